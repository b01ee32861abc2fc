"""Runs that are killed, stopped or damaged, and go on: `main` with stand-ins for vLLM and verifier.

Each run is a process of its own, forked from a server that has imported everything. What is to go
wrong in it is a `fault`: a function below, which the process calls before `main`.
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig

import train_hpt
from common import checkpoint, distributed, flags, report
from rollout import Rollout
from test_upge import tiny_lm
from tools import soak
from toy import make

ROOT = Path(__file__).parents[1]
FLAGS = """
    --prompts-per-step 4 --samples-per-prompt 3 --seed 3 --max-prompt-tokens 8 --method ppo
    --max-response-tokens 8 --tokens-per-microbatch 30 --lr 1e-2 --critic-lr 3e-2 --warmup-steps 3
    --data made-up.jsonl --eval-data made-up.jsonl --eval-samples 2 --eval-every 2 --save-every 1
    --steps 4
"""
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["train_hpt", "test_upge", "torch._dynamo", "transformers.models.qwen2.modeling_qwen2"]
)


# ------------------------------------------------------------------------------------ stand-ins


class Sampler:
    """Stands in for rollout.Sampler: tokens depend on seed and, unless `blind`, weights."""

    tensor_parallel = 1
    blind = False  # set in the process of a run

    def __init__(self, model, **settings):
        self.weights = ""

    def load(self, named_tensors):
        digest = hashlib.sha256()
        for name, tensor in named_tensors:
            assert tensor.isfinite().all(), f"the sampler was given {name} with nan or inf"
            digest.update(tensor.numpy().tobytes())
        self.weights = "" if self.blind else digest.hexdigest()

    def sleep(self):
        pass

    def close(self):
        pass

    def generate(self, prompts, seeds, n, label=None):
        return [self.responses(seed, n) for seed in seeds]

    def stream(self, prompts, seeds, n):
        yield from enumerate(self.responses(seed, n) for seed in seeds)

    def responses(self, seed, n):
        draw = random.Random(distributed.derive_seed(seed, self.weights))
        group = []
        for _ in range(n):
            ids = [draw.randrange(3, 32) for _ in range(draw.randrange(2, 6))]
            group.append(Rollout(ids, [-3.0] * len(ids), False, str(ids[0])))
        return group


class Verifier:
    """Stands in for reward.Verifier: odd tokens are right."""

    timeouts = 0

    def __init__(self, function=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def score(self, responses, answers, each_done=None):
        return [float(int(response) % 2) for response in responses]


def free_port():
    """A TCP port of the loopback interface that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def made_up_inputs(args, method):
    """Stands in for train_hpt.load_inputs."""
    problems = []
    for i in range(6):
        ids = {"prompt_ids": [3 + i, 4], "demo_ids": [5, 6 + i, 7]}
        problems.append({"prompt": f"q{i}", "answer": "1", "demonstration": "1"} | ids)
    config = AutoConfig.from_pretrained(args.model)
    return train_hpt.Inputs(make.tokenizer(), config, problems, "", problems, "", [1])


def run_main(words, log, fault, rank, ranks, port):
    """In a process of its own: `main`, after the fault is prepared; its output goes to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    with (
        mock.patch("rollout.Sampler", Sampler),
        mock.patch("reward.Verifier", Verifier),
        mock.patch("train_hpt.load_inputs", made_up_inputs),
        mock.patch("train_hpt.print_plan"),
        mock.patch("common.report.closing_table"),
        distributed.one_failure_message(),
    ):
        args = flags.parse_training_args(words)
        if fault:
            fault[0](args, *fault[1:])
        train_hpt.main(args)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "base"
    tiny_lm().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base):
    """run(out, *flags, fault=None, ranks=1) runs `main` to its end: (exit status, output)."""

    def run(out, *more, fault=None, ranks=1, resume=True):
        words = [*FLAGS.split(), "--model", str(base), "--out", str(out), *map(str, more)]
        log, port = Path(f"{out}.log"), free_port()
        log.unlink(missing_ok=True)
        words += ["--resume"] if resume else []
        processes = []
        for rank in range(ranks):
            process = FORK.Process(target=run_main, args=(words, log, fault, rank, ranks, port))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(200)
            assert process.exitcode is not None, log.read_text()
            if process.exitcode:
                break
        for other in processes:  # as torchrun does when a rank has failed
            other.kill()
            other.join()
        return process.exitcode, log.read_text()

    return run


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """The directory of a run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    status, output = run(out, resume=False)
    assert status == 0, output
    return out


def lines(out, name="metrics.jsonl"):
    """The lines of a file without what the clock says."""
    rows = [json.loads(line) for line in (out / name).read_text().splitlines()]
    timed = ("time/", "perf/rollout", "perf/train")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def assert_same_run(out, wanted):
    for name in ("metrics.jsonl", "held_out.jsonl", "samples.jsonl"):
        assert lines(out, name) == lines(wanted, name)
    assert names(out) == names(wanted)
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (out / "final" / name).read_bytes() == (wanted / "final" / name).read_bytes()


def names(out):
    return sorted(path.name for path in out.iterdir())


# ------------------------------------------------------------------------------------------- faults


EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def at_event(out, number, what):
    """Call `what` at the n-th time that this process opens, renames or removes something in out."""
    seen = 0

    def hook(event, values):
        nonlocal seen
        if event in EVENTS and str(values[0]).startswith(str(out)):
            seen += 1
            if seen == number:
                what()

    sys.addaudithook(hook)


def kill(args, number):
    at_event(args.out, number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def send(args, step, *signals, rank=0):
    """Send signals to a rank of the run itself, while it works on a step."""
    generate, calls = Sampler.generate, 0

    def generate_and_send(sampler, *rest, **more):
        nonlocal calls
        calls += 1
        if calls == step and os.environ["RANK"] == str(rank):
            for one in signals:
                os.kill(os.getpid(), one)
        return generate(sampler, *rest, **more)

    Sampler.generate = generate_and_send


# ----------------------------------------------------------------------------------------- killed


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(run, straight, tmp_path):
    """At any moment of any step: between two lines of a file, in the middle of a checkpoint."""
    out, draw, kills = tmp_path / "run", random.Random(0), 0
    for _ in range(100):
        status, output = run(out, fault=(kill, draw.randrange(1, 110)))
        if status == 0:
            break
        assert status == -signal.SIGKILL, output
        kills += 1
    assert kills >= 8
    assert_same_run(out, straight)


def kill_while_removing(args):
    """At the first checkpoint that is removed, when one of its files is gone."""
    remove = shutil.rmtree

    def rmtree(path, *rest, **more):
        if Path(path, "config.json").exists():
            Path(path, "config.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        remove(path, *rest, **more)

    shutil.rmtree = rmtree


def test_a_checkpoint_that_is_being_removed_does_not_look_whole(run, straight, tmp_path):
    out = tmp_path / "run"
    status, output = run(out, fault=(kill_while_removing,))
    assert status == -signal.SIGKILL
    assert all((folder / "config.json").exists() for folder in out.glob("step_00000?"))
    assert run(out)[0] == 0
    assert_same_run(out, straight)


def test_lines_without_a_checkpoint_are_written_once(run, straight, tmp_path):
    """A run that dies before its first checkpoint begins again, its first evaluation included."""
    out = tmp_path / "run"
    status, _ = run(out, fault=(kill, 8))  # at the samples of step 1
    assert status == -signal.SIGKILL and lines(out) and lines(out, "held_out.jsonl")
    assert run(out)[0] == 0
    assert_same_run(out, straight)


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    assert [row["step"] for row in report.read_jsonl(path)] == [1, 2, 3]
    report.cut_logs(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    report.cut_logs(tmp_path, -1)
    assert not path.exists()


@pytest.fixture
def half(straight, tmp_path):
    """A copy of the straight run as it was after step 2, with lines of step 3 already written."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "step_000003")
    shutil.rmtree(out / "final")
    return out


# ------------------------------------------------------------------------------- told to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_in_hand(run, straight, tmp_path, number):
    out = tmp_path / "run"
    status, output = run(out, "--save-every", 0, fault=(send, 2, number))
    assert status == 128 + number
    assert f"{out}/step_000002 is saved. To go on: the same command with --out {out}" in output
    assert [row["step"] for row in lines(out)] == [0, 1, 2]
    assert run(out)[0] == 0
    for name in ("metrics.jsonl", "held_out.jsonl", "samples.jsonl"):
        assert lines(out, name) == lines(straight, name)


def test_a_signal_to_one_of_two_ranks_stops_both(run, tmp_path):
    out, fault = tmp_path / "run", (functools.partial(send, rank=1), 1, signal.SIGTERM)
    status, output = run(out, "--save-every", 0, "--steps", 2, fault=fault, ranks=2)
    assert status == 128 + signal.SIGTERM and "step_000001 is saved" in output


def test_what_is_read_lies_where_its_weight_lies(monkeypatch):
    """On a GPU, AdamW wants its count of steps there too. The device "meta" stands in for a GPU."""
    sizes = {"w": (2, 3), "w/step": (), "w/exp_avg": (2, 3)}
    stored = {f"policy/{name}": SimpleNamespace(size=torch.Size(s)) for name, s in sizes.items()}
    reader = SimpleNamespace(read_metadata=lambda: SimpleNamespace(state_dict_metadata=stored))
    monkeypatch.setattr(checkpoint.dcp, "HuggingFaceStorageReader", lambda folder: reader)
    monkeypatch.setattr(checkpoint.dcp, "load", lambda state, storage_reader: None)
    for device in ("meta", "cpu"):
        layer = torch.nn.Linear(3, 2, bias=False, device=device)
        network = SimpleNamespace(name="policy", optimizer=torch.optim.AdamW(layer.parameters()))
        network.named_parameters = lambda layer=layer: [("w", layer.weight)]
        checkpoint.read_state(Path("trainer"), [network])
        state = network.optimizer.state[layer.weight]
        assert {name: tensor.device.type for name, tensor in state.items()} == {
            "step": device,
            "exp_avg": device,
        }


def test_dropout_goes_on_as_it_would_have(run, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"attention_dropout": 0.5}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    more = ["--model", tmp_path / "base", "--steps", 2]
    assert run(tmp_path / "straight", *more)[0] == 0
    assert run(tmp_path / "run", *more, fault=(kill, 60))[0] == -signal.SIGKILL
    assert "going on after step 1" in run(tmp_path / "run", *more)[1]
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_at_once(run, tmp_path, second):
    """torchrun passes the first Ctrl-C on as it is, and the second as SIGTERM."""
    status, output = run(tmp_path / "run", fault=(send, 2, signal.SIGINT, second))
    assert status == 130 and "interrupted" in output and not list(tmp_path.glob("run/step_000002"))


def test_a_signal_in_the_last_step_changes_nothing(run, straight, tmp_path):
    out = tmp_path / "run"
    status, _ = run(out, "--save-every", 0, "--steps", 1, fault=(send, 1, signal.SIGTERM))
    assert status == 0 and (out / "final").is_dir()


@pytest.mark.parametrize("program", ["train_hpt.py", "evaluate.py"])
def test_an_interrupt_during_the_imports_shows_no_traceback(program):
    flags = ["--model", make.BASE, "--data", ROOT / "toy/held_out.jsonl"]
    line = [sys.executable, ROOT / program, *flags]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "interrupted\n"
    assert process.returncode == 130


def test_ranks_end_when_torchrun_is_killed(tmp_path):
    """The kernel kills them; torchrun has no time to."""
    program, number = tmp_path / "rank.py", tmp_path / "pid"
    program.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from common import distributed\n"
        "distributed.init_process_group()\n"
        f"open({str(number)!r}, 'w').write(f'{{os.getpid()}}\\n')\n"
        "time.sleep(60)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", program]
    with subprocess.Popen(torchrun, stderr=subprocess.DEVNULL) as launcher:
        wait_for(lambda: number.exists() and number.read_text().endswith("\n"))
        launcher.kill()
    rank = Path("/proc", number.read_text().strip(), "stat")  # "Z": it has ended
    wait_for(lambda: not rank.exists() or rank.read_text().split(")")[-1].split()[0] == "Z")


def join_twice(port):
    """Two attempts of a rank whose store outlives them, as that of torchrun does."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= single | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    outlives = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        distributed.init_process_group()
        store = dist.distributed_c10d._get_default_store()
        assert not store.check(["address"])
        store.set("address", "of a rank that will have died")
        dist.destroy_process_group()
    assert outlives.num_keys() > 2


def test_an_attempt_does_not_find_the_addresses_of_dead_ranks():
    process = FORK.Process(target=join_twice, args=(free_port(),))
    process.start()
    process.join(100)
    assert process.exitcode == 0


def wait_for(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ----------------------------------------------------------------------------------- what is saved


def test_the_newest_checkpoints_stay(run, straight, tmp_path):
    kept = [name for name in names(straight) if name.startswith("step_")]
    assert kept == ["step_000002", "step_000003"] and (straight / "final").is_dir()
    assert run(tmp_path / "all", "--keep", 0)[0] == 0
    kept = [name for name in names(tmp_path / "all") if name.startswith("step_")]
    assert kept == ["step_000001", "step_000002", "step_000003"]


def test_a_checkpoint_is_readable_for_everyone_and_holds_a_tied_weight_once(run, tmp_path):
    """The tied head has a copy of its own on each of two ranks."""
    out = tmp_path / "run"
    assert run(out, "--steps", 1, ranks=2)[0] == 0
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}
    stored = load_file(out / "final/model.safetensors").keys()
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_the_other_way_round(
    run, blind_run, tmp_path, before, after
):
    """The run is also prolonged: final/ of two steps becomes step_000002."""
    out, sampler = tmp_path / "run", (blind,)
    assert run(out, "--steps", 2, fault=sampler, ranks=before)[0] == 0
    status, output = run(out, fault=sampler, ranks=after)
    assert status == 0, output
    assert (out / "step_000002").is_dir()
    for got, wanted in zip(lines(out), lines(blind_run), strict=True):
        for name in wanted.keys() - {"perf/padding_frac"}:
            assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    for name in ("model.safetensors", "critic/model.safetensors"):
        got, wanted = (load_file(folder / "final" / name) for folder in (out, blind_run))
        for key in wanted:
            if "k_proj.bias" not in key:  # its gradient is 0 but for rounding
                # AdamW divides small gradients by small moments, and their rounding with them. Lost
                # moments would move weights by about the learning rate, 1e-2.
                assert torch.allclose(got[key], wanted[key], atol=5e-5), key


def blind(args):
    Sampler.blind = True  # else rounding of the weights would change the samples


@pytest.fixture(scope="module")
def blind_run(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("blind") / "run"
    assert run(out, fault=(blind,))[0] == 0
    return out


# ------------------------------------------------------------------------ damaged, changed, locked


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGE = [
    (cut, "trainer/shard-*", "bytes instead of"),
    (flip, "trainer/shard-*", "has other contents than were written"),
    (flip, "critic/model.safetensors", "has other contents than were written"),
    (Path.unlink, "model.safetensors", "model.safetensors is missing"),
    (cut, "trainer/checkpoint.json", "checkpoint.json is missing or cannot be read"),
]


@pytest.mark.parametrize("damage, file, sentence", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(straight, tmp_path, damage, file, sentence):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    [path] = (out / "step_000003").glob(file)
    damage(path)
    facts = checkpoint.facts_of(out / "step_000003")
    assert sentence in checkpoint.fault_of(out / "step_000003", facts)
    facts = checkpoint.facts_of(out / "step_000002")  # negative control
    assert checkpoint.fault_of(out / "step_000002", facts) is None


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(run, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "final")
    flip(out / "step_000003/model.safetensors")
    status, output = run(out)
    assert status == 0 and f"warning: {out}/step_000003 is damaged" in output
    assert f"going on after step 2, from {out}/step_000002" in output
    assert_same_run(out, straight)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(run, half):
    cut(half / "step_000002/trainer/checkpoint.json")
    before = lines(half)
    status, output = run(half)
    assert status == 1 and f"error: --resume: no checkpoint in {half} is whole" in output
    assert lines(half) == before


CHANGES = [
    (["--lr", "0.5"], "has --lr 0.01, not 0.5"),
    (["--seed", "4"], "has --seed 3, not 4"),
    (["--method", "rloo"], "has --method ppo, not rloo"),
    (["--prompts-per-step", "5"], "has --prompts-per-step 4, not 5"),
    (["--eval-data", "other.jsonl"], "has --eval-data made-up.jsonl, not other.jsonl"),
    (["--clip-eps", "inf"], "has --clip-eps None, not inf"),
    (["--chord-mu", "0.2", "0.1"], "has --chord-mu [0.1, 0.1], not [0.2, 0.1]"),
]


def parse(base, out, *more):
    words = [*FLAGS.split(), "--model", str(base), "--out", str(out)]
    return flags.parse_training_args([*words, "--resume", *more])


@pytest.mark.parametrize("change, sentence", CHANGES)
def test_a_flag_that_would_change_the_run_is_named(straight, base, capsys, change, sentence):
    with pytest.raises(SystemExit):
        parse(base, straight, *change)
    assert f"--resume: the run in {straight} {sentence}: give the same" in capsys.readouterr().err


def test_a_flag_that_does_not_change_the_run_may_differ(straight, base):
    more = "--steps 9 --save-every 3 --keep 5 --max-skipped 2 --eval-every 1 --tensor-parallel 2"
    assert parse(base, straight, *more.split(), "--tokens-per-microbatch", "50").steps == 9


def test_a_run_from_before_there_was_a_flag_goes_on(straight, base, tmp_path):
    config = json.loads((straight / "config.json").read_text())
    del config["flags"]["chord_mu"], config["flags"]["chord_steps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parse(base, tmp_path).chord_mu == [0.1, 0.1]


def test_where_there_is_no_run_to_go_on_with(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        flags.parse_training_args(["--resume"])
    assert "--resume needs --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flags.parse_training_args(["--out", str(tmp_path)])
    assert "or go on with the run in it with --resume" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit):
        parse(base, tmp_path)
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        parse(base, tmp_path)
    assert "config.json cannot be read" in capsys.readouterr().err


def test_fewer_steps_than_are_done(run, straight):
    status, output = run(straight, "--steps", 3)
    assert status == 1 and f"error: --steps 3: {straight}/final is at step 4" in output


def test_other_problems_than_the_runs(run, half):
    facts = json.loads((half / "step_000002" / checkpoint.FACTS).read_text())
    report.write_json(half / "step_000002" / checkpoint.FACTS, facts | {"data": "0"})
    status, output = run(half)
    assert status == 1 and "the problems of --data are not those" in output


def test_two_runs_do_not_write_to_one_directory(run, half):
    import fcntl

    with open(half / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, output = run(half)
    assert status == 1 and f"error: --out {half}: another run is writing there" in output


# ---------------------------------------------------------------------------------- a full disk


def limit_files(size):
    """As a full disk, which needs root: no file of this process can become larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_disk(args, step, size):
    """No file can be larger than `size` from the beginning of a step's checkpoint."""
    make = Path.mkdir

    def mkdir(path, *rest, **more):
        if path.parent.name == f"step_{step:06d}.partial":
            limit_files(size)
        make(path, *rest, **more)

    Path.mkdir = mkdir


@pytest.mark.parametrize("size, ranks", [(10_000, 1), (10_000, 2), (30_000, 1)])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    run, straight, tmp_path, size, ranks
):
    """The trainer's state is larger than both sizes, the model only than the first."""
    out = tmp_path / "run"
    status, output = run(out, fault=(fill_disk, 2, size), ranks=ranks)
    assert status == 1
    sentence = f"error: the checkpoint {out}/step_000002 cannot be written: File too large; the "
    assert output.count(sentence) == 1 and "Traceback" not in output
    assert [name for name in names(out) if name.startswith("step_")] == ["step_000001"]
    if ranks == 1:
        assert run(out)[0] == 0
        assert_same_run(out, straight)


def test_machines_that_do_not_share_the_directory(tmp_path):
    with pytest.raises(OSError, match="file system that all machines share"):
        checkpoint.write_state(tmp_path / "step_000002.partial/trainer", [])


def append_to_full_disk(path, size):
    limit_files(size)
    with pytest.raises(SystemExit, match=rf"error: {path} cannot be written: File too large"):
        report.append_jsonl(path, [{"step": 2, "x": "y" * 100}, {"step": 2}])


@pytest.mark.parametrize("room", [0, 50, 130])
def test_a_full_disk_leaves_no_half_line(tmp_path, room):
    path = tmp_path / "metrics.jsonl"
    report.append_jsonl(path, [{"step": 1}])
    process = FORK.Process(target=append_to_full_disk, args=(path, path.stat().st_size + room))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.read_text() == '{"step": 1}\n'


# -------------------------------------------------------------------------------- not a number


def spoil_weights(args, update, value):
    """One weight of the policy, or moment if the value is "moment", is lost in an update."""
    step, updates = torch.optim.AdamW.step, 0

    def spoiled(optimizer, *rest):
        nonlocal updates
        step(optimizer, *rest)
        updates += 1
        if updates == update:
            parameter = optimizer.param_groups[0]["params"][3]
            moment = optimizer.state[parameter]["exp_avg_sq"]
            tensor = moment if value == "moment" else parameter.detach()
            tensor.to_local()[-1] = math.inf if value == "moment" else value

    torch.optim.AdamW.step = spoiled


# Policy and critic take turns: two updates of each per step.
@pytest.mark.parametrize("update, value", [(13, math.nan), (16, math.inf), (13, "moment")])
def test_weights_that_are_not_finite_are_neither_saved_nor_sampled_from(
    run, tmp_path, update, value
):
    out = tmp_path / "run"
    status, output = run(out, fault=(spoil_weights, update, value))
    name, number = ("policy", (update + 1) // 2) if update % 2 else ("critic", update // 2)
    assert status == 1 and f"error: optimizer step {number} of the {name} made lm." in output
    assert "AssertionError" not in output  # of the sampler
    assert names(out)[-3:] == ["samples.jsonl", "step_000002", "step_000003"]
    assert [row["step"] for row in lines(out)] == [0, 1, 2, 3]


SPOILT = [7, 8, 9]  # the first tokens of responses that are spoilt


def spoil_advantages(args, spoilt):
    """The advantage of a response whose first token is in `spoilt` is nan."""
    build = train_hpt.build_sequences

    def build_spoilt(*rest):
        by_row = build(*rest)
        for row, sequences in by_row.items():
            by_row[row] = [
                s._replace(advantage=math.nan) if s.response_ids[0] in spoilt else s
                for s in sequences
            ]
        return by_row

    train_hpt.build_sequences = build_spoilt


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_update_says_what_it_trained_on(run, tmp_path, ranks):
    """Only the prompts whose gradient is not finite; the others are innocent."""
    out = tmp_path / "run"
    fault = (spoil_advantages, SPOILT)
    status, output = run(out, "--method", "dr_grpo", fault=fault, ranks=ranks)
    assert status == 0, output
    skipped = {row["step"]: row["optim/skipped"] for row in lines(out) if row["step"]}
    rows = lines(out, "skipped.jsonl")
    assert {row["step"] for row in rows} == {step for step, count in skipped.items() if count}
    assert 0 < len({row["update"] for row in rows}) == sum(skipped.values()) < 8
    groups = {}
    for row in rows:
        assert row["row"] == "dr_grpo" and row["network"] == "policy"
        assert (row["advantage"] is None) == (row["response_ids"][0] in SPOILT)
        assert row["prompt"] and row["response"]
        groups.setdefault((row["update"], *row["prompt_ids"]), []).append(row["response_ids"])
    for group in groups.values():  # without those that have no signal, which are not computed
        assert len(group) <= 3 and any(response[0] in SPOILT for response in group)


def test_too_many_skipped_updates_in_a_row_end_the_run(run, tmp_path):
    out, fault = tmp_path / "run", (spoil_advantages, range(32))
    status, output = run(out, "--method", "dr_grpo", "--max-skipped", 4, fault=fault)
    assert status == 1
    assert "error: the last 6 optimizer steps of the policy were skipped" in output
    assert [row["step"] for row in lines(out)] == [0, 1, 2, 3]
    assert len(lines(out, "skipped.jsonl")) == 3 * 4 * 3  # every rollout of three steps
    # The count goes on where the run was stopped.
    status, output = run(out, "--method", "dr_grpo", "--max-skipped", 5, fault=fault)
    assert "error: the last 6 optimizer steps of the policy were skipped" in output


# ------------------------------------------------------------------------------------- the soak


def test_the_soak_sees_a_line_and_a_weight_that_differ(straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    report.cut_logs(out, 4)  # nothing is cut
    rows = [row | {"time/step": 0.0} for row in report.read_jsonl(out / "metrics.jsonl")]
    (out / "metrics.jsonl").unlink()
    report.append_jsonl(out / "metrics.jsonl", rows)
    assert soak.differences(out, straight) == []
    rows[-1]["optim/grad_norm"] += 1e-9
    (out / "metrics.jsonl").unlink()
    report.append_jsonl(out / "metrics.jsonl", rows)
    flip(out / "final/model.safetensors")
    assert soak.differences(out, straight) == [
        f"{out}/metrics.jsonl differs from that of {straight}",
        f"{out}/final differs from that of {straight}",
    ]
    assert soak.last_step(out) == 4 and soak.newest(out) == "final"


def test_the_soak_finds_what_a_run_leaves_behind():
    sleeper = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '30'])"]
    with subprocess.Popen(sleeper) as process:
        wait_for(lambda: len(soak.descendants(process.pid)) == 2)
        _, grandchild = soak.descendants(process.pid)
        process.kill()
        process.wait()
    assert not soak.is_alive(process.pid) and soak.is_alive(grandchild)
    os.kill(grandchild, signal.SIGKILL)
    wait_for(lambda: not soak.is_alive(grandchild))
