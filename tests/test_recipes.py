"""recipes/: the runs of the paper's authors, and their baselines; each can be planned."""

import math
import subprocess
import sys

import pytest
from transformers import LlamaConfig, Qwen2Config

from common import flags, plan
from common.report import REPOSITORY
from toy import make

RECIPES = REPOSITORY / "recipes"
QWEN = {"rope_theta": 40000.0, "max_position_embeddings": 16384, "template": "chat", "gamma": 0.0}
MODELS = {  # recipe: what it has of its own
    "qwen2.5-math-7b": QWEN | {"model": "Qwen/Qwen2.5-Math-7B", "sft_coef": 0.05},
    "qwen2.5-math-1.5b": QWEN | {"model": "Qwen/Qwen2.5-Math-1.5B", "sft_coef": 0.05 * 0.3},
    "llama-3.1-8b": {
        "model": "meta-llama/Llama-3.1-8B",
        "rope_theta": None,
        "max_position_embeddings": None,
        "template": "plain",
        "gamma": 2 / 8,
        "sft_coef": 0.05,
    },
}
BASELINES = {  # recipe: the flags in which it differs from HPT
    "sft": {"method": "sft"},
    "grpo": {"method": "grpo", "lr": 1e-6, "clip_eps": 0.2},
    "luffy": {"method": "luffy", "lr": 1e-6},
    "srft": {"method": "srft", "lr": 1e-6},
}
OF_ALL = {
    "method": "hpt",
    "data": "Elliott/Openr1-Math-46k-8192",
    "max_prompt_tokens": 1024,
    "max_response_tokens": 8192,
    "prompts_per_step": 128,
    "samples_per_prompt": 8,
    "temperature": 1.0,
    "gate": "switch",
    "clip_eps": math.inf,  # they do not clip
    "pi_old": "trainer",
    "entropy_coef": 0.001,
    "steps": 500,
    "minibatches_per_step": 2,
    "lr": 5e-6,
    "warmup_steps": 0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}
# width, inner width, layers, heads, key-value heads, vocabulary of the models on the hub
SHAPES = {
    "qwen2.5-math-7b": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-math-1.5b": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936),
    "llama-3.1-8b": (LlamaConfig, 4096, 14336, 32, 32, 8, 128256),
}


def parse(*recipes):
    return flags.parse_training_args([f"@{RECIPES / recipe}.args" for recipe in recipes])


@pytest.mark.parametrize("recipe", MODELS)
def test_the_recipe_of_a_model_is_hpt_as_the_authors_ran_it(recipe):
    args, expected = vars(parse(recipe)), OF_ALL | MODELS[recipe]
    assert {name: args[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_differs_from_hpt_in_its_own_flags_alone(model, baseline):
    hpt, args = vars(parse(model)), vars(parse(model, baseline))
    assert args == hpt | BASELINES[baseline]


def test_no_recipe_is_left_out_here():
    names = {path.stem for path in RECIPES.glob("*.args")}
    assert names == {*MODELS, *BASELINES, "smollm2-135m-word-problems"}


def config_of(recipe):
    """The model's config with its true shape, which needs no weights."""
    kind, width, inner, layers, heads, kv_heads, vocabulary = SHAPES[recipe]
    return kind(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=recipe == "qwen2.5-math-1.5b",
        max_position_embeddings=131072 if kind is LlamaConfig else 4096,
    )


@pytest.mark.parametrize("baseline", [[], *([name] for name in BASELINES)], ids=str)
@pytest.mark.parametrize("recipe", MODELS)
def test_the_paper_s_runs_fit_on_eight_gpus_of_80_gb(recipe, baseline, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(plan, "host_memory", lambda: 500e9)
    args = parse(recipe, *baseline)
    assert plan.memory_plan(args, config_of(recipe), False, 80).problems() == []
    too_small = plan.memory_plan(args, config_of(recipe), False, 8)  # the check can fail
    assert too_small.problems() != []


@pytest.mark.parametrize("recipe", MODELS)
def test_plan_runs_on_a_stand_in_of_the_family(recipe, tmp_path):
    """The stand-in is the true config and another tokenizer, without weights."""
    config_of(recipe).save_pretrained(tmp_path)
    make.tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "train_hpt.py", f"@{RECIPES / recipe}.args", "--model", tmp_path]
    done = subprocess.run(
        [*command, "--plan", "80"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "memory per rank, estimated" in done.stdout, done.stderr
