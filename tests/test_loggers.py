"""--tensorboard and --wandb: with stand-ins for both packages, and with the packages if installed.

The stand-ins write what they are given into the run's directory, one line per metric or step.
"""

import json
import os
import signal
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from test_resume import base, run, wait_for  # noqa: F401 (fixtures)

from common import flags, loggers, report
from common.step_table import StepTable

ROWS = [
    {"step": 0, "eval/avg@2": 0.25},
    {"step": 1, "reward/mean": 0.5, "sft/nll": None},
    {"step": 2, "reward/mean": 0.75, "sft/nll": 1.5},
]
BOTH = {"tensorboard": True, "wandb": "project", "clip_eps": float("inf")}


# ---------------------------------------------------------------------------------------- stand-ins


class SummaryWriter:
    """Stands in for torch.utils.tensorboard.SummaryWriter."""

    def __init__(self, folder, purge_step):
        assert purge_step == 0
        self.path = Path(folder, "events.out.tfevents.1")
        self.path.parent.mkdir(exist_ok=True)
        self.path.touch(exist_ok=False)  # the events of an earlier attempt are gone

    def add_scalar(self, name, value, step):
        with open(self.path, "a") as file:
            file.write(json.dumps([step, name, value]) + "\n")

    def flush(self):
        pass

    def close(self):
        pass


class Run:
    """Stands in for a run of wandb. What it is given also goes to a "server", a file."""

    def __init__(self, id, dir, **settings):
        self.id, self.out, self.settings = id or "made up", Path(dir), settings
        self.step = len(self.on_server()) if settings["resume"] == "allow" and id else 0

    def on_server(self):
        path = self.out / "server.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, row, step):
        with open(self.out / "server.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")

    def finish(self, exit_code):
        (self.out / "exit_code").write_text(str(exit_code))


def stand_in_modules():
    """The two packages as sys.modules would have them."""
    wandb, tensorboard = ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
    wandb.Settings, wandb.init = SimpleNamespace, lambda **settings: Run(**settings)
    tensorboard.SummaryWriter = SummaryWriter
    return {"wandb": wandb, "torch.utils.tensorboard": tensorboard}


@pytest.fixture
def packages(monkeypatch):
    """Both packages are there, as stand-ins, and no logger is open before and after a test."""
    modules = stand_in_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(loggers, "_open", [])
    monkeypatch.setattr(loggers.atexit, "register", lambda *_, **__: None)
    return modules


def write(out, rows):
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_values(rows):
    """Rows without the metrics that have no value, which no copy has."""
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def in_tensorboard(out):
    """The rows of a run, from the stand-in's event file."""
    rows = {}
    for step, name, value in rows_of(out / "tensorboard/events.out.tfevents.1"):
        row = rows.setdefault(step, {"step": step})
        assert name not in row, f"{name} of step {step} is there twice"
        row[name] = value
    return list(rows.values())


# ----------------------------------------------------------------------------------- what is copied


def test_both_have_the_names_and_values_of_metrics_jsonl(packages, tmp_path):
    loggers.begin(tmp_path, BOTH)
    for row in ROWS:
        report.log(tmp_path, row, StepTable(9))
    loggers.close()
    wanted = with_values(rows_of(tmp_path / "metrics.jsonl"))
    assert in_tensorboard(tmp_path) == rows_of(tmp_path / "server.jsonl") == wanted
    assert (tmp_path / "exit_code").read_text() == "0"


def test_a_number_that_is_not_finite_is_left_out(packages, tmp_path):
    loggers.begin(tmp_path, BOTH)
    report.log(tmp_path, {"step": 1, "reward/mean": 0.5, "loss/rl": float("nan")}, StepTable(9))
    assert in_tensorboard(tmp_path) == [{"step": 1, "reward/mean": 0.5}]


def test_without_the_flags_nothing_is_written(packages, tmp_path):
    loggers.begin(tmp_path, BOTH | {"tensorboard": False, "wandb": None})
    report.log(tmp_path, ROWS[0], StepTable(9))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_copy_nothing(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "rank", lambda: 1)
    report.begin_copies(tmp_path, SimpleNamespace(**BOTH))
    report.log(tmp_path, ROWS[0], StepTable(9))
    assert not list(tmp_path.iterdir())


def test_the_run_of_wandb_has_the_name_of_the_directory(packages, tmp_path):
    out = tmp_path / "my run"
    out.mkdir()
    loggers.begin(out, BOTH)
    settings = loggers._open[1].run.settings
    assert (settings["project"], settings["name"]) == ("project", "my run")
    assert settings["config"] == BOTH and settings["settings"].console == "off"


def test_a_copy_that_begins_late_has_the_lines_from_before(packages, tmp_path):
    write(tmp_path, ROWS[:2])
    loggers.begin(tmp_path, BOTH)
    report.log(tmp_path, ROWS[2], StepTable(9))
    assert in_tensorboard(tmp_path) == rows_of(tmp_path / "server.jsonl") == with_values(ROWS)


def test_a_resumed_run_has_each_step_once(packages, tmp_path):
    """It died after step 2, and goes on after step 1, which is the newest checkpoint's."""
    loggers.begin(tmp_path, BOTH)
    for row in ROWS:
        report.log(tmp_path, row, StepTable(9))
    loggers.close(exit_status=1)
    report.cut_logs(tmp_path, 1)
    loggers.begin(tmp_path, BOTH)
    assert loggers._open[1].run.id == "made up"  # the same run of wandb
    for row in (ROWS[2], {"step": 3, "reward/mean": 1.0}):
        report.log(tmp_path, row, StepTable(9))
    wanted = with_values(rows_of(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in wanted] == [0, 1, 2, 3]
    assert in_tensorboard(tmp_path) == rows_of(tmp_path / "server.jsonl") == wanted


def test_offline_a_resumed_run_writes_one_whole_copy(packages, tmp_path):
    """wandb then knows of no earlier attempt, whose files are removed."""
    old = tmp_path / "wandb/offline-run-1-x"
    old.mkdir(parents=True)
    (tmp_path / "wandb/run_id.txt").write_text("x")
    write(tmp_path, ROWS)
    loggers.begin(tmp_path, BOTH)
    assert not old.exists()
    assert rows_of(tmp_path / "server.jsonl") == with_values(ROWS)


# ------------------------------------------------------------------------------- packages that fail


def fail(*values, **more):
    raise ConnectionError("the \x1b[2Jnetwork is down.\nand more")


SENTENCE = (
    "warning: --wandb: the \\x1b[2Jnetwork is down: the run goes on without it; metrics.jsonl has "
    "every step, and a later --resume copies all of them\n"
)


@pytest.mark.parametrize("part", ["init", "log", "finish"])
def test_a_package_that_fails_is_one_warning(packages, tmp_path, monkeypatch, capsys, part):
    monkeypatch.setattr(packages["wandb"] if part == "init" else Run, part, fail)
    loggers.begin(tmp_path, BOTH)
    for row in ROWS:
        report.log(tmp_path, row, StepTable(9))
    loggers.close()
    loggers.close()
    assert capsys.readouterr().err == SENTENCE
    assert in_tensorboard(tmp_path) == with_values(ROWS)  # the other one goes on
    assert with_values(rows_of(tmp_path / "metrics.jsonl")) == with_values(ROWS)


def test_a_package_that_works_gives_no_warning(packages, tmp_path, capsys):
    loggers.begin(tmp_path, BOTH)
    report.log(tmp_path, ROWS[0], StepTable(9))
    loggers.close()
    assert capsys.readouterr().err == ""


def test_an_interruption_is_not_swallowed(packages, tmp_path, monkeypatch):
    def interrupt(*values, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", interrupt)
    loggers.begin(tmp_path, BOTH)
    with pytest.raises(KeyboardInterrupt):
        report.log(tmp_path, ROWS[0], StepTable(9))


@pytest.mark.parametrize("fails", [False, True])
def test_errors_are_printed_as_without_wandb(packages, tmp_path, monkeypatch, fails):
    """wandb replaces what Python calls for an error that nothing has caught."""
    hooks = sys.exit, sys.excepthook

    def init(**settings):
        sys.exit = sys.excepthook = fail
        return fail() if fails else Run(**settings)

    monkeypatch.setattr(packages["wandb"], "init", init)
    loggers.begin(tmp_path, BOTH)
    assert (sys.exit, sys.excepthook) == hooks


# --------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize("words", [["--wandb", "project"], ["--tensorboard"]])
def test_a_package_that_is_missing_is_one_sentence(words, monkeypatch, capsys):
    package = words[0].removeprefix("--")
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        flags.parse_training_args(words)
    sentence = f"error: {words[0]} needs the package {package}: pip install {package}\n"
    assert capsys.readouterr().err.endswith(sentence)
    flags.parse_training_args([])  # without the flag the package is not missed


def test_a_folder_named_wandb_is_no_package(tmp_path, monkeypatch):
    """Python would import it, as a package without contents."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mere_folder").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    assert flags.is_installed("package") and not flags.is_installed("mere_folder")
    assert not flags.is_installed("there_is_none_of_this_name")


# ------------------------------------------------------------------ the loop, killed and resumed


def with_stand_ins(args, *fault):
    """The flags and the packages are there; then another fault of tests/test_resume.py."""
    args.tensorboard, args.wandb = True, "project"
    sys.modules.update(stand_in_modules())
    if fault:
        fault[0](args, *fault[1:])


def that_fail(args):
    """Both packages fail when they are given step 2."""
    with_stand_ins(args)
    log, add_scalar = Run.log, SummaryWriter.add_scalar
    Run.log = lambda self, row, step: fail() if step == 2 else log(self, row, step)
    SummaryWriter.add_scalar = lambda self, name, value, step: (
        fail() if step == 2 else add_scalar(self, name, value, step)
    )


def killed_in_step_3(args):
    """Step 3 is logged, and its checkpoint, due with each step, is not written."""
    with_stand_ins(args)
    log = Run.log

    def log_and_die(self, row, step):
        log(self, row, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.log = log_and_die


def test_a_run_that_is_killed_and_resumed_has_each_step_once(run, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    assert run(out, fault=(killed_in_step_3,))[0] == -signal.SIGKILL
    assert [row["step"] for row in in_tensorboard(out)] == [0, 1, 2, 3]
    status, output = run(out, "--steps", 5, fault=(with_stand_ins,))
    assert status == 0 and "going on after step 2" in output, output
    wanted = with_values(rows_of(out / "metrics.jsonl"))
    assert [row["step"] for row in wanted] == [0, 1, 2, 3, 4, 5]
    assert in_tensorboard(out) == wanted
    sent = rows_of(out / "server.jsonl")
    assert [row["step"] for row in sent] == [0, 1, 2, 3, 4, 5]
    assert without_times(sent) == without_times(wanted)  # step 3 was sent before the death


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_a_run_whose_loggers_fail_ends_well(run, tmp_path):  # noqa: F811
    """The next attempt has neither flag, which a resumed run may."""
    out = tmp_path / "run"
    status, output = run(out, "--steps", 3, fault=(that_fail,))
    assert status == 0 and (out / "final").is_dir(), output
    assert output.count("warning: --wandb") == output.count("warning: --tensorboard") == 1
    assert [row["step"] for row in rows_of(out / "server.jsonl")] == [0, 1]
    assert run(out, "--steps", 4)[0] == 0


# ------------------------------------------------------------------------------ the real packages


def events(folder):
    """{(step, metric): value} of real event files, in float32; each is there once."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.tensor.float_val[0]
    return found


def test_real_event_files(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(loggers, "_open", [])
    for rows in (ROWS, ROWS[:2]):  # the second time as after a resume
        loggers.close()
        write(tmp_path, rows)
        loggers.begin(tmp_path, BOTH | {"wandb": None})
    loggers.log(ROWS[2])
    loggers.log({"step": 3, "reward/mean": 1.0})
    wanted = {}
    for row in with_values([*ROWS, {"step": 3, "reward/mean": 1.0}]):
        wanted |= {(row["step"], name): value for name, value in row.items() if name != "step"}
    assert events(tmp_path / "tensorboard") == wanted
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # as TensorBoard reads them
    assert [event.step for event in shown.Scalars("reward/mean")] == [1, 2, 3]
    loggers.close()


def records(path):
    """The records of a .wandb file, which has the form of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of the block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the record is whole, or this is its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_a_real_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(loggers, "_open", [])
    out, ids = tmp_path / "a run", set()
    out.mkdir()
    for rows in (ROWS, ROWS[:2]):  # the second time as after a resume
        write(out, rows)
        loggers.begin(out, BOTH | {"tensorboard": False})
        ids.add(loggers._open[0].run.id)
        if rows == ROWS:
            loggers.close(exit_status=1)
    loggers.log(ROWS[2])
    loggers.close()
    assert len(ids) == 1
    [path] = out.glob("wandb/offline-run-*/*.wandb")  # that of the first attempt is gone
    # wandb's own process writes the file, and may be a little behind.
    wait_for(lambda: any(record.HasField("exit") for record in records(path)))
    sent, names = [], set()
    for record in records(path):
        if record.HasField("run"):
            names.add((record.run.project, record.run.display_name, record.run.run_id))
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: item for item in record.history.item}
            values = {name: json.loads(item.value_json) for name, item in row.items()}
            step = values.pop("_step")
            sent.append({"step": step} | {k: v for k, v in values.items() if k[0] != "_"})
    assert names == {("project", "a run", *ids)}
    assert sent == with_values(ROWS)
