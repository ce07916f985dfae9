"""Measured runs beside what the model says of them; only runs without synchronisation tell it anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hvd_shadowsync.capacity.reduction import Reduction, background, foreground, per_step
from hvd_shadowsync.capacity.setting import Job, Setting, Unevenness
from hvd_shadowsync.capacity.ways import Prediction, predict
from hvd_shadowsync.pacing import Pacing

LINKS = 2
"""That a message passes, its own host's and the other's, each with the latency that was added."""
SAME_RUN = ("workload", "hosts", "rate_mbit", "latency_ms", "batch")
OF_SEVERAL_RANKS = ("ours, every rank on the network", "ours, hierarchical")
"""Contenders that have several ranks a host, whose records have to say how many."""
SLOW = "-slow"
"""The end of the names of workloads whose last rank sleeps as long as it works, and whose own examples do not count."""

Record = Mapping[str, Any]
Change = Callable[[Setting], Setting]


@dataclass(frozen=True)
class Compared:
    """A figure of a record, and the model's; the worst and the best of its runs, where the record has them."""

    run: str
    figure: str
    predicted: float
    measured: float
    worst: float | None = None
    best: float | None = None

    @property
    def ratio(self) -> float:
        """Predicted over measured; inf where nothing was measured."""
        return self.predicted / self.measured if self.measured else float("inf")


@dataclass(frozen=True)
class NotPredicted:
    """A record that the model has no prediction for."""

    run: str
    why: str


Result = Compared | NotPredicted


def load(files: Sequence[Path]) -> list[Record]:
    """Return the records of all files, each of which has a JSON list.

    Raises:
        ValueError: a file cannot be read, or is none of records; names it and the remedy.
    """
    records: list[Record] = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--validate {file} cannot be read ({error}); give what a benchmark wrote") from error
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise ValueError(f"--validate {file} is no list of records; give what a benchmark wrote")
        records += found
    return records


def compare(records: Sequence[Record], setting: Setting, cores: float | None = None) -> list[Result]:
    """Return what is predicted and measured of each record, in their order.

    Args:
        records: of `benchmarks/compare.py` (with "workload") and `benchmarks/allreduce.py` (with "mb").
        setting: for all that records do not say.
        cores: of the machine that has all the ranks of a record; None: no thread waits for a core.
    """
    alone = [each for each in records if "workload" in each and _name(each) == "none" and each.get("step_ms")]
    steps = {_run(each): float(each["step_ms"]) for each in alone}
    return [result for record in records for result in _results(record, setting, cores, steps)]


def _results(
    record: Record, setting: Setting, cores: float | None, steps: Mapping[tuple[Any, ...], float]
) -> list[Result]:
    if why := _unknown(record, steps):
        return [NotPredicted(_title(record), why)]
    try:
        on = _on(record, setting, cores)
        return list(_training(record, on, steps[_run(record)]) if "workload" in record else _alone(record, on))
    except KeyError as error:
        return [NotPredicted(_title(record), f"the record lacks {error}")]
    except (TypeError, ValueError) as error:
        return [NotPredicted(_title(record), f"the record is not of this form: {error}")]


def _unknown(record: Record, steps: Mapping[tuple[Any, ...], float]) -> str:
    """Return why there is no prediction for a record; empty where there is one."""
    name, trains = _name(record), "workload" in record
    if "not_run" in record:
        return f"it was not run: {record['not_run']}"
    if trains and not record.get("examples_per_s"):
        return "no run of it has come to its end"
    if trains and name.startswith("none"):
        return "it is what the step's time is taken from" if name == "none" else "it is not synchronised"
    if (trains and _way_of(name) is None) or not (trains or name in REDUCTIONS):
        return f"there is no model of {name}"
    if trains and _run(record) not in steps:
        return "there is no record 'none' of the same run, from which the step's time is taken"
    return ""


# --- runs of training -------------------------------------------------------------------------------------------------


def _training(record: Record, setting: Setting, step_ms: float) -> Iterator[Compared]:
    chosen = _way_of(_name(record))
    assert chosen is not None, "looked at before"
    way, change = chosen
    asked = change(replace(setting, job=Job(record["dense_bytes"], step_ms, record["batch"])))
    if way == "shadow":
        asked = replace(asked, cluster=replace(asked.cluster, hierarchical=True))
    predicted = predict(asked, way)
    title = _title(record)
    yield _spread(title, "examples/s", _counted(asked, way, predicted), record["examples_per_s"])
    if way == "shadow":
        own_step_ms = step_ms / predicted.efficiency
        yield from _if_there(record, "sync_gap_steps", predicted.period_ms / own_step_ms)
        yield from _if_there(record, "in_flight_ms", predicted.reduction_ms)


def _counted(setting: Setting, way: str, predicted: Prediction) -> float:
    """Return the examples/s of the ranks that are not slow."""
    ranks = setting.cluster.ranks
    even = ranks - setting.unevenness.slow_ranks(ranks)
    if way == "shadow":
        return predicted.efficiency * even * setting.job.batch / setting.job.step_ms * 1000
    return predicted.examples_per_s * even / ranks


def _way_of(name: str) -> tuple[str, Change] | None:
    """Return which way a contender goes, and what its name says of the setting; None if there is no model of it."""
    if name in ("horovod", "ddp"):
        return "allreduce", lambda setting: setting
    if name == "horovod fp16":
        return "allreduce", _halved
    if match := re.fullmatch(r"(?:FR-MA|FR-BMUF|post-local SGD) k=(\d+)", name):
        return "fixed", lambda setting: replace(setting, fixed_every=int(match[1]))
    if match := re.fullmatch(r"(?:S-MA|S-BMUF) k=(\d+)", name):
        return "shadow", lambda setting: replace(setting, pacing=Pacing(sync_every=int(match[1])))
    if match := re.fullmatch(r"(?:S-MA|S-BMUF) cpu_budget=([\d.]+)", name):
        return "shadow", lambda setting: replace(setting, pacing=Pacing(cpu_budget=float(match[1])))
    return ("shadow", lambda setting: setting) if name in ("S-MA", "S-BMUF") else None


def _halved(setting: Setting) -> Setting:
    return replace(setting, job=replace(setting.job, dense_bytes=setting.job.dense_bytes / 2))


# --- allreduces by themselves -----------------------------------------------------------------------------------------


REDUCTIONS: Mapping[str, Callable[[Setting], Reduction]] = {
    "ours": background,
    "ours, every rank on the network": background,
    "ours, hierarchical": background,
    "ours, float16": lambda setting: foreground(_halved(setting)),
    **dict.fromkeys(("Horovod", "MPI_Allreduce", "Gloo"), per_step),
}


def _alone(record: Record, setting: Setting) -> Iterator[Compared]:
    num_bytes = 1e6 * record["mb"]
    costs = replace(setting.costs, round_cpu_s_per_gb=0.0)
    job = replace(setting.job, dense_bytes=num_bytes)
    reduction = REDUCTIONS[_name(record)](replace(setting, job=job, costs=costs))
    yield _spread(_title(record), "ms", 1000 * reduction.seconds, record["ms"])
    if _name(record).startswith("ours"):  # others wait without a pause: their CPU time is all the time
        yield _spread(_title(record), "CPU s/GB", reduction.cpu_s / num_bytes * 1e9, {"median": record["cpu_s_per_gb"]})


# --- what they have in common -----------------------------------------------------------------------------------------


def _spread(run: str, figure: str, predicted: float, measured: Mapping[str, float]) -> Compared:
    return Compared(run, figure, predicted, measured["median"], measured.get("worst"), measured.get("best"))


def _if_there(record: Record, figure: str, predicted: float) -> Iterator[Compared]:
    if record.get(figure) is not None:
        yield Compared(_title(record), figure, predicted, record[figure])


def _on(record: Record, setting: Setting, cores: float | None) -> Setting:
    """Return `setting` with the record's hosts and network; without a rate all ranks are on one host."""
    rate, count = record["rate_mbit"], record["hosts"]
    several = _name(record) in OF_SEVERAL_RANKS
    hosts, per_host = (count, record["ranks_per_host"] if several else 1) if rate else (1, count)
    cluster = replace(
        setting.cluster,
        hosts=hosts,
        ranks_per_host=per_host,
        hierarchical=_name(record) == "ours, hierarchical",
        latency_us=setting.cluster.latency_us + 1000 * LINKS * (record.get("latency_ms") or 0.0),
        cores_per_host=cores / hosts if cores else setting.cluster.cores_per_host,
    )
    cluster = replace(cluster, gbps=rate / 1000) if rate else cluster
    slow = str(record.get("workload")).endswith(SLOW)
    uneven = Unevenness(slow_share=1 / count, slow_factor=2.0) if slow else setting.unevenness
    return replace(setting, cluster=cluster, unevenness=uneven)


def _name(record: Record) -> str:
    return str(record.get("contender") or "?")


def _run(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in SAME_RUN)


def _title(record: Record) -> str:
    hosts, mb, rate, latency = (_plain(record.get(key)) for key in ("hosts", "mb", "rate_mbit", "latency_ms"))
    what = record.get("workload") or f"{mb} MB"
    where = f"{hosts} hosts, {rate} Mbit/s" if record.get("rate_mbit") else f"{hosts} ranks, one host"
    return f"{what}, {where}{f', {latency} ms' if record.get('latency_ms') else ''}, {_name(record)}"


def _plain(value: Any) -> str:
    """Return 16.0 as "16", and "?" for what is missing."""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value or "?")
