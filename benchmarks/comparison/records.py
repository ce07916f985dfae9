"""The records: one for each case and contender, with all its runs, in a JSON file that grows with every run."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .catalogue import Contender

Record = dict[str, Any]
CASE = ("workload", "hosts", "rate_mbit", "latency_ms")


def load(path: Path) -> list[Record]:
    """Return the records of a file; none where there is no file.

    Raises:
        ValueError: the file is not what `save` writes; names it.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); give another file with --json, or remove it") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) and "contender" in each for each in found):
        raise ValueError(f"{path} is no list of records; give another file with --json, or remove it")
    return found


def save(path: Path, records: Sequence[Record]) -> None:
    """Write the records; an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_text("[\n" + ",\n".join(json.dumps(each) for each in records) + "\n]\n", encoding="utf-8")
    os.replace(written, path)


def blank(case: Case, contender: Contender) -> Record:
    """Return a record without runs."""
    return {
        "workload": case.workload.name,
        "hosts": case.hosts,
        "rate_mbit": case.network.rate_mbit,
        "latency_ms": case.network.latency_ms,
        "contender": contender.name,
        "batch": case.workload.batch,
        "title": case.title,
        "runs": [],
    }


def find(records: Sequence[Record], case: Case, contender: Contender) -> Record | None:
    """Return the record of a case and a contender."""
    wanted = blank(case, contender)
    keys = (*CASE, "contender")
    return next((each for each in records if all(each[key] == wanted[key] for key in keys)), None)


def add(record: Record, repeat: int, run: Record) -> None:
    """Add a run and form the medians anew."""
    record["runs"].append({"repeat": repeat, **run})
    good = [each for each in record["runs"] if "failed" not in each]
    record.pop("not_run", None)
    if not good:
        return
    record["dense_bytes"] = good[0]["dense_bytes"]
    record["examples_per_s"] = spread([each["examples_per_s"] for each in good], best=max)
    for key in ("step_ms", "sync_gap_steps", "in_flight_ms"):
        known = [each[key] for each in good if each[key] is not None]
        record[key] = round(statistics.median(known), 3) if known else None


def spread(values: Sequence[float], *, best: Callable[[Iterable[float]], float] = max) -> dict[str, float]:
    """Return the median, the best and the worst."""
    worst = min if best is max else max
    return {"median": statistics.median(values), "best": best(values), "worst": worst(values)}


def ratios(record: Record, to: Record | None) -> dict[str, float] | None:
    """Return examples/s over another contender's of the same repeat; None where they have no repeat in common."""
    if to is None:
        return None
    rates = [
        {run["repeat"]: run["examples_per_s"] for run in each["runs"] if "failed" not in run} for each in (record, to)
    ]
    common = sorted(rates[0].keys() & rates[1].keys())
    return spread([rates[0][repeat] / rates[1][repeat] for repeat in common]) if common else None


def ratios_to_paused(record: Record) -> dict[str, float] | None:
    """Return examples/s over those of the same processes while paused; None where they cannot pause."""
    found = [each["to_paused"] for each in record["runs"] if "to_paused" in each]
    return spread(found) if found else None


def by_case(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """Return the records of each case by contender, in the order in which they were made."""
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in CASE), {})[record["contender"]] = record
    return found
