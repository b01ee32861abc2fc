"""Curves from the metrics.jsonl of one or more runs.

    python plot.py runs/A runs/B --out curves.png
"""
import argparse
import json
from pathlib import Path

PANELS = {  # metric -> title; a panel that no run has is left out
    "reward/mean": "reward on training prompts",
    "hpt/sft_frac": "share of gated prompts",
    "hpt/offline_ratio": "offline ratio K / (n(N-K)+K)",
    "policy/entropy": "entropy per token, nats",
    "response_length/mean": "response length, tokens",
    "sft/nll": "NLL of the demonstrations taken",
    "mismatch/kl": "KL(sampler || trainer)",
    "optim/grad_norm": "gradient norm before clipping",
    "critic/explained_variance": "critic: explained variance",
    "probe/rl_norm": "norm of the RL gradient",
    "probe/sft_norm": "norm of the SFT gradient",
    "probe/cosine": "cosine of the RL and the SFT gradient",
    "probe/rl_variance": "RL: variance over prompts",
    "probe/sft_variance": "SFT: variance over prompts",
    "eval/pass@1": "held-out accuracy",
}


def read_metrics(run):
    """{metric: [(step, value), ...]} of a run directory; SystemExit if it has no readable metrics.jsonl."""
    path, series = Path(run) / "metrics.jsonl", {}
    if not path.is_file():
        raise SystemExit(f"error: {run}: no metrics.jsonl there; give the output directory of a run")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"error: {path}:{number}: not JSON: {error.msg}") from error
        if not isinstance(row, dict) or "step" not in row:
            raise SystemExit(f"error: {path}:{number}: no metrics of a step")
        for name, value in row.items():
            if value is not None:
                series.setdefault(name, []).append((row["step"], value))
    if not series:
        raise SystemExit(f"error: {path}: no step in it yet")
    return series


def mean_over(runs):
    """{metric: [(step, mean), ...]} of several run directories, over the runs that have the metric at the step."""
    values = {}
    for run in runs:
        for name, points in read_metrics(run).items():
            for step, value in points:
                values.setdefault(name, {}).setdefault(step, []).append(value)
    return {name: [(step, sum(v) / len(v)) for step, v in sorted(steps.items())] for name, steps in values.items()}


def plot(runs, path, panels=PANELS):
    """Draw the panels that any run has into the PNG `path`, a line a label: runs is {label: run directories to average}."""
    pyplot = _pyplot()
    series = {label: mean_over(directories) for label, directories in runs.items()}
    panels = {name: title for name, title in panels.items() if any(name in s for s in series.values())}
    colors = {run: f"C{i}" for i, run in enumerate(series)}
    columns = min(3, max(1, len(panels)))
    figure, axes = pyplot.subplots(-(-len(panels) // columns) or 1, columns, squeeze=False, layout="constrained",
                                   figsize=(4.2 * columns, 2.7 * (-(-len(panels) // columns) or 1)))
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (name, title) in zip(axes.flat, panels.items()):
        for run, metrics in series.items():
            if name in metrics:
                axis.plot(*zip(*metrics[name]), color=colors[run], marker="o" if len(metrics[name]) < 12 else None, markersize=3,
                          linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if name.startswith(("reward", "hpt", "eval")):
            axis.set_ylim(-0.02, 1.02)
    figure.legend([pyplot.Line2D([], [], color=color) for color in colors.values()], colors, loc="outside lower center",
                  ncols=min(4, len(colors)), fontsize=8)
    _save(figure, path)


def pass_at_k(curves, path):
    """Draw {label: {k: pass@k, %}} into the PNG `path`."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    for label, values in curves.items():
        axis.plot(*zip(*values.items()), label=label, marker="o", markersize=3, linewidth=1.2)
    ks = [2**i for i in range(max(max(values) for values in curves.values()).bit_length())]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, map(str, ks))
    axis.set(xlabel="k", ylabel="pass@k, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(figure, path)


def _save(figure, path):
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --out {path} cannot be written: {error}") from error
    _pyplot().close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("error: curves need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output directories of runs")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    names = [Path(run).name for run in args.runs]
    plot({name if names.count(name) == 1 else run: [run] for name, run in zip(names, args.runs)}, args.out)
    print(args.out)
