"""The vote: what follows from the ballots of all ranks."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies

from hvd_shadowsync.ballot import NUM_FIELDS, Ballot, Count, Intent, Verdict, count

TRAIN, MEET, CONSOLIDATE, LEAVE, END = Intent
OLD, NEW = 111, 222

ballots = strategies.builds(
    Ballot,
    intent=strategies.sampled_from(Intent),
    counts=strategies.booleans(),
    layout=strategies.sampled_from([OLD, NEW]),
    spent_us=strategies.integers(0, 10**9),
)


def counted(*given: Ballot, agreed: int = OLD) -> Count:
    return count(torch.stack([ballot.encode() for ballot in given]), agreed)


def with_intents(*intents: Intent, layout: int = OLD) -> Count:
    return counted(*(Ballot(intent, True, layout) for intent in intents))


@pytest.mark.parametrize(
    ("intents", "verdict"),
    [
        ((TRAIN, TRAIN), Verdict.ROUND),
        ((TRAIN, CONSOLIDATE), Verdict.ROUND),
        ((TRAIN, LEAVE), Verdict.ROUND),
        ((TRAIN, CONSOLIDATE, LEAVE), Verdict.ROUND),
        ((CONSOLIDATE, CONSOLIDATE), Verdict.CONSOLIDATE),
        ((CONSOLIDATE, LEAVE), Verdict.CONSOLIDATE),
        ((LEAVE, LEAVE), Verdict.STOP),
        ((TRAIN, MEET), Verdict.ROUND),
        ((TRAIN, MEET, LEAVE), Verdict.ROUND),
        ((MEET, MEET), Verdict.MEET),
        ((MEET, CONSOLIDATE), Verdict.CONFLICT),
        ((MEET, LEAVE), Verdict.CONFLICT),
        ((TRAIN,), Verdict.ROUND),
        ((CONSOLIDATE,), Verdict.CONSOLIDATE),
        ((LEAVE,), Verdict.STOP),
        ((END, TRAIN), Verdict.ROUND),
        ((END, MEET), Verdict.ROUND),
        ((END, MEET, LEAVE), Verdict.ROUND),
        ((END, CONSOLIDATE), Verdict.ROUND),
        ((END, LEAVE), Verdict.CONSOLIDATE),
        ((END,), Verdict.CONSOLIDATE),
    ],
)
def test_what_follows_from_intents(intents: tuple[Intent, ...], verdict: Verdict) -> None:
    assert with_intents(*intents).verdict is verdict


@pytest.mark.parametrize("intents", [(TRAIN, TRAIN), (TRAIN, LEAVE), (CONSOLIDATE, CONSOLIDATE), (CONSOLIDATE, LEAVE)])
def test_a_new_layout_comes_first(intents: tuple[Intent, Intent]) -> None:
    first, second = intents
    assert with_intents(first, second, layout=NEW).verdict is Verdict.REGROUP
    mixed = counted(Ballot(first, True, OLD), Ballot(second, True, NEW))
    assert mixed.verdict is Verdict.MISMATCH


def test_ranks_may_leave_with_different_layouts() -> None:
    assert counted(Ballot(LEAVE, True, OLD), Ballot(LEAVE, True, NEW)).verdict is Verdict.STOP


def test_weights_are_who_counts() -> None:
    given = [Ballot(TRAIN, True, OLD), Ballot(CONSOLIDATE, False, OLD), Ballot(TRAIN, True, OLD)]
    assert counted(*given).weights == (1.0, 0.0, 1.0)


def test_where_nobody_counts_all_do() -> None:
    assert counted(*[Ballot(CONSOLIDATE, False, OLD)] * 3).weights == (1.0, 1.0, 1.0)


def test_intents_by_rank() -> None:
    assert with_intents(TRAIN, LEAVE, MEET).intents == (TRAIN, LEAVE, MEET)


def test_the_rank_that_has_spent_most() -> None:
    assert counted(*(Ballot(TRAIN, True, OLD, spent) for spent in (7, 2**40, 0))).most_spent_us == 2**40


def test_the_rank_that_the_last_round_cost_most() -> None:
    assert counted(*(Ballot(TRAIN, True, OLD, 1, cost) for cost in (7, 2**40, 0))).most_cost_us == 2**40


@pytest.mark.parametrize("rank", [0, 2])
def test_one_rank_without_patience_is_enough(rank: int) -> None:
    assert counted(*(Ballot(TRAIN, True, OLD, gives_up=each == rank) for each in range(3))).gives_up
    assert not counted(*[Ballot(TRAIN, True, OLD)] * 3).gives_up


def test_a_ballot_is_56_bytes_and_holds_a_fingerprint_whole() -> None:
    encoded = Ballot(CONSOLIDATE, True, 2**62 - 1, 9, 8, True, True).encode()
    assert encoded.dtype == torch.int64
    assert encoded.nbytes == 56
    assert encoded.tolist() == [2, 1, 2**62 - 1, 9, 8, 1, 1]
    assert encoded.numel() == NUM_FIELDS


@pytest.mark.parametrize(
    ("given", "weights", "all_bad"),
    [
        ([(True, 0), (True, 1), (True, 0)], (1.0, 0.0, 1.0), False),
        ([(True, 1), (True, 1)], (1.0, 1.0), True),
        ([(True, 2), (False, 0)], (0.0, 1.0), False),
        ([(True, 3), (False, 0)], (0.0, 1.0), True),
        ([(True, 2), (True, 1), (False, 0)], (0.0, 0.0, 1.0), False),
        ([(True, 3), (True, 1), (False, 0)], (0.0, 0.0, 1.0), True),
        ([(True, 3), (True, 0), (False, 0)], (0.0, 1.0, 0.0), False),
        ([(False, 9), (False, 0)], (0.0, 1.0), False),
    ],
)
def test_bad_replicas_weigh_nothing(given: list[tuple[bool, int]], weights: tuple[float, ...], all_bad: bool) -> None:
    """Those of ranks without data heal the others, unless it does not help."""
    found = counted(*(Ballot(TRAIN, counts, OLD, bad=bad) for counts, bad in given))
    assert (found.weights, found.all_bad) == (weights, all_bad)
    assert found.any_progress == any(counts and not bad for counts, bad in given)


@hypothesis.given(given=strategies.lists(ballots, min_size=1, max_size=5))
def test_weights_never_sum_to_nothing(given: list[Ballot]) -> None:
    found = counted(*given)
    assert sum(found.weights) >= 1
    assert len(found.weights) == len(found.intents) == len(given)


@hypothesis.given(given=strategies.lists(ballots, min_size=2, max_size=5), data=strategies.data())
def test_the_verdict_does_not_depend_on_the_order_of_ranks(given: list[Ballot], data: strategies.DataObject) -> None:
    assert counted(*given).verdict is counted(*data.draw(strategies.permutations(given))).verdict


@hypothesis.given(given=strategies.lists(ballots, min_size=1, max_size=5))
def test_numbers_are_reduced_only_where_all_ranks_have_the_agreed_layout(given: list[Ballot]) -> None:
    if counted(*given).verdict in (Verdict.ROUND, Verdict.CONSOLIDATE):
        assert {ballot.layout for ballot in given} == {OLD}
