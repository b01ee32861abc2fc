"""Train several methods from one base, for equally many steps, and compare them.

    python -m tools.compare                               the toy: three seeds of every method
    python -m tools.compare --task word-problems          a language model of 135 M parameters
    python -m tools.compare --only HPT GRPO --seeds 1     some methods, one seed
    python -m tools.compare --report                      the tables and figures of existing runs

Each run is the program that a user would start, `torchrun train_hpt.py`; its log begins with its
command. The same command again continues: finished runs are kept, a run that was stopped starts
anew.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import curves, flags, report
from toy import make

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


# ------------------------------------------------------------------------------- what is compared


@dataclasses.dataclass(frozen=True)
class Arm:
    """How one row of a comparison is trained."""

    method: str
    flags: tuple = ()  # of train_hpt.py, over those of the task; {folder} is the comparison's
    length: float = 1.0  # its steps, as a multiple of --steps
    parent: str | None = None  # the arm whose final model this one starts from
    table: str = "from the base"  # the table that shows it; "" if it is only a parent


@dataclasses.dataclass(frozen=True)
class Task:
    """What the arms are trained on, and how they are measured."""

    recipe: Path  # an argument file of train_hpt.py
    steps: int  # the default of --steps
    flags: tuple  # of every arm, over those of the recipe; {halfway} is half of the arm's steps
    columns: dict[str, Callable]  # title -> the levels whose held-out accuracy the column shows
    hard: Callable  # the levels of the held-out problems that are sampled many times
    samples: int  # the default of --samples, per hard problem
    sampled: tuple[str, ...]  # the arms whose models sample the hard problems; perhaps the base
    arms: dict[str, Arm]


LONGER = {
    "flags": (
        *("--data", "{folder}/longer.jsonl", "--eval-data", "{folder}/longer_held_out.jsonl"),
        *("--max-prompt-tokens", 24, "--lr", 5e-4),
    ),
    "length": 2.0,
    "table": "sums of 7 digits, which the base never solves; twice the steps, lr 5e-4",
}
TOY = Task(
    recipe=flags.TOY_ARGS,
    steps=30,
    flags=("--eval-every", "{halfway}", "--eval-samples", 8, "--lr", 1e-4),
    columns={"held out, %": lambda level: True, "levels 5-6, %": lambda level: level in (5, 6)},
    hard=lambda level: level in (5, 6),
    samples=64,
    sampled=("base", "SFT", "GRPO", "Dr. GRPO", "PPO", "SFT -> GRPO", "LUFFY", "SRFT", "HPT"),
    arms={
        "SFT": Arm("sft"),
        "GRPO": Arm("grpo"),
        "Dr. GRPO": Arm("dr_grpo"),
        "PPO": Arm("ppo"),
        "SFT -> GRPO": Arm("grpo", parent="SFT"),
        "LUFFY": Arm("luffy"),
        "SRFT": Arm("srft"),
        "HPT": Arm("hpt"),
        "HPT, gamma 1/8": Arm("hpt", ("--gamma", 1 / 8)),
        "HPT, gamma 2/8": Arm("hpt", ("--gamma", 2 / 8)),
        "HPT, Mix/ON": Arm("hpt_mix"),
        "HPT, OFF/ON": Arm("hpt_off"),
        "GRPO, longer sums": Arm("grpo", **LONGER),
        "HPT, longer sums": Arm("hpt", **LONGER),
    },
)

WARM = "from the base after a few steps of SFT, a start from which GRPO has rewards"
C_SFT = "the coefficient of SFT in HPT"
# A fifth of the recipe's, as between LUFFY and HPT in the paper: at the recipe's, GRPO collapses.
SLOW = ("--lr", 1e-5)
WORD_PROBLEMS = Task(
    recipe=report.REPOSITORY / "recipes/smollm2-135m-word-problems.args",
    steps=20,
    flags=("--eval-every", 0),
    columns={
        "held out, %": lambda level: "new" not in level,
        "new wordings, %": lambda level: "new" in level,
        "levels 4-6, %": lambda level: level in ("4", "5", "6"),
    },
    hard=lambda level: level in ("4", "5", "6"),
    samples=16,
    sampled=(
        "SFT",
        "SFT -> GRPO",
        "HPT",
        "GRPO, warm, lr 1e-5",
        "HPT, warm",
        "HPT, warm, lr 1e-5",
    ),
    arms={
        "SFT": Arm("sft"),
        "GRPO": Arm("grpo"),
        "SFT, half": Arm("sft", length=0.5, table=""),
        "SFT -> GRPO": Arm("grpo", SLOW, length=0.5, parent="SFT, half"),
        "LUFFY": Arm("luffy"),
        "HPT": Arm("hpt"),
        "SFT, a few steps": Arm("sft", length=0.3, table=""),
        "GRPO, warm": Arm("grpo", parent="SFT, a few steps", table=WARM),
        "GRPO, warm, lr 1e-5": Arm("grpo", SLOW, parent="SFT, a few steps", table=WARM),
        "HPT, warm": Arm("hpt", parent="SFT, a few steps", table=WARM),
        "HPT, warm, lr 1e-5": Arm("hpt", SLOW, parent="SFT, a few steps", table=WARM),
        "HPT, c_sft 0.05": Arm("hpt", ("--sft-coef", 0.05), table=C_SFT),
        "HPT, c_sft 0.3": Arm("hpt", ("--sft-coef", 0.3), table=C_SFT),
    },
)
TASKS = {"toy": TOY, "word-problems": WORD_PROBLEMS}
PANELS = {
    "reward/mean": "reward on training prompts",
    "hpt/sft_frac": "share of gated prompts",
    "hpt/offline_ratio": "offline ratio",
    "policy/entropy": "entropy per token, nats",
    "response_length/mean": "response length, tokens",
    "eval/pass@1": "held-out accuracy",
}


# ------------------------------------------------------------------------------------------ running


@dataclasses.dataclass
class Comparison:
    """Where the runs are, and what they have in common."""

    task: Task
    folder: Path
    steps: int  # of an arm whose length is 1
    samples: int  # per hard held-out problem, for pass@k
    model: str | None = None  # replaces the base that the recipe names

    def directory(self, label: str, seed: int) -> Path:
        """Return the output directory of a run."""
        name = label.lower().replace("->", "then").replace("/", "_").replace(" ", "-")
        name = name.replace(",", "").replace(".", "")
        return self.folder / f"{name}-seed{seed}"

    def pass_directory(self, label: str) -> Path:
        """Return the directory of an arm's many samples of hard problems, taken with seed 0."""
        return self.directory(label, 0).with_suffix(".pass")

    def steps_of(self, label: str) -> int:
        """Return how many rollout steps an arm takes."""
        return max(1, round(self.task.arms[label].length * self.steps))

    def training_command(self, label: str, seed: int) -> list:
        """Return the command line that trains a run."""
        arm, steps = self.task.arms[label], self.steps_of(label)
        words = {"folder": self.folder, "halfway": steps // 2}
        command = [*TORCHRUN, report.REPOSITORY / "train_hpt.py", f"@{self.task.recipe}"]
        if self.model:
            command += ["--model", self.model]
        command += [str(word).format(**words) for word in (*self.task.flags, *arm.flags)]
        command += ["--method", arm.method, "--steps", steps, "--seed", seed]
        command += ["--out", self.directory(label, seed)]
        if arm.parent:
            command += ["--model", self.directory(arm.parent, seed) / "final"]
        return command

    def recipe_flags(self):
        """Return the flags of the recipe, parsed."""
        model = ["--model", self.model] if self.model else []
        return flags.parse_training_args([f"@{self.task.recipe}", *model])

    def sampling_command(self, label: str, model: Path | str) -> list:
        """Return the command line that samples the hard held-out problems many times."""
        recipe = self.recipe_flags()
        command = [*TORCHRUN, report.REPOSITORY / "evaluate.py", "--model", model]
        command += ["--data", self.folder / "hard_held_out.jsonl", "--samples", self.samples]
        command += ["--temperature", 1.0, "--top-p", 1.0, "--system-prompt", recipe.system_prompt]
        command += ["--max-response-tokens", recipe.max_response_tokens]
        return [*command, "--out", self.pass_directory(label)]

    def run(self, job: tuple[str, int]) -> bool:
        """Train a run, (label, seed), unless it is finished; say whether anything was done."""
        label, seed = job
        out = self.directory(label, seed)
        is_new = not (out / "final" / "config.json").exists()
        if is_new:
            if out.exists():
                out.rename(out.with_name(f"{out.name}.stopped{time.time():.0f}"))
            call(self.training_command(label, seed), self.folder / f"{out.name}.log")
        else:
            self.check_run(label, out)
        if seed == 0 and label in self.task.sampled:
            is_new |= self.sample_hard_problems(label, out / "final")
        return is_new

    def check_run(self, label: str, out: Path) -> None:
        """Raise SystemExit unless a finished run had the steps and the base that it would now."""
        had = json.loads((out / "config.json").read_text())["flags"]
        wanted = {"steps": self.steps_of(label)}
        if self.model and not self.task.arms[label].parent:
            wanted["model"] = os.path.abspath(self.model)
            had["model"] = os.path.abspath(had["model"])
        for name, value in wanted.items():
            if had[name] != value:
                raise SystemExit(
                    f"error: {out} had --{name} {had[name]}, not {value}: "
                    f"name another --out, or give the same --{name}"
                )

    def sample_hard_problems(self, label: str, model: Path | str) -> bool:
        """Sample the hard problems unless that is done; say whether anything was done."""
        out = self.pass_directory(label)
        if (out / "results.jsonl").exists():
            samples = report.read_jsonl(out / "results.jsonl")[0]["samples"]
            if samples != self.samples:
                raise SystemExit(
                    f"error: {out} had --samples {samples}, not {self.samples}: "
                    "remove it, or give the same --samples"
                )
            return False
        call(self.sampling_command(label, model), self.folder / f"{out.name}.log")
        return True

    def write_problems(self) -> None:
        """Write the problems that are not shipped: hard ones alone, and the toy's longer sums."""
        held_out = report.read_jsonl(Path(self.recipe_flags().eval_data))
        hard = [row for row in held_out if self.task.hard(row["level"])]
        write_jsonl(self.folder / "hard_held_out.jsonl", hard)
        if self.task is TOY:
            longer, longer_held_out = make.problems(counts={7: 500})
            write_jsonl(self.folder / "longer.jsonl", longer)
            write_jsonl(self.folder / "longer_held_out.jsonl", longer_held_out)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a .jsonl file anew."""
    path.unlink(missing_ok=True)
    report.append_jsonl(path, rows)


def call(command: list, log: Path) -> None:
    """Run a command with its output in a file. If it fails, SystemExit names the file."""
    command = [str(word) for word in command]
    with open(log, "w") as file:
        print(*command, file=file, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"error: a run failed, its output is in {log}")


# ---------------------------------------------------------------------------------------- reporting


@dataclasses.dataclass
class FinishedRun:
    """What a finished run left behind."""

    seed: int
    folder: Path
    before: list  # held-out results before training
    halfway: list  # those between the first and the last evaluation
    after: list  # those after training
    steps: list  # metrics of each training step


def read_run(folder: Path, seed: int) -> FinishedRun:
    """Read the files of a finished run."""
    held_out = report.read_results(folder / "held_out.jsonl")
    last = held_out[-1]["step"]
    return FinishedRun(
        seed,
        folder,
        before=[row for row in held_out if row["step"] == 0],
        halfway=[row for row in held_out if 0 < row["step"] < last],
        after=[row for row in held_out if row["step"] == last],
        steps=[row for row in report.read_steps(folder) if row["step"] > 0],
    )


def write_report(comparison: Comparison, seeds: int) -> str:
    """Write comparison.md and the figures from the finished runs; return the text."""
    task, runs = comparison.task, {}  # {label: its finished runs}
    for label in task.arms:
        for seed in range(seeds):
            folder = comparison.directory(label, seed)
            if is_measured(folder, comparison.steps_of(label)):
                runs.setdefault(label, []).append(read_run(folder, seed))
    if not runs:
        raise SystemExit(f"error: no finished run in {comparison.folder}")

    blocks = []
    for number, title in enumerate(titles(task)):
        labels = [label for label in runs if task.arms[label].table == title]
        if labels:
            blocks.append(report.markdown_table(main_table(task, title, labels, runs)))
            metrics = {}
            for label in labels:
                metrics[label] = [report.read_metrics(run.folder) for run in runs[label]]
            name = "comparison.png" if number == 0 else f"comparison{number + 1}.png"
            curves.plot(metrics, comparison.folder / name, PANELS)
    blocks.append(report.markdown_table(level_table(runs, task)))
    samples = read_samples(comparison)
    if samples:
        blocks.append(report.markdown_table(pass_table(samples)))
        ks = ks_of(samples)
        drawn = {label: report.pass_curve(rows, ks) for label, rows in samples.items()}
        curves.pass_at_k(drawn, comparison.folder / "pass.png")
    if "HPT" in samples:
        blocks.append(report.markdown_table(exclusive_table(samples)))
    if "HPT" in runs and "GRPO" in runs:
        blocks.append([exclusive_sentence(runs["HPT"], runs["GRPO"])])
    text = "\n\n".join("\n".join(lines) for lines in blocks)
    (comparison.folder / "comparison.md").write_text(text + "\n")
    return text


def is_measured(folder: Path, steps: int) -> bool:
    """Tell whether a run has been evaluated after its last step. Its model need not be there."""
    path = folder / "held_out.jsonl"
    rows = report.read_jsonl(path) if path.exists() else []
    return bool(rows) and isinstance(rows[-1], dict) and rows[-1].get("step") == steps


def titles(task: Task) -> list[str]:
    """Return the titles of the tables, in the order of the arms."""
    return [title for title in dict.fromkeys(arm.table for arm in task.arms.values()) if title]


def read_samples(comparison: Comparison) -> dict[str, list[dict]]:
    """Return {label: results on the hard problems} of the models that have sampled them."""
    samples = {}
    for label in comparison.task.sampled:
        path = comparison.pass_directory(label) / "results.jsonl"
        if path.exists():
            samples[label] = report.read_results(path)
    return samples


def main_table(task: Task, title: str, labels: list[str], runs: dict) -> list[list]:
    """Return the rows of a table: accuracy before and after training, and what it cost.

    Args:
        title: the first cell.
        labels: the arms that the table shows.
        runs: {label: its finished runs}, those of the arms' parents among them.
    """
    head = [title, "seeds", "before, %", "halfway, %", *task.columns]
    head += ["gated at the end", "reward at the end"]
    rows = [[*head, "rollouts", "demonstration tokens", "training, s, median"]]
    for label in labels:
        finished = runs[label]
        row = [label, len(finished)]
        row.append(over_seeds([percent(run.before) for run in finished]))
        row.append(over_seeds([percent(run.halfway) for run in finished if run.halfway]))
        for is_counted in task.columns.values():
            row.append(over_seeds([percent(run.after, is_counted) for run in finished]))
        row.append(at_the_end(finished, "hpt/sft_frac"))
        row.append(at_the_end(finished, "reward/mean"))
        parents = runs.get(task.arms[label].parent, [])
        row.append(f"{statistics.fmean(costs(finished, parents, 'data/rollouts')):,.0f}")
        row.append(f"{statistics.fmean(costs(finished, parents, 'data/demo_tokens')):,.0f}")
        row.append(f"{statistics.median(costs(finished, parents, 'time/step')):.0f}")
        rows.append(row)
    return without_empty_columns(rows)


def without_empty_columns(rows: list[list]) -> list[list]:
    """Leave out the columns that hold nothing below their title."""
    filled = [any(row[i] != "" for row in rows[1:]) for i in range(len(rows[0]))]
    return [[cell for cell, is_filled in zip(row, filled) if is_filled] for row in rows]


def at_the_end(finished: list[FinishedRun], metric: str) -> str:
    """Return the mean of a metric over the last five steps of all runs, or "" without it."""
    values = [step[metric] for run in finished for step in run.steps[-5:] if metric in step]
    return f"{statistics.fmean(values):.2f}" if values else ""


def costs(finished: list[FinishedRun], parents: list[FinishedRun], metric: str) -> list[float]:
    """Return the sum of a metric over the steps of each run, with the steps of its parent."""
    steps_of_parents = {run.seed: run.steps for run in parents}
    totals = []
    for run in finished:
        steps = run.steps + steps_of_parents.get(run.seed, [])
        totals.append(sum(step[metric] for step in steps))
    return totals


def level_table(runs: dict[str, list[FinishedRun]], task: Task) -> list[list]:
    """Return the rows of held-out accuracy by level, the mean over seeds."""
    levels = {}  # in the order of the first run's levels
    for finished in runs.values():
        levels |= dict.fromkeys(report.by_level(finished[0].after))
    levels.pop("all")
    rows = [["held out, by level, %", *levels]]
    for label, finished in runs.items():
        if task.arms[label].table:
            results = report.by_level([row for run in finished for row in run.after])
            cells = [f"{percent(results[key]):.0f}" if key in results else "" for key in levels]
            rows.append([label, *cells])
    return rows


def pass_table(samples: dict[str, list[dict]]) -> list[list]:
    """Return the rows of pass@k on the hard problems."""
    ks = ks_of(samples)
    rows = [["pass@k on hard problems, seed 0, %", *ks]]
    for label, results in samples.items():
        rows.append([label, *(f"{value:.1f}" for value in report.pass_curve(results, ks).values())])
    return rows


def ks_of(samples: dict[str, list[dict]]) -> list[int]:
    """Return the k of pass@k that are reported, those that every arm has samples for."""
    return report.powers_of_two(min(results[0]["samples"] for results in samples.values()))


def exclusive_table(samples: dict[str, list[dict]]) -> list[list]:
    """Return the rows of how many hard problems HPT alone solves, and each other arm alone."""
    problems = len(samples["HPT"])
    rows = [[f"of {problems} hard problems, seed 0", "HPT alone solves", "the other alone solves"]]
    for label, results in samples.items():
        if label != "HPT":
            rows.append([f"HPT and {label}", *report.exclusive_solves(samples["HPT"], results)])
    return rows


def exclusive_sentence(hpt: list[FinishedRun], grpo: list[FinishedRun]) -> str:
    """Say how many problems HPT alone and GRPO alone solve, and by how much two seeds differ."""
    of_hpt = {run.seed: run.after for run in hpt}
    of_grpo = {run.seed: run.after for run in grpo}
    seeds = [seed for seed in of_hpt if seed in of_grpo]
    between_methods = [signed(of_hpt[seed], of_grpo[seed]) for seed in seeds]
    text = (
        f"Of {len(hpt[0].after)} held-out problems, solved by HPT and not by GRPO, "
        f"and the reverse, by seed: {', '.join(between_methods)}"
    )
    for label, of_method in (("HPT", of_hpt), ("GRPO", of_grpo)):
        between_seeds = [signed(of_method[a], of_method[b]) for a, b in itertools.pairwise(seeds)]
        if between_seeds:
            text += (
                f"; as a yardstick, by {label} and not by {label} with the next seed, and the "
                f"reverse: {', '.join(between_seeds)}"
            )
    return text


def signed(a: list[dict], b: list[dict]) -> str:
    """Return "+x/-y": x problems solved in a alone, y in b alone."""
    a_alone, b_alone = report.exclusive_solves(a, b)
    return f"+{a_alone}/-{b_alone}"


def percent(results: list[dict], is_counted: Callable = lambda level: True) -> float:
    """Return the mean accuracy in percent, of the results whose level is counted."""
    counted = [report.accuracy(result) for result in results if is_counted(result["level"])]
    return 100 * statistics.fmean(counted) if counted else math.nan


def over_seeds(values: list[float]) -> str:
    """Return mean ± sample standard deviation over seeds, as a cell; "" for levels not there."""
    if not values or math.isnan(values[0]):
        return ""
    cell = f"{statistics.fmean(values):.1f}"
    if len(values) > 1:
        cell += f" ± {statistics.stdev(values):.1f}"
    return cell


# ------------------------------------------------------------------------------------- command line


def per_task(name: str) -> str:
    """Return a default that each task has for itself, as words for --help."""
    return ", ".join(f"{key}: {getattr(task, name)}" for key, task in TASKS.items())


def parse_args(argv=None):
    """Parse the flags of the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arms = "\n".join(f"{name}: {'; '.join(task.arms)}" for name, task in TASKS.items())
    parser.epilog = f"the arms of each task:\n{arms}"
    flag = parser.add_argument
    flag("--task", choices=TASKS, default="toy", help="what the arms are trained on (%(default)s)")
    flag("--model", metavar="DIR", help="the base (the one that the task's recipe names)")
    flag("--seeds", type=flags.COUNT, default=3, help="runs per arm, seeds 0 .. N-1 (%(default)s)")
    flag("--steps", type=flags.COUNT, help=f"rollout steps per run ({per_task('steps')})")
    flag(
        "--jobs",
        type=flags.COUNT,
        default=min(4, os.cpu_count()),
        help="runs at a time, one thread each (%(default)s)",
    )
    flag("--samples", type=flags.COUNT, help=f"per hard problem ({per_task('samples')})")
    flag("--only", nargs="+", metavar="ARM", help="these arms (all)")
    flag("--out", metavar="DIR", help="output directory (runs/compare-TASK)")
    flag("--report", action="store_true", help="train nothing; report on the runs that exist")
    args = parser.parse_args(argv)
    if args.report and args.only:
        parser.error("--report shows every run that is there: leave --only out")
    task = TASKS[args.task]
    args.only = args.only or list(task.arms)
    args.steps = args.steps or task.steps
    args.samples = args.samples or task.samples
    args.out = args.out or f"runs/compare-{args.task}"
    for label in args.only:
        if label not in task.arms:
            parser.error(f"--only {label!r}: the arms of {args.task} are {'; '.join(task.arms)}")
        parent = task.arms[label].parent
        if parent and parent not in args.only:
            parser.error(f"--only also needs {parent}, whose final model {label} starts from")
    return args


def main(argv=None) -> None:
    """Run what is missing, a few runs at a time, and report."""
    args = parse_args(argv)
    folder = report.make_directory(args.out, exist_ok=True)
    comparison = Comparison(TASKS[args.task], folder, args.steps, args.samples, args.model)
    if not args.report:
        run_missing(comparison, args)
    text = write_report(comparison, args.seeds)
    print(f"\n{text}\n\n{folder}: comparison.md, the figures, and every run")


def run_missing(comparison: Comparison, args) -> None:
    """Run every arm with every seed; arms that start from another arm's model come last."""
    first, second = [], []
    for seed in range(args.seeds):
        for label in args.only:
            parent = comparison.task.arms[label].parent
            (second if parent else first).append((label, seed))
    total = len(first) + len(second)
    print(
        f"{total} runs, --steps {args.steps}, {args.jobs} at a time, into {comparison.folder}",
        flush=True,
    )

    comparison.write_problems()
    if "base" in comparison.task.sampled:
        comparison.sample_hard_problems("base", comparison.recipe_flags().model)
    started, done = time.monotonic(), 0
    for jobs in (first, second):
        with ThreadPoolExecutor(args.jobs) as pool:
            for (label, seed), is_new in zip(jobs, pool.map(comparison.run, jobs), strict=True):
                done += 1
                minutes = (time.monotonic() - started) / 60
                note = "" if is_new else " (was there)"
                print(
                    f"{done:>3} of {total}: {label}, seed {seed}{note}, {minutes:.1f} minutes",
                    flush=True,
                )


if __name__ == "__main__":
    main()
