"""Blockwise model-update filtering: S-BMUF in the background, FR-BMUF in the foreground."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_shadowsync.algorithms.base import Algorithm
from hvd_shadowsync.checks import check_interval


class PlainBlockState(NamedTuple):
    """State without block momentum."""

    global_model: Tensor


class BlockState(NamedTuple):
    """State with block momentum."""

    global_model: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class BMUF(Algorithm):
    """S-BMUF: the mean of the replicas is a block gradient for a global model, which the replicas are pulled to.

        c = copy(w_i);  m = AllReduce(c) / N
        V = block_momentum V + block_lr (m - A);  G = G + V;  A = G + block_momentum V (nesterov) or G;  w_i towards A

    Sources: Chen and Huo, "Scalable training of deep learning machines by incremental block training with intra-block
    parallel optimization and blockwise model-update filtering", ICASSP 2016 (block momentum; with Nesterov the block
    gradient is taken from the look-ahead A that the replicas started the block from); Zheng et al. 2020, arXiv
    2003.03477, algorithm S-BMUF (block_lr, in the background).

    Attributes:
        alpha: share of the way to the global model, in (0, 1]; default 1.
        block_lr: learning rate of the global model (eta), in (0, inf); default 1.
        block_momentum: in [0, 1); default 0, which is right in the background: rounds are many and short there. The
            papers' 1 - 1/N belongs to long blocks in the foreground; it multiplies each round's progress by N.
        nesterov: pull the replicas to the look-ahead; needs block_momentum > 0. Default False.
    """

    alpha: float = 1.0
    block_lr: float = 1.0
    block_momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("block_lr", self.block_lr, low=0.0, high=float("inf"), low_included=False, high_included=False)
        check_interval("block_momentum", self.block_momentum, low=0.0, high=1.0, high_included=False)
        if self.nesterov and self.block_momentum == 0:
            raise ValueError("nesterov=True needs block_momentum > 0; give both or neither")

    def init(self, params: Tensor) -> PlainBlockState | BlockState:
        """Return the global model at `params`, at rest."""
        if self.block_momentum == 0:
            return PlainBlockState(params.clone())
        return BlockState(params.clone(), torch.zeros_like(params))

    def update(
        self, reduced: Tensor, state: PlainBlockState | BlockState
    ) -> tuple[Tensor, PlainBlockState | BlockState]:
        """Return the new global model (or its look-ahead) as the anchor."""
        if isinstance(state, PlainBlockState):
            moved = torch.lerp(state.global_model, reduced, self.block_lr)
            return moved, PlainBlockState(moved)
        anchor = self._anchor(state.global_model, state.velocity)
        velocity = torch.add(self.block_momentum * state.velocity, reduced - anchor, alpha=self.block_lr)
        moved = state.global_model + velocity
        return self._anchor(moved, velocity), BlockState(moved, velocity)

    def rebase(self, mean: Tensor, state: PlainBlockState | BlockState) -> PlainBlockState | BlockState:
        """Put the global model (its look-ahead, if that is what replicas start from) at `mean`; keep the velocity."""
        if isinstance(state, PlainBlockState):
            return PlainBlockState(mean)
        return BlockState(mean - (self._anchor(mean, state.velocity) - mean), state.velocity)

    def surviving_progress(self, merge: str, size: int) -> float:
        """g / (g + alpha (1 - g)) with g = block_lr / (1 - block_momentum); interpolation keeps 1 - alpha of that."""
        gain = self.block_lr / (1 - self.block_momentum)
        kept = 1.0 if merge == "delta" else 1.0 - self.alpha
        return kept * gain / (gain + self.alpha * (1 - gain))

    def _anchor(self, global_model: Tensor, velocity: Tensor) -> Tensor:
        return global_model + self.block_momentum * velocity if self.nesterov else global_model
