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
        for name, value in row.items():
            if value is not None:
                series.setdefault(name, []).append((row["step"], value))
    return series


def plot(runs, path):
    """Draw the PANELS that the `runs` (directories) have into the PNG `path`, a line a run."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("error: curves need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {Path(run).name: read_metrics(run) for run in runs}
    panels = {name: title for name, title in PANELS.items() if any(name in s for s in series.values())}
    columns = min(3, max(1, len(panels)))
    figure, axes = pyplot.subplots(-(-len(panels) // columns) or 1, columns, squeeze=False, layout="constrained",
                                   figsize=(4.2 * columns, 2.7 * (-(-len(panels) // columns) or 1)))
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (name, title) in zip(axes.flat, panels.items()):
        for run, metrics in series.items():
            if name in metrics:
                axis.plot(*zip(*metrics[name]), label=run, marker="o" if len(metrics[name]) < 12 else None, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if name.startswith(("reward", "hpt", "eval")):
            axis.set_ylim(-0.02, 1.02)
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output directories of runs")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    plot(args.runs, args.out)
    print(args.out)
