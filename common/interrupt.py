"""What happens when a run is told to stop.

SIGTERM and Ctrl-C let the step in hand be finished and saved; a second Ctrl-C ends at once. After a
second Ctrl-C, torchrun sends SIGTERM to its ranks.
"""

import os
import signal
import sys

from common import terminal

_asked = 0  # the number of the first signal that told this rank to stop


def listen() -> None:
    """From now on SIGTERM and the first Ctrl-C are only noted, for `asked`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and "&" of a script ignore some
            signal.signal(number, _note)


def _note(number, _frame) -> None:
    """The handler of both signals."""
    global _asked
    if _asked == signal.SIGINT:
        raise KeyboardInterrupt
    if not _asked and os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        terminal.clear()
        # Not print(): the signal may have interrupted another print() of this process.
        os.write(2, f"\n{name}: the step in hand is finished and saved first{again}\n".encode())
    _asked = _asked or number


def asked() -> int:
    """The number of the signal that told any rank to stop, or 0. Every rank must call this."""
    import torch
    import torch.distributed as dist

    number = torch.tensor(_asked)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def stop(number: int, checkpoint, out) -> None:
    """End the run with the status that tells of a signal: 143 for SIGTERM, 130 for Ctrl-C."""
    if os.environ.get("RANK", "0") == "0":
        terminal.clear()
        print(
            f"{signal.Signals(number).name}: stopped; {checkpoint} is saved. To go on: the same "
            f"command with --out {out} --resume",
            file=sys.stderr,
            flush=True,
        )
    raise SystemExit(128 + number)
