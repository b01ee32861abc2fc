"""Train the paper's methods on the toy from one base, for equally many steps, and compare them.

    python -m tools.compare                three seeds of every method
    python -m tools.compare --seeds 1      one seed
    python -m tools.compare --report       the tables and figures again, from the runs that exist

Each run is the program that a user would start, `torchrun train_hpt.py`; its log begins with its
command. The same command again continues: finished runs are kept, a run that was stopped starts
anew.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import curves, flags, report
from toy import make

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
HARD_LEVELS = (5, 6)  # of such sums the base solves less than 3 in 100
LONGER_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Arm:
    """How one row of the comparison is trained."""

    method: str
    gamma: float = 0.0
    parent: str | None = None  # the arm whose final model this one starts from
    longer_sums: bool = False  # sums of 7 digits, which the base never solves


ARMS = {
    "SFT": Arm("sft"),
    "GRPO": Arm("grpo"),
    "Dr. GRPO": Arm("dr_grpo"),
    "PPO": Arm("ppo"),
    "SFT -> GRPO": Arm("grpo", parent="SFT"),
    "LUFFY": Arm("luffy"),
    "SRFT": Arm("srft"),
    "HPT": Arm("hpt"),
    "HPT, gamma 1/8": Arm("hpt", gamma=1 / 8),
    "HPT, gamma 2/8": Arm("hpt", gamma=2 / 8),
    "HPT, Mix/ON": Arm("hpt_mix"),
    "HPT, OFF/ON": Arm("hpt_off"),
    "GRPO, longer sums": Arm("grpo", longer_sums=True),
    "HPT, longer sums": Arm("hpt", longer_sums=True),
}
MAIN_ARMS = list(ARMS)[:8]  # the paper's table; these get pass@k with many samples, and curves
PANELS = {
    "reward/mean": "reward on training prompts",
    "hpt/offline_ratio": "offline ratio",
    "policy/entropy": "entropy per token, nats",
    "response_length/mean": "response length, tokens",
    "eval/pass@1": "held-out accuracy",
}


# ------------------------------------------------------------------------------------------ running


@dataclasses.dataclass
class Comparison:
    """Where the runs are, and what they have in common."""

    folder: Path
    steps: int  # of every arm except those on longer sums
    samples: int  # per hard held-out problem, for pass@k

    def directory(self, label: str, seed: int) -> Path:
        """Return the output directory of a run."""
        name = label.lower().replace("->", "then").replace("/", "_").replace(" ", "-")
        name = name.replace(",", "").replace(".", "")
        return self.folder / f"{name}-seed{seed}"

    def pass_directory(self, label: str) -> Path:
        """Return the directory of an arm's many samples of hard problems, taken with seed 0."""
        return self.directory(label, 0).with_suffix(".pass")

    def training_command(self, label: str, seed: int) -> list:
        """Return the command line that trains a run."""
        arm, out = ARMS[label], self.directory(label, seed)
        command = [*TORCHRUN, report.REPOSITORY / "train_hpt.py", f"@{flags.TOY_ARGS}"]
        command += ["--method", arm.method, "--gamma", arm.gamma, "--seed", seed, "--out", out]
        command += ["--eval-every", self.steps // 2, "--eval-samples", 8, "--lr", 1e-4]
        if arm.longer_sums:
            command += ["--data", self.folder / "longer.jsonl"]
            command += ["--eval-data", self.folder / "longer_held_out.jsonl"]
            command += ["--max-prompt-tokens", 24, "--lr", 5e-4, "--steps", LONGER_STEPS]
        else:
            command += ["--steps", self.steps]
        if arm.parent:
            command += ["--model", self.directory(arm.parent, seed) / "final"]
        return command

    def sampling_command(self, label: str, model: Path | str) -> list:
        """Return the command line that samples the hard held-out problems many times."""
        toy = flags.parse_training_args([f"@{flags.TOY_ARGS}"])
        command = [*TORCHRUN, report.REPOSITORY / "evaluate.py", "--model", model]
        command += ["--data", self.folder / "hard_held_out.jsonl", "--samples", self.samples]
        command += ["--temperature", 1.0, "--top-p", 1.0]
        command += ["--max-response-tokens", toy.max_response_tokens]
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
            self.check_steps(label, out)
        if seed == 0 and label in MAIN_ARMS:
            is_new |= self.sample_hard_problems(label, out / "final")
        return is_new

    def check_steps(self, label: str, out: Path) -> None:
        """Raise SystemExit unless a finished run took as many steps as it would now."""
        wanted = LONGER_STEPS if ARMS[label].longer_sums else self.steps
        steps = json.loads((out / "config.json").read_text())["flags"]["steps"]
        if steps != wanted:
            raise SystemExit(
                f"error: {out} took {steps} steps, not {wanted}: "
                "name another --out, or the same --steps"
            )

    def sample_hard_problems(self, label: str, model: Path | str) -> bool:
        """Sample the hard problems unless that is done; say whether anything was done."""
        out = self.pass_directory(label)
        if (out / "results.jsonl").exists():
            return False
        call(self.sampling_command(label, model), self.folder / f"{out.name}.log")
        return True

    def write_problems(self) -> None:
        """Write the problems that the toy does not ship: longer sums, and its hard ones alone."""
        longer, longer_held_out = make.problems(counts={7: 500})
        hard = [row for row in make.problems()[1] if row["level"] in HARD_LEVELS]
        write_jsonl(self.folder / "longer.jsonl", longer)
        write_jsonl(self.folder / "longer_held_out.jsonl", longer_held_out)
        write_jsonl(self.folder / "hard_held_out.jsonl", hard)


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
    before: list  # held-out results before training
    halfway: list  # those between the first and the last evaluation
    after: list  # those after training
    steps: list  # metrics of each training step


def read_run(folder: Path, seed: int) -> FinishedRun:
    """Read the files of a finished run."""
    held_out = report.read_jsonl(folder / "held_out.jsonl")
    last = held_out[-1]["step"]
    return FinishedRun(
        seed,
        before=[row for row in held_out if row["step"] == 0],
        halfway=[row for row in held_out if 0 < row["step"] < last],
        after=[row for row in held_out if row["step"] == last],
        steps=[row for row in report.read_jsonl(folder / "metrics.jsonl") if row["step"] > 0],
    )


def write_report(comparison: Comparison, seeds: int) -> str:
    """Write comparison.md, comparison.png and pass.png from the finished runs; return the text."""
    runs = {}  # {label: its finished runs}
    for label in ARMS:
        for seed in range(seeds):
            folder = comparison.directory(label, seed)
            if (folder / "final").exists():
                runs.setdefault(label, []).append(read_run(folder, seed))
    if not runs:
        raise SystemExit(f"error: no finished run in {comparison.folder}")
    samples = read_samples(comparison)

    lines = report.markdown_table(main_table(runs))
    if samples:
        lines += ["", *report.markdown_table(pass_table(samples))]
        drawn = {label: report.pass_curve(rows, ks_of(rows)) for label, rows in samples.items()}
        curves.pass_at_k(drawn, comparison.folder / "pass.png")
    if any(ARMS[label].longer_sums for label in runs):
        lines += ["", *report.markdown_table(longer_table(runs))]
    if "HPT" in runs and "GRPO" in runs:
        lines += ["", exclusive_sentence(runs["HPT"], runs["GRPO"])]
    text = "\n".join(lines)
    (comparison.folder / "comparison.md").write_text(text + "\n")

    metrics = {}
    for label in MAIN_ARMS:
        folders = [comparison.directory(label, run.seed) for run in runs.get(label, [])]
        if folders:
            metrics[label] = report.mean_metrics(folders)
    curves.plot(metrics, comparison.folder / "comparison.png", PANELS)
    return text


def read_samples(comparison: Comparison) -> dict[str, list[dict]]:
    """Return {label: results on the hard problems} of the base and the main arms."""
    samples = {}
    for label in ("base", *MAIN_ARMS):
        path = comparison.pass_directory(label) / "results.jsonl"
        if path.exists():
            samples[label] = report.read_jsonl(path)
    return samples


def main_table(runs: dict[str, list[FinishedRun]]) -> list[list]:
    """Return the rows of the paper's table: accuracy and what it cost."""
    head = ["method", "seeds", "halfway, %", "held out, %", "levels 5-6, %"]
    rows = [[*head, "rollouts", "demonstration tokens", "training, s, median"]]
    base = base_results(runs)
    if base:
        cells = [f"{percent(base):.1f}", f"{percent(base, HARD_LEVELS):.1f}"]
        rows.append(["base", "", "", *cells, "", "", ""])
    for label, finished in runs.items():
        if ARMS[label].longer_sums:
            continue
        row = [label, len(finished)]
        row.append(over_seeds([percent(run.halfway) for run in finished if run.halfway]))
        row.append(over_seeds([percent(run.after) for run in finished]))
        row.append(over_seeds([percent(run.after, HARD_LEVELS) for run in finished]))
        parents = runs.get(ARMS[label].parent, [])
        row.append(f"{statistics.fmean(costs(finished, parents, 'data/rollouts')):,.0f}")
        row.append(f"{statistics.fmean(costs(finished, parents, 'data/demo_tokens')):,.0f}")
        row.append(f"{statistics.median(costs(finished, parents, 'time/step')):.0f}")
        rows.append(row)
    return rows


def base_results(runs: dict[str, list[FinishedRun]]) -> list[dict]:
    """Return the held-out results of the base; every arm that starts from it has the same."""
    for label, finished in runs.items():
        if not ARMS[label].parent and not ARMS[label].longer_sums:
            return finished[0].before
    return []


def costs(finished: list[FinishedRun], parents: list[FinishedRun], metric: str) -> list[float]:
    """Return the sum of a metric over the steps of each run, with the steps of its parent."""
    steps_of_parents = {run.seed: run.steps for run in parents}
    totals = []
    for run in finished:
        steps = run.steps + steps_of_parents.get(run.seed, [])
        totals.append(sum(step[metric] for step in steps))
    return totals


def pass_table(samples: dict[str, list[dict]]) -> list[list]:
    """Return the rows of pass@k on the hard problems."""
    ks = ks_of(next(iter(samples.values())))
    rows = [["pass@k, levels 5-6, seed 0, %", *ks]]
    for label, results in samples.items():
        rows.append([label, *(f"{value:.1f}" for value in report.pass_curve(results, ks).values())])
    return rows


def ks_of(results: list[dict]) -> list[int]:
    """Return the k of pass@k that results are reported for."""
    return report.powers_of_two(results[0]["samples"])


def longer_table(runs: dict[str, list[FinishedRun]]) -> list[list]:
    """Return the rows of the arms on longer sums."""
    head = [f"sums of 7 digits, {LONGER_STEPS} steps, lr 5e-4", "seeds", "before, %", "held out, %"]
    rows = [[*head, "share gated at the end", "reward at the end"]]
    for label, finished in runs.items():
        if not ARMS[label].longer_sums:
            continue
        last_steps = [run.steps[-1] for run in finished]
        gated = [step["hpt/sft_frac"] for step in last_steps if "hpt/sft_frac" in step]
        row = [label, len(finished)]
        row.append(over_seeds([percent(run.before) for run in finished]))
        row.append(over_seeds([percent(run.after) for run in finished]))
        row.append(f"{statistics.fmean(gated):.2f}" if gated else "")
        row.append(f"{statistics.fmean(step['reward/mean'] for step in last_steps):.2f}")
        rows.append(row)
    return rows


def exclusive_sentence(hpt: list[FinishedRun], grpo: list[FinishedRun]) -> str:
    """Say how many problems HPT alone and GRPO alone solve, and by how much two seeds differ."""
    of_hpt = {run.seed: run.after for run in hpt}
    of_grpo = {run.seed: run.after for run in grpo}
    seeds = [seed for seed in of_hpt if seed in of_grpo]
    between_methods = [signed(of_hpt[seed], of_grpo[seed]) for seed in seeds]
    between_seeds = [signed(of_grpo[a], of_grpo[b]) for a, b in itertools.pairwise(seeds)]
    return (
        f"Of {len(hpt[0].after)} held-out problems, solved by HPT and not by GRPO, "
        f"and the reverse, by seed: {', '.join(between_methods)}; as a yardstick, by GRPO and not "
        f"by GRPO with the next seed, and the reverse: {', '.join(between_seeds)}"
    )


def signed(a: list[dict], b: list[dict]) -> str:
    """Return "+x/-y": x problems solved in a alone, y in b alone."""
    a_alone, b_alone = report.exclusive_solves(a, b)
    return f"+{a_alone}/-{b_alone}"


def percent(results: list[dict], levels: tuple | None = None) -> float:
    """Return the mean accuracy in percent, of all results or of those of some levels."""
    if levels:
        results = [result for result in results if result["level"] in levels]
    return 100 * statistics.fmean(report.accuracy(result) for result in results)


def over_seeds(values: list[float]) -> str:
    """Return mean ± sample standard deviation over seeds, as a cell."""
    if not values:
        return ""
    cell = f"{statistics.fmean(values):.1f}"
    if len(values) > 1:
        cell += f" ± {statistics.stdev(values):.1f}"
    return cell


# ------------------------------------------------------------------------------------- command line


def parse_args(argv=None):
    """Parse the flags of the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--seeds", type=flags.COUNT, default=3, help="runs per arm, seeds 0 .. N-1 (%(default)s)")
    flag("--steps", type=flags.COUNT, default=30, help="rollout steps per run (%(default)s)")
    flag(
        "--jobs",
        type=flags.COUNT,
        default=min(4, os.cpu_count()),
        help="runs at a time, one thread each (%(default)s)",
    )
    flag("--samples", type=flags.COUNT, default=64, help="per hard problem (%(default)s)")
    flag("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="; ".join(ARMS))
    flag("--out", default="runs/compare", help="output directory (%(default)s)")
    flag("--report", action="store_true", help="train nothing; report on the runs that exist")
    args = parser.parse_args(argv)
    for label in args.only:
        parent = ARMS[label].parent
        if parent and parent not in args.only:
            parser.error(f"--only also needs {parent}, whose final model {label} starts from")
    return args


def main(argv=None) -> None:
    """Run what is missing, a few runs at a time, and report."""
    args = parse_args(argv)
    folder = report.make_directory(args.out, exist_ok=True)
    comparison = Comparison(folder, args.steps, args.samples)
    if not args.report:
        run_missing(comparison, args)
    text = write_report(comparison, args.seeds)
    print(f"\n{text}\n\n{folder}: comparison.md, comparison.png, pass.png, and every run")


def run_missing(comparison: Comparison, args) -> None:
    """Run every arm with every seed; arms that start from another arm's model come last."""
    first, second = [], []
    for seed in range(args.seeds):
        for label in args.only:
            (second if ARMS[label].parent else first).append((label, seed))
    total = len(first) + len(second)
    print(
        f"{total} runs of {args.steps} steps, {args.jobs} at a time, into {comparison.folder}",
        flush=True,
    )

    comparison.write_problems()
    comparison.sample_hard_problems("base", make.BASE)
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
