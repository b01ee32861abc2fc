"""recipes/: the runs of the paper's authors, and their baselines; each can be read and planned."""

import math

import pytest
from programs import ROOT, run
from transformers import LlamaConfig, Qwen2Config

import train_hpt
from common import flags, plan
from toy import make

RECIPES = ROOT / "recipes"
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
    "sft": {"method": "sft", "steps": 1078, "lr": 5e-5}
    | {"lr_schedule": "cosine", "warmup_steps": 216},
    "sft-then-grpo": {"model": "runs/sft/final", "method": "grpo", "lr": 1e-6, "clip_eps": 0.2},
    "sft-then-hpt": {"model": "runs/sft/final", "lr": 1e-6},
    "grpo": {"method": "grpo", "lr": 1e-6, "clip_eps": 0.2},
    "luffy": {"method": "luffy", "lr": 1e-6},
    "srft": {"method": "srft", "lr": 1e-6},
    "chord": {"method": "chord", "gate": "examples.gates:chord"},
}
# The defaults of train_hpt.py are the paper's; the authors' run does not clip.
OF_ALL = {"method": "hpt", "gate": None, "clip_eps": math.inf, "entropy_coef": 0.001}
SHAPES = {  # width, inner width, layers, heads, key-value heads, vocabulary of the models
    "qwen2.5-math-7b": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-math-1.5b": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936),
    "llama-3.1-8b": (LlamaConfig, 4096, 14336, 32, 32, 8, 128256),
}


def parse(*recipes):
    return flags.parse_training_args([f"@{RECIPES / recipe}.args" for recipe in recipes])


@pytest.mark.parametrize("recipe", MODELS)
def test_the_recipe_of_a_model_is_hpt_as_the_authors_ran_it(recipe):
    args = vars(parse(recipe))
    wanted = vars(flags.training_parser().parse_args([])) | OF_ALL | MODELS[recipe]
    del args["save_every"], wanted["save_every"]
    assert args.pop("sft_coef") == pytest.approx(wanted.pop("sft_coef"))
    assert args == wanted


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_differs_from_hpt_in_its_own_flags_alone(baseline):
    for recipe in MODELS:
        args = parse(recipe, baseline)
        assert vars(args) == vars(parse(recipe)) | BASELINES[baseline]
        assert callable(train_hpt.load_gate(args))


def test_no_recipe_is_left_out_here():
    names = {path.stem for path in RECIPES.glob("*.args")}
    assert names == {*MODELS, *BASELINES, "smollm2-135m-word-problems"}
    assert parse("smollm2-135m-word-problems").model


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


@pytest.mark.parametrize("recipe", MODELS)
def test_the_papers_runs_fit_on_eight_gpus_of_80_gb(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert plan.memory_plan(parse(recipe), config_of(recipe), False, 80).problems() == []
    too_small = plan.memory_plan(parse(recipe), config_of(recipe), False, 8)  # the check can fail
    assert too_small.problems() != []


def test_plan_runs_on_a_stand_in_of_the_family(tmp_path):
    """The stand-in is the true config and another tokenizer, without weights."""
    config_of("qwen2.5-math-1.5b").save_pretrained(tmp_path)
    make.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    flags = [f"@{RECIPES}/qwen2.5-math-1.5b.args", "--model", tmp_path, "--plan", "80"]
    assert "this fits" in run("train_hpt.py", *flags).stdout
