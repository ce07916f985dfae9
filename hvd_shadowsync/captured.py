"""A copy of what a round makes of the replicas, taken by the round as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.replica import NamedTensor, Replica


class Capture:
    """One rank's copy of the anchor of a round, or of the mean of a consolidation, with the algorithm's state after it.

    The thread that runs rounds fills it, slice by slice; any thread reads it once it is `done`. It costs a vector and
    one copy of it.
    """

    def __init__(self) -> None:
        self.done = False
        self.rounds: dict[str, Any] = {}
        """Algorithm and state, as `Rounds.state_dict()` has them, without the counters."""

    def begin(self, replica: Replica) -> None:
        """Make room for `replica`."""
        self._replica = replica
        with torch.inference_mode(False):
            self._vector = torch.empty(replica.numel, dtype=replica.dtype)

    def add(self, piece: slice, anchor: Tensor) -> None:
        """Copy a slice."""
        self._vector[piece].copy_(anchor)

    def finish(self, integers: Tensor, rounds: Mapping[str, Any]) -> None:
        """Take the integer buffers and what the rounds remember; the copy is complete."""
        self._integers = integers.clone()
        self.rounds = dict(rounds)
        self.done = True

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, views of the copy."""
        return {each.name: _part(self._vector, place, each) for place, each in self._places(self._replica.params)}

    def tensors(self) -> dict[int, Tensor]:
        """Return the copies of all tensors by the `id` of the live ones, in their shapes and dtypes."""
        found = {
            id(each.tensor): _part(self._vector, place, each) for place, each in self._places(self._replica.tensors)
        }
        if any(each.dtype != self._vector.dtype for each in found.values()):  # a view keeps, and saves, all of it
            found = {each: part.clone() if part.dtype == self._vector.dtype else part for each, part in found.items()}
        start = 0
        for each in self._replica.integers:
            found[id(each.tensor)] = _part(self._integers, slice(start, start + each.numel), each)
            start += each.numel
        return found

    def _places(self, tensors: list[NamedTensor]) -> list[tuple[slice, NamedTensor]]:
        segments = self._replica.segments
        return [(slice(part.start, part.stop), each) for part, each in zip(segments, tensors, strict=False)]


def _part(flat: Tensor, place: slice, like: NamedTensor) -> Tensor:
    part = flat[place].view(like.live().shape)
    if like.tensor.is_complex():
        part = torch.view_as_complex(part.clone())  # pairs may begin at an odd place
    return part.to(like.tensor.dtype)
