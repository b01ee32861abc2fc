"""What reaches the terminal: no control character of a model or of data, and no traceback of ours.

A control character can rewrite the screen, retitle the window or put text before the prompt of a
shell.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import distributed, flags, report

REPOSITORY = Path(__file__).resolve().parents[1]
ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\r\x00\ud800"
SPELLED_OUT = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e\r\x00\ud800"


def test_control_characters_are_spelled_out():
    assert distributed.printable(f"a{ESCAPE}b") == f"a{SPELLED_OUT}b"
    assert distributed.printable("a\tb") == r"a\tb"


@pytest.mark.parametrize("text", ["", "one\ntwo", "x² ≤ 中文 é \\boxed{3} 🙂", "back\\slash"])
def test_other_text_stays_as_it_is(text):
    assert distributed.printable(text) == text


def test_a_message_that_ends_the_program():
    with pytest.raises(SystemExit) as stop, distributed.one_failure_message():
        raise SystemExit(f"error: --reward m:f raised ValueError: {ESCAPE}")
    assert stop.value.code == f"error: --reward m:f raised ValueError: {SPELLED_OUT}"
    with pytest.raises(SystemExit) as stop, distributed.one_failure_message():
        raise SystemExit(3)  # a status is no text
    assert stop.value.code == 3


def test_an_error_that_nothing_has_caught(capsys):
    assert sys.excepthook is not sys.__excepthook__
    try:
        raise ValueError(f"a row says {ESCAPE}")
    except ValueError as error:
        distributed.print_uncaught(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.endswith(f"a row says {SPELLED_OUT}\n")


def test_a_wrong_flag(capsys):
    with pytest.raises(SystemExit):
        flags.parse_training_args(["--steps", "\x1b[2J"])
    assert r"at least 1, not \x1b[2J" in capsys.readouterr().err


LEVELS = ["\x1b[31mred", "two\nlines", "a|b", 3]


def result(level, **more):
    one = {"prompt": "p", "level": level, "samples": 1, "correct": 1, "lengths": [3]}
    return one | {"truncated": 0} | more


def test_levels_in_the_closing_table_of_a_run(tmp_path, capsys):
    rows = [result(level, step=step) for step in (0, 1) for level in LEVELS]
    report.append_jsonl(tmp_path / "held_out.jsonl", rows)
    steps = [{"step": step, "hpt/offline_ratio": 0.5} for step in (0, 1)]
    report.append_jsonl(tmp_path / "metrics.jsonl", steps)
    report.closing_table(tmp_path, SimpleNamespace(temperature=1.0))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    lines = [line.split()[0] for line in printed.splitlines() if "+-" in line][1:]
    assert lines == ["3", r"\x1b[31mred", "a|b", r"two\nlines", "all"]


def test_levels_in_the_table_of_an_evaluation(tmp_path, capsys):
    rows = {"sums": [result(level) for level in LEVELS]}
    report.evaluation_table(tmp_path, {"model": "\x1b[31m"}, rows, {"sums": 0})
    written = (tmp_path / "table.md").read_text()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    table = [line for line in written.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + len(LEVELS)  # head, rule, all levels together, each level
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1


def test_the_plan_of_a_run(capsys, tmp_path):
    args = flags.parse_training_args(["--model", "m", "--data", "\x1b[31m.jsonl"])
    problem = {"prompt_ids": [1], "demo_ids": [2]}
    report.print_plan(
        args,
        tmp_path,
        parameters=1,
        memory=[],
        tokenizer=SimpleNamespace(decode=lambda ids: ESCAPE),
        problems=[problem],
        left_out="",
        held_out=[],
        held_out_left_out="",
        n=2,
    )
    printed = capsys.readouterr().out
    assert "the first problem" in printed and distributed.printable(printed) == printed


@pytest.mark.parametrize(
    "program, caught",
    [("train_hpt.py", "KeyboardInterrupt"), ("evaluate.py --model m --data d.jsonl", "OSError")],
)
def test_an_interruption_during_the_imports_is_one_word(tmp_path, program, caught):
    """Here `torch` presses Ctrl-C. Some libraries catch what follows, and go on."""
    lines = ["import os, signal, time", "try:", "    os.kill(os.getpid(), signal.SIGINT)"]
    lines += ["    time.sleep(30)", f"except {caught}:", "    time.sleep(30)"]
    (tmp_path / "torch.py").write_text("\n".join(lines) + "\n")
    for name in ("transformers", "vllm"):  # evaluate.py imports others first
        (tmp_path / f"{name}.py").write_text("import torch\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *program.split()]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and done.stderr == "interrupted\n"


def test_no_library_sends_usage_statistics():
    """Each library is asked what it would do, after one of our modules was imported."""
    lines = ["import common", "from huggingface_hub import constants"]
    lines += ["from vllm.usage.usage_lib import is_usage_stats_enabled"]
    lines += ["print(constants.HF_HUB_DISABLE_TELEMETRY, is_usage_stats_enabled())"]
    names = ("DO_NOT_TRACK", "VLLM_NO_USAGE_STATS", "HF_HUB_DISABLE_TELEMETRY")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, "-c", "; ".join(lines)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split()[-2:] == ["True", "False"], done.stderr
