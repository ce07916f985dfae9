"""Examples/s and sync gap over the number of hosts, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvd_shadowsync.capacity.setting import Setting
from hvd_shadowsync.capacity.ways import Prediction, predict

HOSTS = (*(1 << power for power in range(14)), 10_000)


def curves(settings: Mapping[str, tuple[Setting, str]]) -> dict[str, list[Prediction]]:
    """Return the predictions for each of `HOSTS`, by name; `settings` has a setting and a way by name."""
    return {
        name: [predict(replace(setting, cluster=replace(setting.cluster, hosts=hosts)), way) for hosts in HOSTS]
        for name, (setting, way) in settings.items()
    }


def draw(settings: Mapping[str, tuple[Setting, str]], file: Path) -> None:
    """Write the picture, one line for each way, both axes logarithmic; needs the package matplotlib.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib ({error}); pip install matplotlib") from error
    figure = Figure(figsize=(13, 5), layout="constrained")
    speed, gap = figure.subplots(1, 2)
    for colour, (name, predictions) in enumerate(curves(settings).items()):
        _line(speed, [each.examples_per_s for each in predictions], name, colour)
        if settings[name][1] != "none":
            _line(gap, [each.sync_gap_steps for each in predictions], name, colour)
    speed.set(ylabel="examples/s of all ranks")
    gap.set(ylabel="sync gap (steps from round to round)")
    for panel in (speed, gap):
        panel.set(xlabel="hosts", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    speed.legend()
    figure.savefig(file, dpi=110)


def _line(panel: Any, values: Sequence[float], name: str, colour: int) -> None:
    """Draw one way; without synchronisation (0) dotted and above the others, some of which come close to it."""
    style = ":" if colour == 0 else "--" if name.endswith("hierarchical") else "-"
    shade, level = ("black", 3) if colour == 0 else (f"C{colour - 1}", 2)
    panel.plot(HOSTS, values, color=shade, linestyle=style, linewidth=1.4, label=name, zorder=level)
