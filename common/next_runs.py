"""What to run after a training run: commands with the paths of this one, ready to be copied."""

import os
import shlex
from pathlib import Path

from common import flags

PROGRAMS = flags.REPOSITORY
ENVIRONMENT = dict(os.environ)  # as the program was started; vLLM changes LOCAL_WORLD_SIZE later
# Flags of training that evaluate.py should be given too; SET_BY_PAPER are those that --paper sets.
SHARED = ("template", "reward", "trust_remote_code")
SET_BY_PAPER = ("system_prompt", "max_response_tokens")


def next_commands(out: Path, args, words: list[str]) -> list[str]:
    """Return at most three lines, each with a word on what its command is for.

    Args:
        out: the directory of the run that has ended.
        args: its flags.
        words: its command line, without the name of the program.
    """
    commands = {
        "pass@k of the result": evaluation_command(out, args),
        "beside another run": plot_command(out),
    }
    if args.method in ("sft", "dft"):
        commands["SFT -> GRPO"] = second_stage_command(out, args, words)
    elif args.out:
        more = [*without(words, "--steps"), "--steps", str(2 * args.steps)]
        more += [] if "--resume" in more else ["--resume"]
        commands["twice as many steps"] = f"{launcher()} {shlex.join(more)}"
    return [f"{why:<22}{command}" for why, command in commands.items()]


def evaluation_command(out: Path, args) -> str:
    """Return the command that evaluates the model of a run, on its held-out problems if any."""
    words = ["python", shown(PROGRAMS / "evaluate.py"), "--model", str(out / "final")]
    names = SHARED
    if args.eval_data:
        words += ["--data", shown(args.eval_data)]
        names += SET_BY_PAPER
        if columns := args.eval_columns or args.columns:
            words += ["--columns", ",".join(f"{key}={name}" for key, name in columns.items())]
    else:
        words.append("--paper")
    defaults = flags.evaluation_parser()
    for name in names:
        value = getattr(args, name)
        if value != defaults.get_default(name):
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [str(value)]
    return shlex.join(words)


def plot_command(out: Path) -> str:
    """Return the command that draws a run beside another one."""
    there = "" if Path.cwd() == PROGRAMS else f"PYTHONPATH={shlex.quote(str(PROGRAMS))} "
    return f"{there}python -m tools.plot {shlex.quote(str(out))} OTHER_RUN"


def second_stage_command(out: Path, args, words: list[str]) -> str:
    """Return the command that goes on with GRPO where SFT has ended."""
    rest = without(words, "--method", "--model", "--out")
    if not any(word.startswith("@") for word in rest) and not flags.has_flag("--model", words):
        rest = [f"@{shown(flags.TOY_ARGS)}", *rest]  # it was the default
    rest += ["--method", "grpo", "--model", str(out / "final")]
    rest += ["--out", f"{args.out}-grpo"] if args.out else []
    return f"{launcher()} {shlex.join(rest)}"


def launcher() -> str:
    """Return how this run was started: torchrun and its ranks, or Python alone."""
    program = shlex.quote(shown(PROGRAMS / "train_hpt.py"))
    if "TORCHELASTIC_RUN_ID" not in ENVIRONMENT:
        return f"python {program}"
    ranks, here = ENVIRONMENT["WORLD_SIZE"], ENVIRONMENT["LOCAL_WORLD_SIZE"]
    if ranks != here:  # the rest of the command differs from machine to machine
        return f"torchrun --nnodes={int(ranks) // int(here)} ... {program}"
    return f"torchrun {program}" if ranks == "1" else f"torchrun --nproc_per_node={ranks} {program}"


def without(words: list[str], *names: str) -> list[str]:
    """Return a command line without some flags and their values."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in names:
            kept.append(word)
        skip = word in names  # its value comes next
    return kept


def shown(path) -> str:
    """Return a path as one would type it: relative to the current directory, where it is below."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
