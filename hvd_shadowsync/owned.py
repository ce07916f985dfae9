"""Tensors that belong to one rank alone: whatever keeps replicas together leaves them out."""

from __future__ import annotations

from torch import Tensor

MARK = "_shadowsync_owned"


def mark_owned(tensor: Tensor) -> None:
    """Say that `tensor`, and whatever shares its memory (what `state_dict()` returns does), is of this rank alone."""
    setattr(tensor.untyped_storage(), MARK, True)


def is_owned(tensor: Tensor) -> bool:
    """Tell whether `tensor` is of this rank alone."""
    return getattr(tensor.untyped_storage(), MARK, False) is True
