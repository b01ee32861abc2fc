"""Checkpoints: all that a run needs in order to go on as if it had never stopped.

    runs/NAME/step_000100/            a plain Hugging Face directory, for vLLM and evaluate.py
    runs/NAME/step_000100/critic/     the same of PPO's critic
    runs/NAME/step_000100/trainer/    weights and Adam's moments of the policy and of PPO's critic,
                                      each rank's shards, which any number of ranks can read

final/ has the same form. Nothing random is stored, since everything random derives from the seed
and the step. `save` writes into step_000100.partial/ and renames it when all of it is there: so a
directory without ".partial" is whole.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from common import distributed, report

KEEP = 2  # step_* directories stay, the newest
STEP = "trainer/step.txt"


@contextlib.contextmanager
def as_one_sentence(what: str):
    """Turn what a `with` block raises into a SystemExit, whatever it is.

    Errors of the disk, of torch and of transformers are of many kinds.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        last_line = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise SystemExit(f"error: {what}: {last_line}") from error


def save(out: Path, step: int, last_step: int, networks: list, tokenizer, end_token_ids) -> Path:
    """Write the checkpoint of a step, remove older ones, and return its directory.

    Every rank calls this, after the lines of the step are in the run's .jsonl files.

    Args:
        networks: model.Network objects, the policy first.
        tokenizer, end_token_ids: for the Hugging Face directory.
    """
    directory = out / ("final" if step == last_step else f"step_{step:06d}")
    partial = directory.with_name(directory.name + ".partial")
    with as_one_sentence(
        f"the checkpoint of step {step} cannot be written, those before are whole"
    ):
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "trainer").mkdir(parents=True)
            (partial / STEP).write_text(f"{step}\n")
        dist.barrier()
        for network in networks:  # the models come first: they are worth more than the moments
            folder = partial if network is networks[0] else partial / network.name
            network.save(folder, tokenizer, end_token_ids)
        dcp.save(state_of(networks), checkpoint_id=partial / "trainer")
        dist.barrier()
        if distributed.rank() == 0:
            remove(directory)
            partial.rename(directory)
            steps = [
                path for _, path in sorted(checkpoints_of(out).items()) if path.name != "final"
            ]
            for old in steps[:-KEEP]:
                remove(old)
    dist.barrier()
    return directory


def try_to_save(out: Path, network, tokenizer, end_token_ids) -> None:
    """Write what a checkpoint holds beside tensors, before the first step; then remove it.

    Raises:
        SystemExit: something cannot be written, which would lose the trained model.
    """
    if distributed.rank() == 0:
        trial, renamed = out / "trial.partial", out / "trial.old.partial"
        for leftover in (trial, renamed):  # of a run that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        with as_one_sentence(f"a model could not be saved in {out}"):
            trial.mkdir()
            network.write(trial, tokenizer, end_token_ids, weights={})
            nothing = {"nothing": torch.zeros(1)}
            dcp.save(nothing, checkpoint_id=trial / "trainer", no_dist=True)
            trial.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def remove(directory: Path) -> None:
    """Remove a directory, if it is there. It loses its name first, so that it never looks whole."""
    if not os.path.lexists(directory):  # unlike exists(), true for a link to nothing
        return
    doomed = directory.with_name(directory.name + ".old.partial")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        if doomed.is_symlink():
            doomed.unlink()
        else:
            shutil.rmtree(doomed)
    except OSError as error:
        report.say(f"warning: {directory} cannot be removed: {error}")


def state_of(networks: list) -> dict:
    """{name of a network: its sharded weights and Adam's moments}, by torch's own helper."""
    state = {}
    for network in networks:
        weights, moments = get_state_dict(network, network.optimizer)
        state[network.name] = {"weights": weights, "moments": moments}
    return state


def resume(out: Path, networks: list, last_step: int) -> int:
    """Load the newest checkpoint of a run, if there is one; return its step, else 0.

    Lines of later steps are cut off the run's .jsonl files. Every rank calls this.

    Raises:
        SystemExit: the checkpoint cannot be read, or has more steps than `last_step`.
    """
    found = checkpoints_of(out)
    step = max(found, default=0)
    directory = found.get(step)
    if step > last_step:
        raise SystemExit(f"error: --steps {last_step}: {directory} has done {step} steps already")
    if directory:
        load(directory, networks)
    dist.barrier()  # all ranks have read it
    if distributed.rank() == 0:
        for path in out.iterdir():
            if re.fullmatch(r"(final|step_\d+|trial)(\.old)?\.partial", path.name):
                shutil.rmtree(path, ignore_errors=True)
        if directory and step < last_step and directory.name == "final":
            directory = directory.rename(out / f"step_{step:06d}")  # the run gets another final/
        report.cut_logs(out, step if directory else -1)
        where = f"going on after step {step}, from {directory}"
        report.say(where if directory else f"no checkpoint in {out}: the run begins at step 1")
    dist.barrier()
    return step


def checkpoints_of(out: Path) -> dict[int, Path]:
    """{step: directory} of the checkpoints of a run; what else lies there is not looked at."""
    found = {}
    for path in out.iterdir():
        if re.fullmatch(r"final|step_\d+", path.name) and (path / STEP).is_file():
            step = (path / STEP).read_text().strip()
            if step.isdecimal():
                found[int(step)] = path
    return found


def load(directory: Path, networks: list) -> None:
    """Load weights and moments in place; each rank reads what its shards need."""
    state = state_of(networks)
    with as_one_sentence(
        f"{directory} cannot be read; remove it, and --resume takes the one before"
    ):
        dcp.load(state, checkpoint_id=directory / "trainer")
    for network in networks:
        parts = state[network.name]
        set_state_dict(
            network,
            network.optimizer,
            model_state_dict=parts["weights"],
            optim_state_dict=parts["moments"],
        )
