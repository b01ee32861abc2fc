"""What the ranks of a torchrun job share: the process group, work, totals, messages, and seeds.

Everything random in this project comes from `derive_seed(seed, step, problem, ...)`, never from a
rank or from the order of calls. torch is imported inside the functions, so that a program can parse
its flags before it pays for slow imports.
"""

import contextlib
import ctypes
import datetime
import hashlib
import io
import ipaddress
import math
import os
import random
import signal
import socket
import sys
import time
import traceback

# How long a rank waits for the others at the start, where one that has failed on another machine is
# not noticed.
TIME_TO_JOIN = datetime.timedelta(minutes=15)
# How long it waits later. It must be longer than one may be busy while another is done: with its
# share of a large evaluation, or of slow grading. A rank that ends is noticed at once, whatever
# this says: its connections close.
TIMEOUT = datetime.timedelta(hours=12)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
LAUNCHER = os.getppid()  # as it was when the program started


def derive_seed(*key) -> int:
    """A seed of 62 bits from any printable key, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def shuffled(n: int, *key) -> list[int]:
    """0 .. n-1 in an order that depends on the key alone."""
    order = list(range(n))
    random.Random(derive_seed(*key)).shuffle(order)
    return order


def init_process_group():
    """Join torchrun's process group, or make one of a single process; return the device.

    Raises:
        SystemExit: --master-addr is no address at which other machines can reach this one, or
            this machine has fewer GPUs than torchrun has started ranks on it.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    end_with_launcher()
    gpu = torch.cuda.is_available()
    alone = "MASTER_ADDR" not in os.environ and int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone:
        single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        os.environ |= {name: str(value) for name, value in single.items()}
    choose_network()
    if gpu:
        check_gpus(torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if alone:  # a store inside this process; torch's own would listen on every interface
        store, rank, ranks = dist.HashStore(), 0, 1
    else:  # torchrun's environment says how
        store, rank, ranks = next(rendezvous("env://", timeout=TIME_TO_JOIN))
    # All attempts of `torchrun --max-restarts` may share a store. Under a prefix of its own, an
    # attempt does not find the addresses of dead ranks there.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backends = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(
        backends, timeout=TIME_TO_JOIN, store=store, rank=rank, world_size=ranks
    )
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def check_gpus(gpus: int) -> None:
    """Raise SystemExit if torchrun has started more ranks on this machine than it has GPUs."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > gpus:
        raise SystemExit(
            f"error: torchrun has started {ranks} ranks on this machine, which has {gpus} "
            f"GPU{'s' * (gpus > 1)}: each rank needs its own, so give --nproc_per_node={gpus}"
        )


def end_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun dies, however that happens.

    Without this, kill -9 of torchrun leaves its ranks training, and a resumed run beside them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != LAUNCHER:  # it has died already
        raise SystemExit("error: torchrun has died")


def choose_network() -> None:
    """Say where Gloo and vLLM listen: on loopback, or where the other machines reach this one.

    Left alone, both take the address of this machine's name, which is often a loopback address.
    Values that the user has set are kept.
    """
    address = "127.0.0.1"  # the traffic of ranks on one machine need not leave it
    if os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):
        master = os.environ["MASTER_ADDR"]
        address = address_towards(master)
        if ipaddress.ip_address(address).is_loopback and "LOCAL_WORLD_SIZE" in os.environ:
            raise SystemExit(
                f"error: --master-addr {master} is an address of this machine alone, {address}: "
                "give the one at which the other machines reach it"
            )
    name = interface_of(address)
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("VLLM_HOST_IP", address)


def address_towards(host: str) -> str:
    """The address of this machine in the network in which it reaches a host."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # of a datagram socket: nothing is sent
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address, as "lo"."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if address in [known.address.partition("%")[0] for known in addresses]:
            return name
    return None


def rank() -> int:
    """This process's rank, 0 without a process group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    import torch.distributed as dist

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
    import torch.distributed as dist

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
    import torch.distributed as dist

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


def is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether an error comes from Gloo or NCCL, as where another rank has ended."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def printable(text: str) -> str:
    """A text with its control characters spelled out, line breaks aside: \\x1b for an escape.

    What a model, a data set or an error message says may hold sequences that rewrite the screen,
    retitle the window or type into the shell. No such text is printed without this.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def print_uncaught(kind, error, traceback_) -> None:
    """What Python calls for an error that nothing has caught, once this module is imported.

    An interruption, which may come in the middle of the slow imports, gets a word; any other error
    gets its traceback, without control characters.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        lines = traceback.format_exception(kind, error, traceback_)
        print(printable("".join(lines)), end="", file=sys.stderr)


sys.excepthook = print_uncaught


def during_imports() -> None:
    """Until `in_main`, Ctrl-C ends the program with a word, not with a traceback of an import."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def in_main() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_number, _frame) -> None:
    """The handler of SIGINT during imports."""
    if os.environ.get("RANK", "0") == "0":
        cleared = b"\r" + 20 * b" " + b"\r" if os.isatty(2) else b""  # as common/terminal.py does
        os.write(2, cleared + b"interrupted\n")
    os._exit(128 + signal.SIGINT)


@contextlib.contextmanager
def one_failure_message(quiet: bool = False):
    """Around a program under torchrun: if every rank fails with the same message, print it once.

    Rank 0 fails at once. The others wait 10 seconds first; torchrun ends them in that time. A rank
    that fails alone prints its message after the wait. A rank that only notices that another has
    ended waits too, so that the message of that other one stands on top. With `quiet`, what the
    others print to standard error is dropped: argparse prints its message before it raises.
    """
    in_main()
    my_rank = int(os.environ.get("RANK", 0))  # the process group may not exist yet
    silence = contextlib.redirect_stderr(io.StringIO()) if quiet and my_rank else None
    try:
        with silence or contextlib.nullcontext():
            yield
    except KeyboardInterrupt:
        if my_rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as stop:
        told_to_stop = stop.code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        if my_rank and stop.code and not told_to_stop:
            time.sleep(10)
        if isinstance(stop.code, str):
            stop.code = printable(stop.code)
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        time.sleep(10)  # on this machine, torchrun ends this rank meanwhile
        raise SystemExit(
            f"error: rank {my_rank} lost the others, of which one has ended; its own message says "
            f"why ({printable(str(error)):.200})"
        ) from error
