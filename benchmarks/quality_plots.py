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
from quality_plan import AT_THE_END, GAPS, GOAL, HOROVOD, METHODS, ONE, SWEPT, Choice, Result
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
LEVEL_LABEL = 2500.0  # steps, right of all curves
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
    figure, axes = row_of_panels(max(len(panels), 1))
    labels = []
    for panel, (title, methods) in zip(axes, panels.items(), strict=False):
        panel.set(title=title, xlabel="trainers", xscale="log", xlim=(0.9, 2.6 * max(key[1] for key in groups)))
        panel.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
        panel.minorticks_off()
        labels.append([
            curve(panel, [(beside(key[1], index), auc(groups[key])) for key in keys], method)
            for index, method in enumerate([ONE, HOROVOD, AT_THE_END, *methods])
            if (keys := [(method, trainers, None) for trainers in (1, 2, 4, 8) if (method, trainers, None) in groups])
        ])  # fmt: skip
    for panel, each in zip(axes, labels, strict=False):
        write(panel, each)
    return figure


def over_gap(groups: Groups) -> plt.Figure:
    """A panel for each number of trainers; hollow: no round before the end of the pass, whose steps are the gap."""
    counts = sorted({key[1] for key in groups if key[2] is not None})
    figure, axes = row_of_panels(len(counts))
    labels = []
    for panel, trainers in zip(axes, counts, strict=True):
        panel.set(
            title=f"{trainers} trainers", xlabel="sync gap seen (steps per round)", xscale="log", xlim=(0.9, 15000)
        )
        references = [key for key in ((ONE, 1, None), (HOROVOD, trainers, None)) if key in groups]
        labels.append([
            *(level(panel, auc(groups[key]), key[0]) for key in references),
            *(curve(panel, [(seen(groups[key]), auc(groups[key])) for key in keys], method,
                    [not gaps(groups[key]) for key in keys])
              for method in SWEPT
              if (keys := [(method, trainers, every) for every in GAPS if (method, trainers, every) in groups])),
        ])  # fmt: skip
    for panel, each in zip(axes, labels, strict=True):
        write(panel, each)
    return figure


def row_of_panels(count: int) -> tuple[plt.Figure, Sequence[Axes]]:
    figure, axes = plt.subplots(
        1, count, figsize=(5.2 * count, 4.6), sharey=True, layout="constrained", squeeze=False
    )  # fmt: skip
    axes[0][0].set_ylabel("AUC on the test months (mean, 95 % interval)")
    return figure, axes[0]


def beside(trainers: int, index: int) -> float:
    """Return where the curve `index` has its points, so that intervals are beside one another."""
    return trainers if trainers == 1 else trainers * 1.03 ** (index - 3)


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
    return LEVEL_LABEL, interval.mean, method


def write(panel: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write labels to the right of where curves end, below one another where they would overlap."""
    panel.grid(alpha=0.25)
    low, high = panel.get_ylim()
    space, right = LABEL_SPACE * (high - low), max((x for x, _, _ in labels), default=1.0)
    last: dict[float, float] = {}  # the highest label so far in each column
    for x, y, method in sorted(labels, key=lambda label: label[1]):
        column = right if x > 0.8 * right else x
        last[column] = max(y, last.get(column, -math.inf) + space)
        name, upright = method.removesuffix(" interpolate"), "bottom" if x > LEVEL_LABEL - 1 else "center"
        panel.annotate(name, (x, y), (column * 1.07, last[column]), color=colour(method), fontsize=8, va=upright)
    panel.set_ylim(low, max([high, *(at + space for at in last.values())]))
