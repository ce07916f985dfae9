"""Warm-up: the first steps average gradients synchronously over the ranks, as Horovod does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from hvd_shadowsync.average import mean_of
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.replica import NamedTensor, Replica


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

    def __init__(self, ranks: Survivors, poller: Poller, steps: int, *, sparse_as_dense: bool = False) -> None:
        self._ranks, self._poller = ranks, poller
        self._sparse_as_dense = sparse_as_dense
        self.steps = self.left = steps
        self.trained: list[int] = []
        """The ranks whose weights have all steps of the warm-up so far, by `Communicator.members`."""

    def average(self, params: Iterable[NamedTensor]) -> None:
        """Replace the gradients of `params` by their mean over the ranks that train; counts as one step."""
        self._meet([each for each in params if each.tensor.requires_grad], Part.TRAINS)

    def finish(self, params: Iterable[NamedTensor], *, leaving: bool) -> None:
        """Take part until the warm-up is over or no rank trains any more; it is over too where ranks leave then."""
        trained = [each for each in params if each.tensor.requires_grad]
        while self.left and self._meet(trained, Part.LEAVES if leaving else Part.WAITS):
            pass

    def _meet(self, params: list[NamedTensor], part: Part) -> bool:
        trains = part is Part.TRAINS
        has = [trains and each.tensor.grad is not None for each in params]
        found = self._ranks.together(lambda comm: self._mean(comm, params, part, has))
        if found.mean is None:
            self.left = 0 if Part.LEAVES in found.parts else self.left
            return False
        self.left -= 1
        self.trained = [m for m, each in zip(self._ranks.comm.members, found.parts, strict=True) if each == Part.TRAINS]
        if trains:
            self._set_gradients(found)
        return True

    def _mean(self, comm: Communicator, params: list[NamedTensor], part: Part, has: list[bool]) -> _Found:
        present = torch.zeros(comm.size, 1 + len(params), dtype=torch.uint8)
        self._poller.wait([comm.iallgather(torch.tensor([part, *has], dtype=torch.uint8), present)])
        parts = present[:, 0].tolist()
        if Part.TRAINS not in parts:
            return _Found(parts, [], None)
        wanted = [each for each, used in zip(params, present[:, 1:].any(0).tolist(), strict=True) if used]
        gradients = Replica([NamedTensor(each.name, _dense_gradient(each.tensor, part)) for each in wanted])
        flat = gradients.empty()
        gradients.read(flat)
        weights = [float(each == Part.TRAINS) for each in parts]
        return _Found(parts, wanted, (gradients, mean_of(comm, self._poller, flat, weights)))

    def _set_gradients(self, found: _Found) -> None:
        assert found.mean is not None, "a rank trains"
        replica, flat = found.mean
        sparse_dims = [None if self._sparse_as_dense else _sparse_dim(each.tensor.grad) for each in found.wanted]
        replica.write(flat)
        for each, gradient, sparse_dim in zip(found.wanted, replica.tensors, sparse_dims, strict=True):
            dense = gradient.tensor
            each.tensor.grad = dense if sparse_dim is None else dense.to_sparse(sparse_dim)


@dataclass
class _Found:
    """Each rank's part, the parameters for which a rank has a gradient, and their mean, as a replica and its values."""

    parts: list[int]
    wanted: list[NamedTensor]
    mean: tuple[Replica, Tensor] | None


def _sparse_dim(gradient: Tensor | None) -> int | None:
    return gradient.sparse_dim() if gradient is not None and gradient.is_sparse else None


def _dense_gradient(param: Tensor, part: Part) -> Tensor:
    if param.grad is None or part is not Part.TRAINS:
        return torch.zeros_like(param, requires_grad=False)
    return param.grad.to_dense() if param.grad.is_sparse else param.grad
