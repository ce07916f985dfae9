"""What ranks tell each other before a round, and what follows from it: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

import torch
from torch import Tensor


class Intent(IntEnum):
    """What a rank's training thread is about."""

    TRAIN = 0
    MEET = 1  # waits in a collective call that leaves the replicas alone: gather(), metrics(merged=True)
    CONSOLIDATE = 2  # waits in synchronize()
    LEAVE = 3  # waits in close(), or is gone
    END = 4  # was told to end: waits for the last consolidation, whatever calls the others are in


CALLS = {
    Intent.TRAIN: "training",
    Intent.MEET: "a collective call such as metrics(merged=True)",
    Intent.CONSOLIDATE: "synchronize()",
    Intent.LEAVE: "close()",
    Intent.END: "its last consolidation",
}


class Verdict(Enum):
    """What all ranks do next."""

    ROUND = "a round of the algorithm"
    MEET = "all ranks are in the call"
    CONSOLIDATE = "all replicas become their mean"
    REGROUP = "the replicas have new parameters; lay the vectors out anew"
    MISMATCH = "the replicas differ in their parameters for the moment; nothing is exchanged"
    CONFLICT = "the ranks wait for one another in calls that do not go together"
    STOP = "all ranks leave"


@dataclass(frozen=True)
class Ballot:
    """One rank's vote.

    Attributes:
        intent: what its training thread is about.
        counts: whether its replica counts in the mean; False once a rank has nothing new to contribute.
        layout: fingerprint of its replica's names, shapes and dtypes, non-negative.
        spent_us: CPU time that it has spent on synchronisation since its last vote, microseconds.
        cost_us: how long after the last round began the next could, as to the way it was sent, microseconds.
        gives_up: whether it has waited too long for the ranks to have the same parameters.
        bad: 0 if its replica has no NaN or infinity. Else it is to take over what the others make of theirs, and this
            is how often in a row it had some, this time included; 1 if it had some while others made progress.
    """

    intent: Intent
    counts: bool
    layout: int
    spent_us: int = 0
    cost_us: int = 0
    gives_up: bool = False
    bad: int = 0

    def encode(self) -> Tensor:
        """Return the ballot as a vector, int64."""
        fields = [self.intent, self.counts, self.layout, self.spent_us, self.cost_us, self.gives_up, self.bad]
        return torch.tensor(fields, dtype=torch.int64)


NUM_FIELDS = 7
HOPELESS = 3
"""So often in a row a rank that trains may have bad numbers while all that train do, and only others have good ones."""


@dataclass(frozen=True)
class Count:
    """The ballots of all ranks, and what follows."""

    verdict: Verdict
    weights: tuple[float, ...]
    intents: tuple[Intent, ...]
    most_spent_us: int
    most_cost_us: int
    gives_up: bool
    all_bad: bool
    any_progress: bool
    """Whether a replica that counts is good."""


def count(votes: Tensor, agreed_layout: int) -> Count:
    """Return what follows from `votes`, int64 of shape (size, 7), where the last rounds had `agreed_layout`."""
    intents, counts, layouts, spent_us, cost_us, give_up, bad = votes.T.tolist()
    weights = weights_of(counts, bad)
    verdict = _verdict(set(intents), set(layouts), agreed_layout)
    most_spent_us, most_cost_us = max(spent_us), max(cost_us)
    counting = [ill for each, ill in zip(counts, bad, strict=True) if each]
    return Count(
        verdict, weights, tuple(map(Intent, intents)), most_spent_us, most_cost_us, any(give_up),
        all_bad=all(bad) or _is_hopeless(counting), any_progress=not all(counting),
    )  # fmt: skip


def weights_of(counts: Sequence[float], bad: Sequence[int]) -> tuple[float, ...]:
    """Return how much each replica weighs: those that count and are good; if there are none, all good ones; or all."""
    for weights in ([each * (not ill) for each, ill in zip(counts, bad, strict=True)], [not ill for ill in bad]):
        if any(weights):
            return tuple(map(float, weights))
    return (1.0,) * len(bad)


def conflict(intents: Sequence[int]) -> str:
    """Return the message for ranks that wait for one another in calls that do not go together."""
    where = ", ".join(f"rank {rank} in {CALLS[Intent(intent)]}" for rank, intent in enumerate(intents))
    return f"the ranks wait for one another: {where}; make these calls on every rank, in the same order"


def _is_hopeless(counting: Sequence[int]) -> bool:
    """Tell whether all ranks that train are bad, and one that was good beside others does not keep what it gets."""
    return all(counting) and max(counting, default=0) >= HOPELESS


def _verdict(intents: set[int], layouts: set[int], agreed_layout: int) -> Verdict:
    if intents == {Intent.LEAVE}:
        return Verdict.STOP
    if len(layouts) > 1:
        return Verdict.MISMATCH
    if layouts != {agreed_layout}:
        return Verdict.REGROUP
    if Intent.TRAIN in intents or (Intent.END in intents and intents & {Intent.MEET, Intent.CONSOLIDATE}):
        return Verdict.ROUND
    if Intent.MEET in intents:
        return Verdict.MEET if intents == {Intent.MEET} else Verdict.CONFLICT
    return Verdict.CONSOLIDATE
