"""Kill a training run at random moments, resume it, and compare it with a run left alone.

python -m tools.soak --kills 50

A run of the toy with small steps is done once without a disturbance. Then the same run is started
again and again, and ended after a random time: by kill -9 of a rank, by kill -9 of torchrun, or by
SIGTERM to torchrun. Each time it must leave no process and no unreadable file behind. When a run
has come to its end, all its lines and its final weights must be those of the run left alone, and
the next one begins. Memory, open files, threads and processes of a rank are read at each step.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import report
from evaluate import weights_digest

ROOT = Path(__file__).resolve().parents[1]
TOY = "--prompts-per-step 4 --samples-per-prompt 2 --eval-samples 1 --eval-every 100 --keep 2"
KINDS = {  # what is ended, with which signal
    "kill -9 of a rank": ("rank", signal.SIGKILL),
    "kill -9 of torchrun": ("torchrun", signal.SIGKILL),
    "SIGTERM to torchrun": ("torchrun", signal.SIGTERM),
}
LOGS = ("metrics.jsonl", "held_out.jsonl", "samples.jsonl")
AT_START = 0.2  # of the times count from the start, the others from the first step
PATIENCE = 60  # seconds within which all processes of a run must have ended


def main(argv=None):
    """Soak, print the table, and exit with 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each run (%(default)s)")
    parser.add_argument("--save-every", type=int, default=5, help="steps (%(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--longest", type=float, default=12, help="seconds to live (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--out", default="runs/soak", help="a new directory (%(default)s)")
    args = parser.parse_args(argv)
    out = report.make_directory(args.out)

    straight = out / "straight"
    usage = watch(start(straight, args), straight)
    print("\n".join(["", *usage_table(usage), ""]), flush=True)
    faults = soak(out, straight, args)
    print("\n".join(faults) or "nothing was wrong")
    raise SystemExit(1 if faults else 0)


def soak(out: Path, straight: Path, args) -> list[str]:
    """Kill and resume; print the table; return a sentence for everything that was wrong."""
    draw = random.Random(args.seed)
    kills, faults, matched, run = [], [], 0, 1
    while len(kills) < args.kills or (out / f"run_{run}").exists():
        folder, kind = out / f"run_{run}", draw.choice(list(KINDS))
        process, begun = start(folder, args), time.time()
        seconds = draw.uniform(0, args.longest) if len(kills) < args.kills else None
        if draw.random() > AT_START:
            wait_for_steps(process, folder, begun)
        if not wait(process, seconds):
            faults += end(process, kind, folder)
            kills.append(describe(kind, folder, begun, args.steps))
            print(
                f"{folder}: {kind} {kills[-1]['when']}, after step {last_step(folder)}", flush=True
            )
            continue
        if process.returncode:
            faults.append(f"{folder} ended with status {process.returncode}: see {folder}.log")
            break
        differing = differences(folder, straight)
        faults += differing
        matched += not differing
        print(f"{folder}: ended, {'differs' if differing else 'as the straight run'}", flush=True)
        run += 1
    print("\n".join(["", *kill_table(kills)]))
    print(f"\n{run - 1} runs came to their end, {matched} of them as the straight run\n")
    return faults


def describe(kind: str, folder: Path, begun: float, steps: int) -> dict:
    """How and when a run was ended, and how many steps must be repeated.

    begun: the time at which the process began; steps: of the whole run.
    """
    if not has_begun(folder, begun):
        return {"kind": kind, "when": "while it started", "repeated": None}
    saving = any(path.is_dir() for path in folder.glob("*.partial"))
    saved = steps if newest(folder) == "final" else int(newest(folder).removeprefix("step_"))
    repeated = max(0, last_step(folder) - saved)
    return {"kind": kind, "when": "in a save" if saving else "in a step", "repeated": repeated}


def kill_table(kills: list[dict]) -> list[str]:
    """A table with a row per kind of death."""
    moments = ("while it started", "in a step", "in a save")
    rows = [["how it was ended", "times", *moments, "steps repeated, mean", "at most"]]
    for kind in KINDS:
        mine = [kill for kill in kills if kill["kind"] == kind]
        repeated = [kill["repeated"] for kill in mine if kill["repeated"] is not None]
        when = [sum(kill["when"] == moment for kill in mine) for moment in moments]
        mean = f"{statistics.fmean(repeated):.1f}" if repeated else ""
        rows.append([kind, len(mine), *when, mean, max(repeated, default="")])
    return report.markdown_table(rows)


# ------------------------------------------------------------------------------- one run of the toy


def start(folder: Path, args) -> subprocess.Popen:
    """Start the run in a folder, or go on with it, under torchrun; its output is added to a log."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    flags = [*TOY.split(), "--steps", args.steps, "--save-every", args.save_every]
    command = [sys.executable, *launcher, ROOT / "train_hpt.py", *flags, "--out", folder]
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(
            [*map(str, command), "--resume"], stdout=log, stderr=log, start_new_session=True
        )


def wait(process: subprocess.Popen, seconds: float | None) -> bool:
    """Whether a process ends within a time, which may be unlimited."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_for_steps(process: subprocess.Popen, folder: Path, begun: float) -> None:
    """Wait until a run that began at a time has written a line, or has ended."""
    while not (has_begun(folder, begun) or wait(process, 0.1)):
        pass


def has_begun(folder: Path, begun: float) -> bool:
    """Whether a run has changed its metrics since a time."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_mtime > begun


def end(process: subprocess.Popen, kind: str, folder: Path) -> list[str]:
    """End a run in one of the ways; return what is wrong with what it leaves behind."""
    target, number = KINDS[kind]
    everyone = descendants(process.pid)
    victim = process.pid
    if target == "rank":
        victim = next(iter(children(process.pid)), process.pid)
    os.kill(victim, number)
    faults = []
    if not wait(process, PATIENCE):
        faults.append(f"{folder}: torchrun was there {PATIENCE} s after {kind}")
        process.kill()
    deadline = time.monotonic() + PATIENCE
    while (left := [pid for pid in everyone if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        faults.append(f"{folder}: processes {left} were there {PATIENCE} s after {kind}")
    for name in LOGS:
        if (folder / name).exists():
            report.read_jsonl(folder / name)  # raises if a reader would stumble
    return faults


def newest(folder: Path) -> str:
    """The name of the newest checkpoint in a folder; step_000000 without one."""
    if (folder / "final").exists():
        return "final"
    names = [path.name for path in folder.glob("step_*") if path.suffix != ".partial"]
    return max(names, default="step_000000")


def last_step(folder: Path) -> int:
    """The last step whose metrics are written, 0 without any."""
    path = folder / "metrics.jsonl"
    rows = report.read_jsonl(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def differences(folder: Path, straight: Path) -> list[str]:
    """A sentence for each file of a run that is not that of the straight run, times aside."""
    found = []
    for name in LOGS:
        if untimed(folder / name) != untimed(straight / name):
            found.append(f"{folder / name} differs from that of {straight}")
    if weights_digest(str(folder / "final")) != weights_digest(str(straight / "final")):
        found.append(f"{folder / 'final'} differs from that of {straight}")
    return found


def untimed(path: Path) -> list[dict]:
    """The rows of a .jsonl file without what the clock says."""
    timed = ("time/", "perf/rollout", "perf/train")
    rows = report.read_jsonl(path)
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


# ----------------------------------------------------------------------------- what a rank uses


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:  # the thread has ended meanwhile
            continue
    return found


def descendants(pid: int) -> list[int]:
    """A process and all that it and its children have started."""
    found = [pid]
    for child in children(pid):
        found += descendants(child)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to take note of its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def usage_of(rank: int) -> dict:
    """What a rank holds now."""
    status = Path(f"/proc/{rank}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    maps = Path(f"/proc/{rank}/maps").read_text().splitlines()
    shared = {line.split()[-1] for line in maps if "/dev/shm/" in line}
    return {
        "memory, MB": int(values["VmRSS"].split()[0]) / 1024,
        "open files": len(list(Path(f"/proc/{rank}/fd").iterdir())),
        "threads": int(values["Threads"]),
        "processes": len(descendants(rank)),
        "files in /dev/shm": len(shared),
    }


def watch(process: subprocess.Popen, folder: Path) -> dict[int, dict]:
    """{step: what the first rank held then} of a run, until it ends."""
    usage = {}
    while not wait(process, 0.1):
        step = last_step(folder)
        if step and step not in usage:
            try:
                usage[step] = usage_of(children(process.pid)[0])
            except (OSError, IndexError, KeyError):  # the rank is just ending
                continue
    if process.returncode:
        raise SystemExit(f"error: the straight run failed: see {folder}.log")
    return usage


def usage_table(usage: dict[int, dict]) -> list[str]:
    """A table of what a rank holds: after a tenth of its steps, a third, two thirds, and all."""
    steps = sorted(usage)
    shown = sorted({steps[int(share * (len(steps) - 1))] for share in (0.1, 0.33, 0.67, 1)})
    rows = [["a rank of the straight run holds", *(f"after step {step}" for step in shown)]]
    for name in usage[shown[0]]:
        rows.append([name, *(f"{usage[step][name]:.0f}" for step in shown)])
    return report.markdown_table(rows)


if __name__ == "__main__":
    main()
