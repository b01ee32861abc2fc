"""What a person sees of a run: lines that stay, and one line that does not.

    start(verbose)                    before the slow imports: libraries are quiet unless verbose
    begin_phase(name), end_phase()    parts of the start, each named with its seconds when it ends
    begin_step(step, last)            what goes on from now on, until `end_steps`
    with progress(label, total):      a part of that, and how far it is
    say(text), show(text)             a line that stays
    with closing():                   around a program, so that nothing is left of the other line

The other line, the transient one, is for rank 0 on a terminal. A thread draws it again every
second, so that a part that takes ten minutes never looks dead. Into files and pipes go the lines
that stay, without colour. Nothing slow is imported here.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator

from common.distributed import printable

# What other libraries print at the start, about twenty lines, by their own switches. Errors stay.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # those of transformers too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_LOGS": "-all",  # Python: warnings off, errors on
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",  # what has no switch of its own, as vLLM's capture of CUDA graphs
}
QUIET_MODULES = "torch vllm transformers huggingface_hub datasets numpy pydantic matplotlib"
INTERVAL = 0.25  # seconds after which the transient line is looked at again


def quiet_libraries() -> None:
    """Hide the logs, bars and warnings of other libraries; what the user has set is kept.

    It must be called before they are imported.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # vLLM reads its variable when an engine starts; until then this holds.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    if not sys.warnoptions:
        modules = "|".join(QUIET_MODULES.split())
        warnings.filterwarnings("ignore", module=rf"({modules})(\.|$)")
        for category in (FutureWarning, SyntaxWarning):  # for those who develop the libraries
            warnings.filterwarnings("ignore", category=category)


# ---------------------------------------------------------------------------- what the terminal can


def is_terminal(stream) -> bool:
    """Tell whether a stream ends at a terminal that understands control sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def width() -> int:
    """Return how many columns there are for a line: those of the terminal, 120 in a file."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else 120


def bold(text: str) -> str:
    """Return a text that stands out, where there is colour. See https://no-color.org."""
    return _styled(text, 1)


def dim(text: str) -> str:
    """Return a text that stands back, where there is colour."""
    return _styled(text, 2)


def _styled(text, code):
    """Return a text in an ANSI style, or as it is."""
    has_colour = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    return f"\x1b[{code}m{text}\x1b[0m" if has_colour else text


def cut(text: str, columns: int) -> str:
    """Return as much of a text as fits; wide characters, as Chinese ones, take two columns."""
    used = 0
    for i, character in enumerate(text):
        used += columns_of(character)
        if used > columns:
            return text[:i]
    return text


def columns_of(text: str) -> int:
    """Return how many columns a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def clock(seconds: float) -> str:
    """Return a time that one can see running: 0:45, 12:34, 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def duration(seconds: float) -> str:
    """Return a time in at most five characters: 45s, 9m05s, 42m, 1h02m, 13h, 3d04h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if minutes < 10:
        return f"{minutes}m{s:02}s" if minutes else f"{s}s"
    if hours < 10:
        return f"{hours}h{m:02}m" if hours else f"{m}m"
    if days < 10:
        return f"{days}d{h:02}h" if days > 1 else f"{hours}h"
    return f"{days}d"


# ------------------------------------------------------------------------------- the transient line


class Progress:
    """What goes on: a phase, a step, or a part of it.

    total: how many things there are to do; None if they are not counted.
    done: how many are done already.
    """

    def __init__(self, label: str, total: int | None = None, done: int = 0):
        self.label, self.total, self.done, self.first = printable(label), total, done, done
        self.begin = time.perf_counter()

    def update(self, count: int = 1) -> None:
        """Count things that are done."""
        self.done += count

    def seconds(self) -> float:
        """Return how long it has been going on."""
        return time.perf_counter() - self.begin

    def text(self) -> str:
        """Return label, count, time, and the time that is left at this pace."""
        seconds, words = self.seconds(), [self.label]
        if self.total is not None:
            words.append(f"{self.done}/{self.total}")
        words.append(clock(seconds))
        if self.total is not None and self.done > self.first:
            left = seconds / (self.done - self.first) * (self.total - self.done)
            words.append(f"{duration(left)} left")
        return "  ".join(words)


class TransientLine:
    """The line that does not stay. It is drawn between `run` and `stop`, by a thread."""

    def __init__(self):
        self.phase: Progress | None = None
        self.step: Progress | None = None
        self.parts: list[Progress] = []  # of the phase or step; the last is the innermost
        self.lock = threading.RLock()  # a signal may come to a thread that holds it
        self.drawn = ""  # what stands there now
        self.stopped = threading.Event()

    def run(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._draw_again, daemon=True).start()

    def _draw_again(self):
        with contextlib.suppress(OSError):  # the terminal may go before the run does
            while not self.stopped.wait(INTERVAL):
                self.draw()

    def text(self) -> str:
        """Return what the line says: the phase or step, and the innermost part of it."""
        if self.phase and _verbose:  # other libraries print bars and lines of their own
            return ""
        whole, parts = self.phase or self.step, self.parts
        if not parts:
            return whole.text() if whole else ""
        return f"{whole.label}  {parts[-1].text()}" if whole else parts[-1].text()

    def draw(self) -> None:
        """Write the line; the cursor goes back to its start, so that what comes next covers it."""
        with self.lock:
            if self.stopped.is_set():
                return
            text = cut(self.text(), width() - 1)
            if text != self.drawn:
                self._write(text)

    def clear(self) -> None:
        """Remove the line until it is drawn again."""
        with self.lock:
            if self.drawn:
                self._write("")

    def stop(self) -> None:
        """Remove the line for good."""
        with self.lock:
            self.stopped.set()
            self.phase, self.step, self.parts = None, None, []
            self.clear()

    def _write(self, text):
        """Write over what stands there. Not print(): a signal may have interrupted another."""
        rest = " " * (columns_of(self.drawn) - columns_of(text))
        os.write(2, f"\r{text}{rest}\r".encode(errors="replace"))
        self.drawn = text


_line = TransientLine()
_started = _verbose = False


def start(verbose: bool) -> None:
    """Begin a program, once its flags are known and before its slow imports.

    verbose: whether other libraries print what they like.
    """
    global _started, _verbose
    _verbose = verbose
    if verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # vLLM's own default
    else:
        quiet_libraries()
    if os.environ.get("RANK", "0") != "0":
        return
    _started = True
    if is_terminal(sys.stdout) and is_terminal(sys.stderr):  # else it would mix with a file's lines
        _line.run()
    begin_phase("imports")


def is_verbose() -> bool:
    """Tell whether other libraries may print what they like."""
    return _verbose


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Around a program: remove the transient line when it ends, also if it fails."""
    try:
        yield
    finally:
        _line.stop()


def clear() -> None:
    """Remove the transient line, so that a message can begin there."""
    _line.clear()


# ------------------------------------------------------------------------------------ what goes on


def begin_phase(name: str) -> None:
    """Name a part of the start; it ends when the next one begins, or with `end_phase`.

    This is for rank 0 of a program that has called `start`; elsewhere nothing is printed.
    """
    end_phase()
    if not _started:
        return
    _line.phase = Progress(name)
    if _verbose:  # other libraries print below
        show(f"{name} ...")


def end_phase() -> None:
    """Print the name of the phase that is going on, and its seconds, if it took any."""
    phase, _line.phase = _line.phase, None
    if phase and phase.seconds() >= 0.05:
        show(dim(f"{phase.label:<24}{phase.seconds():>7.1f} s"))


def begin_step(step: int, last_step: int) -> None:
    """Let the transient line name a step, until the next one begins."""
    _line.step = Progress(f"step {step}/{last_step}")


def end_steps() -> None:
    """Name no step any more."""
    _line.step = None


@contextlib.contextmanager
def progress(label: str | None, total: int | None = None, done: int = 0) -> Iterator[Progress]:
    """Show a part of the work while the `with` block runs, and how much of it is done.

    label: None shows nothing. total, done: as Progress has them.
    """
    part = Progress(label or "", total, done)
    if label:
        _line.parts = [*_line.parts, part]
    try:
        yield part
    finally:
        _line.parts = [other for other in _line.parts if other is not part]


def each(label: str, items: Iterable) -> Iterator:
    """Go through a list, and show how far that is."""
    items = list(items)
    with progress(label, len(items)) as part:
        for item in items:
            yield item
            part.update()


# ----------------------------------------------------------------------------- what stays


def say(text: str = "") -> None:
    """Print a text in which control characters, of a data set or of a model, are spelled out."""
    show(printable(text))


def show(text: str) -> None:
    """Print a text as it is, with its colours; it holds nothing of a data set or of a model."""
    with _line.lock:
        _line.clear()
        print(text, flush=True)
