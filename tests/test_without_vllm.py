"""Training with transformers in vLLM's place: the whole run, where vLLM cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tools.without_vllm
from common import flags
from common.data import overrides_of
from tools.without_vllm import TransformersSampler

ROOT = Path(__file__).parents[1]
BASE = ROOT / "toy/base"
SMALL = """
    --model toy/base --data toy/train.jsonl --max-prompt-tokens 16 --max-response-tokens 64
    --prompts-per-step 8 --samples-per-prompt 4 --save-every 1 --eval-samples 1
    --no-gradient-checkpointing
"""
BLOCKED = "import runpy, sys; sys.modules['vllm'] = None; del sys.argv[0]; "
BLOCKED += "runpy.run_module('tools.without_vllm', run_name='__main__')"


def sampler_of(model):
    words = ["--model", str(model), "--data", "none", "--temperature", "0.7"]
    args = flags.parse_training_args(words)
    return TransformersSampler(
        args.model,
        max_response_tokens=40,
        temperature=args.temperature,
        config_overrides=overrides_of(args),
        end_token_ids=[1],
    )


@pytest.fixture(scope="module")
def sampler():
    return sampler_of(BASE)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Of a tiny Gemma 2, with caps on its scores and on its logits that matter."""
    folder = tmp_path_factory.mktemp("gemma2")
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=5,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=3.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    lm.save_pretrained(folder)
    return sampler_of(folder)


def prompts_of(sampler):
    return [sampler.tokenizer(text).input_ids for text in ("8+8\n", "123+4567\n", "9+1\n")]


@pytest.mark.parametrize("model", ["sampler", "gemma"])
def test_log_probabilities_are_those_of_each_response_alone(model, request):
    sampler = request.getfixturevalue(model)
    prompts = prompts_of(sampler)
    lm = AutoModelForCausalLM.from_pretrained(
        sampler.lm.name_or_path, dtype=torch.float32, attn_implementation="eager"
    )
    groups = sampler.generate(prompts, [5, 6, 7], n=4)
    assert [len(group) for group in groups] == [4, 4, 4]
    off = []
    for prompt, group in zip(prompts, groups):
        for response in group:
            ids = torch.tensor([prompt + response.ids])
            with torch.no_grad():
                logits = lm(ids).logits[0, len(prompt) - 1 : -1]
            for temperature in (0.7, 1.0):  # the second is the negative control
                logp = (logits / temperature).log_softmax(-1)
                logp = logp.gather(-1, ids[0, len(prompt) :, None])[:, 0]
                off.append((logp - torch.tensor(response.logp)).abs().max())
    assert max(off[::2]) < 1e-4 < 1e-2 < max(off[1::2])


def test_a_response_ends_at_its_end_token_or_is_truncated(sampler):
    responses = [r for group in sampler.generate(prompts_of(sampler), [1, 2, 3], 8) for r in group]
    for r in responses:
        assert 1 not in r.ids[:-1] and len(r.ids) == len(r.logp) <= 40
        assert r.truncated == (r.ids[-1] != 1) and (not r.truncated or len(r.ids) == 40)
    assert {r.truncated for r in responses} == {False, True}


def test_samples_depend_on_the_seed(sampler):
    prompts = prompts_of(sampler)
    first, same, other = (sampler.generate(prompts, [seed] * 3, 2) for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("more", [["--plan", "80"], ["--plan"], ["--tensor-parallel", "2"]])
def test_what_needs_vllm_is_refused(more):
    with pytest.raises(SystemExit, match=f"^error: {more[0]}: "):
        tools.without_vllm.main(flags.parse_training_args(["@toy/toy.args", *more]))


def test_a_run_comes_to_its_end_and_goes_on(tmp_path):
    held_out = (ROOT / "toy/held_out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join(held_out[:8]))
    words = [*SMALL.split(), "--out", str(tmp_path / "a")]
    words += ["--eval-data", str(tmp_path / "held_out.jsonl")]
    command = [sys.executable, "-c", BLOCKED, "without_vllm", *words]
    for more in (["--steps", "2"], ["--steps", "3", "--resume"]):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert "Loading weights" not in done.stderr  # the bars of transformers
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    mismatches = [row["mismatch/kl"] for row in rows if "mismatch/kl" in row]
    assert mismatches and max(mismatches) < 1e-8
    assert os.path.exists(tmp_path / "a/final/model.safetensors")
