"""The programs, started as a user starts them, and what they write."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "toy/base"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SMALL = ["--prompts-per-step", 8, "--samples-per-prompt", 4, "--eval-samples", 1]


class Run(NamedTuple):
    """A run that has ended."""

    flags: list  # without --out and --gate
    out: Path
    stdout: str
    stderr: str
    watched: list[dict]  # what watched.gate has written at each step


def toy_run(folder: Path, train: Path, held_out: Path) -> Run:
    """Six steps of the toy, of eight prompts, with evaluations and checkpoints on the way."""
    flags = [f"@{ROOT}/toy/toy.args", "--data", train, "--eval-data", held_out, *SMALL]
    flags += ["--steps", 6, "--save-every", 2, "--eval-every", 2]
    watch = ["--gate", "tests.watched:gate"]  # it is HPT's gate all the same
    environment = os.environ | {"WATCHED": str(folder / "watched.jsonl"), "HF_HUB_OFFLINE": "1"}
    out = folder / "run"
    done = run("train_hpt.py", *flags, *watch, "--out", out, ranks=1, env=environment)
    return Run(flags, out, done.stdout, done.stderr, read(folder / "watched.jsonl"))


def command(program, *flags, ranks: int | None = None) -> list[str]:
    """The command line of a program, under torchrun if `ranks` says so."""
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks else [sys.executable]
    return list(map(str, [*launcher, ROOT / program, *flags]))


def run(program, *flags, ranks=None, fails=False, folder=ROOT, **more):
    """Run a program to its end, and check that it fails or does not; a CompletedProcess."""
    line = command(program, *flags, ranks=ranks)
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=900, **more)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def is_alive(pid: int) -> bool:
    """Whether a process is there and is not a zombie, which has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 300) -> None:
    """Wait until condition() is true; fail if that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list) -> Path:
    """Write a .jsonl file, and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, without what the clock says."""
    timed = ("time/", "perf/rollout", "perf/train")
    rows = read(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def weights(folder: Path) -> dict:
    """{name: parameter in float32} of a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM

    return dict(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters()
    )
