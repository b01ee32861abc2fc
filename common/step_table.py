"""The table that a run prints while it trains: a line per step, in columns of constant width.

     step  reward  gated  offline    nll  length  entropy  mismatch    grad   tok/s    sec   left
     1/36   0.074  0.656    0.193  0.066    49.4    0.195   8.0e-14  0.0143    4210    3.2  2m10s

`Column` says which metric stands where; docs/metrics.md says what the metrics mean.
"""

import statistics
import time
from collections import deque
from collections.abc import Container
from typing import NamedTuple

from common import terminal

HEADER_EVERY = 20  # lines
RECENT = 20  # steps from which the time of a step is estimated


class Column(NamedTuple):
    """A column of the table."""

    title: str
    metrics: tuple[str, ...]  # the first that the step has is shown
    width: int
    form: str  # of format()


COLUMNS = [
    Column("reward", ("reward/mean",), 6, ".3f"),
    Column("gated", ("hpt/sft_frac",), 5, ".3f"),
    Column("offline", ("hpt/offline_ratio",), 7, ".3f"),
    Column("nll", ("sft/nll",), 5, ".3f"),
    Column("length", ("response_length/mean",), 6, ".1f"),
    Column("entropy", ("policy/entropy",), 7, ".3f"),
    Column("mismatch", ("mismatch/kl",), 8, ".1e"),
    Column("grad", ("optim/grad_norm",), 6, ".3g"),
    Column("tok/s", ("perf/rollout_tokens_per_sec", "perf/train_tokens_per_sec"), 6, ".0f"),
    Column("sec", ("time/step",), 5, ".1f"),
]
LEFT_WIDTH = 5  # of the last column, which is no metric
NARROW = ("tok/s", "mismatch", "offline", "nll", "grad", "length")  # first to go where it is narrow
ACCURACY = "eval/pass@1"


class StepTable:
    """The lines of a run.

    Args:
        last_step: N of "step k/N".
        evaluated: the steps after which held-out problems are evaluated.
        width: columns of the terminal; its own if not given.
    """

    def __init__(self, last_step: int, evaluated: Container[int] = (), width: int | None = None):
        self.last_step, self.evaluated = last_step, evaluated
        self.step_width = max(len("step"), len(f"{last_step}/{last_step}"))
        self.columns = fitting(width or terminal.width(), self.step_width)
        self.lines = 0
        self.last_time = time.perf_counter()
        self.step_times = deque(maxlen=RECENT)  # evaluations aside; what follows a step included
        self.evaluation_times = []

    def lines_of(self, metrics: dict) -> list[str]:
        """Return what to print for a step: its line, and the header above where one is due."""
        self.measure(metrics)
        lines = []
        if self.lines % HEADER_EVERY == 0:
            lines.append(terminal.dim(self.header()))
        self.lines += 1
        cells = [f"{metrics['step']}/{self.last_step}".rjust(self.step_width)]
        for column in self.columns:
            found = (metrics[name] for name in column.metrics if metrics.get(name) is not None)
            cells.append(cell(next(found, None), column.width, column.form))
        left = self.seconds_left(metrics["step"])
        cells.append(("-" if left is None else terminal.duration(left)).rjust(LEFT_WIDTH))
        lines.append("  ".join(cells + remarks(metrics)))
        return lines

    def header(self) -> str:
        """Return the line that names the columns."""
        titles = [column.title.rjust(column.width) for column in self.columns]
        return "  ".join(["step".rjust(self.step_width), *titles, "left".rjust(LEFT_WIDTH)])

    def measure(self, metrics: dict) -> None:
        """Note how long the step took, and the evaluation after it, by the clock."""
        now = time.perf_counter()
        seconds, self.last_time = now - self.last_time, now
        evaluation = 0.0
        if ACCURACY in metrics:
            evaluation = seconds - metrics.get("time/step", 0.0)
            self.evaluation_times.append(evaluation)
        if metrics["step"] > 0:
            self.step_times.append(seconds - evaluation)

    def seconds_left(self, step: int) -> float | None:
        """Estimate the time after a step from those of this process; None before the first."""
        if not self.step_times:
            return None
        left = (self.last_step - step) * statistics.fmean(self.step_times)
        if self.evaluation_times:
            evaluations = sum(s in self.evaluated for s in range(step + 1, self.last_step + 1))
            left += evaluations * statistics.fmean(self.evaluation_times)
        return left


def fitting(width: int, step_width: int) -> list[Column]:
    """Return the columns that fit into a width; those named in NARROW go first."""
    columns = list(COLUMNS)
    for title in NARROW:
        if step_width + sum(2 + column.width for column in columns) + 2 + LEFT_WIDTH <= width:
            break
        columns = [column for column in columns if column.title != title]
    return columns


def cell(value: float | None, width: int, form: str) -> str:
    """Return a number in a width, with fewer digits where it needs more room; "-" without one."""
    if value is None:
        return "-".rjust(width)
    forms = [form, ".3g", ".0f", ".2g", ".1g"]
    if abs(value) < 10:
        forms.remove(".0f")  # it would leave one digit, or none
    texts = [format(value, one) for one in forms]
    return next((text for text in texts if len(text) <= width), texts[-1]).rjust(width)


def remarks(metrics: dict) -> list[str]:
    """Return what stands behind the columns: what is not there at every step."""
    found = []
    if skipped := metrics.get("optim/skipped", 0) + metrics.get("critic/skipped", 0):
        found.append(f"{skipped} skipped")  # optimizer steps whose gradient was not finite
    if metrics.get("perf/train_tokens_per_sec") == 0:
        found.append("nothing to train on")  # no sequence has a signal
    if metrics.get(ACCURACY) is not None:
        found.append(terminal.bold(f"HELD-OUT ACCURACY {metrics[ACCURACY]:.3f}"))
    return found
