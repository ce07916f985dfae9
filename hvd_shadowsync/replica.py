"""The replica: named live tensors of one rank, their flat snapshot, and what is merged back into them."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from hvd_shadowsync.gpus import Arriving, Staging

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


class FlatLayout:
    """How tensors lie in one flat vector of `dtype` in the host's memory, one after the other, and how they are copied.

    Two ways: `read` and `write` on the thread that owns the tensors, on whatever devices; `download`, `upload` and
    `merging` for rounds, which on GPUs go through a staging buffer of theirs (`gpus.Staging`).
    """

    def __init__(self, tensors: Sequence[NamedTensor], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = list(tensors), dtype
        self.segments = _lay_out(self.tensors)
        self.numel = self.segments[-1].stop if self.segments else 0
        self._on_host: list[int] = []
        self._on_gpus: dict[torch.device, list[int]] = {}
        for index, each in enumerate(self.tensors):
            mine = self._on_gpus.setdefault(each.tensor.device, []) if each.tensor.is_cuda else self._on_host
            mine.append(index)
        self._training = {gpu: torch.cuda.current_stream(gpu) for gpu in self._on_gpus}
        self._stagings: dict[torch.device, Staging] = {}

    @property
    def gpus(self) -> list[torch.device]:
        """The GPUs that tensors are on."""
        return list(self._on_gpus)

    def empty(self) -> Tensor:
        """Return a new flat vector, page-locked where tensors are on a GPU."""
        return torch.empty(self.numel, dtype=self.dtype, pin_memory=bool(self._on_gpus))

    def lives(self, *, unnoticed: bool = False) -> list[Tensor]:
        """Return the live values, as `NamedTensor.live` does."""
        return [each.live(unnoticed=unnoticed) for each in self.tensors]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return the tensors' parts of `flat`, which may end before the last of them."""
        return [flat[segment.start : segment.stop] for segment in self.segments if segment.stop <= flat.numel()]

    def read(self, out: Tensor) -> None:
        """Copy the live values into `out`."""
        for live, part in zip(self.lives(), self.split(out), strict=True):
            part.view(live.shape).copy_(live)

    def write(self, flat: Tensor) -> None:
        """Set the live values to `flat`."""
        for live, part in zip(self.lives(), self.split(flat), strict=True):
            live.copy_(part.view(live.shape))

    def download(self, out: Tensor) -> None:
        """Copy the live values into `out`, beside training."""
        lives = self.lives()
        for staging, indices in self._gpus():
            staging.download([lives[index] for index in indices], out)
        parts = self.split(out)
        for index in self._on_host:
            parts[index].view(lives[index].shape).copy_(lives[index])
        for staging, _ in self._gpus():
            staging.wait()

    def upload(self, staged: Tensor) -> None:
        """Bring what of `staged` belongs to tensors on GPUs there, for `merging`; no download comes in between."""
        for staging, _ in self._gpus():
            staging.upload(staged)
        for staging, _ in self._gpus():
            staging.wait()

    @contextmanager
    def merging(self, staged: Tensor, *, hogwild: bool = False) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Give the live tensors and the parts of `staged`, which was uploaded, each where its live tensor is."""
        lives = self.lives(unnoticed=hogwild)
        parts = [part.view(live.shape) for part, live in zip(self.split(staged), lives, strict=True)]
        with ExitStack() as stack:
            for staging, indices in self._gpus():
                for index, part in zip(indices, stack.enter_context(staging.merging(hogwild=hogwild)), strict=True):
                    parts[index] = part
            yield lives, [part.to(live.device) for part, live in zip(parts, lives, strict=True)]

    def _gpus(self) -> Iterator[tuple[Staging, list[int]]]:
        for gpu, indices in self._on_gpus.items():
            if gpu not in self._stagings:
                lives = [self.tensors[index].live() for index in indices]
                places = [self.segments[index].start for index in indices]
                self._stagings[gpu] = Staging(self._training[gpu], lives, places, self.dtype)
            yield self._stagings[gpu], indices


class Replica:
    """Weights, then floating-point buffers, as one flat vector; integer buffers as another.

    The live tensors keep their storage; snapshot and merge copy. The flat vector is float32, or float64 where a
    tensor of that type is among the weights; half precision is widened. Snapshots may be taken on any thread while
    the training thread goes on (a snapshot may then hold some weights from before a step and some from after it);
    merging is for the thread that owns the live tensors.
    """

    def __init__(self, params: Sequence[NamedTensor], buffers: Sequence[NamedTensor] = ()) -> None:
        self.params = list(params)
        tensors = self.params + [each for each in buffers if _is_real(each.tensor)]
        self.dtype = torch.float64 if any(_is_double(each.tensor) for each in tensors) else torch.float32
        self._reals = FlatLayout(tensors, self.dtype)
        self._integers = FlatLayout([each for each in buffers if not _is_real(each.tensor)], torch.int64)
        self.tensors, self.segments, self.numel = self._reals.tensors, self._reals.segments, self._reals.numel
        self.integers = self._integers.tensors
        self.num_weights = sum(each.numel for each in self.params)
        self._starts = [segment.start for segment in self.segments]

    @property
    def gpus(self) -> list[torch.device]:
        """The GPUs that real-valued tensors are on."""
        return self._reals.gpus

    @property
    def fingerprint(self) -> int:
        """A positive number of 62 bits that is the same on ranks whose tensors agree in name, shape and dtype."""
        description = "\n".join(each.describe() for each in self.tensors + self.integers)
        return int.from_bytes(hashlib.sha256(description.encode()).digest()[:8], "big") >> 2

    def empty(self) -> Tensor:
        """Return a new flat vector, page-locked where the live tensors are on a GPU."""
        return self._reals.empty()

    def empty_integers(self) -> Tensor:
        """Return a new vector for the integer buffers, int64."""
        return self._integers.empty()

    def read(self, out: Tensor, integers: Tensor | None = None) -> None:
        """Copy the live values into the flat vector `out`, integer buffers into `integers`, on the training thread."""
        self._reals.read(out)
        if integers is not None:
            self._integers.read(integers)

    @torch.no_grad()
    def write(self, flat: Tensor, integers: Tensor | None = None) -> None:
        """Set the live values to `flat`, integer buffers to `integers`, on the training thread."""
        self._reals.write(flat)
        if integers is not None:
            self._integers.write(integers)

    def snapshot(self, out: Tensor) -> None:
        """Copy the live values into the flat vector `out`, on any thread, beside training; for rounds."""
        self._reals.download(out)

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
        """Copy the integer buffers into `out`, as `snapshot` does."""
        self._integers.download(out)

    def upload(self, staged: Tensor, integers: Tensor | None = None) -> None:
        """Bring what is to be merged to the GPUs, on any thread, so that merging waits for no copy."""
        self._reals.upload(staged)
        if integers is not None:
            self._integers.upload(integers)

    @torch.no_grad()
    def merge(
        self, staged: Tensor, how: Merge, alpha: float = 1.0, *, hogwild: bool = False, still: Collection[int] = ()
    ) -> None:
        """Bring the flat vector `staged`, which was uploaded, into the live tensors but those numbered in `still`.

        With `hogwild` autograd takes no notice, and the thread may be any.
        """
        if self.tensors:
            with self._reals.merging(staged, hogwild=hogwild) as (lives, parts):
                if still:
                    lives, parts = ([e for i, e in enumerate(each) if i not in still] for each in (lives, parts))
                _APPLY[how](lives, parts, alpha)

    @torch.no_grad()
    def assign_integers(self, staged: Tensor, *, hogwild: bool = False) -> None:
        """Set the integer buffers to `staged`, which was uploaded."""
        if self.integers:
            with self._integers.merging(staged, hogwild=hogwild) as (lives, parts):
                for live, part in zip(lives, parts, strict=True):
                    live.copy_(part)

    def head(self, most: int) -> Arriving:
        """Return the first values, `most` at most and those that are in one place, as they are now; does not wait."""
        heads: list[Tensor] = []
        for each in self.tensors:
            have = sum(head.numel() for head in heads)
            if have >= most or each.tensor.device != self.tensors[0].tensor.device:
                break
            heads.append(each.live().reshape(-1)[: most - have].to(self.dtype))
        return Arriving(torch.cat(heads) if heads else torch.empty(0, dtype=self.dtype))

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the weights' parts of the vector `flat` by name, each in its tensor's shape (copies)."""
        parts = zip(self.params, self._reals.split(flat), strict=False)
        return {each.name: part.view(each.live().shape).clone() for each, part in parts}

    def from_names(self, tensors: dict[str, Tensor], default: Tensor) -> Tensor:
        """Return a vector of the weights with `tensors` by name where given and `default` elsewhere."""
        flat = default[: self.num_weights].clone()
        for segment, each in zip(self.segments, self.params, strict=False):
            if each.name in tensors:
                flat[segment.start : segment.stop].copy_(tensors[each.name].reshape(-1))
        return flat


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
