"""The replica: named live tensors of one rank, their flat snapshot, and what is merged back into them."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

MERGES = ("delta", "interpolate")


class Merge(Enum):
    """How a staged vector enters the live tensors."""

    ADD = "live += staged"
    PULL = "live += alpha (staged - live)"
    ASSIGN = "live = staged"


@dataclass(frozen=True)
class NamedTensor:
    """A live tensor of the replica and its name, which is the same on every rank."""

    name: str
    tensor: Tensor

    def describe(self) -> str:
        """Return name, shape and dtype, as replicas are compared by them."""
        return f"{self.name}: shape {tuple(self.tensor.shape)}, {self.tensor.dtype}"

    def live(self, *, unnoticed: bool = False) -> Tensor:
        """Return the live values, real-valued, sharing memory; `unnoticed` by autograd's version counter if asked."""
        tensor = self.tensor.data if unnoticed else self.tensor.detach()
        return torch.view_as_real(tensor) if tensor.is_complex() else tensor

    @property
    def numel(self) -> int:
        """Number of real numbers."""
        return self.tensor.numel() * (2 if self.tensor.is_complex() else 1)


@dataclass(frozen=True)
class Segment:
    """Where a tensor lies in the flat vector."""

    name: str
    start: int
    stop: int


class Replica:
    """Weights, then floating-point buffers, as one flat vector; integer buffers as another.

    The live tensors keep their storage; snapshot and merge copy. The flat vector is float32, or float64 where a
    tensor of that type is among the weights; half precision is widened. Snapshots may be taken on any thread while
    the training thread goes on (a snapshot may then hold some weights from before a step and some from after it);
    merging is for the thread that owns the live tensors.
    """

    def __init__(self, params: Sequence[NamedTensor], buffers: Sequence[NamedTensor] = ()) -> None:
        self.params = list(params)
        self.tensors = self.params + [each for each in buffers if _is_real(each.tensor)]
        self.integers = [each for each in buffers if not _is_real(each.tensor)]
        self.dtype = torch.float64 if any(_is_double(each.tensor) for each in self.tensors) else torch.float32
        self.segments = _lay_out(self.tensors)
        self.num_weights = sum(each.numel for each in self.params)
        self.numel = self.segments[-1].stop if self.segments else 0
        self._starts = [segment.start for segment in self.segments]
        self.pinned = any(each.tensor.is_cuda for each in self.tensors)
        self._stream = torch.cuda.Stream() if self.pinned else None  # type: ignore[no-untyped-call]
        self._training_stream = torch.cuda.current_stream() if self.pinned else None
        self._uploaded: torch.cuda.Event | None = None

    @property
    def fingerprint(self) -> int:
        """A positive number of 62 bits that is the same on ranks whose tensors agree in name, shape and dtype."""
        description = "\n".join(each.describe() for each in self.tensors + self.integers)
        return int.from_bytes(hashlib.sha256(description.encode()).digest()[:8], "big") >> 2

    def empty(self) -> Tensor:
        """Return a new flat vector, page-locked where the live tensors are on a GPU."""
        return torch.empty(self.numel, dtype=self.dtype, pin_memory=self.pinned)

    def empty_integers(self) -> Tensor:
        """Return a new vector for the integer buffers, int64."""
        return torch.empty(sum(each.numel for each in self.integers), dtype=torch.int64)

    def snapshot(self, out: Tensor) -> None:
        """Copy the live values into the flat vector `out`."""
        if self._stream is None or self._training_stream is None:
            self._copy_live(out)
            return
        if self._uploaded is not None:
            self._uploaded.synchronize()
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(self._training_stream)
            self._copy_live(out)
        self._stream.synchronize()

    def snapshot_part(self, out: Tensor, part: slice) -> None:
        """Copy the live values of `part` into that part of the flat vector `out`; for tensors on the CPU.

        The parts are asked for in order: a tensor that is not contiguous is copied as a whole with its first element.
        """
        first = bisect.bisect_right(self._starts, part.start) - 1
        for index in range(max(first, 0), bisect.bisect_left(self._starts, part.stop)):
            segment, live = self.segments[index], self.tensors[index].live()
            if live.is_contiguous():
                start, stop = max(segment.start, part.start), min(segment.stop, part.stop)
                out[start:stop].copy_(live.view(-1)[start - segment.start : stop - segment.start])
            elif segment.start >= part.start:
                out[segment.start : segment.stop].view(live.shape).copy_(live)

    def snapshot_integers(self, out: Tensor) -> None:
        """Copy the integer buffers into `out`."""
        for segment, each in zip(_lay_out(self.integers), self.integers, strict=True):
            out[segment.start : segment.stop].copy_(each.tensor.detach().reshape(-1))

    @torch.no_grad()
    def merge(self, staged: Tensor, how: Merge, alpha: float = 1.0, *, hogwild: bool = False) -> None:
        """Bring the flat vector `staged` into the live tensors; `hogwild` lets autograd take no notice."""
        lives = [each.live(unnoticed=hogwild) for each in self.tensors]
        if not lives:
            return
        parts = [part.view(live.shape) for part, live in zip(self._parts(staged), lives, strict=True)]
        if self.pinned:
            parts = [part.to(live.device, non_blocking=True) for part, live in zip(parts, lives, strict=True)]
        _APPLY[how](lives, parts, alpha)
        if self.pinned:
            self._uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._uploaded.record()

    @torch.no_grad()
    def assign_integers(self, staged: Tensor) -> None:
        """Set the integer buffers to `staged`."""
        for segment, each in zip(_lay_out(self.integers), self.integers, strict=True):
            each.tensor.copy_(staged[segment.start : segment.stop].view(each.tensor.shape))

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the weights' parts of the vector `flat` by name, each in its tensor's shape (copies)."""
        parts = zip(self.params, self._parts(flat), strict=False)
        return {each.name: part.view(each.live().shape).clone() for each, part in parts}

    def from_names(self, tensors: dict[str, Tensor], default: Tensor) -> Tensor:
        """Return a vector of the weights with `tensors` by name where given and `default` elsewhere."""
        flat = default[: self.num_weights].clone()
        for segment, each in zip(self.segments, self.params, strict=False):
            if each.name in tensors:
                flat[segment.start : segment.stop].copy_(tensors[each.name].reshape(-1))
        return flat

    def _copy_live(self, out: Tensor) -> None:
        for each, part in zip(self.tensors, self._parts(out), strict=True):
            live = each.live()
            part.view(live.shape).copy_(live, non_blocking=True)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of `flat`, which has the weights alone or the buffers as well."""
        return [flat[segment.start : segment.stop] for segment in self.segments if segment.stop <= flat.numel()]


def _add(lives: list[Tensor], parts: list[Tensor], alpha: float) -> None:
    torch._foreach_add_(lives, parts)


def _pull(lives: list[Tensor], parts: list[Tensor], alpha: float) -> None:
    torch._foreach_lerp_(lives, [part.to(live.dtype) for part, live in zip(parts, lives, strict=True)], alpha)


def _assign(lives: list[Tensor], parts: list[Tensor], alpha: float) -> None:
    torch._foreach_copy_(lives, parts)


_APPLY: dict[Merge, Callable[[list[Tensor], list[Tensor], float], None]] = {
    Merge.ADD: _add,
    Merge.PULL: _pull,
    Merge.ASSIGN: _assign,
}


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)


def _lay_out(tensors: Iterable[NamedTensor]) -> list[Segment]:
    segments, start = [], 0
    for each in tensors:
        segments.append(Segment(each.name, start, start + each.numel))
        start += each.numel
    return segments


def distance(a: Tensor, b: Tensor) -> float:
    """Return the Euclidean distance of `a` from `b`, in units of the norm of `b`."""
    norm = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) / norm if norm > 0 else math.nan
