"""Intervals against calculations by hand, and what a verdict makes of them."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")
from intervals import Interval, mean_interval, paired_interval, verdict


def test_a_mean_with_its_interval() -> None:
    """Deviation 0.01, n = 3, t(2) at 97.5 % = 4.302653: 4.302653 * 0.01 / sqrt(3) = 0.0248414."""
    interval = mean_interval([0.01, 0.02, 0.03])
    assert interval.mean == pytest.approx(0.02)
    assert interval.half_width == pytest.approx(0.0248414, abs=1e-6)
    assert (interval.low, interval.high) == (pytest.approx(-0.0048414, abs=1e-6), pytest.approx(0.0448414, abs=1e-6))


def test_differences_are_paired_by_seed() -> None:
    """Differences 0.01, 0.02, 0.03 as above, whatever the order and however far the seeds are apart."""
    values, references = {1: 0.70, 3: 0.93, 2: 0.51, 4: 0.6}, {3: 0.90, 1: 0.69, 2: 0.49, 5: 0.1}
    interval = paired_interval(values, references)
    assert interval == (pytest.approx(0.02), pytest.approx(0.0248414, abs=1e-6))


def test_five_seeds_and_another_level() -> None:
    """t(4) at 97.5 % = 2.776445, at 95 % = 2.131847; deviation sqrt(2.5), n = 5."""
    assert mean_interval([1, 2, 3, 4, 5]).half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert mean_interval([1, 2, 3, 4, 5], 0.9).half_width == pytest.approx(2.131847 * math.sqrt(2.5 / 5), rel=1e-6)


def test_too_few_values_have_no_interval() -> None:
    assert mean_interval([0.7])[0] == 0.7
    assert math.isnan(mean_interval([0.7]).half_width)
    assert math.isnan(paired_interval({1: 0.7}, {2: 0.7}).mean)


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (Interval(0.001, 0.0005), "met"),
        (Interval(-0.0005, 0.0004), "met"),
        (Interval(-0.0005, 0.0006), "undecided"),
        (Interval(-0.002, 0.0011), "undecided"),
        (Interval(-0.002, 0.0009), "not met"),
        (Interval(0.5, math.nan), "undecided"),
        (Interval(math.nan, math.nan), "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(interval: Interval, said: str) -> None:
    assert verdict(interval, 0.001) == said
