"""What the ranks of a torchrun job share: the process group, work, totals, and seeds.

Everything random in this project comes from `derive_seed(seed, step, problem, ...)`, never from a
rank or from the order of calls.
"""

import contextlib
import ctypes
import datetime
import hashlib
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from tqdm import tqdm

# A rank may be busy for hours, with its share of a large evaluation, while another one is done. A
# rank that ends is noticed at once, whatever this says: its connections close.
TIMEOUT = datetime.timedelta(hours=12)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
LAUNCHER = os.getppid()  # as it was when the program started
_signals = []  # the numbers of the signals that told this rank to stop


def derive_seed(*key) -> int:
    """A seed of 62 bits from any printable key, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def shuffled(n: int, *key) -> list[int]:
    """0 .. n-1 in an order that depends on the key alone."""
    order = list(range(n))
    random.Random(derive_seed(*key)).shuffle(order)
    return order


def init_process_group() -> torch.device:
    """Join torchrun's process group, or make one of a single process; return the device.

    On one machine everything stays on loopback. On several, GLOO_SOCKET_IFNAME and VLLM_HOST_IP say
    where the machines reach each other (docs/gpu.md).

    Raises:
        SystemExit: torchrun has started more ranks on this machine than it has GPUs.
    """
    end_with_launcher()
    alone = "RANK" not in os.environ
    if alone:
        single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        os.environ |= {name: str(value) for name, value in single.items()}
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if local_ranks == int(os.environ["WORLD_SIZE"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        if local_ranks > torch.cuda.device_count():
            raise SystemExit(
                f"error: torchrun has started {local_ranks} ranks on this machine, which has "
                f"{torch.cuda.device_count()} GPUs: each rank needs its own"
            )
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # A store inside this process; the one of torch would listen on every network interface.
    single = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    dist.init_process_group(backend, timeout=TIMEOUT, **single)
    return device


def end_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun dies: kill -9 of torchrun leaves no rank."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != LAUNCHER:  # it has died already
            raise SystemExit("error: torchrun has died")


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share_work(items: list, work, ranks_per_engine: int = 1) -> list:
    """The results of `work` for all items, in order, each computed by one rank only.

    Args:
        items: the same list on every rank.
        work: a function from a list of items to the list of their results. Every rank calls it
            once, on its share, which may be empty.
        ranks_per_engine: this many consecutive ranks share one engine and do the same share.

    Every rank must call this, and every rank gets all results.
    """
    if not dist.is_initialized():
        return work(items)
    engine, engines = rank() // ranks_per_engine, world_size() // ranks_per_engine
    shares = [None] * world_size()
    dist.all_gather_object(shares, work(items[engine::engines]))
    results = [None] * len(items)
    for i, share in enumerate(shares[::ranks_per_engine]):
        results[i::engines] = share
    return results


def total_over_ranks(counts: dict[str, float], maxima: tuple[str, ...] = ()) -> dict[str, float]:
    """Each count summed over the ranks, those named in `maxima` replaced by their largest value.

    Every rank must call this with the same names. A NaN on any rank is kept.
    """
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, counts)
    totals = {}
    for name in counts:
        values = [other[name] for other in everyone]
        if name in maxima:
            totals[name] = math.nan if any(map(math.isnan, values)) else max(values)
        else:
            totals[name] = sum(values)
    return totals


# A progress bar is for the terminal of rank 0, and goes when its work is done. A file or a pipe
# gets only lines that stay.
SHOW_BARS = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def progress(items: Iterable, label: str) -> Iterable:
    """The items, with a progress bar on the terminal of rank 0."""
    return tqdm(items, label, leave=False, disable=not SHOW_BARS)


def listen_for_stop() -> None:
    """From now on SIGTERM, a closed terminal and the first Ctrl-C are only noted: `stop_asked`."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _note)


def _note(number, _frame) -> None:
    """The handler of these signals; the second Ctrl-C ends the program."""
    if number == signal.SIGINT and number in _signals:
        raise KeyboardInterrupt
    if not _signals and os.environ.get("RANK", "0") == "0":
        # Not print(): the signal may have interrupted another print() of this process.
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nthe step in hand is finished and saved first; Ctrl-C again ends it\n")
    _signals.append(number)


def stop_asked() -> int:
    """The number of a signal that told any rank to stop, or 0. Every rank must call this."""
    number = torch.tensor(max(_signals, default=0))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


@contextlib.contextmanager
def one_sentence():
    """Around a program: what every rank would say at its end is printed once, by rank 0.

    The other ranks wait; torchrun ends them in that time. A rank that fails alone speaks after it.
    """
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.code, str) and os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        raise
