"""Markdown tables of the benchmark of quality: the goal, other learning rates, all algorithms, the sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from intervals import Interval, mean_interval, paired_interval, verdict
from quality_plan import (
    AT_THE_END,
    GOAL,
    HOROVOD,
    METHODS,
    ONE,
    SWEPT,
    Choice,
    Result,
    Run,
)

ALLOWANCE = 0.001  # of AUC below Horovod's
GOAL_COLUMNS = ["trainers", "algorithm", "seeds", "AUC", "- one process", "- Horovod", "by mean", "by interval"]
ALL_COLUMNS = [
    "trainers", "algorithm", "seeds", "AUC", "normalised entropy", "sync gap, steps", "- Horovod",
]  # fmt: skip
SWEEP_COLUMNS = [
    "trainers", "algorithm", "sync_every", "sync gap, steps", "seeds", "AUC", "normalised entropy", "- Horovod",
]  # fmt: skip
NOTE = (
    "Sync gap: steps from round to round, the mean over seeds with least and most. BMUF with its defaults (block "
    "learning rate 1, no block momentum) is MA by definition: S-BMUF and S-MA differ by when their rounds fall.\n"
)
Seeds = Mapping[int, Result]
Groups = dict[tuple[str, int, int | None], dict[int, Result]]
"""Results at the choice's learning rate by method, trainers and what the sweep asked for, then by seed."""


def grouped(choice: Choice, found: Sequence[Result]) -> Groups:
    groups: Groups = {}
    for result in found:
        run = Run(**result["run"])
        if run.learning_rate == choice.learning_rate and run.seed <= choice.seeds:
            groups.setdefault((run.method, run.trainers, run.sync_every), {})[run.seed] = result
    return groups


def values(seeds: Seeds, figure: str = "auc") -> dict[int, float]:
    """Return a figure by seed; nan where the training diverged."""
    return {seed: math.nan if each[figure] is None else each[figure] for seed, each in seeds.items()}


def gaps(seeds: Seeds) -> list[float]:
    """Return the steps from round to round of each run that had rounds before its end."""
    return [each["sync_gap_steps"] for each in seeds.values() if each["sync_gap_steps"] is not None]


def report(choice: Choice, found: Sequence[Result], about: Mapping[str, Any]) -> str:
    """Return all tables."""
    groups = grouped(choice, found)
    return "\n".join(
        [
            introduction(choice, found, about),
            "### The goal\n",
            f"AUC minus Horovod's, not below -{ALLOWANCE}: by the mean over seeds, and by the whole interval.\n",
            table(GOAL_COLUMNS, goal(groups)),
            "### The same by learning rate\n",
            table(
                ["trainers", "learning rate", f"{HOROVOD} (1: {ONE})", *(f"{each} - {HOROVOD}" for each in GOAL)],
                by_rate(choice, found),
            ),
            "### All algorithms\n",
            NOTE,
            table(ALL_COLUMNS, everything(groups)),
            "### The sync gap\n",
            table(SWEEP_COLUMNS, sweep(groups)),
        ]
    )


def introduction(choice: Choice, found: Sequence[Result], about: Mapping[str, Any]) -> str:
    passes = ", ".join(f"{steps} with {n}" for n, steps in sorted({(e["run"]["trainers"], e["steps"]) for e in found}))
    return (
        f"{about['machine']}. Batch {about['settings']['batch_size']} a trainer, Adagrad, learning rate "
        f"{choice.learning_rate:g} where no other is said, one pass over "
        f"{max((each['examples'] for each in found), default=0)} examples in all runs; steps of a trainer: {passes}. "
        "Intervals are of 95 %, by Student's t over seeds; those of differences are paired by seed, which is the seed "
        "of the initial weights (the order of the data is the same).\n"
    )


def goal(groups: Groups) -> Iterable[list[str]]:
    """Return a row for each algorithm of the goal, Horovod first: differences and what they say."""
    one = values(groups.get((ONE, 1, None), {}))
    for method, trainers, seeds in _ordered(groups, [HOROVOD, *GOAL]):
        horovod = values(groups.get((HOROVOD, trainers, None), {}))
        to_one, to_horovod = paired_interval(values(seeds), one), paired_interval(values(seeds), horovod)
        row = [str(trainers), method, str(len(seeds)), spread(values(seeds)), difference(to_one)]
        if method == HOROVOD or not horovod:
            yield [*row, "", "", ""]
        else:
            by_mean = "met" if to_horovod.mean >= -ALLOWANCE else "not met"
            yield [*row, difference(to_horovod), by_mean, f"**{verdict(to_horovod, ALLOWANCE)}**"]


def by_rate(choice: Choice, found: Sequence[Result]) -> Iterable[list[str]]:
    """Return a row for each number of trainers and each learning rate."""
    aucs: dict[tuple[int, float], dict[str, dict[int, Result]]] = {}
    for result in found:
        run = Run(**result["run"])
        if run.method in (ONE, HOROVOD, *GOAL) and run.sync_every is None and run.seed <= choice.seeds:
            aucs.setdefault((run.trainers, run.learning_rate), {}).setdefault(run.method, {})[run.seed] = result
    for (trainers, rate), methods in sorted(aucs.items()):
        reference = values(methods.get(ONE if trainers == 1 else HOROVOD, {}))
        if reference:
            ours = [difference(paired_interval(values(methods.get(method, {})), reference)) for method in GOAL]
            yield [str(trainers), f"{rate:g}", spread(reference), *ours]


def everything(groups: Groups) -> Iterable[list[str]]:
    for method, trainers, seeds in _ordered(groups, list(METHODS)):
        yield [
            str(trainers), method, str(len(seeds)), spread(values(seeds)),
            spread(values(seeds, "normalised_entropy")), "" if method in (ONE, AT_THE_END) else gap(seeds),
            "" if method == HOROVOD else to_horovod(groups, trainers, seeds),
        ]  # fmt: skip


def sweep(groups: Groups) -> Iterable[list[str]]:
    for method, trainers, every in sorted((key for key in groups if key[2] is not None), key=_swept_order):
        seeds = groups[method, trainers, every]
        yield [
            str(trainers), method, str(every), gap(seeds), str(len(seeds)), spread(values(seeds)),
            spread(values(seeds, "normalised_entropy")), to_horovod(groups, trainers, seeds),
        ]  # fmt: skip


def to_horovod(groups: Groups, trainers: int, seeds: Seeds) -> str:
    return difference(paired_interval(values(seeds), values(groups.get((HOROVOD, trainers, None), {}))))


def spread(by_seed: Mapping[int, float]) -> str:
    mean, half_width = mean_interval(list(by_seed.values()))
    return (
        "diverged" if math.isnan(mean) else f"{mean:.4f}" + ("" if math.isnan(half_width) else f" ± {half_width:.4f}")
    )


def difference(interval: Interval) -> str:
    if math.isnan(interval.mean):
        return ""
    ends = "" if math.isnan(interval.half_width) else f" ({interval.low:+.4f} to {interval.high:+.4f})"
    return f"{interval.mean:+.4f}{ends}"


def gap(seeds: Seeds) -> str:
    found = gaps(seeds)
    if not found:
        return "at the end only"
    return f"{statistics.fmean(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ordered(groups: Groups, methods: Sequence[str]) -> list[tuple[str, int, Seeds]]:
    keys = [key for key in groups if key[2] is None and key[0] in methods]
    return [(*key[:2], groups[key]) for key in sorted(keys, key=lambda key: _order(*key[:2]))]


def _order(method: str, trainers: int) -> tuple[int, int]:
    return trainers, list(METHODS).index(method)


def _swept_order(key: tuple[str, int, int | None]) -> tuple[int, int, int]:
    return key[1], SWEPT.index(key[0]), key[2] or 0
