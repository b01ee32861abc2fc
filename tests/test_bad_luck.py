"""What other people's reports found: odd files of a model, of a run, of a user; odd machines."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, GenerationConfig

import train_hpt
from common import checkpoint, data, distributed, flags, model, report
from reward import Verifier
from toy import make
from upge import METHODS

ROOT = report.REPOSITORY
GOOD = {"prompt": "1+2", "answer": "3", "demonstration": "<think>A</think>\\boxed{3}"}


@pytest.fixture
def base(tmp_path):
    """A function that copies the toy's base, with other values in some of its .json files."""

    def copy(**files):
        folder = tmp_path / "base"
        shutil.copytree(make.BASE, folder)
        for name, values in files.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return copy


def args_of(folder, **more):
    settings = {"model": str(folder), "template": "chat", "rope_theta": None, "lr": 1e-3}
    settings |= {"max_position_embeddings": None, "temperature": 1.0, "weight_decay": 0.0}
    return SimpleNamespace(**settings | {"offload": False, "compile": False} | more)


# ---------------------------------------------------------------------------- a model that is saved

UNWRITABLE = [{"temperature": 0.6}, {"top_p": 0.9}, {"top_k": 5}, {"typical_p": 0.5}]
UNWRITABLE += [{"length_penalty": 2.0}, {"pad_token_id": -1}, {"num_return_sequences": 2}]
UNWRITABLE += [{"max_new_tokens": 0}, {"num_beams": 4, "early_stopping": True}]


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of this process alone; without torchrun's variables, whatever else is set."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("WORLD_SIZE", "8")  # set by somebody, without a RANK: one process
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("RANK", "")
    monkeypatch.delenv("RANK")
    yield distributed.init_process_group()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "files",
    [{"generation_config": {"eos_token_id": 1} | values} for values in UNWRITABLE]
    + [{"config": values} for values in ({"temperature": 0.6}, {"output_attentions": True})],
    ids=str,
)
def test_a_trained_model_can_be_saved_whatever_its_base_says(base, tmp_path, one_rank, files):
    args = args_of(base(**files))
    config, tokenizer = model.load_config_and_tokenizer(args)
    ends = model.end_token_ids(args.model, config, tokenizer)
    policy = model.build_policy(args, config, one_rank, False)
    checkpoint.try_to_save(tmp_path, policy, tokenizer, ends)
    policy.save(tmp_path / "final", tokenizer, ends)
    assert GenerationConfig.from_pretrained(tmp_path / "final").eos_token_id == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "final"]


def test_what_cannot_be_saved_ends_before_the_first_step(tmp_path):
    def write(*_, **__):
        raise OSError(95, "Operation not supported")

    with pytest.raises(SystemExit, match=r"could not be saved in .*: .*not supported"):
        checkpoint.try_to_save(tmp_path, SimpleNamespace(write=write), None, [1])


@pytest.mark.parametrize(
    "more, index, stray",
    [
        (["backup.safetensors"], None, "backup"),
        (["optimizer.safetensors"], None, "optimizer"),
        (["adapter_model.safetensors"], None, "adapter_model"),
        (["a-1.safetensors"], ["a-1.safetensors"], "model"),  # an old file beside newer shards
        (["consolidated.safetensors"], ["model.safetensors"], None),  # vLLM reads the index alone
        ([], None, None),
    ],
)
def test_a_model_of_which_two_programs_would_read_two_is_refused(base, more, index, stray):
    folder = base()
    for name in more:
        shutil.copy(folder / "model.safetensors", folder / name)
    if index:
        weights = {f"w{i}": name for i, name in enumerate(index)}
        text = json.dumps({"weight_map": weights})
        (folder / "model.safetensors.index.json").write_text(text)
    if stray is None:
        model.load_config_and_tokenizer(args_of(folder))
    else:
        with pytest.raises(SystemExit, match=rf"different weights: take away {stray}\.safetensors"):
            model.load_config_and_tokenizer(args_of(folder))


# --------------------------------------------------------------------------- the directory of a run


def made_checkpoint(folder):
    (folder / "trainer").mkdir(parents=True)
    (folder / checkpoint.STEP).write_text(folder.name.lstrip("step_0") or "9")
    return folder


def test_only_our_checkpoints_are_counted_and_removed(tmp_path):
    for name in ("step_000001.bak", "step_000001_good", "step_best", "step_000007"):
        made_checkpoint(tmp_path / name)
    (tmp_path / "step_000003").mkdir()  # holds no checkpoint
    (tmp_path / "step_000004").write_text("a file")
    (tmp_path / "step_000005").symlink_to(tmp_path / "step_000007")
    (tmp_path / "step_000005/trainer").exists()
    found = checkpoint.checkpoints_of(tmp_path)
    assert {path.name for path in found.values()} <= {"step_000007", "step_000005"}


@pytest.mark.parametrize("text", ["", "abc", "-1"])
def test_a_checkpoint_whose_step_is_unreadable_is_none(tmp_path, text):
    (made_checkpoint(tmp_path / "step_000007") / checkpoint.STEP).write_text(text)
    assert checkpoint.checkpoints_of(tmp_path) == {}


def test_a_link_to_nothing_is_removed(tmp_path):
    (tmp_path / "final").symlink_to(tmp_path / "nowhere")
    checkpoint.remove(tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_lines_without_a_checkpoint_are_kept_however_often_a_run_begins(tmp_path):
    for value in ("a", "b"):
        report.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "x": value}])
        report.cut_logs(tmp_path, -1)
    kept = report.read_jsonl(tmp_path / "metrics.jsonl.old")
    assert [row["x"] for row in kept] == ["a", "b"]


def test_a_link_is_removed_and_what_it_leads_to_is_not(tmp_path):
    target = made_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "step_000001").symlink_to(target)
    checkpoint.remove(tmp_path / "step_000001")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_failure_to_remove_is_a_warning(tmp_path, monkeypatch, capsys):
    made_checkpoint(tmp_path / "step_000001")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: os.rmdir(tmp_path / "none"))
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: os.rmdir(tmp_path / "none"))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    checkpoint.remove(tmp_path / "step_000001")
    assert capsys.readouterr().out.startswith("warning: ")


def test_a_run_whose_files_were_moved_goes_on_and_another_one_does_not(tmp_path, capsys):
    words = ["--model", "a/base", "--data", "a/sums.jsonl", "--out", str(tmp_path), "--resume"]
    before = vars(flags.parse_training_args(words)) | {"date": "2020-02-29"}
    (tmp_path / "config.json").write_text(json.dumps({"flags": before}))
    (tmp_path / "b/base").mkdir(parents=True)
    (tmp_path / "b/sums.jsonl").touch()
    base, sums = str(tmp_path / "b/base"), str(tmp_path / "b/sums.jsonl")
    moved = ["--model", base, "--data", sums, *words[4:]]
    assert flags.parse_training_args(moved).date == "2020-02-29"  # as when it began
    with pytest.raises(SystemExit):  # one of the same name that is not there, or another one
        flags.parse_training_args(["--model", "b/base", *moved[2:]])
    with pytest.raises(SystemExit):
        flags.parse_training_args(["--model", "b/other", "--data", "b/sums.jsonl", *words[4:]])
    assert "has --model a/base" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"flags": before | {"model": str(make.BASE)}}))
    with pytest.raises(SystemExit):  # the old one is still there, so this is another
        flags.parse_training_args(moved)


# ----------------------------------------------------------------------------------- chat templates

PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def problems_with(template, tmp_path, **more):
    tokenizer = AutoTokenizer.from_pretrained(make.BASE)
    tokenizer.chat_template = template
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD) + "\n")
    args = {"columns": {}, "template": "chat", "system_prompt": "", "reward": "reward:grade"}
    args = SimpleNamespace(**args | {"date": "2020-02-29"} | more)
    found, _ = data.load_problems(args, str(tmp_path / "data.jsonl"), tokenizer, True)
    return tokenizer.decode(found[0]["prompt_ids"]), tokenizer.decode(found[0]["demo_ids"])


@pytest.mark.parametrize(
    "form, wanted", [("%d %b %Y", "29 Feb 2020"), ("%Y-%m-%d", "2020-02-29"), ("%B", "February")]
)
def test_a_template_writes_the_date_of_the_run(tmp_path, form, wanted):
    prompt, _ = problems_with(f"{PLAIN_TEMPLATE}{{{{ strftime_now('{form}') }}}}", tmp_path)
    assert prompt == f"1+2{wanted}"


@pytest.mark.parametrize("end", ["<think>\n\n</think>\n\n", "<think></think>"])
def test_thoughts_that_the_template_has_closed_are_refused(tmp_path, end):
    with pytest.raises(SystemExit, match="closed what a demonstration opens"):
        problems_with(PLAIN_TEMPLATE + end.replace("\n", "{{ '\\n' }}"), tmp_path)
    _, demonstration = problems_with(f"{PLAIN_TEMPLATE}<think>", tmp_path)
    assert demonstration == "A</think>\\boxed{3}<eos>"  # the tag is there already


def test_a_template_that_drops_the_question_is_noticed(tmp_path):
    with pytest.raises(SystemExit, match="no problem is left: 1 left out: 1 with odd values"):
        problems_with("{{ 'Hello' }}", tmp_path)


# ------------------------------------------------------------------------------------------ rewards


@pytest.fixture
def score(tmp_path, monkeypatch):
    """A function that scores with a function of a file in the current directory."""
    monkeypatch.chdir(tmp_path)

    def score(value, file="mine"):
        (tmp_path / f"{file}.py").write_text(f"def f(response, answer):\n    return {value}\n")
        with Verifier(workers=2, function=f"{file}:f") as verifier:
            return verifier.score(["a", "b"], ["1", "2"])

    return score


@pytest.mark.parametrize(
    "value, wanted",
    [("0.7 + 0.2 + 0.1", 1), ("1.0000001", 1), ("-1e-9", 0), ("0.999", 0.999), ("True", 1)],
)
def test_rewards_that_are_rounded_are_0_or_1(score, value, wanted):
    assert score(value) == [wanted, wanted]


@pytest.mark.parametrize("value", ["1.1", "-0.1", "float('nan')", "float('inf')"])
def test_rewards_that_are_none_end_the_run(score, value):
    with pytest.raises(SystemExit, match="not a number from 0 to 1"):
        score(value)


@pytest.mark.parametrize("file", ["reward", "common", "calendar", "upge", "json"])
def test_the_file_where_one_starts_comes_first(score, file):
    assert score("0.25", file) == [0.25, 0.25]


def test_an_error_names_the_file_that_was_loaded(score, tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}/mine.py.* cannot be loaded: .*SyntaxError"):
        score("(")


# ----------------------------------------------------------------------------- signals and consoles


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_step_goes_on(number):
    program = f"""
import os
from common import distributed
distributed.init_process_group()
distributed.listen_for_stop()
os.kill(os.getpid(), {int(number)})
print(distributed.stop_asked())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == [str(int(number))], done.stderr


def test_a_console_that_is_not_utf8_gets_escapes():
    program = "import common; print('50 ± 2')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
    )
    assert done.stdout == b"50 \\xb1 2\n"


# -------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("flag", ["--gate", "--reward"])
@pytest.mark.parametrize("value", ["mine", "mine:", ":f", "mine.py:f(x)"])
def test_a_function_of_ones_own_is_module_and_function(flag, value, capsys):
    with pytest.raises(SystemExit):
        flags.parse_training_args(["--model", "m", flag, value])
    assert f"{flag}: must be MODULE:FUNCTION, not {value}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0.005", "2.5", "0"])
def test_a_temperature_that_vllm_and_the_trainer_would_take_for_two_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        flags.parse_training_args(["--model", "m", "--temperature", value])
    assert "--temperature: must be" in capsys.readouterr().err


def test_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = flags.parse_training_args(["--model=~/m", "--data=~/d.jsonl", "--out=~/no/such/x"])
    assert (args.model, args.data) == ("/home/me/m", "/home/me/d.jsonl")
    assert args.out == "/home/me/no/such/x"


def test_one_problem_has_no_error():
    assert report.mean_and_error([1.0]).percent() == "100.0"
    assert report.mean_and_error([1.0, 0.0]).percent() == "50.0 ± 50.0"


# ------------------------------------------------------------------------------------------- gates


def raises(rewards, step):
    raise KeyError("mine")


BAD_GATES = [lambda R, step: None, lambda R, step: torch.ones(3), lambda R, step: (1, 0), raises]
BAD_GATES += [lambda R, step: ([1, 0], [1, 0, 1]), lambda R, step: (R.mean(-1) / 0, R.mean(-1))]


@pytest.mark.parametrize("gate", BAD_GATES)
def test_a_gate_that_gives_no_numbers_ends_in_a_sentence(gate):
    with pytest.raises(SystemExit, match="error: --gate"):
        train_hpt.apply_gate(gate, [[1.0, 0.0], [0.0, 0.0]], 1, METHODS["hpt"])


@pytest.mark.parametrize(
    "gate", [lambda R, step: ([1, 0], [0, 1]), lambda R, step: (R.mean(-1).numpy(), 1 - R[:, 0])]
)
def test_a_gate_may_give_lists_arrays_and_tensors(gate):
    alpha, beta = train_hpt.apply_gate(gate, [[1.0, 1.0], [0.0, 0.0]], 1, METHODS["hpt"])
    assert (alpha, beta) == ([1.0, 0.0], [0.0, 1.0])


def test_a_gate_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_gate.py").write_text("def f(:\n")
    for name, sentence in (("broken_gate:f", "SyntaxError"), ("no_such:f", "ModuleNotFoundError")):
        with pytest.raises(SystemExit, match=f"--gate {name} cannot be loaded: {sentence}"):
            train_hpt.load_gate(SimpleNamespace(gate=name))
