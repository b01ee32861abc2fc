"""The memory plan: against numbers worked out by hand, and what it says of what does not fit."""

import os
import subprocess
import sys

import pytest
from transformers import Qwen2Config

from common import flags, plan
from toy import make

SHAPES = {  # of Qwen2.5
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
PARAMETERS = {"1.5B": 1.544e9, "7B": 7.616e9, "32B": 32.76e9}  # of the models on the hub


def config_of(name):
    width, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


def plan_of(name, ranks, monkeypatch, words=(), gigabytes=80, critic=False):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(plan, "host_memory", lambda: 200e9)
    args = flags.parse_training_args(["--model", "m", *words])
    return plan.memory_plan(args, config_of(name), critic, gigabytes)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_from_the_config_alone(name):
    total, block, outside = plan.count_parameters(config_of(name))
    assert total == pytest.approx(PARAMETERS[name], rel=1e-3)
    assert block * SHAPES[name][2] + outside == total


@pytest.mark.parametrize("name, ranks", [("1.5B", 1), ("1.5B", 8), ("7B", 8)])
def test_weights_and_moments_take_12_bytes_per_parameter_divided_by_the_ranks(
    name, ranks, monkeypatch
):
    made = plan_of(name, ranks, monkeypatch)
    assert made.resident == pytest.approx(12 * PARAMETERS[name] / ranks, rel=1e-3)
    assert made.engine_weights == pytest.approx(2 * PARAMETERS[name], rel=1e-3)
    with_critic = plan_of(name, ranks, monkeypatch, critic=True)
    assert with_critic.resident == 2 * made.resident


def test_keys_and_values_of_a_token(monkeypatch):
    """Two tensors, 28 layers, 4 heads of 128 numbers of 2 bytes; ranks that share halve it."""
    assert plan_of("7B", 8, monkeypatch).cache_per_token == 2 * 28 * 4 * 128 * 2
    shared = plan_of("7B", 8, monkeypatch, ["--tensor-parallel", "2"])
    assert shared.cache_per_token == 28 * 4 * 128 * 2


def test_the_engine_gets_what_the_trainer_leaves(monkeypatch):
    made = plan_of("7B", 8, monkeypatch)
    assert made.utilization * 80e9 + made.resident < 0.95 * 80e9
    assert made.utilization > plan_of("7B", 4, monkeypatch).utilization
    assert made.concurrent < plan_of("1.5B", 8, monkeypatch).concurrent


@pytest.mark.parametrize(
    "name, ranks, fits",
    [("1.5B", 1, True), ("7B", 1, False), ("7B", 8, True), ("32B", 8, False), ("32B", 32, True)],
)
def test_what_fits_on_80_gb(name, ranks, fits, monkeypatch):
    shared = ["--tensor-parallel", "2"] if name == "32B" else []
    assert (plan_of(name, ranks, monkeypatch, shared).problems() == []) == fits


def test_a_small_host_and_a_small_cache_are_named(monkeypatch):
    monkeypatch.setattr(plan, "USABLE", 0.3)
    [trainer, engine] = plan_of("7B", 8, monkeypatch).problems()
    assert "lower --tokens-per-microbatch" in trainer and "for one response" in engine
    monkeypatch.setattr(plan, "USABLE", 0.95)
    made = plan_of("7B", 8, monkeypatch)
    assert made.problems() == []
    assert "host memory" in type(made)(**(vars(made) | {"host": 10e9})).problems()[0]


@pytest.fixture
def model_directory(tmp_path):
    """A config and a tokenizer, and no weights."""
    config_of("7B").save_pretrained(tmp_path)
    make.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def run_plan(directory, gigabytes, ranks):
    command = [sys.executable, "train_hpt.py", "--model", str(directory), "--plan", gigabytes]
    environment = os.environ | {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_flag_needs_no_weights_and_ends(model_directory):
    fits, does_not = run_plan(model_directory, "80", "8"), run_plan(model_directory, "24", "8")
    assert fits.returncode == 0 and fits.stdout.endswith("this fits\n"), fits.stderr
    assert does_not.returncode == 1 and "this may not fit: a rank needs" in does_not.stdout
