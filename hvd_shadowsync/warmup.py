"""Warm-up: the first steps average gradients synchronously over the ranks, as Horovod does."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import torch
from torch import Tensor

from hvd_shadowsync.average import average_in_place
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.reducers import OwnerMean
from hvd_shadowsync.replica import NamedTensor


class Part(IntEnum):
    """What a rank's part in a step of the warm-up is."""

    WAITS = 0
    TRAINS = 1
    LEAVES = 2


class Warmup:
    """Averages the gradients of the first `steps` training steps, in the training thread.

    Ranks that stop training earlier take part without counting (`finish`), so the others are not held up. A rank
    without a gradient for a parameter contributes zeros, and gets the mean. Sparse gradients are averaged as dense
    ones, and are sparse again afterwards unless `sparse_as_dense`.
    """

    def __init__(self, comm: Communicator, poller: Poller, steps: int, *, sparse_as_dense: bool = False) -> None:
        self._comm, self._poller = comm, poller
        self._mean = OwnerMean(comm, poller)
        self._sparse_as_dense = sparse_as_dense
        self.steps = self.left = steps
        self.root = 0
        """A rank whose weights have all steps of the warm-up so far."""

    @property
    def bytes_sent(self) -> int:
        """What this rank has put on the wire for gradients, bytes."""
        return self._mean.bytes_sent

    def average(self, params: Iterable[NamedTensor]) -> None:
        """Replace the gradients of `params` by their mean over the ranks that train; counts as one step."""
        self._meet([each for each in params if each.tensor.requires_grad], Part.TRAINS)

    def finish(self, params: Iterable[NamedTensor], *, leaving: bool) -> None:
        """Take part until the warm-up is over or no rank trains any more; it is over too where ranks leave then."""
        trained = [each for each in params if each.tensor.requires_grad]
        while self.left and self._meet(trained, Part.LEAVES if leaving else Part.WAITS):
            pass

    def _meet(self, params: list[NamedTensor], part: Part) -> bool:
        present = torch.zeros(self._comm.size, 1 + len(params), dtype=torch.uint8)
        trains = part is Part.TRAINS
        own = torch.tensor([part] + [trains and each.tensor.grad is not None for each in params], dtype=torch.uint8)
        self._poller.wait([self._comm.iallgather(own, present)])
        parts = present[:, 0].tolist()
        if Part.TRAINS not in parts:
            self.left = 0 if Part.LEAVES in parts else self.left
            return False
        self.left -= 1
        self.root = parts.index(Part.TRAINS)
        weights = [float(each == Part.TRAINS) for each in parts]
        wanted = [each for each, used in zip(params, present[:, 1:].any(0).tolist(), strict=True) if used]
        self._average(wanted, weights, trains)
        return True

    def _average(self, params: list[NamedTensor], weights: list[float], trains: bool) -> None:
        sparse_dims = [None if self._sparse_as_dense else _sparse_dim(each.tensor.grad) for each in params]
        gradients = [NamedTensor(each.name, _dense_gradient(each.tensor, trains)) for each in params]
        average_in_place(self._mean, gradients, weights)
        for each, gradient, sparse_dim in zip(params, gradients, sparse_dims, strict=True):
            if trains:
                dense = gradient.tensor
                each.tensor.grad = dense if sparse_dim is None else dense.to_sparse(sparse_dim)


def _sparse_dim(gradient: Tensor | None) -> int | None:
    return gradient.sparse_dim() if gradient is not None and gradient.is_sparse else None


def _dense_gradient(param: Tensor, trains: bool) -> Tensor:
    if param.grad is None or not trains:
        return torch.zeros_like(param, requires_grad=False)
    return param.grad.to_dense() if param.grad.is_sparse else param.grad
