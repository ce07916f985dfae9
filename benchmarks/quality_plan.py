"""What the benchmark of quality runs: algorithms, learning rates, and the stages in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

BATCH_SIZE = 256  # rows per trainer and step, as in ctr.py
MOST_TRAINERS = 8
GAPS = (1, 3, 10, 30, 100, 300, 1000)
ONE, HOROVOD, AT_THE_END = "one process", "Horovod", "averaged at the end"
RULES = {"MA": "ma", "EASGD": "easgd", "BMUF": "bmuf"}


@dataclass(frozen=True)
class Method:
    """How replicas are kept together.

    Attributes:
        library: "horovod", "ours", or "none".
        rule: of ours: "ma", "easgd" or "bmuf".
        alpha: of the rule; None: its default.
        options: further arguments of `ShadowSync`.
    """

    library: str
    rule: str = "ma"
    alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    ONE: Method("none"),
    HOROVOD: Method("horovod"),
    AT_THE_END: Method("none"),
    **{f"S-{name}": Method("ours", rule) for name, rule in RULES.items()},
    **{f"S-{name} interpolate": Method("ours", rule, 0.5, {"merge": "interpolate"}) for name, rule in RULES.items()},
    **{
        f"FR-{name}-{k}": Method("ours", rule, options={"foreground": True, "sync_every": k})
        for name, rule in RULES.items()
        for k in (5, 30)
    },
}
GOAL = ["S-MA", "S-EASGD", "S-BMUF"]
SWEPT = ["S-MA", "S-EASGD"]
REST = [name for name in METHODS if name not in (ONE, HOROVOD, *GOAL)]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: a name of METHODS.
        trainers: ranks.
        seed: of the initial weights.
        learning_rate: of Adagrad.
        sync_every: of the sweep: steps from round to round; None: what the method has.
    """

    method: str
    trainers: int
    seed: int
    learning_rate: float
    sync_every: int | None = None


Result = dict[str, Any]
"""What became of a run: "run" (its fields), "auc", "normalised_entropy", "sync_gap_steps" and more."""


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    Attributes:
        trainers: numbers of trainers beside the one process.
        seeds: how many, from 1.
        algorithms: names of METHODS beside the one process and Horovod, which are always there.
        sweep: whether to sweep the sync gap.
        learning_rate: of all runs but those at other rates; the examples'.
        other_rates: learning rates at which Horovod and those of the goal are compared as well.
    """

    trainers: Sequence[int] = (2, 4, 8)
    seeds: int = 5
    algorithms: Sequence[str] = (*GOAL, *REST)
    sweep: bool = True
    learning_rate: float = 0.02
    other_rates: Sequence[float] = (0.01, 0.04)


def whole_steps(rows: int, limit: int | None, trainers: int) -> int:
    """Return a trainer's steps, such that every number of trainers up to MOST_TRAINERS sees the same examples."""
    chunk = BATCH_SIZE * MOST_TRAINERS
    return min(rows, limit or rows) // chunk * MOST_TRAINERS // trainers


def stages(choice: Choice) -> dict[str, list[Run]]:
    """Return the runs, in the order of their importance."""
    goal = [ONE, HOROVOD, *(method for method in choice.algorithms if method in GOAL)]
    rest = [method for method in choice.algorithms if method in REST]
    swept = [method for method in choice.algorithms if method in SWEPT] if choice.sweep else []
    return {
        "goal": _runs(choice, goal, choice.learning_rate),
        "other rates": [run for rate in choice.other_rates for run in _runs(choice, goal, rate)],
        "sweep": _runs(choice, swept, choice.learning_rate, GAPS),
        "rest": _runs(choice, rest, choice.learning_rate),
    }


def _runs(choice: Choice, methods: Sequence[str], rate: float, gaps: Sequence[int | None] = (None,)) -> list[Run]:
    return [
        Run(method, trainers, seed, rate, sync_every=gap)
        for trainers in (1, *choice.trainers)
        for seed in range(1, choice.seeds + 1)
        for method in methods
        for gap in gaps
        if (method == ONE) == (trainers == 1)
    ]


def jobs(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Iterate over the runs that one job can do: Horovod's thread is not beside ours, and ranks are equally many."""

    def job(run: Run) -> tuple[int, bool]:
        return run.trainers, METHODS[run.method].library == "horovod"

    for _, group in groupby(sorted(runs, key=job), key=job):
        yield list(group)
