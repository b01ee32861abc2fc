"""What users get wrong ends a program with one sentence, before anything slow starts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import BASE, ROOT, run
from transformers import AutoModelForCausalLM

import evaluate
import reward
import rollout
import train_hpt
from common import flags, model

GOOD = {"prompt": "1+2", "answer": "3", "demonstration": "1+2+0=3;\\boxed{3}"}
LIMITS = ["--max-prompt-tokens", "16", "--max-response-tokens", "32"]


@pytest.fixture
def good_data(tmp_path):
    """A file with one problem."""
    path = tmp_path / "good.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return path


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch):
    """The sampler and the verifier must not have been started when the sentence comes."""

    def started(*_, **__):
        pytest.fail("a sampler or a verifier was started")

    monkeypatch.setattr(rollout, "build", started)
    monkeypatch.setattr(reward, "Verifier", started)


def train(model_folder, data_file, *more):
    """Train as the command line would; later flags win."""
    words = ["--model", str(model_folder), "--data", str(data_file), *LIMITS, *map(str, more)]
    train_hpt.main(flags.parse_training_args(words))


def test_good_input_starts_the_verifier(good_data):  # a negative control of this file
    with pytest.raises(pytest.fail.Exception, match="was started"):
        train(BASE, good_data)


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_no_file(good_data, flag):
    with pytest.raises(SystemExit, match=r"^error: .*none.jsonl"):
        train(BASE, good_data, flag, "none.jsonl")


@pytest.mark.parametrize(
    "row, sentence",
    [
        ('{"prompt": "1+2", "ans', r"^error: .*bad.jsonl:2: "),
        ('{"prompt": "1+2", "demonstration": "3"}', r"^error: .*bad.jsonl:2: .*answer"),
    ],
    ids=["bad JSON", "a missing column"],
)
def test_a_row_that_cannot_be_read(good_data, row, sentence):
    bad = good_data.with_name("bad.jsonl")
    bad.write_text(f"{json.dumps(GOOD)}\n{row}\n")
    with pytest.raises(SystemExit, match=sentence):
        train(BASE, bad)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--method", "dpo"], "argument --method: invalid choice: 'dpo'"),
        (["--out", str(ROOT)], f"--out {ROOT} exists already: name another directory"),
    ],
    ids=["no such method", "--out exists"],
)
def test_a_flag_that_cannot_be(good_data, capsys, words, sentence):
    with pytest.raises(SystemExit):
        train(BASE, good_data, *words)
    assert f"error: {sentence}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("found", [None, "0.9.1"])
def test_no_vllm(monkeypatch, good_data, found):
    class Distribution:
        name, version = "vllm", found

    installed = [Distribution] if found else []
    monkeypatch.setattr(rollout.metadata, "distributions", lambda: installed)
    with pytest.raises(SystemExit, match=f"^error: vLLM 0.32.0 is needed.*{found or 'none'}"):
        train(BASE, good_data)
    Distribution.version = f"{rollout.VLLM_VERSION}+cu130"  # negative control
    monkeypatch.setattr(rollout.metadata, "distributions", lambda: [Distribution])
    rollout.check_vllm()


def test_too_long_for_the_context(good_data):
    with pytest.raises(SystemExit, match=r"^error: .*266.*256"):
        train(BASE, good_data, "--max-response-tokens", 250)


@pytest.fixture
def base(tmp_path):
    """A copy of the toy's base model, to be broken."""
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def test_no_chat_template(base, good_data):
    (base / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match=r"^error: .*chat template.*--template plain"):
        train(base, good_data)


def test_no_model_and_nothing_that_fits(good_data):
    with pytest.raises(SystemExit, match=r"^error: .*no/such/model"):
        train("no/such/model", good_data)
    with pytest.raises(SystemExit, match=r"^error: .*good.jsonl.*1 left out"):
        train(BASE, good_data, "--max-response-tokens", 1)
    words = ["--model", str(BASE), "--data", "none.jsonl"]
    with pytest.raises(SystemExit, match=r"^error: .*none.jsonl"):
        evaluate.main(flags.parse_evaluation_args(words))


# tests/test_machines.py has "more ranks than GPUs".


@pytest.mark.slow
def test_a_reward_of_ones_own_that_raises(tmp_path, good_data):
    (tmp_path / "mine.py").write_text("def grade(response, answer):\n    return 1 / 0\n")
    words = ["--model", BASE, "--data", good_data, *LIMITS, "--sampler", "transformers"]
    words += ["--reward", "mine:grade", "--prompts-per-step", 2, "--samples-per-prompt", 2]
    done = run("train_hpt.py", *words, fails=True, folder=tmp_path)
    last_line = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert re.match(r"error: .*mine:grade.*ZeroDivisionError", last_line)


def test_two_ranks_say_it_once(tmp_path):
    words = ["--model", BASE, *LIMITS, "--data", tmp_path / "none.jsonl"]
    done = run("train_hpt.py", *words, ranks=2, fails=True)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "none.jsonl" in line


# ---------------------------------------------------------------- models that could run their code


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_pickled_model_is_not_read(base, tmp_path):
    (base / "model.safetensors").unlink()
    torch.save({"w": Bomb(tmp_path / "trace")}, base / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(base, **model.SAFELY)
    settings = {"max_response_tokens": 9, "temperature": 1.0, "end_token_ids": [1]}
    with pytest.raises(OSError, match="safetensors"):
        rollout.TransformersSampler(str(base), config_overrides=lambda c: c, **settings)
    assert not (tmp_path / "trace").exists()
    torch.load(base / "pytorch_model.bin", weights_only=False)  # negative control
    assert (tmp_path / "trace").exists()


def test_code_of_a_model_is_not_run_whatever_stands_on_standard_input(base, good_data, tmp_path):
    """transformers asks there whether it may, if it has not been told."""
    trace = tmp_path / "trace"
    classes = ["class C(Qwen2Config):", "    model_type = 'mine'"]
    classes += ["class M(Qwen2ForCausalLM):", "    config_class = C"]
    imports = ["import pathlib", "from transformers import Qwen2Config, Qwen2ForCausalLM"]
    lines = [*imports, f"pathlib.Path({str(trace)!r}).touch()", *classes]
    (base / "own.py").write_text("\n".join(lines) + "\n")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (base / "config.json").write_text(json.dumps(config))
    words = ["--model", base, "--data", good_data, *LIMITS]
    done = run("train_hpt.py", *words, fails=True, input="y\n" * 9)
    assert not trace.exists() and "[y/N]" not in done.stdout + done.stderr
    [sentence] = done.stderr.splitlines()  # nothing else
    assert sentence.startswith("error: ")
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(base)!r}, "
    code += "trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", code], check=True)  # negative control
    assert trace.exists()
