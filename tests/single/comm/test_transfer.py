"""How bytes are sent: what ranks start with, and the search for something better."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.transfer import ROUNDS_OF_A_TRIAL, WARM_UP_ROUNDS, Search, Transfer
from hvd_shadowsync.comm.tuning import EAGER_BYTES

MIB = 1 << 20
START = Transfer(MIB, 4, 0.001)


def searched(cost: Callable[[Transfer], float], num_bytes: int = 64 * MIB, start: Transfer = START) -> list[Transfer]:
    """Let a search see `cost` of what it tries until it is over; return what was used, round by round."""
    search, used = Search(start, num_bytes), []
    while not search.is_over:
        used.append(search.transfer)
        search.observe(round(cost(search.transfer)))
        assert len(used) < 100
    return [*used, search.transfer]


@pytest.mark.parametrize(("size", "mib"), [(2, 1), (3, 1.5), (4, 2), (8, 4), (64, 4), (1000, 62.5)])
def test_a_ranks_share_of_a_chunk_is_sent_without_asking(size: int, mib: float) -> None:
    chunk_bytes = Transfer.between(size).chunk_bytes
    assert chunk_bytes == mib * MIB
    assert chunk_bytes / size <= EAGER_BYTES


def test_pauses() -> None:
    poller = Transfer(pause_s=0.002).poller(Poller())
    assert poller.pause_s(0) == 0.0005
    assert poller.pause_s(1000) == 0.002


def test_without_a_difference_the_start_stays() -> None:
    used = searched(lambda transfer: 1000.0)
    assert used[-1] == START
    assert len(set(used)) == 8  # the start, two sizes, two numbers, three pauses
    assert len(used) - 1 == WARM_UP_ROUNDS + 8 * ROUNDS_OF_A_TRIAL


@pytest.mark.parametrize("chunk_bytes", [MIB // 4, 4 * MIB])
@pytest.mark.parametrize("in_flight", [2, 8])
@pytest.mark.parametrize("pause_s", [0.00025, 0.003, 0.01])
def test_the_best_is_found(chunk_bytes: int, in_flight: int, pause_s: float) -> None:
    best = Transfer(chunk_bytes, in_flight, pause_s)

    def cost(transfer: Transfer) -> float:
        pairs = zip(vars(transfer).values(), vars(best).values(), strict=True)
        return 10_000 * (1 + sum(ours != theirs for ours, theirs in pairs))

    assert searched(cost)[-1] == best


def test_a_start_that_was_slow_by_itself_is_tried_again() -> None:
    rounds, other = iter(range(100)), Transfer(MIB // 4, 4, 0.001)
    used = searched(lambda transfer: 2000 if transfer == START and next(rounds) < 5 else 1000)
    assert used[-7:] == [START] * 3 + [other] * 3 + [START]


def test_what_was_lucky_once_is_tried_again() -> None:
    rounds, other = iter(range(100)), Transfer(MIB // 4, 4, 0.001)
    used = searched(lambda transfer: 500 if transfer == other and next(rounds) < 3 else 1000)
    assert used[-7:] == [START] * 3 + [other] * 3 + [START]


def test_a_little_better_is_not_better() -> None:
    assert searched(lambda transfer: 1000 if transfer == START else 960)[-1] == START


def test_what_is_much_worse_gets_no_third_round() -> None:
    used = searched(lambda transfer: 1000 if transfer == START else 1300)
    assert len(used) - 1 == WARM_UP_ROUNDS + ROUNDS_OF_A_TRIAL + 7 * 2
    assert used[-1] == START


def test_one_slow_round_of_three_decides_nothing() -> None:
    rounds = iter(range(100))
    assert searched(lambda transfer: 9000 if next(rounds) % 3 == 0 else 500 if transfer.in_flight == 8 else 1000)[
        -1
    ] == Transfer(MIB, 8, 0.001)


@pytest.mark.parametrize(("num_bytes", "tried"), [(MIB // 8, 4), (MIB, 5), (3 * MIB, 7)])
def test_what_amounts_to_the_same_for_few_bytes_is_not_tried(num_bytes: int, tried: int) -> None:
    """An eighth of a MiB goes in one piece whatever is chosen: three pauses are left."""
    assert len(set(searched(lambda transfer: 1000.0, num_bytes))) == tried


def test_ranks_that_see_the_same_costs_choose_the_same() -> None:
    costs = [1000 * (7 * number % 13 + 1) for number in range(100)]
    left, right = iter(costs), iter(costs)
    assert searched(lambda _: next(left)) == searched(lambda _: next(right))
