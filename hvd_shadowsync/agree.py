"""Whether the replicas of a job match: refused on every rank, with the first difference named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.errors import ReplicaMismatchError
from hvd_shadowsync.replica import NamedTensor


def describe_tensors(tensors: Iterable[NamedTensor]) -> list[tuple[str, str]]:
    """Return (what, value) for each tensor's shape and dtype."""
    return [(f"parameter {each.name}", f"shape {tuple(each.tensor.shape)}, {each.tensor.dtype}") for each in tensors]


def describe_optimizer(optimizer: torch.optim.Optimizer) -> list[tuple[str, str]]:
    """Return (what, value) for the optimizer's class and the settings of its parameter groups."""
    lines = [("optimizer", type(optimizer).__name__)]
    for index, group in enumerate(optimizer.param_groups):
        lines += [(f"optimizer group {index}, {key}", _show(group[key])) for key in sorted(group) if key != "params"]
        lines.append((f"optimizer group {index}, parameters", str(len(group["params"]))))
    return lines


def describe_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, value) for arguments that have to be the same on every rank."""
    return [(f"argument {name}", repr(value)) for name, value in settings.items()]


def describe_values(tensors: Iterable[NamedTensor]) -> list[tuple[str, str]]:
    """Return (what, value) for the bytes that each tensor holds."""
    return [(f"initial value of {each.name}", f"sha256 {_digest(each.live())}") for each in tensors]


def require_same(comm: Communicator, lines: Sequence[tuple[str, str]]) -> None:
    """Raise `ReplicaMismatchError` on every rank unless all ranks give the same `lines` (collective)."""
    digests = comm.allgather_object(hashlib.sha256(repr(list(lines)).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    descriptions = comm.allgather_object(list(lines))
    for rank, theirs in enumerate(descriptions):
        if theirs != descriptions[0]:
            raise ReplicaMismatchError(_first_difference(descriptions[0], theirs, rank))


def _first_difference(ours: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]], rank: int) -> str:
    remedy = "build the same model, optimizer and wrapper, in the same order, on every rank"
    for left, right in zip(ours, theirs, strict=False):
        if left[0] != right[0]:
            return f"replicas differ: rank 0 has {left[0]} where rank {rank} has {right[0]}; {remedy}"
        if left[1] != right[1]:
            return f"replicas differ in {left[0]}: {left[1]} on rank 0, {right[1]} on rank {rank}; {remedy}"
    more, has, lacks = (ours, 0, rank) if len(ours) > len(theirs) else (theirs, rank, 0)
    extra = more[min(len(ours), len(theirs))]
    return f"replicas differ: rank {has} has {extra[0]} ({extra[1]}), which rank {lacks} lacks; {remedy}"


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.tolist())
    if isinstance(value, (bool, int, float, str, tuple, list, type(None))):
        return repr(value)
    return type(value).__name__


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
