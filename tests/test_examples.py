"""examples/: upge.py in other trainers, and the row of one's own in docs/your-own-trainer.md."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import upge
from common.metrics import Counts
from common.model import Policy
from examples import hf_loop
from test_upge import ARGS, error, made_up_step, tiny_lm
from train_hpt import accumulate_gradient, build_micro_batches
from upge import METHODS, TABLE

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


@pytest.mark.parametrize(
    "response, right",
    [
        (r"1+1+0=2;\boxed{2}", True),
        (r"\boxed{3}\boxed{2}", True),
        (r"\boxed{2}\boxed{3}", False),
        (r"\boxed{22}", False),
        ("2", False),
        ("", False),
    ],
)
def test_the_plain_loop_grades_the_last_box(response, right):
    assert hf_loop.reward(response, "2") == float(right)


def gradient_of_plain_loop(prompts):
    """(flat gradient of hf_loop.hpt_loss, share of gated prompts)."""
    lm = tiny_lm().float()
    questions = [p.problem["prompt_ids"] for p in prompts]
    rollouts = [[r.ids for r in p.rollouts] for p in prompts]
    demos = [p.problem["demo_ids"] for p in prompts]
    rewards = torch.tensor([p.rewards for p in prompts])
    loss, gated = hf_loop.hpt_loss(lm, questions, rollouts, demos, rewards)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in lm.parameters()]), gated


def gradient_of_train_hpt(prompts):
    lm, args, cpu = tiny_lm().float(), SimpleNamespace(**ARGS), torch.device("cpu")
    micro_batches = build_micro_batches(prompts, METHODS["hpt"], args, cpu, Counts())
    accumulate_gradient(Policy(lm, temperature=1.0), micro_batches, args, Counts())
    return torch.cat([p.grad.flatten() for p in lm.parameters()])


@pytest.mark.parametrize("gated", [0, 2, 6])
def test_the_plain_loop_has_the_gradient_of_train_hpt(monkeypatch, gated):
    monkeypatch.setattr(hf_loop, "L_MAX", ARGS["max_response_tokens"])
    got, share = gradient_of_plain_loop(made_up_step(gated))
    assert error(got, gradient_of_train_hpt(made_up_step(gated))) < 1e-4
    assert share == pytest.approx(gated / 6)


def shifted(response_logp):
    """The log-probability of each token in the place of the next."""

    def wrong(*args):
        logp, valid = response_logp(*args)
        return logp.roll(1, 1), valid

    return wrong


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("L_MAX", ARGS["max_response_tokens"] + 4),
        ("SFT_COEF", ARGS["sft_coef"] * 10),
        ("GAMMA", 0.25),
        ("response_logp", shifted(hf_loop.response_logp)),
    ],
)
def test_a_plain_loop_with_a_mistake_has_another_gradient(monkeypatch, name, wrong):
    """Negative controls of the test above."""
    monkeypatch.setattr(hf_loop, "L_MAX", ARGS["max_response_tokens"])
    monkeypatch.setattr(hf_loop, name, wrong)
    got, _ = gradient_of_plain_loop(made_up_step(2))
    assert error(got, gradient_of_train_hpt(made_up_step(2))) > 1e-2


# ------------------------------------------------------------------------------------------ TRL


@pytest.fixture(scope="module")
def trl_loss():
    """examples/trl_loss.py, where TRL is installed."""
    pytest.importorskip("trl", reason="TRL is not installed: `pip install trl==1.16.0`")
    from examples import trl_loss

    return trl_loss


def made_up_reward(completions, **_):
    """Something that differs within a group, whatever the model has written."""
    return [float(i % 3 == 0) for i in range(len(completions))]


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
    trainer = trl_loss.UpgeTrainer(base, made_up_reward, config, data, row=row)
    trainer.current_gradient_accumulation_steps = 2  # as TRL sets it when it trains
    return trainer


def gradient_of_trl(trainer, compute_loss):
    """Flat gradient of an optimizer step on the trainer's batch; the policy has moved a little."""
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
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
TRLS_OWN = {  # row of the table -> TRL's settings that mean the same
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
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


def test_advantages_and_weights_are_those_of_the_row(trl_loss, tmp_path):
    trainer = trl_trainer(trl_loss, tmp_path, "rloo")
    gradient_of_trl(trainer, trainer._compute_loss)
    A = torch.cat([inputs["advantages"] for inputs in trainer._buffered_inputs])
    wanted = TABLE["rloo"].advantage(trainer.rewards.view(-1, 4)).flatten()
    assert A.sort().values.tolist() == pytest.approx(wanted.sort().values.tolist())
    weights = torch.cat([inputs["weight"] for inputs in trainer._buffered_inputs])
    assert weights.tolist() == pytest.approx([1 / 16 / 12] * 16)


@pytest.mark.parametrize("row", ["sft", "luffy_demo", "ppo", "dpo"])
def test_a_row_that_trl_cannot_train_is_refused(trl_loss, row):
    with pytest.raises(ValueError, match=f"TRL cannot train the row {row}: choose one of reinf"):
        trl_loss.UpgeTrainer(row=row)


def test_another_row_is_another_word(trl_loss):
    log = trl_loss.main("gspo", steps=2)
    rewards = [line["reward"] for line in log if "reward" in line]
    assert len(rewards) == 2 and all(0 <= r <= 1 for r in rewards)


# ------------------------------------------------------------------------------ a row of your own


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_first_program_of_the_page_has_the_gradient_of_dr_grpo():
    names = {}
    exec(blocks("python")[0], names)
    per_token = 0.5 / (2 * 2 * 10)  # A / (N G L_max)
    wanted = torch.zeros(4, 4)
    wanted[0, :4], wanted[1, :2] = -per_token, per_token  # the second prompt has no advantage
    assert torch.allclose(names["logp"].grad, wanted)


def test_the_row_of_your_own_is_chords():
    """The page's program, run; it compares itself with the loss written by hand."""
    names = {}
    for block in blocks("python"):
        exec(block, names)
    made, shipped = names["row"], TABLE["chord_demo"]
    assert made._replace(scale=None) == shipped._replace(scale=None)
    logp = torch.log(torch.tensor([[0.1, 0.5, 0.8]]))
    t = upge.Tokens(logp, torch.ones(1, 3), torch.ones(1, 3).bool(), (0.2, 0.2), None, None, None)
    assert torch.equal(made.scale(t), shipped.scale(t))
    assert not torch.equal(made.scale(t), TABLE["sft"].scale(t))  # negative control


def test_the_lines_of_the_diff_are_in_upge():
    source = (ROOT / "upge.py").read_text().splitlines()
    [diff] = blocks("diff")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(added) > 5
    for line in added:
        assert line in source, line
