"""Means with confidence intervals (95 %, Student's t), of values and of differences that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and how far its confidence interval reaches to each side; nan with fewer than two values."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean of independent values with its interval: t(n-1) times deviation / sqrt(n)."""
    if len(values) < 2:
        return Interval(values[0] if values else math.nan, math.nan)
    quantile = float(t.ppf((1 + level) / 2, len(values) - 1))
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def paired_interval(values: Mapping[int, float], references: Mapping[int, float], level: float = LEVEL) -> Interval:
    """Return the interval of value minus reference over the seeds that both have."""
    return mean_interval([values[seed] - references[seed] for seed in values if seed in references], level)


def verdict(difference: Interval, allowance: float) -> str:
    """Say whether the difference is above -allowance: "met" or "not met" if the whole interval says so."""
    if difference.low >= -allowance:
        return "met"
    return "not met" if difference.high < -allowance else "undecided"
