"""A long run takes no more of the machine than a short one.

LONG_RUN=1 python -m pytest tests/test_flat.py -s    300 steps against 30; else 60 against 20
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from test_run import BASE, ROOT, read, write_rows

EARLY, LATE = (30, 300) if os.environ.get("LONG_RUN") else (20, 60)
MEGABYTES_PER_STEP = 0.25  # of the allocator's; a batch of rollouts that is kept would be more


def descendants(pid):
    """The numbers of a process and of all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += descendants(int(child))
    return found


def taken(pid):
    """{what: how much} a process and those that it started have of the machine now."""
    pids = descendants(pid)
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        "processes": len(pids),
        "open files": sum(len(os.listdir(f"/proc/{p}/fd")) for p in pids),
        "threads": int(fields["Threads"]),
        "shared memory, kB": int(fields["RssShmem"].split()[0]),
        "mapped shared files": sum("/dev/shm" in line for line in maps),
        "memory, MB": int(fields["VmRSS"].split()[0]) / 1024,
    }


def test_a_long_run_takes_no_more_than_a_short_one(tmp_path):
    """With evaluations and checkpoints on the way."""
    data = write_rows(tmp_path / "few.jsonl", read(ROOT / "toy/held_out.jsonl")[:8])
    flags = ["--model", BASE, "--data", data, "--eval-data", data, "--out", tmp_path / "out"]
    flags += ["--max-prompt-tokens", 16, "--max-response-tokens", 24, "--prompts-per-step", 4]
    flags += ["--samples-per-prompt", 2, "--eval-samples", 1, "--eval-every", 10]
    flags += ["--save-every", 10, "--steps", LATE + 5]
    command = list(map(str, [sys.executable, ROOT / "train_hpt.py", *flags]))
    seen, metrics = {}, tmp_path / "out/metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        while run.poll() is None:
            time.sleep(0.02)
            step = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
            if step in (EARLY, LATE) and step not in seen:
                # The least of three, since a file is open while it is written.
                three = [taken(run.pid) for _ in range(3) if not time.sleep(0.03)]
                seen[step] = {name: min(one[name] for one in three) for name in three[0]}
    assert run.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    early, late = seen[EARLY], seen[LATE]
    print(f"\nafter {EARLY} steps: {early}\nafter {LATE} steps: {late}")
    grown = late.pop("memory, MB") - early.pop("memory, MB")
    assert late == early and grown < MEGABYTES_PER_STEP * (LATE - EARLY)
