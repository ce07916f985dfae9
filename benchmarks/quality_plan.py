"""What the benchmark of quality runs: algorithms, the grid of learning rates, and the stages in their order."""

from __future__ import annotations

import math
import statistics
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
TUNED = {ONE: ONE, HOROVOD: HOROVOD, AT_THE_END: AT_THE_END}  # by whose runs a method's rate is chosen; ours: S-MA


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: a name of METHODS.
        trainers: ranks.
        seed: of the initial weights.
        learning_rate: of Adagrad.
        sync_every: of the sweep: steps from round to round; None: what the method has.
        validate: train nine months and test on October, instead of ten and the last two.
    """

    method: str
    trainers: int
    seed: int
    learning_rate: float
    sync_every: int | None = None
    validate: bool = False


Result = dict[str, Any]
"""What became of a run: "run" (its fields), "auc", "normalised_entropy", "sync_gap_steps" and more."""

Rates = dict[tuple[str, int], float]
"""Chosen learning rates by tuned method and number of trainers."""


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    Attributes:
        trainers: numbers of trainers beside the one process.
        seeds: how many, from 1.
        algorithms: names of METHODS beside the one process and Horovod, which are always there.
        sweep: whether to sweep the sync gap.
        learning_rates: the grid; one value is taken as it is.
        tuning_seeds: how many, from 1.
        equal_rates: learning rates at which all of the goal are compared as well, whatever was chosen.
    """

    trainers: Sequence[int] = (2, 4, 8)
    seeds: int = 5
    algorithms: Sequence[str] = (*GOAL, *REST)
    sweep: bool = True
    learning_rates: Sequence[float] = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    tuning_seeds: int = 2
    equal_rates: Sequence[float] = (0.01, 0.02, 0.04, 0.08)


def whole_steps(rows: int, limit: int | None, trainers: int) -> int:
    """Return a trainer's steps, such that every number of trainers up to MOST_TRAINERS sees the same examples."""
    chunk = BATCH_SIZE * MOST_TRAINERS
    return min(rows, limit or rows) // chunk * MOST_TRAINERS // trainers


def tuned_by(method: str) -> str:
    return TUNED.get(method, GOAL[0])


def tuning(choice: Choice) -> list[Run]:
    """Return the runs on the validation split; none where there is nothing to choose from."""
    if len(choice.learning_rates) == 1:
        return []
    tuned = dict.fromkeys([HOROVOD, *(tuned_by(method) for method in choice.algorithms)])
    return [
        Run(method, trainers, seed, rate, validate=True)
        for trainers in (1, *choice.trainers)
        for method in ([ONE] if trainers == 1 else tuned)
        for seed in range(1, choice.tuning_seeds + 1)
        for rate in choice.learning_rates
    ]


def validated(results: Sequence[Result]) -> dict[tuple[str, int], dict[float, list[float]]]:
    """Return the AUC on the validation split by tuned method, trainers and learning rate; -inf: it diverged."""
    found: dict[tuple[str, int], dict[float, list[float]]] = {}
    for result in results:
        run = result["run"]
        if run["validate"]:
            by_rate = found.setdefault((run["method"], run["trainers"]), {})
            auc = result["auc"]
            by_rate.setdefault(run["learning_rate"], []).append(-math.inf if auc is None else auc)
    return found


def best_rates(choice: Choice, results: Sequence[Result]) -> Rates:
    """Return the rates with the best mean AUC on the validation split, where all of its runs are there."""
    pairs = [(ONE, 1), *((method, n) for n in choice.trainers for method in (HOROVOD, AT_THE_END, GOAL[0]))]
    if len(choice.learning_rates) == 1:
        return dict.fromkeys(pairs, choice.learning_rates[0])
    best: Rates = {}
    for pair, by_rate in validated(results).items():
        means = {rate: statistics.fmean(by_rate.get(rate, [])[: choice.tuning_seeds] or [-math.inf])
                 for rate in choice.learning_rates}  # fmt: skip
        if all(len(by_rate.get(rate, [])) >= choice.tuning_seeds for rate in choice.learning_rates):
            best[pair] = max(means, key=lambda rate: means[rate])
    return best


def stages(choice: Choice, rates: Rates) -> dict[str, list[Run]]:
    """Return the runs on the test months, in the order of their importance."""
    goal = [ONE, HOROVOD, *(method for method in choice.algorithms if method in GOAL)]
    rest = [method for method in choice.algorithms if method in REST]
    swept = [method for method in choice.algorithms if method in SWEPT] if choice.sweep else []
    pairs = [(ONE, 1), *((tuned_by(method), n) for method in METHODS for n in choice.trainers)]
    return {
        "goal": _runs(choice, rates, goal),
        "equal rates": [run for rate in choice.equal_rates for run in _runs(choice, dict.fromkeys(pairs, rate), goal)],
        "sweep": _runs(choice, rates, swept, GAPS),
        "rest": _runs(choice, rates, rest),
    }


def _runs(choice: Choice, rates: Rates, methods: Sequence[str], gaps: Sequence[int | None] = (None,)) -> list[Run]:
    return [
        Run(method, trainers, seed, rates.get((tuned_by(method), trainers), math.nan), sync_every=gap)
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
