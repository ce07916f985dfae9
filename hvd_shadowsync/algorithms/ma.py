"""Model averaging: S-MA in the background, FR-MA in the foreground."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hvd_shadowsync.algorithms.base import Algorithm, NoState


@dataclass(frozen=True)
class ModelAveraging(Algorithm):
    """S-MA: pull each replica towards the mean of the replicas.

        c = copy(w_i);  m = AllReduce(c) / N;  w_i += alpha (m - c)         merge="delta"
                                               w_i = (1-alpha) w_i + alpha m   merge="interpolate" (the paper's)

    Source: Zheng et al., "ShadowSync: Performing Synchronization in the Background for Highly Scalable Distributed
    Training", 2020, arXiv 2003.03477, algorithm S-MA.

    Attributes:
        alpha: share of the way to the mean, in (0, 1]; default 1, the mean itself.
    """

    alpha: float = 1.0

    def init(self, params: Tensor) -> NoState:
        """Return the empty state."""
        return NoState()

    def update(self, reduced: Tensor, state: NoState) -> tuple[Tensor, NoState]:
        """Return the mean as the anchor."""
        return reduced, state

    def surviving_progress(self, merge: str, size: int) -> float:
        """1 with the delta rule, 1 - alpha with interpolation."""
        return 1.0 if merge == "delta" else 1.0 - self.alpha
