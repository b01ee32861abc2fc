"""examples/: upge.py in other trainers, gates of one's own, and docs/your-own-trainer.md."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

from examples import gates, hf_loop
from tests.helpers import error, flat_gradient, made_up_step, read, tiny_lm
from upge import TABLE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your-own-trainer.md").read_text()

# ----------------------------------------------------------------------- a plain Hugging Face loop


def test_the_plain_loop_is_a_page_that_imports_upge_alone_of_this_project():
    text = (ROOT / "examples/hf_loop.py").read_text()
    assert len(text.splitlines()) < 130
    nodes = list(ast.walk(ast.parse(text)))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"torch", "transformers", "upge"}


def test_two_steps_of_the_plain_loop(monkeypatch, capsys):
    monkeypatch.setattr(hf_loop, "PROMPTS", 4)
    hf_loop.main(steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        found = re.fullmatch(r"step +\d  reward (\d\.\d{3})  gated (\d\.\d{3})", line)
        assert found and all(0 <= float(share) <= 1 for share in found.groups())


def hpt_gradient_by_hand(step, c_sft=0.05, l_max=32):
    """HPT's gradient on policy: Dr. GRPO where a rollout is right, c_sft times SFT elsewhere."""
    lm, objective = tiny_lm(), 0.0
    for prompt, group, demo, R in zip(*step):
        if R.max() == 0:
            objective = objective + c_sft * read(lm, prompt, demo)[0].mean()
        else:
            A = (R - R.mean()) / len(R) / l_max
            for a, response in zip(A, group):
                objective = objective + a * read(lm, prompt, response)[0].sum()
    (-objective / len(step.prompts)).backward()
    return flat_gradient(lm)


def gradient_of_plain_loop(step):
    """(the gradient of hf_loop.hpt_loss, the share of gated prompts)."""
    lm = tiny_lm()
    loss, gated = hf_loop.hpt_loss(lm, *step)
    loss.backward()
    return flat_gradient(lm), gated


@pytest.mark.parametrize("gated", [0, 2, 6])
def test_the_plain_loop_has_the_gradient_of_hpt(monkeypatch, gated):
    monkeypatch.setattr(hf_loop, "L_MAX", 32)
    got, share = gradient_of_plain_loop(made_up_step(gated))
    assert error(got, hpt_gradient_by_hand(made_up_step(gated))) < 1e-5
    assert share == pytest.approx(gated / 6)


@pytest.mark.parametrize(
    "name, wrong", [("L_MAX", 36), ("SFT_COEF", 0.5), ("GAMMA", 0.25), ("TEMPERATURE", 0.7)]
)
def test_a_plain_loop_with_a_mistake_has_another_gradient(monkeypatch, name, wrong):
    """Negative controls of the test above."""
    monkeypatch.setattr(hf_loop, "L_MAX", 32)
    monkeypatch.setattr(hf_loop, name, wrong)
    got, _ = gradient_of_plain_loop(made_up_step(2))
    assert error(got, hpt_gradient_by_hand(made_up_step(2))) > 1e-2


# ----------------------------------------------------------------------------- gates of one's own


def test_the_smooth_gate_is_p_and_1_less_p():
    R = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    alpha, beta = gates.smooth(R, step=1)
    assert alpha.tolist() == [0, 0.25, 1] and beta.tolist() == [1, 0.75, 0]


@pytest.mark.parametrize(
    "constants, by_hand",  # PEAK, VALLEY, WARMUP, DECAY; {step: mu}
    [
        # the paper's CHORD-mu: no warm-up, from 0.9 to 0.05 in 200 steps, half of it at step 100
        ((0.9, 0.05, 0, 200), {100: 0.475, 200: 0.05, 201: 0.05, 10_000: 0.05}),
        # the example in its code: to 0.5 in 200 steps, then to 0.02 in 400
        ((0.5, 0.02, 200, 400), {1: 0.0025, 100: 0.25, 200: 0.5, 400: 0.26, 600: 0.02, 601: 0.02}),
        # a third of the way in time is a quarter of the way down: (1 - cos 60 degrees) / 2
        ((0.8, 0.4, 3, 3), {1: 0.8 / 3, 2: 1.6 / 3, 3: 0.8, 4: 0.7, 5: 0.5, 6: 0.4}),
        # the paper's CHORD-phi, and the constants as they are: mu never changes
        ((0.1, 0.1, 0, 0), {1: 0.1, 2: 0.1, 500: 0.1}),
        ((0.3, 0.3, 2, 0), {1: 0.15, 2: 0.3, 3: 0.3}),
    ],
)
def test_chords_schedule_by_hand(monkeypatch, constants, by_hand):
    for name, value in zip(("PEAK", "VALLEY", "WARMUP", "DECAY"), constants):
        monkeypatch.setattr(gates, name, value)
    for step, mu in by_hand.items():
        alpha, beta = gates.chord(torch.zeros(3, 4), step)
        assert beta.tolist() == pytest.approx([mu] * 3, abs=1e-12)
        assert alpha.tolist() == pytest.approx([1 - mu] * 3, abs=1e-12)


def test_chords_mu_falls_along_a_cosine(monkeypatch):
    """A negative control of the test above: a line would be elsewhere, except in the middle."""
    monkeypatch.setattr(gates, "PEAK", 0.9)
    monkeypatch.setattr(gates, "DECAY", 200)
    _, beta = gates.chord(torch.zeros(1, 4), 50)
    assert beta.item() > 0.9 + (0.1 - 0.9) * 50 / 200 + 0.05


def test_chord_runs_as_its_recipe_says():
    assert (gates.PEAK, gates.VALLEY, gates.WARMUP, gates.DECAY) == (0.1, 0.1, 0, 0)
    lines = (ROOT / "recipes/chord.args").read_text().splitlines()
    flags = [line for line in lines if not line.startswith("#")]
    assert flags == ["--method chord", "--gate examples.gates:chord"]


# ------------------------------------------------------------------------------------------- TRL


@pytest.fixture(scope="module")
def trl_loss():
    """examples/trl_loss.py, where TRL is installed."""
    pytest.importorskip("trl", reason="TRL is not installed: `pip install trl==1.16.0`")
    from examples import trl_loss

    return trl_loss


def trl_trainer(trl_loss, folder, row, **settings):
    """An UpgeTrainer on four sums, four rollouts of each, in two micro-batches of eight."""
    torch.manual_seed(0)
    config = trl_loss.GRPOConfig(
        output_dir=str(folder),
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_completion_length=12,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        **settings,
    )
    sums = [{"prompt": f"{a}+{a + 2}\n"} for a in range(1, 5)]
    data, base = trl_loss.Dataset.from_list(sums), str(ROOT / "toy/base")

    def reward(completions, **_):  # differs within a group, whatever the model has written
        return [float(i % 3 == 0) for i in range(len(completions))]

    trainer = trl_loss.UpgeTrainer(base, reward, config, data, row=row)
    trainer.current_gradient_accumulation_steps = 2  # as TRL sets it when it trains
    return trainer


def gradient_of_trl(trainer, compute_loss):
    """The gradient of an optimizer step on the trainer's batch; the policy has moved a little."""
    model = trainer.model.train()
    model.zero_grad()
    if trainer._buffered_inputs is None:
        trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert len(trainer._buffered_inputs) == 2
        for inputs in trainer._buffered_inputs:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            tokens = inputs["completion_ids"].shape[1]
            with torch.no_grad():
                logp = trainer._get_per_token_logps_and_entropies(model, ids, mask, tokens)[0]
            inputs["old_per_token_logps"] = logp + 0.3 * torch.sin(1e3 * logp)
    for inputs in trainer._buffered_inputs:
        compute_loss(model, inputs).backward()
    return flat_gradient(model).clone()


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
TRLS_OWN = {  # row of the table -> TRL's settings that mean the same
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo"} | SEQUENCE,
}


@pytest.mark.parametrize("row", TRLS_OWN)
def test_a_row_has_the_gradient_of_trls_own_loss(trl_loss, tmp_path, row):
    """On the same batch, with the same advantages; TRL's are over the std + 1e-4, not 1e-6."""
    trainer = trl_trainer(trl_loss, tmp_path, row, **TRLS_OWN[row])
    got = gradient_of_trl(trainer, trainer._compute_loss)
    parent = trl_loss.GRPOTrainer._compute_loss
    wanted = gradient_of_trl(trainer, lambda model, inputs: parent(trainer, model, inputs))
    assert got.norm() > 1e-4 and error(got, wanted) < 1e-4
    # Negative controls: another clip range, and weights that forget that there are two parts.
    trainer.epsilon_low = trainer.epsilon_high = 0.05
    unlike = gradient_of_trl(trainer, lambda model, inputs: parent(trainer, model, inputs))
    assert error(got, unlike) > 1e-2
    for inputs in trainer._buffered_inputs:
        inputs["weight"] = inputs["weight"] * 2
    assert error(gradient_of_trl(trainer, trainer._compute_loss), wanted) > 1e-2


def test_a_row_that_trl_cannot_train_is_refused(trl_loss):
    for row in ("sft", "luffy_demo", "ppo", "dpo"):
        with pytest.raises(ValueError, match=f"TRL cannot train the row {row}: choose one of re"):
            trl_loss.UpgeTrainer(row=row)


def test_another_row_is_another_word(trl_loss):
    log = trl_loss.main("srft", steps=2)
    rewards = [line["reward"] for line in log if "reward" in line]
    assert len(rewards) == 2 and all(0 <= r <= 1 for r in rewards)


# ------------------------------------------------------------------------- docs/your-own-trainer.md


def test_the_programs_of_the_page_run():
    """They end in assertions of their own: a gradient by hand, and a row's own paper."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        assert "assert" in block
        exec(block, names)
    assert names["row"] == TABLE["chord_demo"]
