"""GPUs: between live tensors there and flat vectors in the host's memory, beside training."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Staging:
    """What of a flat vector lies on one GPU: a staging buffer there, and a stream that copies beside training.

    A download copies the live tensors into the buffer, at the speed of the GPU's memory, and that into the host's; an
    upload fills the buffer, from which the thread that merges takes it, on its own stream and without waiting. Whoever
    waits for a copy sleeps: the driver would spin, and that is CPU time that training lacks.

    Args:
        device: the GPU.
        lives: the live tensors there, real-valued.
        places: of their first elements in the flat vector.
        dtype: of the flat vector.
    """

    def __init__(
        self, device: torch.device, lives: Sequence[Tensor], places: Sequence[int], dtype: torch.dtype
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._training = torch.cuda.current_stream(device)
        self._copied, self._merged = torch.cuda.Event(blocking=True), torch.cuda.Event()
        self._merged.record(self._training)  # the buffer's memory may have been another tensor's until here
        borders = list(itertools.accumulate((each.numel() for each in lives), initial=0))
        self._buffer = torch.empty(borders[-1], dtype=dtype, device=device)
        own = [slice(*each) for each in itertools.pairwise(borders)]
        self._parts = [self._buffer[part].view(live.shape) for live, part in zip(lives, own, strict=True)]
        self._runs = _runs(places, own)

    def download(self, lives: Sequence[Tensor], out: Tensor) -> None:
        """Begin to copy the live tensors, as the training stream leaves them, into their places in `out`."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(self._training)
            torch._foreach_copy_(self._parts, list(lives))
            for place, run in self._runs:
                out[place].copy_(self._buffer[run], non_blocking=True)
            self._copied.record()

    def upload(self, staged: Tensor) -> None:
        """Begin to copy this GPU's places of `staged` into the buffer, once what was there is merged."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._merged)
            for place, run in self._runs:
                self._buffer[run].copy_(staged[place], non_blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Return when what was begun is done."""
        self._copied.synchronize()

    def parts(self) -> list[Tensor]:
        """Return what was uploaded, in the live tensors' order and shapes, for the calling thread's stream."""
        self._training = torch.cuda.current_stream(self._device)
        self._training.wait_event(self._copied)
        return self._parts

    def merged(self) -> None:
        """Take note that the calling thread's stream has read the parts once it gets here."""
        self._merged.record(self._training)


class Arriving:
    """Values on their way into the host's memory, from the GPU that the calling thread's stream makes them on."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(torch.cuda.current_stream(values.device))

    def get(self) -> Tensor:
        """Return the values, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class PageLock:
    """Lets GPUs copy from and to `memory`, of the host, beside other work; `release` it before it is unmapped."""

    def __init__(self, memory: Tensor) -> None:
        self._memory: Tensor | None = None
        if memory.numel() == 0:
            return
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code == 0:
            self._memory = memory
        else:
            logger.warning(
                "%d bytes cannot be page-locked (CUDA error %d): copies wait for one another", memory.nbytes, code
            )

    def release(self) -> None:
        """Give the lock back; idempotent."""
        if self._memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._memory = None


def _runs(places: Sequence[int], parts: Sequence[slice]) -> list[tuple[slice, slice]]:
    """Return the stretches that are whole in both: where in the flat vector, and where in the buffer."""
    runs: list[tuple[slice, slice]] = []
    for place, part in zip(places, parts, strict=True):
        if runs and runs[-1][0].stop == place:
            flat, before = runs.pop()
            place, part = flat.start, slice(before.start, part.stop)
        runs.append((slice(place, place + part.stop - part.start), part))
    return runs
