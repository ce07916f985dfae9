"""Warm-up: the first steps average gradients synchronously over the ranks, as Horovod does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_shadowsync.average import mean_of
from hvd_shadowsync.ballot import Intent, conflict
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.errors import ShadowSyncError
from hvd_shadowsync.replica import NamedTensor, Replica

LOOK_S = 0.01
"""How long a rank waits between two looks at where the others are."""


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
        self._meet([each for each in params if each.tensor.requires_grad], Intent.TRAIN)

    def finish(self, params: Iterable[NamedTensor], intent: Intent, ending: Callable[[], None] | None = None) -> None:
        """Take part until the warm-up is over, or all ranks are in the same call; it is over too where ranks leave.

        Args:
            params: that are trained.
            intent: which call this rank is in, not `Intent.TRAIN`.
            ending: called while others come to their end and this rank does not; may raise, and end the wait.

        Raises:
            ShadowSyncError: the ranks are in calls that do not go together; raised on every rank.
        """
        trained = [each for each in params if each.tensor.requires_grad]
        while self.left:
            intents = set(found := self._meet(trained, intent))
            if Intent.TRAIN in intents:
                continue
            if Intent.LEAVE in intents:
                self.left = 0
            elif len(intents) == 1:
                return
            elif Intent.END not in intents:
                raise ShadowSyncError(conflict(found))
            else:
                if intent is not Intent.END and ending is not None:
                    ending()
                time.sleep(LOOK_S)

    def _meet(self, params: list[NamedTensor], intent: Intent) -> list[int]:
        """Make one step together if a rank trains; return every rank's intent (collective)."""
        trains = intent is Intent.TRAIN
        has = [trains and each.tensor.grad is not None for each in params]
        found = self._ranks.together(lambda comm: self._mean(comm, params, intent, has))
        if found.mean is not None:
            self.left -= 1
            members = zip(self._ranks.comm.members, found.intents, strict=True)
            self.trained = [member for member, each in members if each == Intent.TRAIN]
            if trains:
                self._set_gradients(found)
        return found.intents

    def _mean(self, comm: Communicator, params: list[NamedTensor], intent: Intent, has: list[bool]) -> _Found:
        present = torch.zeros(comm.size, 1 + len(params), dtype=torch.uint8)
        self._poller.wait([comm.iallgather(torch.tensor([intent, *has], dtype=torch.uint8), present)])
        intents = present[:, 0].tolist()
        if Intent.TRAIN not in intents:
            return _Found(intents, [], None)
        wanted = [each for each, used in zip(params, present[:, 1:].any(0).tolist(), strict=True) if used]
        gradients = Replica([NamedTensor(each.name, _dense_gradient(each.tensor, intent)) for each in wanted])
        flat = gradients.empty()
        gradients.read(flat)
        weights = [float(each == Intent.TRAIN) for each in intents]
        return _Found(intents, wanted, (gradients, mean_of(comm, self._poller, flat, weights)))

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
    """Each rank's intent, the parameters for which one has a gradient, and their mean, as a replica and its values."""

    intents: list[int]
    wanted: list[NamedTensor]
    mean: tuple[Replica, Tensor] | None


def _sparse_dim(gradient: Tensor | None) -> int | None:
    return gradient.sparse_dim() if gradient is not None and gradient.is_sparse else None


def _dense_gradient(param: Tensor, intent: Intent) -> Tensor:
    if param.grad is None or intent is not Intent.TRAIN:
        return torch.zeros_like(param, requires_grad=False)
    return param.grad.to_dense() if param.grad.is_sparse else param.grad
