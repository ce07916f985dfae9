"""Bad numbers, NaN and infinity: is there one among many, told in one fast pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Tell whether `values`, any real dtype, has neither NaN nor infinity.

    One sum, which is one pass at the speed of the memory; where that is not finite, as a sum of finite halves may be,
    the values are looked at.
    """
    return math.isfinite(float(values.sum())) or within(values, torch.finfo(values.dtype).max)


def within(values: Tensor, limit: float) -> bool:
    """Tell whether all `values` lie in [-limit, limit]; NaN does not."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return -limit <= float(low) and float(high) <= limit


def has_nan(values: Tensor) -> bool:
    """Tell whether there is a NaN in `values`; infinity may be."""
    return not within(values, math.inf)
