"""Parameters and optimizer state of one rank for all, as scripts ask for them, without ever calling `step()`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.errors import ReplicaMismatchError
from hvd_shadowsync.owned import is_owned


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    root_rank: int = 0,
    *,
    communicator: Communicator | None = None,
) -> None:
    """Give every rank the tensors of rank `root_rank`, in place (collective).

    Args:
        params: `model.state_dict()` or `model.named_parameters()`; values that are no tensors are passed over, and so
            are the shards of embedding tables, which each rank has for itself.
        root_rank: whose values to take; default 0.
        communicator: over which ranks; default all of MPI's.

    Raises:
        ReplicaMismatchError: names, shapes or dtypes differ between the ranks; raised on every rank.
    """
    named = list(params.items()) if isinstance(params, Mapping) else list(params)
    tensors = [(name, tensor) for name, tensor in named if isinstance(tensor, Tensor) and not is_owned(tensor)]
    with _Borrowed(communicator) as comm:
        comm.check_root(root_rank)
        kinds = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
        comm.require_equal("parameters", kinds)
        for _, tensor in tensors:
            comm.broadcast(tensor, root_rank)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, *, communicator: Communicator | None = None
) -> None:
    """Give every rank the optimizer state and settings of rank `root_rank` (collective); no `step()` is taken.

    What a wrapper remembers of its rounds travels along.

    Args:
        optimizer: plain or synchronised.
        root_rank: whose state to take; default 0.
        communicator: over which ranks; default all of MPI's.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer")
    with _Borrowed(communicator) as comm:
        comm.check_root(root_rank)
        state = optimizer.state_dict()
        sizes = comm.allgather_object([len(group["params"]) for group in optimizer.param_groups])
        if any(size != sizes[0] for size in sizes):
            raise ReplicaMismatchError(f"parameters per group differ between ranks: {sizes}; build the same optimizer")
        plan = pytree.tree_map(_blank, state) if comm.rank == root_rank else None
        plan = comm.allgather_object(plan)[root_rank]
        if comm.rank != root_rank:
            state = pytree.tree_map(_filled, plan)
        for leaf in pytree.tree_leaves(state):
            if isinstance(leaf, Tensor):
                comm.broadcast(leaf, root_rank)
        if comm.rank != root_rank:
            optimizer.load_state_dict(state)


@dataclass(frozen=True)
class _Blank:
    """Stands for a tensor whose values follow."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _blank(leaf: Any) -> Any:
    return _Blank(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _filled(leaf: Any) -> Any:
    return torch.empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, _Blank) else leaf


class _Borrowed:
    """A communicator for the time of one call."""

    def __init__(self, communicator: Communicator | None) -> None:
        self._comm = mpi.world() if communicator is None else communicator.dup()
        self._poller = Poller()
        self.rank, self.allgather_object = self._comm.rank, self._comm.allgather_object

    def check_root(self, root_rank: int) -> None:
        if not isinstance(root_rank, int) or not 0 <= root_rank < self._comm.size:
            raise ValueError(f"root_rank={root_rank!r} is not a rank; give one of 0 to {self._comm.size - 1}")

    def require_equal(self, what: str, value: list[Any]) -> None:
        for rank, theirs in enumerate(self._comm.allgather_object(value)):
            if theirs != value:
                differing = [pair for pair in zip(value, theirs, strict=False) if pair[0] != pair[1]]
                first = f": {differing[0][0]} here, {differing[0][1]} there" if differing else ""
                raise ReplicaMismatchError(
                    f"{what} of rank {rank} ({len(theirs)}) and rank {self.rank} ({len(value)}) differ{first}; "
                    "build the same model on every rank"
                )

    def broadcast(self, tensor: Tensor, root: int) -> None:
        host = tensor.detach().to("cpu").contiguous()
        self._poller.wait([self._comm.ibcast(host, root)])
        if self.rank != root:
            with torch.no_grad():
                tensor.copy_(host)

    def __enter__(self) -> _Borrowed:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._comm.free()
