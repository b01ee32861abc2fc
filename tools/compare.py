"""Train several methods from one base, each with several seeds, and compare them.

    python -m tools.compare                               the toy: three seeds of every arm
    python -m tools.compare --task word-problems          a language model of 135 M parameters
    python -m tools.compare --only HPT GRPO --seeds 1     some arms, one seed
    python -m tools.compare --report                      the table and the figure of finished runs

Each run is the program that a user would start, `torchrun train_hpt.py`; its log begins with its
command. The same command again goes on: a finished run is kept, one that was stopped is run again.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import curves, report
from toy import make


class Arm(NamedTuple):
    """A row of a comparison."""

    flags: str  # of train_hpt.py, over those of the task
    parent: str | None = None  # the arm whose final model this one starts from


class Task(NamedTuple):
    """What the arms are trained on."""

    recipe: str  # an argument file of train_hpt.py
    flags: str  # of every arm, over those of the recipe; {out} is the comparison's folder
    arms: dict[str, Arm]  # parents first


TOY = {
    "SFT": Arm("--method sft"),
    "GRPO": Arm("--method grpo"),
    "Dr. GRPO": Arm("--method dr_grpo"),
    "PPO": Arm("--method ppo"),
    "SFT -> GRPO": Arm("--method grpo", parent="SFT"),
    "LUFFY": Arm("--method luffy"),
    "SRFT": Arm("--method srft"),
    "HPT": Arm("--method hpt"),
    "HPT, gamma 1/8": Arm("--method hpt --gamma 0.125"),
    "HPT, gamma 2/8": Arm("--method hpt --gamma 0.25"),
    "HPT, Mix/ON": Arm("--method hpt_mix"),
    "HPT, OFF/ON": Arm("--method hpt_off"),
}
LONGER_SUMS = {
    "GRPO": Arm("--method grpo"),
    "HPT": Arm("--method hpt"),
}
# A few steps of SFT make a start from which GRPO has rewards. At the recipe's learning rate GRPO
# collapses; 1e-5 is a fifth of it, as between LUFFY and HPT in the paper.
WORD_PROBLEMS = {
    "SFT": Arm("--method sft"),
    "GRPO": Arm("--method grpo"),
    "SFT, half": Arm("--method sft --steps 10"),
    "SFT -> GRPO": Arm("--method grpo --steps 10 --lr 1e-5", parent="SFT, half"),
    "LUFFY": Arm("--method luffy"),
    "HPT": Arm("--method hpt"),
    "SFT, a few steps": Arm("--method sft --steps 6"),
    "GRPO, warm": Arm("--method grpo", parent="SFT, a few steps"),
    "GRPO, warm, lr 1e-5": Arm("--method grpo --lr 1e-5", parent="SFT, a few steps"),
    "HPT, warm": Arm("--method hpt", parent="SFT, a few steps"),
    "HPT, warm, lr 1e-5": Arm("--method hpt --lr 1e-5", parent="SFT, a few steps"),
    "HPT, c_sft 0.05": Arm("--method hpt --sft-coef 0.05"),
    "HPT, c_sft 0.3": Arm("--method hpt --sft-coef 0.3"),
}
TASKS = {
    "toy": Task(
        "toy/toy.args",
        "--steps 30 --eval-every 15 --eval-samples 8 --lr 1e-4",
        TOY,
    ),
    # Sums of 7 digits, which the base never solves.
    "longer-sums": Task(
        "toy/toy.args",
        "--data {out}/train.jsonl --eval-data {out}/held_out.jsonl --max-prompt-tokens 24 "
        "--steps 60 --eval-every 30 --eval-samples 8 --lr 5e-4",
        LONGER_SUMS,
    ),
    "word-problems": Task(
        "recipes/smollm2-135m-word-problems.args",
        "--steps 20 --eval-every 0",
        WORD_PROBLEMS,
    ),
}
PANELS = {
    "reward/mean": "reward on training prompts",
    "hpt/sft_frac": "share of gated prompts",
    "hpt/offline_ratio": "offline ratio",
    "policy/entropy": "entropy per token, nats",
    "response_length/mean": "response length, tokens",
    "eval/pass@1": "held-out accuracy",
}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, and report."""
    args = parse_args(argv)
    folder = report.make_directory(args.out or f"runs/compare-{args.task}", exist_ok=True)
    if args.task == "longer-sums":
        names = ("train.jsonl", "held_out.jsonl")
        for name, rows in zip(names, make.problems(counts={7: 500}), strict=True):
            report.replace_file(folder / name, report.lines_of(rows))
    arms = TASKS[args.task].arms
    parents = {arms[label].parent for label in args.only}
    labels = [label for label in arms if label in args.only or label in parents]
    for seed in range(args.seeds):
        for label in labels:
            out = directory(folder, label, seed)
            if not args.report and not is_finished(out):
                print(f"{label}, seed {seed}", flush=True)
                run(command(args, folder, label, seed), out.with_suffix(".log"))
    print(write_report(folder, arms, labels, args.seeds))
    print(f"\n{folder}: comparison.md, comparison.png, and every run")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of the comparison."""
    arms = [f"{name}: {'; '.join(task.arms)}" for name, task in TASKS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["the arms of each task:", *arms]),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", choices=TASKS, default="toy", help="what the arms are trained on (toy)")
    add("--model", metavar="DIR", help="the base (the one that the task's recipe names)")
    add("--only", nargs="+", metavar="ARM", help="these arms, and their parents (all)")
    add("--seeds", type=int, default=3, metavar="N", help="runs per arm, seeds 0 .. N-1 (3)")
    add("--steps", type=int, metavar="N", help="rollout steps of every run (the arm's own)")
    add("--out", metavar="DIR", help="output directory (runs/compare-TASK)")
    add("--report", action="store_true", help="train nothing; report on the finished runs")
    args = parser.parse_args(argv)
    args.only = args.only or list(TASKS[args.task].arms)
    for label in args.only:
        if label not in TASKS[args.task].arms:
            parser.error(f"--only {label!r} is no arm of {args.task}; --help lists them")
    return args


# ------------------------------------------------------------------------------------------ running


def directory(folder: Path, label: str, seed: int) -> Path:
    """Return the output directory of a run."""
    name = label.lower().replace("->", "then").replace("/", "_").replace(" ", "-")
    return folder / f"{name.replace(',', '').replace('.', '')}-seed{seed}"


def is_finished(out: Path) -> bool:
    """Tell whether a run has saved its final model."""
    return (out / "final").is_dir()


def command(args, folder: Path, label: str, seed: int) -> list[str]:
    """Return the command line that trains a run, or goes on with it."""
    task = TASKS[args.task]
    arm, out = task.arms[label], directory(folder, label, seed)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [report.REPOSITORY / "train_hpt.py", f"@{report.REPOSITORY / task.recipe}"]
    words += [word.replace("{out}", str(folder)) for word in shlex.split(task.flags)]
    words += [*shlex.split(arm.flags), "--seed", seed, "--out", out, "--resume"]
    if args.steps:
        words += ["--steps", args.steps]
    if arm.parent:
        words += ["--model", directory(folder, arm.parent, seed) / "final"]
    elif args.model:
        words += ["--model", args.model]
    return [str(word) for word in words]


def run(words: list[str], log: Path) -> None:
    """Run a command with its output in a file. If it fails, SystemExit names the file."""
    with open(log, "a") as file:
        print(shlex.join(words), file=file, flush=True)
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"error: a run failed, its output is in {log}")


# ---------------------------------------------------------------------------------------- reporting


def write_report(folder: Path, arms: dict[str, Arm], labels: list[str], seeds: int) -> str:
    """Write comparison.md and comparison.png from the finished runs; return the table.

    Raises:
        SystemExit: no run is finished.
    """
    runs = {}  # {label: {seed: metrics of the run, as report.read_metrics returns them}}
    for label in labels:
        for seed in range(seeds):
            out = directory(folder, label, seed)
            if is_finished(out):
                runs.setdefault(label, {})[seed] = report.read_metrics(out)
    if not runs:
        raise SystemExit(f"error: no run in {folder} is finished")
    head = ["arm", "seeds", "steps", "before, %", "after, %", "gated at the end"]
    rows = [[*head, "reward at the end", "rollouts", "demonstration tokens", "training, s"]]
    for label, of_arm in runs.items():
        parents = runs.get(arms[label].parent, {})
        rows.append(table_row(label, of_arm, parents))
    text = "\n".join(report.markdown_table(rows))
    (folder / "comparison.md").write_text(text + "\n", encoding="utf-8")
    drawn = {label: list(of_arm.values()) for label, of_arm in runs.items()}
    curves.plot(drawn, folder / "comparison.png", PANELS)
    return text


def table_row(label: str, runs: dict[int, dict], parents: dict[int, dict]) -> list:
    """Return the cells of an arm; runs and parents are {seed: metrics}.

    Accuracies are means ± sample standard deviations over seeds; the other numbers are means. Costs
    are sums over the steps of a run and of its parent's.
    """
    everyone = runs.values()
    accuracies = [[100 * share for _, share in m.get("eval/pass@1", [])] for m in everyone]
    row = [label, len(runs), max(m["step"][-1][0] for m in everyone)]
    row += [
        over_seeds([a[0] for a in accuracies if a]),
        over_seeds([a[-1] for a in accuracies if a]),
    ]
    for name in ("hpt/sft_frac", "reward/mean"):
        last = [value for m in everyone for _, value in m.get(name, [])[-5:]]
        row.append(f"{statistics.fmean(last):.2f}" if last else "")
    for name in ("data/rollouts", "data/demo_tokens", "time/step"):
        totals = [total(m, name) + total(parents.get(seed, {}), name) for seed, m in runs.items()]
        row.append(f"{statistics.fmean(totals):,.0f}")
    return row


def total(metrics: dict[str, list], name: str) -> float:
    """Return the sum of a metric over the steps of a run."""
    return sum(value for _, value in metrics.get(name, []))


def over_seeds(values: list[float]) -> str:
    """Return mean ± sample standard deviation as a cell."""
    error = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{error}" if values else ""


if __name__ == "__main__":
    main()
