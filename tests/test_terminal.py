"""What reaches the terminal: what goes on, and no control character of a model or of data.

A control character can rewrite the screen, retitle the window or put text before the prompt of a
shell.
"""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from terminals import run_on_terminal, screen, transient

from common import distributed, flags, report, terminal
from toy import make

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
    args = flags.parse_training_args(["--model", "m", "--eval-data", "\x1b[31m.jsonl"])
    report.closing_table(tmp_path, args)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    table = printed.split("\n\n")[0]  # a sentence on the accuracy follows it
    lines = [line.split()[0] for line in table.splitlines() if "+-" in line][1:]
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


# ---------------------------------------------------------------------------------- what goes on

SHOW = """
import sys, threading, time
from common import terminal

def see(text):
    "Wait until the transient line begins with a text, and then changes, if there is one."
    end, seen = time.monotonic() + 60, set()
    while threading.active_count() > 1 and len(seen) < 2:
        if terminal._line.drawn.startswith(text):
            seen.add(terminal._line.drawn)
        time.sleep(0.02)
        assert time.monotonic() < end, terminal._line.drawn

terminal.start(verbose="-v" in sys.argv)
with terminal.closing():
    terminal.begin_phase("a slow start")
    time.sleep(0.5)
    if "-v" not in sys.argv:
        see("a slow start")
    terminal.end_phase()
    terminal.begin_step(3, 36)
    with terminal.progress("counted \\x1b[2J", 12) as part:
        part.update(4)
        see("step 3/36  counted")
        terminal.say("a line of data \\x1b[2J")
    see("step 3/36  0:0")
    terminal.show(terminal.bold("in bold"))
    if "fail" in sys.argv:
        with terminal.progress("what fails"):
            see("step 3/36  what fails")
            raise SystemExit("error: a sentence")
"""
LAST_LINES = ["a line of data \\x1b[2J", "in bold"]


def kept(lines):
    """The lines without empty ones, and without a phase that may take no time."""
    return [line for line in lines if line and not line.startswith("imports")]


def show(*words):
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n" + SHOW,
        *words,
    ]


@pytest.fixture(scope="module")
def shown():
    """All that SHOW writes on a terminal."""
    status, written = run_on_terminal(show())
    assert status == 0, written
    return written


def test_only_what_stays_is_left_on_a_terminal(shown):
    first, *rest = kept(screen(shown))
    assert first.startswith("a slow start ") and first.endswith(" s") and " 0.0 s" not in first
    assert rest == LAST_LINES


def test_the_transient_line_says_what_goes_on_and_its_clock_runs(shown):
    seen = transient(shown)
    assert len({line for line in seen if line.startswith("a slow start  0:0")}) >= 2
    counted = [line for line in seen if line.startswith(r"step 3/36  counted \x1b[2J  4/12  0:0")]
    assert counted and all(line.endswith("s left") for line in counted)
    assert seen[-1].startswith("step 3/36  0:0")


def test_a_terminal_has_bold_and_dim(shown):
    assert "\x1b[1min bold\x1b[0m" in shown and "\x1b[2ma slow start" in shown


@pytest.mark.parametrize(
    "environment, has_transient", [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_without_colour(environment, has_transient):
    status, written = run_on_terminal(show(), **environment)
    assert status == 0 and "\x1b" not in written
    assert kept(screen(written))[1:] == LAST_LINES
    assert bool(transient(written)) == has_transient
    assert ("\r" in written.replace("\r\n", "")) == has_transient


@pytest.mark.parametrize("rank", ["0", "1"])
def test_files_get_the_lines_that_stay_and_rank_0_alone_names_phases(rank):
    environment = os.environ | {"TERM": "xterm", "RANK": rank}
    done = subprocess.run(show(), env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and distributed.printable(done.stdout) == done.stdout
    lines = kept(done.stdout.splitlines())
    assert lines[-2:] == LAST_LINES
    assert [line.split()[:3] for line in lines[:-2]] == ([["a", "slow", "start"]] * (rank == "0"))


def test_no_transient_line_where_one_of_the_streams_is_a_file(tmp_path):
    """It would stand between the lines of the other stream, or in the file."""
    for redirection in ("2> log", "> log"):
        command = ["sh", "-c", f'cd {tmp_path}; "$@" {redirection}', "sh", *show()]
        status, written = run_on_terminal(command)
        assert status == 0 and not transient(written) and "\r" not in (tmp_path / "log").read_text()


def test_an_error_begins_on_a_clean_line():
    status, written = run_on_terminal(show("fail"))
    assert status == 1 and transient(written)[-1].startswith("step 3/36  what fails  0:0")
    assert kept(screen(written))[1:] == [*LAST_LINES, "error: a sentence"]


def test_verbose_names_a_phase_when_it_begins_and_leaves_the_line_to_the_libraries():
    status, written = run_on_terminal(show("-v"))
    begun = [line for line in screen(written) if line.endswith("...")]
    assert status == 0 and begun == ["imports ...", "a slow start ..."]
    assert not [line for line in transient(written) if line.startswith("a slow start")]
    assert [line for line in transient(written) if line.startswith("step 3/36")]


def test_an_interruption_during_the_imports_covers_the_transient_line(tmp_path):
    lines = ["import os, signal, time", "from common import terminal"]
    lines += ["while not terminal._line.drawn:", "    time.sleep(0.02)"]
    lines += ["os.kill(os.getpid(), signal.SIGINT)", "time.sleep(30)"]
    (tmp_path / "torch.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, REPOSITORY / "train_hpt.py"]
    status, written = run_on_terminal(command, PYTHONPATH=str(tmp_path))
    assert status == 130 and transient(written)[-1].startswith("imports  0:0")
    assert screen(written) == ["interrupted", ""]


@pytest.mark.parametrize(
    "seconds, text, running",
    [
        (0.4, "0s", "0:00"),
        (59.4, "59s", "0:59"),
        (60, "1m00s", "1:00"),
        (599, "9m59s", "9:59"),
        (2520, "42m", "42:00"),
        (3725, "1h02m", "1:02:05"),
        (13.5 * 3600, "13h", "13:30:00"),
        (47 * 3600, "47h", "47:00:00"),
        (76 * 3600, "3d04h", "76:00:00"),
        (400 * 86400, "400d", "9600:00:00"),
    ],
)
def test_times_are_short(seconds, text, running):
    assert terminal.duration(seconds) == text and len(text) <= 5
    assert terminal.clock(seconds) == running


def test_a_line_is_cut_at_the_edge_of_the_terminal():
    assert terminal.cut("abcdef", 4) == "abcd"
    assert terminal.cut("数学题目", 5) == "数学" and terminal.columns_of("数学") == 4
    assert terminal.cut("abc", 4) == "abc"


def test_the_width_is_that_of_the_terminal_and_120_in_a_file(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((77, 20)))
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.width() == 120  # pytest's output is a file
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert terminal.width() == 77


# ------------------------------------------------------------------------------- other libraries


def test_what_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TORCH_LOGS": "+dynamo"})
    with warnings.catch_warnings():
        terminal.quiet_libraries()
    assert os.environ["TORCH_LOGS"] == "+dynamo"
    others = {name: value for name, value in terminal.QUIET.items() if name != "TORCH_LOGS"}
    assert {name: os.environ[name] for name in others} == others


LOG = """
import logging, sys, warnings
from common import terminal

terminal.start(verbose="-v" in sys.argv)
import torch, transformers, vllm.logger
from tqdm import tqdm

loggers = [logging.getLogger("torch.distributed"), vllm.logger.init_logger("vllm.engine")]
loggers.append(transformers.utils.logging.get_logger("transformers.models"))
for logger in loggers:
    logger.warning("a warning of " + logger.name)
    logger.error("an error of " + logger.name)
for category in (UserWarning, FutureWarning):
    line = 9
    warnings.warn_explicit(f"a {category.__name__} of torch", category, "f.py", line, "torch.nn")
    warnings.warn_explicit(f"a {category.__name__} of ours", category, "f.py", line, "evaluate")
for _ in tqdm([1], "a bar"):
    pass
for _ in transformers.utils.logging.tqdm([1], desc="a bar of transformers"):
    pass
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_quiet_unless_verbose_and_their_errors_are_never_hidden(verbose):
    ours = (*terminal.QUIET, "VLLM_CONFIGURE_LOGGING")  # other tests may have set them
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    command = [sys.executable, "-c", LOG, *["-v"] * verbose]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    for name in ("torch.distributed", "vllm.engine", "transformers.models"):
        assert f"an error of {name}" in printed
        assert (f"a warning of {name}" in printed) == verbose
    assert "a UserWarning of ours" in printed
    hidden = [
        "a UserWarning of torch",
        "a FutureWarning of torch",
        "a bar",
        "a bar of transformers",
    ]
    assert [text in printed for text in hidden] == [verbose] * 4


def test_a_crash_inside_vllm_shows_its_traceback(tmp_path):
    """vLLM is told of a quantisation that it does not know, which nothing of ours looks at."""
    shutil.copytree(make.BASE, tmp_path / "base")
    config = (tmp_path / "base/config.json").read_text()
    broken = config.replace("{", '{"quantization_config": {"quant_method": "none_such"},', 1)
    (tmp_path / "base/config.json").write_text(broken)
    command = [sys.executable, REPOSITORY / "evaluate.py", "--model", tmp_path / "base"]
    command += ["--data", REPOSITORY / "toy/held_out.jsonl", "--max-response-tokens", "112"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "none_such" in done.stderr
    assert "site-packages/vllm" in done.stderr
