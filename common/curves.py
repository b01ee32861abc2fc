"""Curves as PNG files, drawn with matplotlib: metrics over steps, and pass@k over k."""

import math

PANELS = {  # metric -> title of its panel; a panel that no run has is left out
    "reward/mean": "reward on training prompts",
    "hpt/sft_frac": "share of gated prompts",
    "hpt/offline_ratio": "offline ratio K / (n(N-K)+K)",
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


def plot(runs, path, panels=PANELS):
    """Draw one panel per metric, with one line per run, into the PNG file `path`.

    Args:
        runs: {label: {metric: [(step, value), ...]}}, the form that report.read_metrics returns.
        path: the file to write.
        panels: {metric: title}; a metric that no run has gets no panel.

    Raises:
        SystemExit: the file cannot be written, or matplotlib is missing.
    """
    pyplot = _pyplot()
    shown = [name for name in panels if any(name in metrics for metrics in runs.values())]
    columns = min(3, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    size = (4.2 * columns, 2.7 * rows)
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
    colors = {label: f"C{i}" for i, label in enumerate(runs)}
    for axis, name in zip(axes.flat, shown, strict=False):
        _draw_panel(axis, name, panels[name], runs, colors)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    figure.legend(
        [pyplot.Line2D([], [], color=color) for color in colors.values()],
        list(colors),
        loc="outside lower center",
        ncols=min(4, len(colors)),
        fontsize=8,
    )
    _save(figure, path)


def _draw_panel(axis, name, title, runs, colors):
    """Draw one metric of every run that has it."""
    for label, metrics in runs.items():
        if name in metrics:
            steps, values = zip(*metrics[name], strict=True)
            marker = "o" if len(steps) < 12 else None
            axis.plot(
                steps, values, color=colors[label], marker=marker, markersize=3, linewidth=1.2
            )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if name.startswith(SHARES):
        axis.set_ylim(-0.02, 1.02)


def pass_at_k(curves, path):
    """Draw {label: {k: pass@k in percent}} into the PNG file `path`, with k on a log scale."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    largest = 1
    for label, values in curves.items():
        axis.plot(
            list(values),
            list(values.values()),
            label=label,
            marker="o",
            markersize=3,
            linewidth=1.2,
        )
        largest = max(largest, *values)
    ticks = [2**i for i in range(largest.bit_length())]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.set(xlabel="k", ylabel="pass@k, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(figure, path)


def _save(figure, path):
    """Write a figure and forget it; matplotlib keeps open figures in memory."""
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --out {path} cannot be written: {error}") from error
    _pyplot().close(figure)


def _pyplot():
    """Return matplotlib's pyplot, set to draw into files without a screen."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("error: curves need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
