"""Runs that are killed or stopped, and go on: `main` with stand-ins for sampler and verifier.

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
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import tiny_lm
from programs import ROOT, command, is_alive, metrics, wait_for
from safetensors.torch import load_file
from transformers import AutoConfig

import train_hpt
from common import checkpoint, distributed, flags, report
from rollout import Rollout
from toy import make

KILLS = 5  # of the slow test
FLAGS = """
    --prompts-per-step 4 --samples-per-prompt 3 --seed 3 --max-prompt-tokens 8 --method ppo
    --max-response-tokens 8 --tokens-per-microbatch 30 --lr 1e-2 --critic-lr 3e-2 --warmup-steps 3
    --data made-up.jsonl --eval-data made-up.jsonl --eval-samples 2 --eval-every 2 --save-every 1
    --steps 4
"""
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["train_hpt", "helpers", "torch._dynamo", "transformers.models.qwen2.modeling_qwen2"]
)
FILES = ("metrics.jsonl", "held_out.jsonl", "samples.jsonl")


# ------------------------------------------------------------------------------------ stand-ins


class Sampler:
    """Stands in for rollout.Sampler: tokens depend on seed and, unless `blind`, on the weights."""

    tensor_parallel = 1
    blind = False  # set in the process of a run

    def load(self, named_tensors):
        digest = hashlib.sha256()
        for _, tensor in named_tensors:
            digest.update(tensor.numpy().tobytes())
        self.weights = "" if self.blind else digest.hexdigest()

    def sleep(self):
        pass

    def close(self):
        pass

    def generate(self, prompts, seeds, n, with_logp=True):
        return [self.responses(seed, n) for seed in seeds]

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

    def score(self, responses, answers):
        return [float(int(response) % 2) for response in responses]


def made_up_inputs(args, method):
    """Stands in for train_hpt.load_inputs."""
    problems = []
    for i in range(6):
        ids = {"prompt_ids": [3 + i, 4], "demo_ids": [5, 6 + i, 7]}
        problems.append({"prompt": f"q{i}", "answer": "1", "demonstration": "1"} | ids)
    config = AutoConfig.from_pretrained(args.model)
    return train_hpt.Inputs(make.tokenizer(), config, problems, "", problems, [1])


def run_main(words, log, fault, rank, ranks, port):
    """In a process of its own: `main`, after the fault is prepared; its output goes to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    with (
        mock.patch("rollout.build", lambda *_, **__: Sampler()),
        mock.patch("reward.Verifier", Verifier),
        mock.patch("train_hpt.load_inputs", made_up_inputs),
        distributed.one_sentence(),
    ):
        args = flags.parse_training_args(words)
        if fault:
            fault[0](args, *fault[1:])
        train_hpt.main(args)


def free_port():
    """A TCP port of the loopback interface that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
            process.join(300)
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


def names(out):
    """What lies in a run's directory, but for lines that a run without a checkpoint began with."""
    return sorted(path.name for path in out.iterdir() if path.suffix != ".old")


def assert_same_lines(out, wanted):
    assert metrics(out) == metrics(wanted)
    for name in FILES[1:]:
        assert (out / name).read_bytes() == (wanted / name).read_bytes()


def assert_same_run(out, wanted):
    """Lines, checkpoints and final weights are equal, to the bit."""
    assert_same_lines(out, wanted)
    assert names(out) == names(wanted)
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (out / "final" / name).read_bytes() == (wanted / "final" / name).read_bytes()


# ------------------------------------------------------------------------------------------- faults


EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def kill(args, number, within=""):
    """kill -9 at the n-th time that the run opens, renames or removes something in `within`."""
    seen, folder = 0, str(Path(args.out, within))

    def hook(event, values):
        nonlocal seen
        if event in EVENTS and str(values[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def send(args, step, *signals, rank=0):
    """Send signals to a rank of the run itself, while it samples for a step."""
    sample = train_hpt.sample_rollouts

    def sample_and_send(sampler, problems, number, *rest):
        if number == step and os.environ["RANK"] == str(rank):
            for one in signals:
                os.kill(os.getpid(), one)
        return sample(sampler, problems, number, *rest)

    train_hpt.sample_rollouts = sample_and_send


def kill_while_removing(args):
    """When the first of the files of a checkpoint that is too old is gone."""
    remove = shutil.rmtree

    def rmtree(path, *rest, **more):
        if Path(path, "config.json").exists():
            Path(path, "config.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        remove(path, *rest, **more)

    shutil.rmtree = rmtree


# ----------------------------------------------------------------------------------------- killed

MOMENTS = {
    "early in the first checkpoint": (kill, 3, "step_000001.partial"),
    "while step 3 samples": (send, 3, signal.SIGKILL),
    "late in the second checkpoint": (kill, 12, "step_000002.partial"),
    "while it removes a checkpoint": (kill_while_removing,),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(run, straight, tmp_path, moment):
    out = tmp_path / "run"
    status, output = run(out, fault=MOMENTS[moment])
    assert status == -signal.SIGKILL, output
    if "checkpoint" in moment:
        assert list(out.glob("*.partial"))
    for folder in checkpoint.checkpoints_of(out).values():  # what looks whole is
        assert (folder / "config.json").exists() and (folder / "critic/config.json").exists()
    status, output = run(out)
    assert status == 0, output
    assert_same_run(out, straight)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(run, straight, tmp_path):
    """At any moment: between two lines of a file, in the middle of a checkpoint or of a step."""
    out, draw, kills = tmp_path / "run", random.Random(0), 0
    while kills < KILLS or not (out / "final").exists():
        fault = (kill, draw.randrange(1, 130)) if kills < KILLS else None
        status, output = run(out, fault=fault)
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), output
        if status == 0 and kills < KILLS:  # it had come to its end before the moment
            assert_same_run(out, straight)
            shutil.rmtree(out)
    assert_same_run(out, straight)


def test_lines_after_the_checkpoint_and_half_lines_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    report.cut_logs(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    report.cut_logs(tmp_path, -1)
    assert not path.exists() or path.read_text() == ""


# ------------------------------------------------------------------------------- told to stop


def test_a_signal_saves_the_step_in_hand(run, straight, tmp_path):
    out = tmp_path / "run"
    status, output = run(out, "--save-every", 0, fault=(send, 2, signal.SIGTERM))
    assert status == 128 + signal.SIGTERM, output
    assert f"{out}/step_000002 is saved: add --out {out} --resume to go on" in output
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]
    assert run(out)[0] == 0
    assert_same_lines(out, straight)


def test_a_signal_to_one_of_two_ranks_stops_both(run, tmp_path):
    out, fault = tmp_path / "run", (functools.partial(send, rank=1), 1, signal.SIGTERM)
    status, output = run(out, "--save-every", 0, "--steps", 2, fault=fault, ranks=2)
    assert status == 128 + signal.SIGTERM and "step_000001 is saved" in output


def test_a_second_interrupt_ends_at_once(run, tmp_path):
    status, _ = run(tmp_path / "run", fault=(send, 2, signal.SIGINT, signal.SIGINT))
    assert status != 0 and not list(tmp_path.glob("run/step_000002"))


# ----------------------------------------------------------------------------------- what is saved


def test_the_newest_two_checkpoints_stay(straight):
    kept = [name for name in names(straight) if (straight / name).is_dir()]
    assert kept == ["final", "step_000002", "step_000003"]


def blind(args):
    Sampler.blind = True  # else rounding of the weights would change the samples


@pytest.fixture(scope="module")
def blind_run(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("blind") / "run"
    assert run(out, fault=(blind,))[0] == 0
    return out


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_the_other_way_round(
    run, blind_run, tmp_path, before, after
):
    """The run is also prolonged: the first one ends after two steps."""
    out = tmp_path / "run"
    assert run(out, "--steps", 2, fault=(blind,), ranks=before)[0] == 0
    status, output = run(out, fault=(blind,), ranks=after)
    assert status == 0 and "going on after step 2" in output, output
    for got, wanted in zip(metrics(out), metrics(blind_run), strict=True):
        for name in wanted.keys() - {"perf/padding_frac"}:
            assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    stored = load_file(out / "final/model.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored  # it is tied
    for name in ("model.safetensors", "critic/model.safetensors"):
        got, wanted = (load_file(folder / "final" / name) for folder in (out, blind_run))
        for key in wanted:
            if "k_proj.bias" not in key:  # its gradient is 0 but for rounding
                # AdamW divides small gradients by small moments, and their rounding with them. Lost
                # moments would move weights by about the learning rate, 1e-2.
                assert torch.allclose(got[key], wanted[key], atol=5e-5), key


def spoil_weights(args, update):
    """One weight of the policy becomes nan in an update."""
    step, updates = torch.optim.AdamW.step, 0

    def spoiled(optimizer, *rest):
        nonlocal updates
        step(optimizer, *rest)
        updates += 1
        if updates == update:
            optimizer.param_groups[0]["params"][3].detach().to_local()[-1] = math.nan

    torch.optim.AdamW.step = spoiled


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    """The critic's updates count, too: four per step."""
    status, output = run(tmp_path / "run", fault=(spoil_weights, 11))
    assert status == 1 and "of the policy is infinite or nan, and is not saved" in output
    assert sorted(checkpoint.checkpoints_of(tmp_path / "run")) == [1, 2]


# ------------------------------------------------------------------------------ damaged, changed


def test_a_checkpoint_that_cannot_be_read_is_named(run, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "final")  # the newest is then that of step 3
    [path] = (out / "step_000003/trainer").glob("*.distcp")
    os.truncate(path, path.stat().st_size // 2)
    before = metrics(out)
    status, output = run(out)
    sentence = f"error: {out}/step_000003 cannot be read; remove it"
    assert status == 1 and output.count(sentence) == 1 and "Traceback" not in output
    assert metrics(out) == before  # nothing is cut
    shutil.rmtree(out / "step_000003")  # as the sentence says
    assert run(out)[0] == 0
    assert_same_run(out, straight)


def test_fewer_steps_than_are_done(run, straight):
    status, output = run(straight, "--steps", 3)
    assert status == 1 and f"error: --steps 3: {straight}/final has done 4 steps" in output


CHANGES = {
    "--lr 0.5": "has --lr 0.01",
    "--method rloo": "has --method ppo",
    "--eval-data other.jsonl": "has --eval-data made-up.jsonl",
    "--clip-eps inf": "has --clip-eps None",
}


def parse(base, out, *more):
    words = [*FLAGS.split(), "--model", str(base), "--out", str(out)]
    return flags.parse_training_args([*words, "--resume", *more])


@pytest.mark.parametrize("change", CHANGES)
def test_a_flag_that_would_change_the_run_is_named(straight, base, capsys, change):
    with pytest.raises(SystemExit):
        parse(base, straight, *change.split())
    sentence = f"--resume: the run in {straight} {CHANGES[change]}"
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_flag_that_does_not_change_the_run_may_differ(straight, base):
    more = "--steps 9 --save-every 3 --eval-every 1 --tokens-per-microbatch 50"
    assert parse(base, straight, *more.split()).steps == 9


def test_a_cosine_ends_where_it_was_said_to_end(straight, base, tmp_path, capsys):
    config = json.loads((straight / "config.json").read_text())
    config["flags"]["lr_schedule"] = "cosine"
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--lr-schedule", "cosine"]
    steps = config["flags"]["steps"]
    assert parse(base, tmp_path, *words).steps == steps
    with pytest.raises(SystemExit):
        parse(base, tmp_path, *words, "--steps", str(steps + 1))
    assert f"has --steps {steps}" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the real program


def descendants(pid):
    """The numbers of all processes that a process has started, and those that these started."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *descendants(child)]
    return found


@pytest.mark.slow
def test_kill_9_of_torchrun_leaves_nobody_and_the_run_goes_on_from_any_folder(toy_run, tmp_path):
    out = tmp_path / "run"
    line = command("train_hpt.py", *toy_run.flags, "--out", out, "--resume", ranks=1)
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL) as launcher:
        wait_for(lambda: (out / "step_000004").exists() or launcher.poll() is not None)
        left = descendants(launcher.pid)
        launcher.kill()
    assert len(left) > 2  # the rank, and workers of the verifier
    wait_for(lambda: not any(map(is_alive, left)))
    subprocess.run(line, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert metrics(out) == metrics(toy_run.out)
    for name in ("held_out.jsonl", "samples.jsonl", "final/model.safetensors"):
        assert (out / name).read_bytes() == (toy_run.out / name).read_bytes()
