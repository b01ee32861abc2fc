"""Ranks: they keep to loopback, one that ends ends all, and none outlives torchrun."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from programs import ROOT, TORCHRUN, is_alive, wait_for

from common import distributed

JOB = """
import os, signal, sys, time
sys.path[:0] = [{repository!r}, {tests!r}]
import watched
from common import distributed

def say(*words):
    # One write per line: the ranks share a pipe, and an unbuffered print writes word by word.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def work(items):
    if distributed.rank() == 1 and sys.argv[1] == "raises":
        raise ValueError("planted")
    if distributed.rank() == 1 and sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "waits":
        say("pid", os.getpid())
        time.sleep(1000)
    return items

with distributed.one_sentence():
    if sys.argv[1] == "the same sentence":
        raise SystemExit("error: planted")
    distributed.init_process_group()
    say("together", distributed.share_work([1, 2], work), *watched.listening())
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The command line of a job of two ranks; its argument says what happens in it."""
    path = tmp_path_factory.mktemp("job") / "job.py"
    path.write_text(JOB.format(repository=str(ROOT), tests=str(ROOT / "tests")))
    return [*TORCHRUN, "--nproc_per_node=2", str(path)]


def run(job, how):
    return subprocess.run([*job, how], capture_output=True, text=True, timeout=600)


def is_loopback(address):
    """Whether an address of /proc/net is 127.0.0.1 or ::1."""
    number = address.partition(":")[0]
    return number in ("0100007F", "00000000000000000000000001000000")


def test_two_ranks_work_together_and_listen_on_loopback_alone(job):
    done = run(job, "works")
    lines = [line.partition("] ") for line in done.stdout.splitlines() if "together" in line]
    assert [before for before, *_ in lines] == ["together [1, 2"] * 2, done.stderr
    addresses = [address for *_, rest in lines for address in rest.split()]
    assert addresses and all(map(is_loopback, addresses))


def test_a_run_listens_on_loopback_alone(toy_run):
    """vLLM's sockets are among them."""
    addresses = [address for row in toy_run.watched for address in row["listening"]]
    assert addresses and all(map(is_loopback, addresses))


@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_rank_that_ends_ends_the_other(job, how):
    done = run(job, how)
    assert done.returncode != 0 and "together" not in done.stdout
    assert how == "dies" or "planted" in done.stderr


def test_a_sentence_of_all_ranks_is_printed_once(job):
    done = run(job, "the same sentence")
    assert done.returncode != 0 and done.stderr.count("error: planted\n") == 1


def test_kill_9_of_torchrun_leaves_no_rank(job):
    """The kernel kills them; torchrun has no time to."""
    with subprocess.Popen([*job, "waits"], stdout=subprocess.PIPE, text=True) as launcher:
        ranks = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
        assert all(map(is_alive, ranks))
        launcher.kill()
        try:
            wait_for(lambda: not any(map(is_alive, ranks)), seconds=120)
        finally:
            for pid in filter(is_alive, ranks):
                os.kill(pid, signal.SIGKILL)


def test_a_single_process_has_no_store_that_listens():
    code = "from common import distributed; import torch.distributed as dist;"
    code += "distributed.init_process_group(); store = dist.distributed_c10d._get_default_store();"
    code += "print(type(store.underlying_store).__name__)"
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.stdout == "HashStore\n", done.stderr


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    monkeypatch.setattr(os, "environ", os.environ | ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(SystemExit, match=r"^error: torchrun .* 2 ranks .* has 1 GPUs: each rank"):
        distributed.init_process_group()


def test_what_the_user_has_set_and_several_machines(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    for more, wanted in (
        ({"WORLD_SIZE": "8", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"WORLD_SIZE": "16"}, None),  # the user says where the machines reach each other
        ({"WORLD_SIZE": "8"}, "lo"),
    ):
        environment = {"LOCAL_WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"} | more
        monkeypatch.setattr(os, "environ", environment)
        distributed.init_process_group()
        assert environment.get("GLOO_SOCKET_IFNAME") == wanted
