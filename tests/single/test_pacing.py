"""When rounds are due: steps, milliseconds, CPU budget, and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from hvd_shadowsync.checks import check_count
from hvd_shadowsync.pacing import DEFAULT_CPU_BUDGET, Pacing

positive = strategies.floats(0, 1000)


def wait(pacing: Pacing, *, steps: int = 10**6, elapsed_s: float = 0.0, spent_s: float = 0.0) -> float:
    return pacing.wait_s(steps=steps, elapsed_s=elapsed_s, spent_s=spent_s)


def test_the_budget_is_the_default() -> None:
    assert Pacing() == Pacing(cpu_budget=DEFAULT_CPU_BUDGET)
    assert DEFAULT_CPU_BUDGET == 0.02


@pytest.mark.parametrize(
    "given", [{"sync_every": 3}, {"sync_interval_ms": 5.0}, {"sync_every": 3, "sync_interval_ms": 0}]
)
def test_other_conditions_take_its_place(given: dict[str, Any]) -> None:
    assert Pacing(**given).cpu_budget is None


def test_the_budget_goes_with_the_others() -> None:
    assert Pacing(sync_every=3, sync_interval_ms=5.0, cpu_budget=0.5).cpu_budget == 0.5


def test_steps() -> None:
    pacing = Pacing(sync_every=4)
    assert [wait(pacing, steps=steps) for steps in (0, 3, 4, 9)] == [math.inf, math.inf, 0, 0]


@pytest.mark.parametrize("pacing", [Pacing(), Pacing(sync_interval_ms=1.0), Pacing(cpu_budget=1.0)])
def test_one_step_is_needed_in_any_case(pacing: Pacing) -> None:
    assert wait(pacing, steps=0, elapsed_s=1e9) == math.inf
    assert wait(pacing, steps=1, elapsed_s=1e9) == 0
    assert pacing.steps == 1


def test_milliseconds_from_start_to_start() -> None:
    pacing = Pacing(sync_interval_ms=50)
    assert wait(pacing, elapsed_s=0.01, spent_s=7.0) == pytest.approx(0.04)
    assert wait(pacing, elapsed_s=0.06) == 0


def test_the_budget_is_spent_over_elapsed() -> None:
    pacing = Pacing(cpu_budget=0.1)
    assert wait(pacing, spent_s=0.02, elapsed_s=0.05) == pytest.approx(0.15)
    assert wait(pacing, spent_s=0.02, elapsed_s=0.2) == 0
    assert wait(Pacing(cpu_budget=1.0), spent_s=0.02, elapsed_s=0.02) == 0


@pytest.mark.parametrize(
    ("pacing", "head_start_s"), [(Pacing(), 0.2), (Pacing(cpu_budget=1.0), 10.0), (Pacing(sync_every=3), 0.0)]
)
def test_the_first_rounds_may_spend_what_ten_seconds_allow(pacing: Pacing, head_start_s: float) -> None:
    assert pacing.head_start_s == pytest.approx(head_start_s)


@hypothesis.given(
    steps=strategies.integers(1, 50),
    interval=positive,
    budget=strategies.floats(0.01, 1),
    done=strategies.integers(0, 100),
    elapsed=positive,
    spent=positive,
)
def test_a_round_is_due_once_every_condition_holds(
    steps: int, interval: float, budget: float, done: int, elapsed: float, spent: float
) -> None:
    pacing = Pacing(steps, interval, budget)
    left = wait(pacing, steps=done, elapsed_s=elapsed, spent_s=spent)
    assert (left == math.inf) == (done < steps)
    if done >= steps:
        assert left >= 0
        assert wait(pacing, steps=done, elapsed_s=elapsed + left + 1e-6, spent_s=spent) == 0
        if left > 1e-6:
            sooner = elapsed + left / 2
            assert sooner < interval / 1000 or spent / sooner > budget


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sync_every": 0}, ValueError, "sync_every=0 is below 1; give a whole number of at least 1"),
        ({"sync_every": 2.0}, TypeError, "sync_every=2.0 is not a whole number; give one of at least 1"),
        ({"sync_every": True}, TypeError, "sync_every=True is not a whole number"),
        ({"sync_interval_ms": -1}, ValueError, "sync_interval_ms=-1 is outside [0, inf); give"),
        ({"sync_interval_ms": math.inf}, ValueError, "sync_interval_ms=inf is outside [0, inf); give"),
        ({"sync_interval_ms": "5"}, TypeError, "sync_interval_ms='5' is not a number; give"),
        ({"cpu_budget": 0}, ValueError, "cpu_budget=0 is outside (0, 1]; give"),
        ({"cpu_budget": 1.5}, ValueError, "cpu_budget=1.5 is outside (0, 1]; give"),
        ({"cpu_budget": math.nan}, ValueError, "cpu_budget=nan is outside (0, 1]; give"),
        ({"cpu_budget": True}, TypeError, "cpu_budget=True is not a number"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Pacing(**given)


def test_counts() -> None:
    check_count("warmup_steps", 0, least=0)
    with pytest.raises(ValueError, match="warmup_steps=-1 is below 0; give a whole number of at least 0"):
        check_count("warmup_steps", -1, least=0)
