"""Checkpoints: all that a run needs in order to go on as if it had never stopped.

    runs/NAME/step_000100/            a plain Hugging Face directory, for vLLM and evaluate.py
    runs/NAME/step_000100/trainer/    float32 weights and Adam's moments of the policy and of PPO's
                                      critic, written by all ranks (torch.distributed.checkpoint,
                                      as safetensors), so that another number of ranks can read them
    .../trainer/checkpoint.json       the step, the counters, and the size and SHA-256 of every file

final/ has the same form. Nothing random is stored, since everything random derives from the seed
and the step. `save` writes into step_000100.partial/ and renames it when everything is on the disk:
so a directory without ".partial" is whole, unless the disk damages it, which the digests tell.
`resume` takes the newest whole one, and cuts the run's .jsonl files back to its step.
"""

import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from common import report, terminal
from common.distributed import rank, share_work, world_size

PARTIAL = ".partial"  # ends the name of a directory that is being written or removed
FACTS = "trainer/checkpoint.json"
FILE_SIZE = 2**32  # bytes of a file of the trainer's state, which is built in memory
# What a full or broken disk raises: Python, torch and safetensors have errors of their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


def directory_of(out: Path, step: int, last_step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return out / ("final" if step == last_step else f"step_{step:06d}")


# ------------------------------------------------------------------------------------------- saving


def save(directory: Path, step: int, networks: list, inputs, keep: int) -> None:
    """Write the checkpoint of a step, and remove all but the newest `keep` step_* beside it.

    Every rank calls this.

    Args:
        directory: its name, as `directory_of` gives it. One that is there already is replaced.
        step: the step that has just been finished; its lines stand in the .jsonl files.
        networks: model.Network objects, the policy first.
        inputs: train_hpt.Inputs; the checkpoint holds the tokenizer and a digest of the problems.
        keep: how many step_* stay; 0: all.

    Raises:
        SystemExit: something cannot be written, on any rank. The partial checkpoint is removed.
    """
    partial = directory.with_name(directory.name + PARTIAL)
    attempt = functools.partial(together, partial)
    attempt(begin, partial)
    attempt(write_state, partial / "trainer", networks)
    for network in networks:
        folder = partial if network is networks[0] else partial / network.name
        attempt(network.save, folder, inputs.tokenizer, inputs.end_token_ids)
    facts = {
        "step": step,
        "ranks": world_size(),
        "data": digest_of_problems(inputs.problems),
        "counters": {network.name: network.counters() for network in networks},
        "files": digests_of(partial),
    }
    attempt(finish, partial, directory, facts, keep)


def together(partial: Path, work, *values) -> None:
    """Call `work` on every rank; if it fails on one, remove `partial` and end all of them."""
    failure = None
    try:
        work(*values)
    except WRITE_ERRORS as error:
        failure = reason(error)
    failures = [None] * world_size()
    dist.all_gather_object(failures, failure)
    failure = next(filter(None, failures), None)
    if failure:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise SystemExit(
            f"error: the checkpoint {partial.with_suffix('')} cannot be written: {failure}; the "
            "one before it is untouched: free some space, and go on with --resume"
        )


def begin(partial: Path) -> None:
    """Make an empty directory, on rank 0."""
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer").mkdir(parents=True)


def finish(partial: Path, directory: Path, facts: dict, keep: int) -> None:
    """Write checkpoint.json, give the directory its name, and remove old ones, on rank 0."""
    if rank() == 0:
        report.write_json(partial / FACTS, facts)
        flush(partial, directory.parent)
        rename(partial, directory)
        prune(directory.parent, keep)


def reason(error: BaseException) -> str:
    """What is wrong, in words; torch wraps the errors of the ranks into another."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def write_state(folder: Path, networks: list) -> None:
    """Write the weights and the optimizers' state; each rank writes its own shards."""
    if not folder.is_dir():  # rank 0 has made it
        raise OSError(errno.ENOENT, "--out must be in a file system that all machines share")
    state = {}
    for network in networks:
        state |= state_of(network)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    files = 1 + size // world_size() // FILE_SIZE
    file_of = {name: 1 + i * files // len(state) for i, name in enumerate(state)}
    writer = dcp.HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True)
    dcp.save(state, storage_writer=writer)


def state_of(network) -> dict[str, torch.Tensor]:
    """{name: sharded tensor}: "policy/w" is a weight w, "policy/w/exp_avg" a moment of it.

    A weight that no optimizer step has moved has no moments.
    """
    state = {}
    for name, parameter in network.named_parameters():
        state[f"{network.name}/{name}"] = parameter.detach()
        for key, moment in network.optimizer.state.get(parameter, {}).items():
            state[f"{network.name}/{name}/{key}"] = moment
    return state


def digests_of(folder: Path) -> dict[str, list]:
    """{path within the folder: [bytes, SHA-256]} of every file, which is then on the disk.

    Each rank reads a share of the files; every rank calls this and gets all digests.
    """
    names = [None]
    if rank() == 0:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [[str(path.relative_to(folder)) for path in files if path != folder / FACTS]]
    dist.broadcast_object_list(names)
    digests = share_work(names[0], lambda share: [digest_of(folder / name) for name in share])
    return dict(zip(names[0], digests))


def digest_of(path: Path) -> list | None:
    """[bytes, SHA-256] of a file, which is on the disk when this returns; None without a file."""
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:
        return None


def flush(partial: Path, out: Path) -> None:
    """Put on the disk what `digest_of` did not: the run's .jsonl files, and all names.

    The lines of a step are on the disk before its checkpoint has its name. So a checkpoint implies
    its lines.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in [*partial.rglob("*"), partial]:
        if path.is_file():
            path.chmod(0o666 & ~mask)  # safetensors makes its files readable for the owner alone
    logs = [out / name for name in report.LOGS if (out / name).exists()]
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for path in [*logs, partial / FACTS, *folders, partial]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a directory its name; one that has this name is removed first."""
    if target.exists():
        remove(target)
    source.rename(target)
    sync(target.parent)


def remove(directory: Path) -> None:
    """Remove a directory. It loses its name first, so that it never looks whole when it is not."""
    doomed = directory.with_name(directory.name + ".old" + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def prune(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` step_*; 0 keeps all."""
    steps = sorted(path for path in out.glob("step_*") if path.suffix != PARTIAL)
    for path in steps[:-keep] if keep else []:
        remove(path)


# ----------------------------------------------------------------------------------------- resuming


def resume(out: Path, networks: list, inputs, last_step: int) -> int:
    """Load the newest whole checkpoint of a run, if there is one; return its step, else 0.

    Lines of later steps are cut off the run's .jsonl files. The checkpoint is named final/ if its
    step is the last one, else step_*. Every rank calls this; arguments as in `save`.

    Raises:
        SystemExit: no checkpoint is whole, or the newest has more steps than `last_step`, or the
            problems or the networks are not those of the run.
    """
    found = newest_whole(out)
    if found is None:
        if rank() == 0:
            report.cut_logs(out, -1)
        return 0
    directory, facts = found
    step = facts["step"]
    if step > last_step:
        raise SystemExit(
            f"error: --steps {last_step}: {directory} is at step {step}: give more --steps, "
            "or take that directory as the model"
        )
    if facts["data"] != digest_of_problems(inputs.problems):
        raise SystemExit(
            f"error: --resume: the problems of --data are not those that {out} began with: give "
            "the file as it was, or start a new run"
        )
    read_state(directory / "trainer", networks)
    for network in networks:
        network.set_counters(facts["counters"][network.name])
    dist.barrier()  # all ranks have read it
    if rank() == 0:
        name = directory_of(out, step, last_step)
        if name != directory:  # --steps has changed
            rename(directory, name)
        report.cut_logs(out, step)
        terminal.say(f"going on after step {step}, from {name}")
    dist.barrier()
    return step


def newest_whole(out: Path) -> tuple[Path, dict] | None:
    """(directory, what its checkpoint.json says) of the newest whole checkpoint; None without any.

    A damaged one is named and passed over.

    Raises:
        SystemExit: there are checkpoints, and none of them is whole.
    """
    candidates = [None]
    if rank() == 0:
        for leftover in out.glob("*" + PARTIAL):
            shutil.rmtree(leftover)
        paths = [*out.glob("step_*"), *out.glob("final")]
        candidates = [sorted(((facts_of(path), path) for path in paths), key=by_step, reverse=True)]
    dist.broadcast_object_list(candidates)
    for facts, path in candidates[0]:
        fault = fault_of(path, facts)
        if fault is None:
            return path, facts
        if rank() == 0:
            terminal.say(f"warning: {path} is damaged ({fault}): passed over")
    if candidates[0]:
        raise SystemExit(
            f"error: --resume: no checkpoint in {out} is whole; to begin again, remove {out} or "
            "name another --out"
        )
    return None


def facts_of(directory: Path) -> dict:
    """What checkpoint.json of a checkpoint says; {} if it cannot be read."""
    try:
        facts = json.loads((directory / FACTS).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and {"step", "files"} <= facts.keys() else {}


def by_step(candidate: tuple[dict, Path]) -> tuple:
    """What candidates are sorted by: the step, and the name where that is unknown."""
    facts, path = candidate
    return facts.get("step", -1), path.name


def fault_of(directory: Path, facts: dict) -> str | None:
    """What is wrong with a checkpoint, or None. Each rank reads a share of its files."""
    if not facts:
        return f"{FACTS} is missing or cannot be read"
    names = list(facts["files"])
    found = share_work(names, lambda share: [digest_of(directory / name) for name in share])
    for name, digest in zip(names, found):
        size, _ = facts["files"][name]
        if digest is None:
            return f"{name} is missing"
        if digest[0] != size:
            return f"{name} has {digest[0]} bytes instead of {size}"
        if digest != facts["files"][name]:
            return f"{name} has other contents than were written"
    return None


def read_state(folder: Path, networks: list) -> None:
    """Load the weights and the optimizers' state; each rank reads what its shards need."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    parameters, state = {}, {}
    for network in networks:
        for name, parameter in network.named_parameters():
            parameters[f"{network.name}/{name}"] = network, parameter
            state[f"{network.name}/{name}"] = parameter.detach()
    for key, kind in stored.items():
        name, _, moment = key.rpartition("/")
        if name in parameters:  # a moment has the shards of its weight, Adam's count has none
            _, parameter = parameters[name]
            if len(kind.size) == 0:  # the fused AdamW of a GPU wants its count there
                state[key] = torch.zeros((), device=parameter.device)
            else:
                state[key] = torch.zeros_like(parameter.detach())
    others = state.keys() ^ stored.keys()
    others |= {key for key in state.keys() & stored.keys() if state[key].shape != stored[key].size}
    if others:
        raise SystemExit(f"error: {folder} belongs to another model, as {min(others)} shows")
    dcp.load(state, storage_reader=reader)
    for key in stored:
        name, _, moment = key.rpartition("/")
        if name in parameters:
            network, parameter = parameters[name]
            network.optimizer.state[parameter][moment] = state[key]


def digest_of_problems(problems: list[dict]) -> str:
    """A hash of what is trained on: the tokens of prompts and demonstrations, and the answers."""
    digest = hashlib.sha256()
    for problem in problems:
        parts = problem["prompt_ids"], problem["answer"], problem.get("demo_ids")
        digest.update(repr(parts).encode())
    return digest.hexdigest()[:16]
