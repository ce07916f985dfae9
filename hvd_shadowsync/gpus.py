"""GPUs: between live tensors there and flat vectors in the host's memory, beside training."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Staging:
    """What of a flat vector lies on one GPU: a staging buffer there, and a stream that copies beside training.

    For rounds, one at a time: a download copies the live tensors into the buffer, at the speed of the GPU's memory, and
    that into the host's; an upload fills the buffer, from which what was staged is merged, on training's own stream
    and without waiting. Whoever waits for a copy sleeps: the driver would spin, and that is CPU time that training
    lacks.

    Args:
        training: the stream on which the live tensors are trained.
        lives: the live tensors, real-valued, all on its GPU.
        places: of their first elements in the flat vector.
        dtype: of the flat vector.
    """

    def __init__(
        self, training: torch.cuda.Stream, lives: Sequence[Tensor], places: Sequence[int], dtype: torch.dtype
    ) -> None:
        self._device, self._training = training.device, training
        borders = list(itertools.accumulate((each.numel() for each in lives), initial=0))
        own = [slice(*each) for each in itertools.pairwise(borders)]
        self._runs = _runs(places, own)
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._merged = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._buffer = torch.empty(borders[-1], dtype=dtype, device=self._device)
            self._merged.record(torch.cuda.current_stream())  # the memory may have been another tensor's until here
        self._parts = [self._buffer[part].view(live.shape) for live, part in zip(lives, own, strict=True)]

    def download(self, lives: Sequence[Tensor], out: Tensor) -> None:
        """Begin to copy the live tensors, as the training stream leaves them, into their places in `out`."""
        with self._on(self._stream):
            self._stream.wait_stream(self._training)
            self._stream.wait_event(self._merged)
            torch._foreach_copy_(self._parts, list(lives))
            for place, run in self._runs:
                out[place].copy_(self._buffer[run], non_blocking=True)
            self._copied.record()

    def upload(self, staged: Tensor) -> None:
        """Begin to copy this GPU's places of `staged` into the buffer, once what was there is merged."""
        with self._on(self._stream):
            self._stream.wait_event(self._merged)
            for place, run in self._runs:
                self._buffer[run].copy_(staged[place], non_blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Return when what was begun is done."""
        self._copied.synchronize()

    @contextmanager
    def merging(self, *, hogwild: bool) -> Iterator[list[Tensor]]:
        """Give what was uploaded, in the live tensors' order and shapes, to be merged inside the block.

        On the training thread that is on its stream, which is the training stream from then on; `hogwild`, on another
        thread, on the training stream as well.
        """
        if not hogwild:
            self._training = torch.cuda.current_stream(self._device)
        with self._on(self._training):
            self._training.wait_event(self._copied)
            yield self._parts
            self._merged.record()

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Work on `stream`; a thread whose GPU is another one gets it back without making a context there."""
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield


class Arriving:
    """Values on their way into the host's memory, from the GPU that the calling thread's stream makes them on."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(values.device))

    def get(self) -> Tensor:
        """Return the values, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class PageLock:
    """Lets `gpu` copy from and to `memory`, of the host, by itself; `release` it before it is unmapped.

    Where CUDA cannot, copies still work, but take CPU time of the thread that asks for them.
    """

    def __init__(self, memory: Tensor, gpu: torch.device) -> None:
        self._memory, self._gpu = memory, gpu
        self._held = memory.numel() > 0 and self._succeeded(
            lambda cuda: cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        )
        if self._held and not memory.is_pinned():
            logger.info("%d bytes were page-locked without effect: copies take CPU time", memory.nbytes)

    def release(self) -> None:
        """Give the lock back; idempotent."""
        if self._held:
            self._held = False
            self._succeeded(lambda cuda: cuda.cudaHostUnregister(self._memory.data_ptr()))

    def _succeeded(self, call: Callable[[Any], Any]) -> bool:
        with torch.cuda.device(self._gpu):
            code = int(call(torch.cuda.cudart()))  # type: ignore[no-untyped-call]
            if code == 0:
                return True
            with suppress(RuntimeError):  # CUDA reports an error again at the next kernel, whoever starts it
                torch.zeros(1, device=self._gpu)
        logger.warning("%d bytes are not page-locked (CUDA error %d): copies take CPU time", self._memory.nbytes, code)
        return False


def _runs(places: Sequence[int], parts: Sequence[slice]) -> list[tuple[slice, slice]]:
    """Return the stretches that are whole in both: where in the flat vector, and where in the buffer."""
    runs: list[tuple[slice, slice]] = []
    for place, part in zip(places, parts, strict=True):
        if runs and runs[-1][0].stop == place:
            flat, before = runs.pop()
            place, part = flat.start, slice(before.start, part.stop)
        runs.append((slice(place, place + part.stop - part.start), part))
    return runs
