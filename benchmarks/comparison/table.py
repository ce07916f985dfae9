"""The records as Markdown: a table for each case, with ratios to the limit and to Horovod."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cases import WORKLOADS
from .catalogue import CATALOGUE
from .records import Record, by_case, ratios, ratios_to_paused

LIMIT, HOROVOD = "none", "horovod"
HEAD = [
    "contender", "examples/s", "worst", "best", "/ none", "worst", "best", "/ paused", "worst", "best", "/ horovod",
    "step, ms", "sync gap, steps", "in flight, ms", "runs",
]  # fmt: skip
ORDER = {contender.name: index for index, contender in enumerate(CATALOGUE)}


def report(records: Sequence[Record]) -> str:
    """Return all tables."""
    return "\n".join(table(contenders) for contenders in by_case(records).values())


def table(contenders: Mapping[str, Record]) -> str:
    """Return a case's table, what failed or was not run below it.

    Ratios are formed within each repeat; then the median, the worst and the best of them are taken. "/ paused" is to
    the same processes, which pause in turns: it does not depend on how the machine treats one process or another.
    """
    ordered = sorted(contenders.values(), key=lambda each: ORDER.get(each["contender"], len(ORDER)))
    first = ordered[0]
    lines = [f"### {first['title']}", "", described(ordered), "", row(HEAD), row(["---"] * len(HEAD))]
    lines += [row(cells(each, contenders)) for each in ordered]
    notes = [note for each in ordered for note in notes_of(each)]
    return "\n".join([*lines, "", *notes, *([""] if notes else [])])


def described(ordered: Sequence[Record]) -> str:
    sizes = [each["dense_bytes"] for each in ordered if "dense_bytes" in each]
    workload = WORKLOADS.get(ordered[0]["workload"])
    dense = f"; {sizes[0] / 1e6:.2f} MB replicated" if sizes else ""
    what = workload.text if workload else str(ordered[0]["workload"])
    return f"{what[0].upper()}{what[1:]}; batch {ordered[0]['batch']} a rank{dense}."


def cells(record: Record, contenders: Mapping[str, Record]) -> list[str]:
    """Return a contender's row."""
    failed = sum("failed" in run for run in record["runs"])
    runs = f"{len(record['runs'])}, {failed} failed" if failed else str(len(record["runs"]))
    if "examples_per_s" not in record:
        why = "failed" if record["runs"] else "not run"
        return [record["contender"], why, *["-"] * (len(HEAD) - 3), runs]
    rate = record["examples_per_s"]
    limit, horovod = (ratios(record, contenders.get(name)) for name in (LIMIT, HOROVOD))
    paused = ratios_to_paused(record)
    return [
        record["contender"],
        *(f"{rate[key]:.0f}" for key in ("median", "worst", "best")),
        *(number(limit and limit[key], ".3f") for key in ("median", "worst", "best")),
        *(number(paused and paused[key], ".3f") for key in ("median", "worst", "best")),
        number(horovod and horovod["median"], ".2f"),
        number(record.get("step_ms"), ".1f"),
        number(record.get("sync_gap_steps"), ".1f"),
        number(record.get("in_flight_ms"), ".1f"),
        runs,
    ]


def number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def notes_of(record: Record) -> list[str]:
    """Return why a contender was not run, or did not synchronise, and the last lines of runs that failed."""
    notes = [f"- {record['contender']}: not run: {record['not_run']}"] if record.get("not_run") else []
    if "examples_per_s" in record and not record["contender"].startswith(LIMIT) and not record.get("sync_gap_steps"):
        notes.append(f"- {record['contender']}: no synchronisation fell into the time that was measured")
    for run in record["runs"]:
        if "failed" in run:
            first, *rest = run["failed"].splitlines()
            quoted = [f"      {line}" for line in rest]
            notes.append("\n".join([f"- {record['contender']}, repeat {run['repeat']}: {first}", "", *quoted, ""]))
    return notes


def row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
