"""Averaging named tensors over the ranks: gradients of the warm-up, optimizer state of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.reducers import OwnerMean


def mean_of(comm: Communicator, poller: Poller, flat: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the mean of the ranks' vectors `flat` by `weights[rank]`, bit-identical on every rank (collective)."""
    out = torch.empty_like(flat)
    for part, values in OwnerMean(comm, poller).reduce(flat, weights):
        out[part].copy_(values)
    return out
