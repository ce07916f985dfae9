"""Averaging named tensors over the ranks, in place: gradients of the warm-up, optimizer state of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_shadowsync.reducers import OwnerMean
from hvd_shadowsync.replica import NamedTensor, Replica


def average_in_place(mean: OwnerMean, tensors: Sequence[NamedTensor], weights: Sequence[float]) -> None:
    """Replace `tensors`, floating-point and the same on every rank, by their mean, by `weights[rank]` (collective)."""
    replica = Replica(tensors)
    flat = replica.empty()
    replica.read(flat)
    for part, values in mean.reduce(flat, weights):
        flat[part].copy_(values)
    mean.forget()
    replica.write(flat)
