"""What an evaluation prints and writes, and the comparison of two: evaluate.py calls it.

    results.jsonl   a problem a line          results.json   the table's numbers, pass@k for every k, and the settings
    table.md        the table as printed      generations.jsonl   every response
"""
import json
import math
import subprocess
from pathlib import Path

import evaluate
import plot

OTHER = ("arc_c", "arc-c", "gpqa")  # how the names of those begin that the paper averages apart, as out of distribution
RESAMPLES = 10_000


def report(out, settings, results, timeouts):
    """Print the settings and the table; write results.jsonl, results.json and table.md into the directory `out`.

    results: {benchmark: list of evaluate.measure's dicts}; timeouts: {benchmark: answers that the verifier gave up}.
    """
    (out / "results.jsonl").unlink(missing_ok=True)
    for name, rows in results.items():
        evaluate.write(out / "results.jsonl", rows, benchmark=name)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    parts = {name: {level: evaluate.summary(part) for level, part in evaluate.by_level(rows).items()} for name, rows in results.items()}
    numbers = {name: levels["all"] | {"timeouts": timeouts[name], "levels": {str(k): v for k, v in levels.items() if k != "all"}}
               for name, levels in parts.items()}
    ks = [2**i for i in range(1, 20) if 2**i <= max(rows[0]["samples"] for rows in results.values())]
    lines = [["benchmark", "problems", "n", "avg@n, %", *(f"pass@{k}, %" for k in ks), "truncated, %", "tokens", "timeouts"]]
    for name, levels in parts.items():
        for level, s in levels.items():
            lines.append([name if level == "all" else f"{name}, level {level}", s["problems"], s["samples"], _cell(s["pass@1"]),
                          *(_cell(s[f"pass@{k}"]) if f"pass@{k}" in s else "" for k in ks), f"{100 * s['truncated']:.1f}",
                          f"{s['length/mean']:.1f}", timeouts[name] if level == "all" else ""])
    other = [name for name in parts if name.lower().startswith(OTHER)]
    for label, names in {"mean": [name for name in parts if name not in other], "mean, out of distribution": other}.items():
        if len(names) > 1:
            scores = [parts[name]["all"]["pass@1"] for name in names]
            mean = sum(m for m, _ in scores) / len(scores), math.sqrt(sum(e**2 for _, e in scores)) / len(scores)
            numbers[label] = {"benchmarks": names, "avg@n": mean}
            lines.append([f"{label} of {len(names)}", "", "", _cell(mean), *[""] * len(ks), "", "", ""])
    written = {"settings": settings, "commit": commit or None, "results": numbers}
    written = json.loads(json.dumps(written), parse_constant=lambda nan: None)  # the error of a single problem; JSON has no nan
    (out / "results.json").write_text(json.dumps(written, indent=1) + "\n")
    head = [f"- {name}: {'; '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}"
            for name, value in (settings | {"commit": commit}).items() if value not in (None, "")]
    text = "\n".join([*head, "", *_table(lines), "", "±: one standard error over problems. tokens: mean response length. timeouts: answers the "
                      "verifier gave up, scored 0."])
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{out}: table.md, results.json, results.jsonl, generations.jsonl", flush=True)


def compare(a, b, out=None):
    """Print how evaluation `a` differs from `b`, problem by problem, and write comparison.md, .json and pass.png into `out`.

    The difference of means has a 95% interval from a bootstrap over problems, seeded. Exclusive solves, +x/-y: problems
    solved, in more than half of the samples, by `a` alone and by `b` alone (the paper's Table 4). SystemExit unless both
    hold the same problems.
    """
    import numpy
    runs, settings = zip(_read(a), _read(b))
    names = [name for name in runs[0] if name in runs[1]]
    if not names:
        raise SystemExit(f"error: --compare: no benchmark in common: {a} has {', '.join(runs[0])}; {b} has {', '.join(runs[1])}")
    lines = [["benchmark", "problems", "A, %", "B, %", "A - B", "95% interval", "solved by A alone / by B alone"]]
    numbers, curves = {}, {}
    for name in names:
        if [r["prompt"] for r in runs[0][name]] != [r["prompt"] for r in runs[1][name]]:
            raise SystemExit(f"error: --compare: {name} is not the same problems in {a} ({len(runs[0][name])} of them) and in {b} "
                             f"({len(runs[1][name])}): evaluate both, to the end, on the same file")
        pairs = [dict(zip("ab", pair), level=pair[0]["level"]) for pair in zip(runs[0][name], runs[1][name])]
        for level, part in evaluate.by_level(pairs).items():
            scores = [numpy.array([p[run]["correct"] / p[run]["samples"] for p in part]) for run in "ab"]
            difference, rng = scores[0] - scores[1], numpy.random.default_rng(0)
            means = [difference[rng.integers(len(part), size=len(part))].mean() for _ in range(RESAMPLES)]
            low, high = numpy.percentile(means, [2.5, 97.5])
            solved = scores[0] > 0.5, scores[1] > 0.5
            exclusive = int((solved[0] & ~solved[1]).sum()), int((solved[1] & ~solved[0]).sum())
            label = name if level == "all" else f"{name}, level {level}"
            numbers[label] = {"problems": len(part), "a": scores[0].mean(), "b": scores[1].mean(), "difference": difference.mean(),
                              "interval": [low, high], "exclusive": exclusive}
            lines.append([label, len(part), *(f"{100 * s.mean():.1f}" for s in scores), f"{100 * difference.mean():+.1f}",
                          f"[{100 * low:+.1f}, {100 * high:+.1f}]", f"+{exclusive[0]}/-{exclusive[1]}"])
        for run, results in zip((a, b), runs):
            n = results[name][0]["samples"]
            if n > 1:
                curves[f"{run}, {name}"] = {k: 100 * evaluate.mean_pass_at_k(results[name], k)[0] for k in range(1, n + 1)}
    out = Path(out or f"runs/compare-{Path(a).name}-{Path(b).name}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --out {out} cannot be made: {error.strerror}; name another directory") from error
    (out / "comparison.json").write_text(json.dumps({"a": a, "b": b, "results": numbers}, indent=1) + "\n")
    text = "\n".join([f"- A: {a}", f"- B: {b}", *_differing(*settings), "", *_table(lines)])
    (out / "comparison.md").write_text(text + "\n")
    if curves:
        plot.pass_at_k(curves, out / "pass.png")
    print(f"{text}\n\n{out}: comparison.md, comparison.json{', pass.png' * bool(curves)}")


def _read(run):
    """({benchmark: results}, settings) of an evaluation, or of a training run the last of its held-out evaluations."""
    for file, made_by, key in (("results.jsonl", "results.json", "settings"), ("held_out.jsonl", "config.json", "flags")):
        path = Path(run) / file
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            settings = json.loads(path.with_name(made_by).read_text())[key] if path.with_name(made_by).exists() else {}
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: --compare {run}: {path.name} or {made_by} is broken: {error}") from error
        if not rows:
            raise SystemExit(f"error: --compare {run}: {file} is empty")
        step = rows[-1].get("step")
        rows = [row for row in rows if row.get("step") == step]
        return {name: [r for r in rows if r.get("benchmark", "held out") == name]
                for name in dict.fromkeys(row.get("benchmark", "held out") for row in rows)}, settings | {"step": step}
    raise SystemExit(f"error: --compare {run}: no results.jsonl (of evaluate.py, finished) and no held_out.jsonl (of train_hpt.py) there")


def _differing(first, second):
    """Lines that name the settings in which two evaluations differ."""
    return [f"- {key}: {first[key]} in A, {second[key]} in B" for key in first if key not in ("model", "out") and first[key] != second.get(key, first[key])]


def _cell(score):
    """A (mean, standard error) pair in percent."""
    return f"{100 * score[0]:.1f} ± {100 * score[1]:.1f}"


def _table(rows):
    """Rows of cells, the first the head, as the aligned lines of a Markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|", *lines[1:]]
