"""Plots of the benchmark of quality: AUC over the number of trainers, and over the sync gap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from intervals import Interval, mean_interval
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from quality_plan import AT_THE_END, GOAL, HOROVOD, METHODS, ONE, SWEPT, Choice, Result
from quality_report import Groups, Seeds, gaps, grouped, values

COLOURS = {
    ONE: "#000000", HOROVOD: "#D55E00", AT_THE_END: "#999999", "MA": "#0072B2", "EASGD": "#009E73", "BMUF": "#CC79A7",
}  # fmt: skip
"""Okabe and Ito's, which colour-blind people tell apart."""
PANELS = {
    "background, delta rule": GOAL,
    "background, interpolation": [name for name in METHODS if name.endswith("interpolate")],
    "foreground": [name for name in METHODS if name.startswith("FR-")],
}
LABEL_SPACE = 0.045  # of the height of a panel


def draw(choice: Choice, found: Sequence[Result], folder: Path) -> list[Path]:
    """Write the plots that there are results for; return their paths."""
    groups = grouped(choice, found)
    written = []
    for name, is_there, plot in (
        ("quality_trainers.png", any(key[0] == HOROVOD for key in groups), over_trainers),
        ("quality_gap.png", any(key[2] is not None for key in groups), over_gap),
    ):
        if is_there:
            folder.mkdir(parents=True, exist_ok=True)
            figure = plot(groups)
            figure.savefig(folder / name, dpi=130)
            plt.close(figure)
            written.append(folder / name)
    return written


def over_trainers(groups: Groups) -> plt.Figure:
    """A panel for each way of merging, with the peers in all of them."""
    panels = {name: methods for name, methods in PANELS.items() if any(key[0] in methods for key in groups)}
    figure, axes = plt.subplots(1, max(len(panels), 1), figsize=(5.2 * max(len(panels), 1), 4.6), sharey=True,
                                layout="constrained", squeeze=False)  # fmt: skip
    most = max(key[1] for key in groups)
    for panel, (title, methods) in zip(axes[0], panels.items(), strict=False):
        labels = []
        for index, method in enumerate([ONE, HOROVOD, AT_THE_END, *methods]):
            points = [(key[1], auc(groups[key])) for key in sorted(groups, key=str) if key[0] == method and not key[2]]
            if points:
                shifted = [(trainers * 1.012 ** (index - 2), interval) for trainers, interval in points]
                labels.append(curve(panel, shifted, method))
        panel.set(title=title, xlabel="trainers", xscale="log", xticks=[1, 2, 4, 8], xlim=(0.9, most * 2.1))
        panel.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
        panel.minorticks_off()
        write(panel, labels)
    axes[0][0].set_ylabel("AUC on the test months (mean, 95 % interval)")
    return figure


def over_gap(groups: Groups) -> plt.Figure:
    """A panel for each number of trainers; hollow: no round before the end of the pass, whose steps are the gap."""
    counts = sorted({key[1] for key in groups if key[2] is not None})
    figure, axes = plt.subplots(1, len(counts), figsize=(5.2 * len(counts), 4.6), sharey=True, layout="constrained",
                                squeeze=False)  # fmt: skip
    for panel, trainers in zip(axes[0], counts, strict=True):
        labels = []
        for method in SWEPT:
            keys = sorted(
                (key for key in groups if key[:2] == (method, trainers) and key[2]), key=lambda key: key[2] or 0
            )
            if keys:
                points = [(seen(groups[key]), auc(groups[key])) for key in keys]
                hollow = [not gaps(groups[key]) for key in keys]
                labels.append(curve(panel, points, method, hollow))
        panel.set(
            title=f"{trainers} trainers", xlabel="sync gap seen (steps per round)", xscale="log", xlim=(0.9, 3000)
        )
        for method, size in ((ONE, 1), (HOROVOD, trainers)):
            if (method, size, None) in groups:
                labels.append(level(panel, auc(groups[method, size, None]), method))
        write(panel, labels)
    axes[0][0].set_ylabel("AUC on the test months (mean, 95 % interval)")
    return figure


def auc(seeds: Seeds) -> Interval:
    return mean_interval(list(values(seeds).values()))


def seen(seeds: Seeds) -> float:
    """Return the mean gap; without a round before the end the steps of the pass."""
    return statistics.fmean(gaps(seeds) or [each["steps"] for each in seeds.values()])


def colour(method: str) -> str:
    return next(shade for name, shade in COLOURS.items() if name in method)


def curve(
    panel: Axes, points: Sequence[tuple[float, Interval]], method: str, hollow: Sequence[bool] = ()
) -> tuple[float, float, str]:
    """Draw means with intervals; return where its label belongs, and whose it is."""
    style = "--" if method.endswith("-30") else "-"
    x, y = [at for at, _ in points], [interval.mean for _, interval in points]
    reach = [0.0 if math.isnan(interval.half_width) else interval.half_width for _, interval in points]
    panel.errorbar(
        x, y, reach, color=colour(method), linestyle=style, marker="o", markersize=4, capsize=2.5, linewidth=1.3
    )
    for at, mean, open_one in zip(x, y, hollow, strict=False):
        if open_one:
            panel.plot(at, mean, "o", color=colour(method), markerfacecolor="white", markersize=5, zorder=5)
    return x[-1], y[-1], method


def level(panel: Axes, interval: Interval, method: str) -> tuple[float, float, str]:
    """Draw a mean with its interval across the panel."""
    panel.axhline(interval.mean, color=colour(method), linewidth=1.1, linestyle=":")
    if not math.isnan(interval.half_width):
        panel.axhspan(interval.low, interval.high, color=colour(method), alpha=0.1, linewidth=0)
    return 700.0, interval.mean, method


def write(panel: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write labels to the right of where curves end, moved apart where they would overlap."""
    panel.grid(alpha=0.25)
    low, high = panel.get_ylim()
    space, last = LABEL_SPACE * (high - low), -math.inf
    for x, y, method in sorted(labels, key=lambda label: label[1]):
        last = max(y, last + space)
        panel.annotate(method, (x, y), (x * 1.09, last), color=colour(method), fontsize=8, va="center")
