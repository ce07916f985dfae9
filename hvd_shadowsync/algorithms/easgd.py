"""Elastic averaging: S-EASGD against a sharded center in the background, FR-EASGD in the foreground."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hvd_shadowsync.algorithms.base import Algorithm, NoState


@dataclass(frozen=True)
class ElasticAveraging(Algorithm):
    """S-EASGD: each replica and a center pull each other, one replica at a time, without the replicas meeting.

        z = (1-alpha) z + alpha c_i;  w_i towards z                 the paper's, with the value just updated
        d = alpha (c_i - z);  w_i -= d;  z += d                     symmetric=True

    The center z is sharded over the ranks; the communicator thread of a shard's owner applies `elastic`.

    Sources: Zheng et al. 2020, arXiv 2003.03477, algorithm S-EASGD; Zhang, Choromanska and LeCun, "Deep learning with
    Elastic Averaging SGD", 2015, arXiv 1412.6651 (the symmetric form).

    Attributes:
        alpha: elastic share of the distance, in (0, 1]; default 0.5.
        symmetric: answer with the center before it moved, so that sum(w) + z is kept; default False.
    """

    alpha: float = 0.5
    symmetric: bool = False

    asynchronous: ClassVar[bool] = True

    def init(self, params: Tensor) -> NoState:
        """Return the empty state: the center lives with the ranks that own its shards."""
        return NoState()

    def elastic(self, center: Tensor, replica: Tensor) -> tuple[Tensor, Tensor]:
        """Return the center after the exchange with `replica`, and what the replica is answered."""
        moved = torch.lerp(center, replica, self.alpha)
        return moved, center if self.symmetric else moved

    def update(self, reduced: Tensor, state: NoState) -> tuple[Tensor, NoState]:
        """Return the center's answer as the anchor."""
        return reduced, state

    def surviving_progress(self, merge: str, size: int) -> float:
        """N / (N + 1 - alpha) for N trainers in turn (symmetric: N / (N + 1)); interpolation keeps 1 - alpha of it."""
        kept = 1.0 if merge == "delta" else 1.0 - self.alpha
        return kept * size / (size + 1 - (0.0 if self.symmetric else self.alpha))
