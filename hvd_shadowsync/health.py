"""Whether this rank's replica is fit for the mean: what is wrong with it, since when, and who is told."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_shadowsync.errors import ShadowSyncError
from hvd_shadowsync.finite import all_finite, has_nan, within
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.replica import Replica

logger = logging.getLogger(__name__)

WATCHED_ROUNDS = 100
SCALARS = ("step", "eta", "mu", "mu_product")
"""State of optimizers that has a parameter's shape where that is a single number, and is no momentum."""


@dataclass(frozen=True)
class Finding:
    """The first tensor of a replica, in its order, that has a bad number, and when that was seen."""

    name: str
    what: str
    step: int
    good_at: int

    def __str__(self) -> str:
        return f"{self.name} has {self.what} at step {self.step} (still good at step {self.good_at})"


class Health:
    """What one rank knows of its own replica; for the thread that runs rounds.

    Bad are NaN and infinity in a weight, weights so large that a sum over all ranks could overflow, and NaN in a
    floating-point buffer: infinity there may be a mask's.

    Args:
        rank: number of this rank in messages.
        metrics: whose steps messages name.
        size: number of ranks.
        max_distance: from the anchor, over the anchor's norm, beyond which a replica is reported; None for never.
    """

    def __init__(self, rank: int, size: int, metrics: RoundMetrics, max_distance: float | None = None) -> None:
        self.rank, self._size, self._metrics, self._max_distance = rank, size, metrics, max_distance
        self.bad: Finding | None = None
        """What is wrong, until it is healed."""
        self.last: Finding | None = None
        """What was wrong last."""
        self._good_at = self._to_watch = self._times = 0
        self._in_a_row, self._healed_at = 0, 0
        self._alone = False
        self._is_far = False

    @property
    def bad_in_a_row(self) -> int:
        """How often it got bad without having been good after a step in between, this time included; 0 while good.

        It does not count, and this is 1, where others made progress meanwhile: then it is this rank's fault alone.
        """
        return 0 if self.bad is None else 1 if self._alone else self._in_a_row + 1

    @property
    def is_watched(self) -> bool:
        """Whether it was bad in one of the last rounds: whoever gets bad once often does so again."""
        return self._to_watch > 0

    def examine(self, replica: Replica, flat: Tensor, since: int, part: slice | None = None) -> bool:
        """Look for bad numbers in the snapshot `flat`, begun at step `since`, or in a part of it; tell if there are.

        What is found in a part is added to what is known; the whole settles it.
        """
        found = self._first_bad(replica, flat, slice(0, flat.numel()) if part is None else part)
        if found is not None:
            self.bad = self.last = self.bad or Finding(*found, self._metrics.steps, self._good_at)
            self._to_watch = WATCHED_ROUNDS
        elif part is None:
            self.bad, self._good_at = None, since
        return found is not None

    def note_good(self, since: int) -> None:
        """Take note that the snapshot of a round, begun at step `since`, had no bad number."""
        self._good_at = since
        if since > self._healed_at + 1:  # which is merged at the end of the next step
            self._in_a_row, self._alone = 0, False
        self._to_watch = max(0, self._to_watch - 1)
        if not self._to_watch:
            self._times = 0

    def note_healed(self, *, others_progress: bool) -> None:
        """Say that the replica takes over the others' numbers; of many times the 1st, 2nd, 4th, 8th...

        Args:
            others_progress: whether some of them are of a rank that trains.
        """
        assert self.bad is not None, "it was bad"
        self._times += 1
        self._in_a_row += 1
        self._alone = self._alone or others_progress
        self._healed_at = self._metrics.steps
        if self._times & (self._times - 1) == 0:
            logger.warning(
                "rank %d: %s; its replica was left out of the mean and is healed from the others'%s",
                self.rank, self.bad, "" if self._times == 1 else f" ({self._times} times by now)",
            )  # fmt: skip
        self.bad = None

    def watch_distance(self, distance: float, step: int) -> None:
        """Say, once each time, that the replica went too far away from the anchor."""
        if self._max_distance is None or math.isnan(distance):
            return
        far = distance > self._max_distance
        if far and not self._is_far:
            logger.warning(
                "rank %d: at step %d the replica is %.3g away from the anchor, in units of its norm, which is more "
                "than max_distance=%g",
                self.rank, step, distance, self._max_distance,
            )  # fmt: skip
        self._is_far = far

    def nobody_is_left(self) -> ShadowSyncError:
        """Return the error for the case that there is no good replica."""
        here = f"here (rank {self.rank}) {self.last}" if self.last is not None else "which ones, each rank says"
        return ShadowSyncError(
            f"all replicas hold NaN or infinity: {here}; go on from the last checkpoint, with a lower learning rate"
        )

    def _first_bad(self, replica: Replica, flat: Tensor, part: slice) -> tuple[str, str] | None:
        """Return the name of the first tensor with a bad number in `part`, and what it has."""
        limit = torch.finfo(flat.dtype).max / (4 * self._size)
        weights = flat[part.start : min(part.stop, replica.num_weights)]
        buffers = flat[max(part.start, replica.num_weights) : part.stop]
        if _is_small(weights, limit) and (all_finite(buffers) or not has_nan(buffers)):
            return None
        for segment in replica.segments:
            values = flat[max(segment.start, part.start) : max(min(segment.stop, part.stop), part.start)]
            if has_nan(values):
                return segment.name, "NaN"
            if segment.stop <= replica.num_weights and not within(values, limit):
                return segment.name, "infinity" if not all_finite(values) else f"{float(values.abs().max()):g}"
        return None


def _is_small(values: Tensor, limit: float) -> bool:
    """Tell whether all are within the limit; fast where they are far below it."""
    return math.isfinite(float(torch.dot(values, values))) or within(values, limit)


def forget_bad_state(optimizer: torch.optim.Optimizer) -> None:
    """Set momenta and the like of `optimizer` to 0 where a parameter or its state has a bad number.

    For the thread that steps. All of a parameter's state goes, not the bad elements alone: what is finite beside them
    comes of the same gradients.
    """
    for param, state in optimizer.state.items():
        tensors = {key: each for key, each in state.items() if isinstance(each, Tensor) and each.is_floating_point()}
        if all(bool(each.isfinite().all()) for each in (param.detach(), *tensors.values())):
            continue
        for key, each in tensors.items():
            if each.shape == param.shape and key not in SCALARS:
                each.zero_()
            else:
                each.nan_to_num_(0.0, 0.0, 0.0)
