"""Curves of metrics over steps as PNG files, drawn with matplotlib."""

import math
from pathlib import Path

from common import report

PANELS = {  # metric -> title of its panel; a panel that no run has is left out
    "reward/mean": "reward on training prompts",
    "hpt/sft_frac": "share of gated prompts",
    "hpt/offline_ratio": "offline ratio",
    "policy/entropy": "entropy per token, nats",
    "response_length/mean": "response length, tokens",
    "sft/nll": "NLL of the demonstrations trained on",
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
SHARES = ("reward", "hpt", "eval")  # the metrics named so lie between 0 and 1
# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008); then again, dashed.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--")
GATE_COLORS = ("#CFE3F1", COLORS[1])  # of rollouts and of demonstrations


def plot(runs: dict[str, list], path: str | Path, panels: dict[str, str] = PANELS) -> None:
    """Draw one panel per metric into the PNG file `path`, with one line per label.

    The line of several runs, say of several seeds, is their mean, and a band reaches from the
    lowest to the highest of them.

    Args:
        runs: {label: [metrics of a run, ...]}, each in the form that report.read_metrics returns,
            {metric: [(step, value), ...]}.
        path: the file to write.
        panels: {metric: title}; a metric that no run has gets no panel.
    """
    import matplotlib  # it is slow, so the programs do not import it at their start

    matplotlib.use("Agg")  # draw into files, without a screen
    from matplotlib import pyplot

    every_run = [metrics for group in runs.values() for metrics in group]
    shown = [name for name in panels if any(name in metrics for metrics in every_run)]
    columns = min(3, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    size = (3.6 * columns, 2.5 * rows)
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
    for axis, name in zip(axes.flat, shown, strict=False):
        _draw_panel(axis, name, panels[name], runs)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    figure.legend(
        [pyplot.Line2D([], [], linewidth=2, **_style(i)) for i in range(len(runs))],
        list(runs),
        loc="outside lower center",
        ncols=min(4, len(runs)),
        fontsize=10,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)  # matplotlib keeps open figures in memory


def plot_gate(rows: list[dict], offline_ratio: list[tuple], path: str | Path) -> None:
    """Draw what the gate's prompts train on, per level and step, and the offline ratio beneath.

    Args:
        rows: those of gate.jsonl, as report.log_gate writes them.
        offline_ratio: [(step, hpt/offline_ratio), ...].
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = {(row["step"], level): share for row in rows for level, _, share in row["levels"]}
    steps = sorted({step for step, _ in shares})
    levels = sorted({level for _, level in shares} - {"all"}, key=report.level_order) or ["all"]
    cells = [[shares.get((step, level), math.nan) for step in steps] for level in levels]

    figure, (above, below) = pyplot.subplots(
        2,
        1,
        sharex=True,
        layout="constrained",
        figsize=(7.5, 2.2 + 0.32 * min(len(levels), 20)),
        height_ratios=[max(1.0, 0.45 * min(len(levels), 20)), 1.0],
    )
    colors = matplotlib.colors.LinearSegmentedColormap.from_list("gate", GATE_COLORS)
    edges = [steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(levels) - 0.5]
    image = above.imshow(
        cells,
        cmap=colors,
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=edges,
        interpolation="nearest",
    )
    names = [str(level)[:20] for level in levels]
    above.set_yticks(range(len(levels)), names, fontsize=9, parse_math=False)
    above.set_ylabel("level", fontsize=10)
    above.set_title("what the prompts of a level train on (white: none was drawn)", fontsize=11)
    bar = figure.colorbar(image, ax=above, ticks=[0, 0.5, 1], pad=0.01)
    bar.set_ticklabels(["rollouts", "half", "demonstration"])
    marker = "o" if len(offline_ratio) < 12 else None
    below.plot(*zip(*offline_ratio), color=COLORS[0], linewidth=1.6, marker=marker, markersize=3)
    below.set_title(
        "share of demonstrations among the sequences trained on (offline ratio)", fontsize=11
    )
    below.set_ylim(-0.02, 1.02)
    below.set_xlabel("step", fontsize=10)
    below.xaxis.get_major_locator().set_params(integer=True)
    below.tick_params(labelsize=9)
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _style(i):
    """Return the colour and the dashes of the i-th line."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def _draw_panel(axis, name, title, runs):
    """Draw one metric of every label whose runs have it."""
    for i, group in enumerate(runs.values()):
        values = {}  # {step: values of the runs}
        for metrics in group:
            for step, value in metrics.get(name, []):
                values.setdefault(step, []).append(value)
        steps = sorted(values)
        means = [sum(values[step]) / len(values[step]) for step in steps]
        marker = "o" if len(steps) < 12 else None
        axis.plot(steps, means, marker=marker, markersize=3, linewidth=1.6, **_style(i))
        if len(group) > 1:
            low, high = [min(values[step]) for step in steps], [max(values[step]) for step in steps]
            axis.fill_between(steps, low, high, color=_style(i)["color"], alpha=0.15, linewidth=0)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step", fontsize=10)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.3)
    if name.startswith(SHARES):
        axis.set_ylim(-0.02, 1.02)
