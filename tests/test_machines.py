"""Ranks that end, and ranks on two machines, which are network namespaces joined by a cable.

The jobs here have a process group and no model. tests/test_run.py trains on two machines.
"""

import contextlib
import datetime
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch.distributed as dist

from common import distributed

REPOSITORY = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


# ------------------------------------------------------------------------- which network is chosen


@pytest.fixture
def environment(monkeypatch):
    """os.environ, to be changed, without what a test runner's own environment says."""
    changed = dict(os.environ)
    for name in ("GLOO_SOCKET_IFNAME", "VLLM_HOST_IP", "MASTER_ADDR", "WORLD_SIZE", "RANK"):
        changed.pop(name, None)
    monkeypatch.setattr(os, "environ", changed)
    return changed


def chosen(environment):
    distributed.choose_network()
    return environment.get("GLOO_SOCKET_IFNAME"), environment["VLLM_HOST_IP"]


@pytest.mark.parametrize("master", ["127.0.0.1", "localhost", "10.1.2.3", "a.name.nobody.knows"])
def test_ranks_on_one_machine_keep_to_loopback(environment, master):
    environment |= {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": master}
    assert chosen(environment) == ("lo", "127.0.0.1")


def test_ranks_on_several_machines_take_the_network_of_the_first(environment, monkeypatch):
    monkeypatch.setattr(distributed, "address_towards", lambda host: f"to {host}")
    monkeypatch.setattr(distributed.ipaddress, "ip_address", lambda text: distributed)
    monkeypatch.setattr(distributed, "is_loopback", False, raising=False)
    monkeypatch.setattr(distributed, "interface_of", lambda address: f"card {address}")
    environment |= {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "first"}
    assert chosen(environment) == ("card to first", "to first")


def test_what_the_user_has_set_is_kept(environment):
    environment |= {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "GLOO_SOCKET_IFNAME": "ib0"}
    assert chosen(environment) == ("ib0", "127.0.0.1")


def test_a_loopback_address_for_several_machines_is_refused(environment):
    environment |= {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "localhost"}
    with pytest.raises(SystemExit, match=r"^error: --master-addr localhost is an address of this"):
        distributed.choose_network()


def test_a_single_process_has_no_store_that_listens_and_waits_long(environment, monkeypatch):
    asked, set_later = {}, []
    monkeypatch.setattr(dist, "init_process_group", lambda _, **settings: asked.update(settings))
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", set_later.append)
    distributed.init_process_group()
    assert isinstance(asked["store"].underlying_store, dist.HashStore)
    assert asked["timeout"] <= datetime.timedelta(hours=1) < datetime.timedelta(hours=6)
    assert set_later == [distributed.TIMEOUT] and asked["timeout"] < distributed.TIMEOUT


def test_more_ranks_than_gpus_are_refused(environment):
    environment["LOCAL_WORLD_SIZE"] = "2"
    distributed.check_gpus(2)
    with pytest.raises(
        SystemExit, match=r"^error: .* 2 ranks .* has 1 GPU: .* --nproc_per_node=1$"
    ):
        distributed.check_gpus(1)


# --------------------------------------------------------------------------------- ranks that end

JOB = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
from common import distributed

def end(how):
    if how == "raises":
        raise ValueError("planted")
    if how == "ends with a sentence":
        raise SystemExit("error: planted")
    os.kill(os.getpid(), signal.SIGKILL)

def work(items):
    if distributed.rank() == 1 and sys.argv[1] != "is late":
        end(sys.argv[1])
    if distributed.rank() == 1:
        time.sleep(12)
    return items

def meet():  # else the time of slow imports would count as time to join
    import torch.distributed
    ready = [Path(__file__).with_name(f"{{os.getppid()}}-{{rank}}") for rank in (0, 1)]
    ready[int(os.environ["RANK"])].touch()
    while not all(path.exists() for path in ready):
        time.sleep(0.1)

with distributed.one_failure_message():
    if sys.argv[1] == "is late":  # the limits of a long run, divided by thousands
        distributed.TIME_TO_JOIN = distributed.datetime.timedelta(seconds=float(sys.argv[2]))
        distributed.TIMEOUT = distributed.datetime.timedelta(seconds=float(sys.argv[3]))
        meet()
    distributed.init_process_group()
    print("together", distributed.share_work([1, 2], work), flush=True)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "job.py"
    path.write_text(JOB.format(repository=str(REPOSITORY)))
    return path


def run_two_ranks(job, *words):
    """Exit status, lines on standard error before torchrun's own, seconds."""
    start = time.monotonic()
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(job), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = done.stderr.partition("torch/distributed/elastic")[0].splitlines()
    return done.returncode, lines, time.monotonic() - start


@pytest.mark.parametrize(
    "how, sentence",
    [("raises", "ValueError: planted"), ("ends with a sentence", "error: planted"), ("dies", None)],
)
def test_a_rank_that_ends_ends_the_other_with_its_own_message_on_top(job, how, sentence):
    status, lines, seconds = run_two_ranks(job, how)
    assert status != 0 and seconds < 300  # the limit for joining is 15 minutes
    said = [line for line in lines if "Error:" in line or "error:" in line]
    if sentence:
        assert said[0].endswith(sentence)
    assert not any("gloo" in line for line in said)  # of the rank that only noticed


def test_a_rank_that_is_late_is_waited_for_as_long_as_the_limit_says(job):
    """Rank 1 works for 12 seconds while rank 0 is done; the limit for joining is not for this."""
    status, lines, _ = run_two_ranks(job, "is late", "10", "60")
    assert status == 0, lines
    status, lines, _ = run_two_ranks(job, "is late", "60", "1")
    assert status != 0 and any("rank 0 lost the others" in line for line in lines)


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:1] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL"), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_a_lost_connection_is_told_from_an_error_of_ones_own(error, lost, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit if lost else RuntimeError), distributed.one_failure_message():
        raise error


# ------------------------------------------------------------------------------------ two machines


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_machines():
    """The names of two network namespaces, with the addresses 10.77.0.1 and 10.77.0.2."""
    key = uuid.uuid4().hex[:6]
    names = [f"hpt-{key}-{i}" for i in (1, 2)]
    if not shutil.which("ip"):
        pytest.skip("network namespaces need the program ip, of the package iproute2")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            cable = [[f"v{key}{i}", "netns", name] for i, name in enumerate(names, 1)]
            ip("link", "add", *cable[0], "type", "veth", "peer", "name", *cable[1])
            for i, name in enumerate(names, 1):
                ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", f"v{key}{i}")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", f"v{key}{i}", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here, which needs root: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run_on_two_machines(names, program, *words, seconds=600):
    """Run the README's command on both; [(exit status, standard output, standard error)]."""
    started = []
    for node_rank, name in enumerate(names):
        command = ["ip", "netns", "exec", name, *TORCHRUN, "--nnodes=2", "--nproc_per_node=1"]
        command += [f"--node-rank={node_rank}", "--master-addr=10.77.0.1", program, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(list(map(str, command)), text=True, **pipes))
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=seconds)
            ended.append((process.returncode, out, err))
    finally:
        for process in started:
            process.terminate()
    return ended


def test_a_rank_that_dies_ends_the_one_on_the_other_machine(job):
    with two_machines() as names:
        start = time.monotonic()
        (status, _, said), (other_status, _, _) = run_on_two_machines(names, job, "dies")
    assert status != 0 and other_status != 0 and time.monotonic() - start < 300
    assert "error: rank 0 lost the others, of which one has ended" in said
