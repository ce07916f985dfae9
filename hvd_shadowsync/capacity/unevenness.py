"""How much longer the slowest of many ranks takes, in closed form."""

from __future__ import annotations

import math
from statistics import NormalDist

from hvd_shadowsync.capacity.setting import Setting, Unevenness


def mean_step_s(setting: Setting, *, slow: bool = False) -> float:
    """Return the mean time of a step of an even rank, or of a slow one, seconds."""
    uneven, step_s = setting.unevenness, setting.job.step_ms / 1000
    return step_s * (uneven.slow_factor if slow else 1.0) + uneven.stall_share * uneven.stall_ms / 1000


def steps_per_s(setting: Setting) -> float:
    """Return the steps a second of all ranks together, each at its own pace."""
    ranks = setting.cluster.ranks
    slow = setting.unevenness.slow_ranks(ranks)
    return (ranks - slow) / mean_step_s(setting) + slow / mean_step_s(setting, slow=True)


def slowest_s(setting: Setting, *, steps: int = 1, step_s: float | None = None) -> float:
    """Return how long the last of all ranks takes for `steps` steps, on average, seconds.

    The largest of n values is put at their quantile (n - 3/8) / (n + 1/4) (Blom, 1958, "Statistical estimates and
    transformed beta-variables"); slow ranks and the others are looked at apart, and so is the last of those that
    stall, if any does.

    Args:
        setting: what is asked about.
        steps: steps that are made between two waits.
        step_s: mean time of a step of an even rank; default: that of the job.
    """
    uneven, ranks = setting.unevenness, setting.cluster.ranks
    slow = uneven.slow_ranks(ranks)
    each_s = setting.job.step_ms / 1000 if step_s is None else step_s
    slowest = max(_largest(uneven, ranks - slow, steps), uneven.slow_factor * _largest(uneven, slow, steps))
    stall_s, often = uneven.stall_ms / 1000, uneven.stall_share
    calm_s = steps * each_s * slowest + often * (steps - 1) * stall_s
    any_stalls = 1 - (1 - often) ** (ranks * steps)
    if any_stalls == 0:
        return calm_s
    stalled = min(ranks, round(ranks * steps * often / any_stalls))
    stalled_s = steps * each_s * _largest(uneven, stalled, steps) + (1 + often * (steps - 1)) * stall_s
    return (1 - any_stalls) * calm_s + any_stalls * max(calm_s, stalled_s)


def _largest(uneven: Unevenness, count: int, steps: int) -> float:
    """Return the largest of `count` means of `steps` steps, over the mean; 0 of none."""
    if count < 2 or uneven.jitter == 0:
        return min(count, 1.0)
    sigma = uneven.sigma(steps)
    return math.exp(sigma * NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) - sigma**2 / 2)
