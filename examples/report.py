"""Compares runs of ctr.py: one table, one picture, one page.

    python examples/report.py runs/demo/*.json --output runs/demo

Prints the table and writes report.md, report.png and report.html (self-contained) into the output folder. Records with
the same settings except the seed are one row and one colour: the table has their mean and standard deviation.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tabulate import tabulate

Record = dict[str, Any]
Groups = dict[str, list[Record]]

HEADERS = ["run", "runs", "examples/s", "AUC", "normalised entropy", "sync gap (steps)", "rounds", "sent (MB)"]
NOTE = (
    "Examples/s are of the whole job's training loop; AUC and normalised entropy (log loss over the entropy of the "
    "label's mean) are of the test rows; the sync gap is training steps per round; MB are sent by all ranks together "
    "(Horovod's computed for a ring). With sharded tables all runs exchange embeddings in the same way, which is most "
    "of what they send; the name says how the rest of the model is kept together."
)
VARIED = ("seed", "report")  # settings in which records of one group differ
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left }}
img {{ max-width: 100% }}
</style></head><body>
<h1>{title}</h1>
{table}
<p>{note}</p>
<img alt="Loss over examples and over time, sync gap over time" src="data:image/png;base64,{picture}">
<h2>Settings</h2>
{settings}
</body></html>
"""


def load(files: Sequence[Path]) -> list[Record]:
    """Reads records.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is no record of ctr.py.
    """
    records = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; write it with: ctr.py --report {file}")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            missing = {"name", "settings", "world_size", "examples_per_second", "test", "sync", "history"} - set(record)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{file} is no record of ctr.py ({error}); write it anew with: ctr.py --report {file}"
            ) from error
        if missing:
            raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; write it anew with: ctr.py --report {file}")
        records.append(record)
    return records


def group(records: Sequence[Record]) -> Groups:
    """Records that differ in the seed only, under one name; further settings that differ stand in the name."""

    def settings(record: Record) -> dict[str, str]:
        described = {**record["settings"], "ranks": record["world_size"]}
        return {name: str(value) for name, value in described.items() if name not in VARIED}

    groups: Groups = {}
    for record in records:
        twins = [settings(other) for other in records if other["name"] == record["name"]]
        mine = settings(record)
        differing = [
            f"{name}={value}" for name, value in mine.items() if any(twin.get(name) != value for twin in twins)
        ]
        groups.setdefault(" ".join([record["name"], *differing]), []).append(record)
    return groups


def spread(values: Sequence[float | None], template: str) -> str:
    """Mean, with the standard deviation where there are several; "-" where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = template.format(statistics.fmean(known))
    return f"{mean} ± {template.format(statistics.stdev(known))}" if len(known) > 1 else mean


def rows(groups: Groups) -> list[list[str]]:
    """One row per group, in the order of HEADERS."""
    columns = [
        (lambda record: record["examples_per_second"], "{:.0f}"),
        (lambda record: record["test"]["auc"], "{:.4f}"),
        (lambda record: record["test"]["normalised_entropy"], "{:.4f}"),
        (lambda record: record["sync"]["sync_gap_steps"], "{:.1f}"),
        (lambda record: record["sync"]["rounds"], "{:.0f}"),
        (lambda record: record["sync"]["bytes_sent"] / 1e6, "{:.1f}"),
    ]
    return [
        [name, str(len(records)), *(spread([value(record) for record in records], form) for value, form in columns)]
        for name, records in groups.items()
    ]


def draw(groups: Groups) -> bytes:
    """The picture as PNG: loss over examples, loss over time, sync gap over time."""
    panels = [
        ("examples", "loss", "examples of the whole job", "training loss of rank 0"),
        ("seconds", "loss", "seconds", "training loss of rank 0"),
        ("seconds", "sync_gap", "seconds", "sync gap (steps per round)"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for panel, (x, y, x_label, y_label) in zip(axes, panels, strict=True):
        for colour, (name, records) in enumerate(groups.items()):
            for number, record in enumerate(records):
                curve(panel, record["history"], x, y, colour=f"C{colour}", label=name if number == 0 else None)
        panel.set(xlabel=x_label, ylabel=y_label)
        panel.grid(alpha=0.3)
    if any(entry["sync_gap"] for records in groups.values() for record in records for entry in record["history"]):
        axes[2].set_yscale("log")
    axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def curve(
    panel: Axes, history: Sequence[dict[str, float | None]], x: str, y: str, *, colour: str, label: str | None
) -> None:
    """One run's values as thin line; losses smoothed over five entries, gaps with a marker at each."""
    entries = [(entry[x], entry[y]) for entry in history if entry[y] is not None]
    width = 5 if y == "loss" else 1
    smooth = [
        statistics.fmean(value for _, value in entries[max(i - width + 1, 0) : i + 1]) for i in range(len(entries))
    ]
    marker = "." if y == "sync_gap" else None
    panel.plot([at for at, _ in entries], smooth, color=colour, alpha=0.8, linewidth=1.1, marker=marker, label=label)


def page(groups: Groups, table: Sequence[Sequence[str]], picture: bytes) -> str:
    """The report as one HTML file without links to others."""
    names = sorted({name for records in groups.values() for name in records[0]["settings"]} - set(VARIED))
    described = {
        group: {**records[0]["settings"], "ranks": records[0]["world_size"]} for group, records in groups.items()
    }
    settings = [[name, *(described[group].get(name) for group in groups)] for name in ["ranks", *names]]
    return PAGE.format(
        title="Background synchronisation compared",
        table=tabulate(table, HEADERS, tablefmt="html", disable_numparse=True),
        note=html.escape(NOTE),
        picture=base64.b64encode(picture).decode(),
        settings=tabulate(settings, ["", *groups], tablefmt="html", disable_numparse=True, missingval="-"),
    )


def write(records: Sequence[Record], output: Path) -> str:
    """Writes report.md, report.png and report.html into the folder; returns the table."""
    groups = group(records)
    table = rows(groups)
    text = tabulate(table, HEADERS, tablefmt="github", disable_numparse=True)
    picture = draw(groups)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(f"{text}\n\n{NOTE}\n", encoding="utf-8")
    (output / "report.png").write_bytes(picture)
    (output / "report.html").write_text(page(groups, table, picture), encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD.json", help="written by ctr.py --report")
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")
    args = parser.parse_args(argv)
    try:
        print(write(load(args.records), args.output), f"\n\n{NOTE}")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    print("\n" + "\n".join(str(args.output / f"report.{kind}") for kind in ("md", "png", "html")))


if __name__ == "__main__":
    main()
