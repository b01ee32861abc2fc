"""--tensorboard and --wandb: copies of metrics.jsonl in TensorBoard and in Weights & Biases.

metrics.jsonl is the record of a run, and a copy has the same names and values. `begin` writes a
copy anew from the lines that are there already. So a resumed run, whose file has been cut back to
its checkpoint, holds each step once, and a flag that is first given at a --resume gets the whole
run. `log` adds the line of a step.

A copy never ends a run: if a package fails, a warning says so once, and the run goes on without it.
The packages are imported only if their flags are given; flags.py has checked that they are there.
"""

import atexit
import json
import os
import shutil
import sys
from pathlib import Path

from common.distributed import printable

_open = []  # of this run, on rank 0


class TensorBoard:
    """Event files in OUT/tensorboard: `tensorboard --logdir OUT` or the folder of several runs."""

    flag = "--tensorboard"

    def __init__(self, out: Path, flags: dict):
        from torch.utils.tensorboard import SummaryWriter

        folder = out / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step=0: a TensorBoard that is open forgets what it has read in the old files.
        self.writer = SummaryWriter(str(folder), purge_step=0)

    def log(self, row: dict) -> None:
        """Write the line of a step, to the disk."""
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self, exit_status: int) -> None:
        """Close the file."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases with the name of OUT; its own files are in OUT/wandb.

    Without a network (WANDB_MODE=offline), OUT/wandb/offline-run-* holds the whole run, for
    `wandb sync`. With one, a resumed run goes on in the same W&B run. W&B takes no step back, so
    the steps between the checkpoint and the death stay as they were first sent.
    """

    flag = "--wandb"

    def __init__(self, out: Path, flags: dict):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # as for usage statistics
        import wandb

        folder = out / "wandb"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("offline-run-*"):
            shutil.rmtree(old)
        key = folder / "run_id.txt"
        hooks = sys.exit, sys.excepthook
        try:
            self.run = wandb.init(
                project=flags["wandb"],
                name=out.resolve().name,
                id=key.read_text() if key.exists() else None,
                resume="allow",
                dir=str(out),
                config=flags,
                settings=wandb.Settings(console="off"),  # what is printed stays on this machine
            )
        finally:
            sys.exit, sys.excepthook = hooks  # wandb's own would print control characters
        key.write_text(self.run.id)
        self.first_step = self.run.step  # what W&B has of earlier steps stays there

    def log(self, row: dict) -> None:
        """Send the line of a step."""
        if row["step"] >= self.first_step:
            self.run.log(numbers(row), step=row["step"])

    def close(self, exit_status: int) -> None:
        """Wait until everything is sent; W&B shows whether the run has ended well."""
        self.run.finish(exit_code=exit_status)


def numbers(row: dict) -> dict:
    """The metrics of a line that have a value, without the step."""
    return {name: value for name, value in row.items() if value is not None and name != "step"}


def begin(out: Path, flags: dict) -> None:
    """Open the copies that the flags ask for, with the lines of metrics.jsonl. Rank 0 calls it."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for kind, wanted in ((TensorBoard, flags["tensorboard"]), (WandB, flags["wandb"])):
        # The class is both the work, since calling it opens a copy, and what a warning names.
        if wanted and (logger := attempt(kind, kind, out, flags)):
            _open.append(logger)
    # If `close` has not been called when the program ends, the run has not come to its end.
    atexit.register(close, exit_status=1)
    for row in rows:
        log(row)


def log(row: dict) -> None:
    """Add the line of a step to each copy that is open."""
    for logger in list(_open):
        attempt(logger, logger.log, row)


def close(exit_status: int = 0) -> None:
    """Close the copies. exit_status: 0 if the run has come to its end."""
    while _open:
        logger = _open.pop()
        attempt(logger, logger.close, exit_status)


def attempt(logger, work, *values):
    """The result of work(*values); None if it fails, and then the logger is dropped.

    logger: a TensorBoard or WandB, or the class of one that is being opened.
    """
    try:
        return work(*values)
    except Exception as error:  # whatever a package may raise: the run is worth more than a copy
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        print(
            f"warning: {logger.flag}: {printable(reason)}: the run goes on without it; "
            "metrics.jsonl has every step, and a later --resume copies all of them",
            file=sys.stderr,
            flush=True,
        )
        if logger in _open:
            _open.remove(logger)
        return None
