"""Waiting by polling: eagerly at first, then with pauses that grow, anew whenever something was done."""

from __future__ import annotations

import itertools
import os
import threading
import time

import hypothesis
import pytest
from hypothesis import strategies

from hvd_shadowsync.comm import poll
from hvd_shadowsync.comm.poll import Poller


class Countdown:
    """A request that is complete at its n-th test, and must not be tested afterwards."""

    def __init__(self, tests: int) -> None:
        self.left = tests

    def test(self) -> bool:
        assert self.left > 0, "tested after it was complete"
        self.left -= 1
        return self.left == 0


class Clock:
    """Stands in for `time` and `os` in one thread: counts pauses and yields, moves on by what was slept."""

    def __init__(self) -> None:
        self.now, self.slept, self.yields = 0.0, [], 0
        self._home = threading.get_ident()

    def perf_counter(self) -> float:
        return self.now if threading.get_ident() == self._home else time.perf_counter()

    def sleep(self, seconds: float) -> None:
        if threading.get_ident() != self._home:
            return time.sleep(seconds)
        self.slept.append(seconds)
        self.now += seconds

    def sched_yield(self) -> None:
        if threading.get_ident() != self._home:
            return os.sched_yield()
        self.yields += 1
        self.now += 1e-5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(poll, "time", clock)
    monkeypatch.setattr(poll, "os", clock)
    return clock


@hypothesis.given(counts=strategies.lists(strategies.integers(1, 6), max_size=5))
def test_returns_when_all_are_complete(counts: list[int]) -> None:
    requests = [Countdown(tests) for tests in counts]
    Poller(shortest_s=1e-6, longest_s=1e-6).wait(requests)
    assert [request.left for request in requests] == [0] * len(counts)


def test_complete_requests_cost_no_pause(clock: Clock) -> None:
    Poller(spin_s=0, eager=0).wait([Countdown(1), Countdown(1)])
    Poller(spin_s=0, eager=0).wait([])
    assert (clock.slept, clock.yields) == ([], 0)


def test_requests_may_come_from_an_iterator(clock: Clock) -> None:
    requests = [Countdown(2), Countdown(3)]
    Poller().wait(iter(requests))
    assert [request.left for request in requests] == [0, 0]


def test_spins_then_polls_eagerly_then_pauses_grow_to_the_longest(clock: Clock) -> None:
    poller = Poller(spin_s=0, eager=3, shortest_s=0.001, longest_s=0.003, growth=2.0)
    poller.wait([Countdown(8)])
    assert clock.yields == 2
    assert clock.slept == [0.001, 0.002, 0.003, 0.003, 0.003]


def test_while_it_spins_it_does_not_sleep(clock: Clock) -> None:
    Poller(spin_s=0.01, eager=1).wait([Countdown(900)])
    assert clock.slept == []
    Poller(spin_s=0.001, eager=1).wait([Countdown(900)])
    assert clock.slept != []


def test_work_meanwhile_starts_the_pauses_anew(clock: Clock) -> None:
    works = iter([False] * 4 + [True] + [False] * 10)
    Poller(spin_s=0, eager=2, shortest_s=0.001, longest_s=1.0, growth=2.0).wait([Countdown(9)], lambda: next(works))
    assert clock.slept == [0.001, 0.002, 0.004, 0.001, 0.002]


def test_meanwhile_runs_between_polls_and_not_after_them(clock: Clock) -> None:
    calls = itertools.count()
    Poller().wait([Countdown(5)], lambda: bool(next(calls)))
    assert next(calls) == 4


@hypothesis.given(
    eager=strategies.integers(0, 20), polls=strategies.integers(0, 10**6), growth=strategies.floats(1.0, 4.0)
)
def test_pauses_never_shrink_and_never_pass_the_longest(eager: int, polls: int, growth: float) -> None:
    poller = Poller(eager=eager, shortest_s=0.001, longest_s=0.02, growth=growth)
    pause, following = poller.pause_s(polls), poller.pause_s(polls + 1)
    assert pause == 0 if polls < eager else 0.001 <= pause <= 0.02
    assert pause <= following


def test_the_default_spins_longer_than_a_pause_lasts_in_practice() -> None:
    poller = Poller()
    assert poller.spin_s > 2 * poller.shortest_s
    assert poller.pause_s(10**9) == poller.longest_s == 0.001
