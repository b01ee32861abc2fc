"""The memory plan: against numbers worked out by hand, and what it says of what does not fit."""

import dataclasses

import pytest
from transformers import Qwen2Config

import train_hpt
from common import flags, plan
from toy import make

SHAPES = {  # of Qwen2.5
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
PARAMETERS = {"1.5B": 1.544e9, "7B": 7.616e9, "32B": 32.76e9}  # of the models on the hub


def config_of(name):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
    return Qwen2Config(**dict(zip(names, SHAPES[name])), max_position_embeddings=32768)


def plan_of(name, ranks, monkeypatch, *words, critic=False):
    """The plan for GPUs of 80 GB."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = flags.parse_training_args(["--model", "m", *words])
    return plan.memory_plan(args, config_of(name), critic, 80)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_from_the_config_alone(name):
    total, block, outside = plan.count_parameters(config_of(name))
    assert total == pytest.approx(PARAMETERS[name], rel=1e-3)
    assert block * SHAPES[name][2] + outside == total


@pytest.mark.parametrize("ranks", [1, 8])
def test_weights_and_moments_take_12_bytes_per_parameter_divided_by_the_ranks(ranks, monkeypatch):
    made = plan_of("1.5B", ranks, monkeypatch)
    assert made.resident == pytest.approx(12 * PARAMETERS["1.5B"] / ranks, rel=1e-3)
    assert plan_of("1.5B", ranks, monkeypatch, critic=True).resident == 2 * made.resident


@pytest.mark.parametrize("share", [1, 2])
def test_the_cache_has_what_trainer_and_engine_leave(share, monkeypatch):
    """A token: two tensors, 28 layers, 4 heads of 128 numbers of 2 bytes, divided by the share."""
    made = plan_of("7B", 8, monkeypatch, "--tensor-parallel", str(share))
    # A pass of 9,216 tokens, 512 responses at a time, CUDA graphs.
    workspace = 9216 * (4 * 3584 + 3 * 18944) * 2 + 512 * 152064 * 16 + 1e9
    used = 12 * 7.616e9 / 8 + 2 * 7.616e9 / share + workspace + plan.CONTEXT
    wanted = (0.95 * 80e9 - used) / (2 * 28 * 4 * 128 * 2 / share)
    assert made.cache_tokens == pytest.approx(wanted, rel=1e-3)
    assert made.utilization * 80e9 + made.resident < 0.95 * 80e9


def test_the_peak_of_training_by_hand(monkeypatch):
    """1.5B on one GPU, 9,216 tokens with gradient checkpointing; every number but 4 is 2 bytes."""
    words = ["--gradient-checkpointing", "on", "--tokens-per-microbatch", "9216"]
    made, head = plan_of("1.5B", 1, monkeypatch, *words), 151936 * 1536
    block = (1.5437e9 - head) / 28  # tied: the output layer is the embedding
    activations = 9216 * (28 * 1536 + 12 * 1536 + 4 * 8960) * 2
    logits = 3 * 1024 * 151936 * 4 + 2 * head * 4  # of a chunk; the gradient's chunk and sum
    fsdp = (2 * block + head) * 2 + 6 * head
    outside = plan.CONTEXT + plan.ENGINE_ASLEEP
    wanted = 16 * 1.5437e9 + activations + logits + fsdp + outside
    assert made.peak == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("tokens, checkpoints", [(9216, False), (32768, True)])
def test_gradients_are_checkpointed_where_memory_asks_for_it(tokens, checkpoints, monkeypatch):
    """28 layers keep 12 widths and 4 inner widths per token, 1.5 MB; 64 GB are left for them."""
    words = ["--tokens-per-microbatch", str(tokens)]
    auto, on, off = (
        plan_of("1.5B", 8, monkeypatch, *words, "--gradient-checkpointing", how)
        for how in ("auto", "on", "off")
    )
    assert auto.checkpointing == checkpoints and auto.peak == (on if checkpoints else off).peak
    assert on.checkpointing and not off.checkpointing and on.problems() == []
    kept = 27 * tokens * (12 * 1536 + 4 * 8960) * 2 - 28 * tokens * 1536 * 2
    assert off.peak - on.peak == pytest.approx(kept)


def test_offload_keeps_16_bytes_per_parameter_on_the_host(monkeypatch):
    here, there = (plan_of("7B", 1, monkeypatch, *words) for words in ([], ["--offload"]))
    assert here.offloaded == there.resident == 0
    assert there.offloaded == pytest.approx(16 * 7.616e9, rel=1e-3)
    assert here.problems() != [] and there.problems() == []
    assert any("the host holds 121.8 GB per rank" in line for line in there.lines())
    [problem] = dataclasses.replace(there, host=64e9).problems()
    assert problem.startswith("the host has 64.0 GB per rank, too little for --offload")


def test_a_share_of_the_gpu_that_is_given_is_the_engines(monkeypatch):
    given = plan_of("7B", 8, monkeypatch, "--gpu-memory-utilization", "0.57")
    assert given.utilization == 0.57 and given.problems() == []
    [problem] = plan_of("7B", 8, monkeypatch, "--gpu-memory-utilization", "0.9").problems()
    assert problem.startswith("the engine's 0.90 of the GPU leaves too little")
    assert 0 < given.cache_tokens < plan_of("7B", 8, monkeypatch).cache_tokens


@pytest.mark.parametrize(
    "name, ranks, fits",
    [("1.5B", 1, True), ("7B", 1, False), ("7B", 8, True), ("32B", 8, False), ("32B", 32, True)],
)
def test_what_fits_on_80_gb(name, ranks, fits, monkeypatch):
    shared = ["--tensor-parallel", "2"] if name == "32B" else []
    assert (plan_of(name, ranks, monkeypatch, *shared).problems() == []) == fits


def test_the_flag_needs_no_weights_and_ends(tmp_path, monkeypatch, capsys):
    config_of("7B").save_pretrained(tmp_path)
    make.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setenv("WORLD_SIZE", "8")
    for gigabytes, wanted in (("80", "this fits\n"), ("24", "a smaller model\n")):
        args = flags.parse_training_args(["--model", str(tmp_path), "--plan", gigabytes])
        try:
            plan.show(args, train_hpt.has_critic(train_hpt.METHODS[args.method]))
        except SystemExit as stop:
            assert stop.code == 1 and gigabytes == "24"
        out = capsys.readouterr().out
        assert wanted in out and ("this may not fit: " in out) == (gigabytes == "24")
