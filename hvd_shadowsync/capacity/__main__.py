"""The capacity model as a command: what each way of synchronisation comes to on so many hosts.

    python -m hvd_shadowsync.capacity --dense-mb 200 --step-ms 40 --hosts 1000 --gbps 25
    python -m hvd_shadowsync.capacity --dense-mb 200 --step-ms 40 --hosts 1000 --jitter 0.1 --plot hosts.png
    python -m hvd_shadowsync.capacity --validate compare.json allreduce.json --cores 2

The table has the closed form and, beside it, a simulation in which every rank draws its own steps.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from hvd_shadowsync.capacity.measured import Compared, compare, load
from hvd_shadowsync.capacity.options import OF_RECORDS, as_option, parser_of, setting_of
from hvd_shadowsync.capacity.plot import draw
from hvd_shadowsync.capacity.reduction import background
from hvd_shadowsync.capacity.setting import Setting
from hvd_shadowsync.capacity.simulation import simulate
from hvd_shadowsync.capacity.ways import Prediction, paced_by, predict
from hvd_shadowsync.checks import check_count, check_interval

CHUNKS = tuple(1e6 * 2**power for power in range(11))
WORTHWHILE = 0.8
DECIMALS = (".1f", ".1f", ".1f", ".0f", ".4f", ".1f", ".0f")
PLOT_FORMATS = (".png", ".pdf", ".svg")
HEADERS = ["way", "reduction ms", "period ms", "gap, steps", "examples/s", "efficiency", "simulated: gap", "examples/s"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or predicted beside measured; exit with 2 on options that are wrong."""
    parser = parser_of(__doc__)
    args = parser.parse_args(argv)
    try:
        if args.validate:
            _validate(args)
        else:
            _predict(args)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"capacity: {as_option(str(error))}\n")


# --- a table of ways --------------------------------------------------------------------------------------------------


def _predict(args: argparse.Namespace) -> None:
    for name in ("dense_mb", "step_ms", "hosts"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing; give it, or --validate with measured runs")
    check_count("seed", seed := args.seed or 0, least=0)
    if args.cores is not None:
        raise ValueError(f"--cores {args.cores:g} goes with --validate; give --cores-per-host here")
    _check_folders(args)
    setting = setting_of(args)
    table = _table(setting)
    predictions = {name: predict(asked, way) for name, (asked, way) in table.items()}
    simulated = {name: simulate(asked, way, seed=seed) for name, (asked, way) in table.items()}
    rows = [
        [name, *_cells(each), f"{simulated[name].sync_gap_steps:.1f}", f"{simulated[name].examples_per_s:.0f}"]
        for name, each in predictions.items()
    ]
    print(_as_text([HEADERS, *rows]), *_notes(setting), sep="\n")
    if args.plot:
        try:
            draw(table, args.plot)
        except OSError as error:
            raise OSError(f"--plot {args.plot} cannot be written ({error.strerror}); give another") from error
        print(f"written: {args.plot}")
    if args.json:
        found = {"predicted": _dicts(predictions), "simulated": _dicts(simulated)}
        _write(args.json, {"setting": asdict(setting), **found})


def _table(setting: Setting) -> dict[str, tuple[Setting, str]]:
    """Return what the rows are about: flat, and hierarchical where hosts have several ranks."""
    labels = {"allreduce": "per-step allreduce", "fixed": f"fixed rate, k={setting.fixed_every}", "shadow": "shadow"}
    kinds = {"flat": False, "hierarchical": True} if setting.cluster.ranks_per_host > 1 else {"": False}
    rows = {"no synchronisation": (setting, "none")}
    for way, label in labels.items():
        for kind, hierarchical in kinds.items():
            asked = replace(setting, cluster=replace(setting.cluster, hierarchical=hierarchical))
            rows[f"{label}, {kind}".removesuffix(", ")] = (asked, way)
    return rows


def _cells(each: Prediction) -> list[str]:
    return [f"{value:{form}}" for value, form in zip(asdict(each).values(), DECIMALS, strict=False)]


def _notes(setting: Setting) -> list[str]:
    """Return what the table assumes, and what other algorithms and chunks would give, on hosts as rounds use them."""
    setting = replace(setting, cluster=replace(setting.cluster, hierarchical=True))
    job, cluster = setting.job, setting.cluster
    kind = " (hierarchical)" if cluster.ranks_per_host > 1 else ""
    notes = [
        f"{job.dense_bytes / 1e6:g} MB dense, {job.step_ms:g} ms and {job.batch:g} examples a step",
        f"hosts: {cluster.hosts}, ranks of each: {cluster.ranks_per_host}; {cluster.gbps:g} Gbit/s, "
        f"{cluster.latency_us:g} us; allreduces: {cluster.algorithm}",
        f"the period of shadow rounds{kind} is that of {paced_by(setting)}",
    ]
    for algorithm in ("ring", "halving"):
        if algorithm != cluster.algorithm:
            other = replace(setting, cluster=replace(cluster, algorithm=algorithm))
            step, shadow = predict(other, "allreduce"), predict(other, "shadow")
            notes.append(
                f"with {algorithm}{kind}: per-step allreduce {step.reduction_ms:.1f} ms, {step.examples_per_s:.0f} "
                f"examples/s; shadow round {shadow.reduction_ms:.1f} ms, gap {shadow.sync_gap_steps:.1f} steps"
            )
    better = _chunked(setting, min(CHUNKS, key=lambda chunk: background(_chunked(setting, chunk)).seconds))
    now, then = predict(setting, "shadow"), predict(better, "shadow")
    if then.reduction_ms < WORTHWHILE * now.reduction_ms:
        chunk_mb = better.chunking.bytes_among(cluster.hosts) / 1e6
        notes.append(
            f"with --chunk-mb {chunk_mb:g}{kind}: shadow round {then.reduction_ms:.1f} ms, "
            f"gap {then.sync_gap_steps:.1f} steps"
        )
    return ["", *notes]


def _chunked(setting: Setting, chunk_bytes: float) -> Setting:
    return replace(setting, chunking=replace(setting.chunking, chunk_bytes=chunk_bytes))


# --- measured runs ----------------------------------------------------------------------------------------------------


def _validate(args: argparse.Namespace) -> None:
    for name in OF_RECORDS:
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {value} does not go with --validate; leave one of them out")
    if args.cores is not None and args.cores_per_host is not None:
        raise ValueError(f"--cores {args.cores:g} and --cores-per-host {args.cores_per_host:g} say the same; give one")
    if args.cores is not None:
        check_interval("cores", args.cores, low=0.0, high=math.inf, low_included=False, high_included=False)
    _check_folders(args)
    args.dense_mb, args.step_ms, args.hosts = 1.0, 1.0, 1  # each record has its own
    found = compare(load(args.validate), setting_of(args), args.cores)
    compared = [each for each in found if isinstance(each, Compared)]
    rows = [
        [c.run, c.figure, *map(_short, (c.predicted, c.measured, c.worst, c.best)), f"{c.ratio:.2f}"] for c in compared
    ]
    headers = ["run", "figure", "predicted", "measured", "worst", "best", "ratio"]
    print(_as_text([headers, *rows]) if rows else "no record is predicted", "", sep="\n")
    for figure in dict.fromkeys(each.figure for each in compared):
        ratios = sorted(each.ratio for each in compared if each.figure == figure)
        print(f"{figure}: predicted over measured {ratios[0]:.2f} to {ratios[-1]:.2f}, median {median(ratios):.2f}")
    others = [each for each in found if not isinstance(each, Compared)]
    if others:
        print("\nnot predicted:", *(f"  {each.run}: {each.why}" for each in others), sep="\n")
    if args.json:
        listed = [{**asdict(each), "ratio": each.ratio} for each in compared]
        _write(args.json, {"compared": listed, "not_predicted": [asdict(each) for each in others]})


# --- in and out -------------------------------------------------------------------------------------------------------


def _as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _dicts(predictions: dict[str, Prediction]) -> dict[str, dict[str, float]]:
    return {name: asdict(each) for name, each in predictions.items()}


def _check_folders(args: argparse.Namespace) -> None:
    for name in ("plot", "json"):
        file: Path | None = getattr(args, name)
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"--{name} {file}: there is no folder {file.parent}; make it, or give another")
        if file is not None and file.is_dir():
            raise ValueError(f"--{name} {file} is a folder; give a file in it")
    if args.plot is not None and args.plot.suffix not in PLOT_FORMATS:
        raise ValueError(f"--plot {args.plot}: give a file that ends in {', '.join(PLOT_FORMATS)}")


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"--json {file} cannot be written ({error.strerror}); give another") from error
    print(f"written: {file}")


if __name__ == "__main__":
    main()
