"""The records as pictures: examples/s over the links' rate, the loss over time and over examples, the sync gap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import NETWORKS, Network
from .records import CASE, Record, by_case
from .table import ORDER

COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart, and a grey; by the beginning of the name
    "none": "#000000", "horovod": "#E69F00", "ddp": "#D55E00", "post-local": "#CC79A7", "torchft": "#009E73",
    "hivemind": "#7F7F7F", "torchrec": "#56B4E9", "sockets": "#7F7F7F",
    "S-MA": "#0072B2", "S-EASGD": "#009E73", "S-BMUF": "#CC79A7",
    "FR-MA": "#0072B2", "FR-EASGD": "#009E73", "FR-BMUF": "#CC79A7",
}  # fmt: skip
LINES = ("-", "--", ":", "-.", (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "d", "<", ">", "p", "h", "*", "1")
PANELS = {
    "peers": ("none", "horovod", "ddp", "post-local", "torchft", "hivemind", "torchrec"),
    "this project, in the background": ("S-", "sockets"),
    "this project, in the foreground": ("FR-",),
}
"""Curves side by side, a few in each, by the beginnings of names; the references are in all of them."""
REFERENCES = ("none", "horovod")


def draw_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what the records allow; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for (workload, hosts), found in by_workload(records).items():
        if len({key for each in found.values() for key in each}) > 1:
            drawn.append(saved(over_rate(workload, hosts, found), folder / f"rate-{workload}-{hosts}.png"))
    for key, contenders in by_case(records).items():
        measured = [each for each in ordered(contenders) if "examples_per_s" in each]
        name = f"{key[0]}-{network_of(key).name}-{key[1]}"
        curves = {each["contender"]: curve for each in measured if (curve := curve_of(each)) is not None}
        if curves:
            title = measured[0]["title"]
            for column, axis, what in ((0, "training time, s", "time"), (1, "examples of all ranks", "examples")):
                drawn.append(saved(loss_over(curves, column, axis, title), folder / f"loss-{what}-{name}.png"))
        if any(each.get("sync_gap_steps") for each in measured):
            drawn.append(saved(sync_gaps(measured), folder / f"gap-{name}.png"))
    return drawn


def by_workload(records: Sequence[Record]) -> dict[tuple[str, int], dict[str, dict[str, Record]]]:
    """Return measured records by workload and hosts, then contender, then network."""
    found: dict[tuple[str, int], dict[str, dict[str, Record]]] = {}
    for record in sorted(records, key=lambda each: ORDER.get(each["contender"], len(ORDER))):
        if "examples_per_s" in record:
            of_contender = found.setdefault((record["workload"], record["hosts"]), {})
            network = network_of(tuple(record[key] for key in CASE))
            of_contender.setdefault(record["contender"], {})[network.text] = record
    return found


def network_of(case: tuple[Any, ...]) -> Network:
    """Return a case's network; a new one where the list no longer has it."""
    for network in NETWORKS.values():
        if (network.rate_mbit, network.latency_ms) == case[2:]:
            return network
    return Network(f"{case[2]}mbit-{case[3]}ms", f"{case[2]} Mbit/s, {case[3]} ms a link")


def ordered(contenders: Mapping[str, Record]) -> list[Record]:
    return sorted(contenders.values(), key=lambda each: ORDER.get(each["contender"], len(ORDER)))


def style_of(name: str) -> dict[str, Any]:
    """Return a contender's colour, line and mark, the same in every picture."""
    families = list(COLOURS)
    family = next((each for each in families if name.startswith(each)), "none")
    members = [each for each in ORDER if each.startswith(family)]
    line = LINES[members.index(name) % len(LINES)] if name in members else LINES[0]
    return {"color": COLOURS[family], "linestyle": line, "marker": MARKS[families.index(family)]}


def panels_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return which contenders go into which panel; panels that would show references alone are left out."""
    names = list(names)
    found = {}
    for title, beginnings in PANELS.items():
        members = [name for name in names if name in REFERENCES or name.startswith(beginnings)]
        if any(name not in REFERENCES for name in members):
            found[title] = members
    return found or {"": names}


def over_rate(workload: str, hosts: int, contenders: Mapping[str, Mapping[str, Record]]) -> Figure:
    """Examples/s of each contender on each network, slowest first; a line from the worst to the best run."""
    seen = {network for each in contenders.values() for network in each}
    slowest_first = [network.text for network in reversed(NETWORKS.values())]
    networks = [each for each in slowest_first if each in seen] + sorted(seen - set(slowest_first))

    def draw(axes: Axes, name: str) -> None:
        found = contenders[name]
        places = [index for index, network in enumerate(networks) if network in found]
        rates = [found[networks[index]]["examples_per_s"] for index in places]
        middle = np.array([each["median"] for each in rates])
        errors = [middle - [each["worst"] for each in rates], [each["best"] for each in rates] - middle]
        axes.errorbar(places, middle, yerr=errors, label=name, markersize=5, elinewidth=0.8, **style_of(name))
        axes.set_xticks(range(len(networks)), [network.replace(", ", ",\n") for network in networks])

    figure = in_panels(
        f"{workload}, {hosts} hosts", contenders, draw, "links between the hosts", "examples/s, all ranks"
    )
    figure.axes[0].set_ylim(bottom=0)
    return figure


def curve_of(record: Record) -> np.ndarray | None:
    """Return the curve of the run whose examples/s are the median, or next to it: seconds, examples, loss."""
    good = [run for run in record["runs"] if run.get("curve")]
    if not good:
        return None
    middle = record["examples_per_s"]["median"]
    return np.array(min(good, key=lambda run: abs(run["examples_per_s"] - middle))["curve"])


def loss_over(curves: Mapping[str, np.ndarray], column: int, axis: str, title: str) -> Figure:
    """Training loss of each contender's middle run."""

    def draw(axes: Axes, name: str) -> None:
        curve, every = curves[name], max(len(curves[name]) // 6, 1)
        axes.plot(curve[:, column], curve[:, 2], label=name, markevery=every, markersize=4, **style_of(name))

    figure = in_panels(title, curves, draw, axis, "training loss, mean of the replicas")
    figure.axes[0].set_yscale("log")
    figure.axes[0].set_xlim(left=0)
    return figure


def sync_gaps(measured: Sequence[Record]) -> Figure:
    """Steps between two synchronisations, a bar a contender, with its figure beside it."""
    known = [each for each in measured if each.get("sync_gap_steps")]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(known)), layout="constrained")
    axes.set_title(measured[0]["title"], loc="left", fontsize=11)
    open_frame(axes)
    names = [each["contender"] for each in known]
    gaps = [each["sync_gap_steps"] for each in known]
    bars = axes.barh(names, gaps, color=[style_of(name)["color"] for name in names], height=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("sync gap, steps")
    axes.margins(x=0.1)
    return figure


def in_panels(
    title: str, names: Iterable[str], draw: Callable[[Axes, str], None], x_label: str, y_label: str
) -> Figure:
    """Draw each contender in its panel, all on the same axes, with a row of a legend below for each."""
    panels = panels_of(names)
    figure, (row,) = plt.subplots(
        1, len(panels), figsize=(1 + 4.2 * len(panels), 5.4), layout="constrained", sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, (heading, members) in zip(row, panels.items(), strict=True):
        for name in members:
            draw(axes, name)
        axes.set_title(heading, loc="left", fontsize=9)
        axes.set_xlabel(x_label)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=8, frameon=False)
        open_frame(axes)
    row[0].set_ylabel(y_label)
    return figure


def open_frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
