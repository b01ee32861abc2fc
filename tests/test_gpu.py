"""What needs a GPU: `python -m pytest tests/test_gpu.py`. Without one it is skipped.

tests/conftest.py hides the GPUs from this process. Its children see them: they have no
CUDA_VISIBLE_DEVICES.
"""

import shutil
import subprocess

import helpers
import programs
import pytest
import torch

import rollout
import train_hpt
from common import batches, distributed, flags, metrics, model
from upge import TABLE

GPUS = []  # as nvidia-smi lists them
if shutil.which("nvidia-smi"):
    GPUS = subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.splitlines()
pytestmark = pytest.mark.skipif(not GPUS, reason="there is no GPU")


@pytest.fixture(autouse=True)
def children_see_the_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_sampler_and_trainer_agree_in_every_step(tmp_path):
    # Four updates at a high rate: a sampler with old weights would show in the second step.
    fast = ["--minibatches-per-step", 4, "--warmup-steps", 0, "--lr", 1e-3, "--steps", 3]
    programs.run("train_hpt.py", *programs.SMALL, *fast, "--out", tmp_path / "run", ranks=1)
    rows = programs.metrics(tmp_path / "run")[1:]
    assert len(rows) == 3 and all(0 < row["optim/grad_norm"] < 100 for row in rows)
    kl = [row["mismatch/kl"] for row in rows if "mismatch/kl" in row]
    assert kl and max(kl) < 1e-2


def test_a_resumed_run_goes_on(tmp_path):
    """SFT samples nothing, so that the run is the one that was never stopped, up to rounding."""
    nll = {}
    for name, steps, more in (("a", 4, []), ("b", 2, []), ("b", 4, ["--resume"])):
        words = [
            *programs.SMALL,
            "--method",
            "sft",
            "--steps",
            steps,
            "--out",
            tmp_path / name,
            *more,
        ]
        programs.run("train_hpt.py", *words, ranks=1)
        nll[name] = [row["sft/nll"] for row in programs.metrics(tmp_path / name)[1:]]
    assert len(nll["b"]) == 4 and nll["b"] == pytest.approx(nll["a"], rel=1e-2)


def test_more_ranks_than_gpus_is_one_sentence():
    done = programs.run("train_hpt.py", ranks=len(GPUS) + 1, fails=True)
    assert done.stderr.count("each rank needs its own") == 1


def sleep_and_load(_rank):
    """Greedy tokens are the same after sleep and load, and others with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(programs.BASE)
    sampler = rollout.Sampler(
        str(programs.BASE),
        max_prompt_tokens=16,
        max_response_tokens=64,
        temperature=0.0,
        end_token_ids=[tokenizer.eos_token_id],
        config_overrides=lambda config: config,
    )
    lm = AutoModelForCausalLM.from_pretrained(programs.BASE, dtype=torch.bfloat16)
    weights = list(lm.named_parameters(remove_duplicate=False))
    prompts = [tokenizer.encode(f"{a}+{b}\n") for a, b in ((47, 85), (123, 456), (9, 8))]
    texts = []
    for factor in (None, 1.0, 0.5):
        if factor:
            sampler.sleep()
            sampler.load((name, (factor * w.detach()).to("cuda")) for name, w in weights)
        texts.append([r.text for group in sampler.generate(prompts, [0] * 3, 1) for r in group])
    assert texts[0] == texts[1] != texts[2]
    sampler.close()


def test_sleep_keeps_the_greedy_tokens():
    helpers.spawn(sleep_and_load)


def bfloat16_gradient(_rank):
    """The gradient of the policy in bfloat16 under FSDP is that of float64."""
    args = flags.parse_training_args(["--tokens-per-microbatch", "128"])
    device = distributed.init_process_group()
    step, lm = helpers.made_up_step(gated=6), helpers.tiny_lm()
    pairs = list(zip(step.prompts, step.demos))
    loss = -sum(helpers.read(lm, prompt, demo)[0].mean() for prompt, demo in pairs)
    loss.backward()
    wanted = helpers.flat_gradient(lm)

    sequences = [batches.Sequence(p, d, True, q, 1.0, 1 / len(d)) for q, (p, d) in enumerate(pairs)]
    policy = model.shard(model.Policy(helpers.tiny_lm(), 1.0), args, device, False)
    m = batches.collate(TABLE["sft"], sequences, device)
    cosines = []
    for advantage in (1.0, -1.0):  # of the first token; the second is a negative control
        m.advantage[0] = advantage
        policy.zero_grad()
        train_hpt.accumulate_gradient(policy, [m], args, metrics.Counts())
        got = torch.cat([p.grad.full_tensor().flatten().cpu() for p in policy.parameters()])
        cosines.append(torch.cosine_similarity(got.double(), wanted, dim=0).item())
    assert cosines[0] > 0.999 > cosines[1]


def test_a_bfloat16_gradient_points_where_that_of_float64_does():
    helpers.spawn(bfloat16_gradient)
