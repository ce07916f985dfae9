"""The weighted mean of the replicas: by `Iallreduce`, or summed by the owner of each slice."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.reducers.base import CHUNK_BYTES, Fill, Reducer, Shards, Slices, as_it_is, pack

IN_FLIGHT = 2


class AllReduceMean(Reducer):
    """The weighted mean of the snapshots by `Iallreduce`, in chunks, a few of them in flight.

    Args:
        comm: used by this reducer alone.
        poller: how to wait.
        chunk_bytes: size of a chunk; default 1 MiB, which stays in a core's cache between its sum and its update.
        in_flight: chunks under way at a time; default 2.
    """

    sliced = True

    def __init__(
        self, comm: Communicator, poller: Poller, *, chunk_bytes: int = CHUNK_BYTES, in_flight: int = IN_FLIGHT
    ) -> None:
        self._comm, self._poller = comm, poller
        self._chunk_bytes, self._in_flight = chunk_bytes, in_flight
        self._free: list[Tensor] = []

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        own, total = weights[self._comm.rank], sum(weights)
        chunk = max(1, min(self._chunk_bytes // snapshot.element_size(), snapshot.numel()))
        flying: deque[tuple[slice, Tensor, Request]] = deque()
        for start in range(0, snapshot.numel(), chunk):
            if len(flying) == self._in_flight:
                yield from self._land(flying, total)
            part = slice(start, min(start + chunk, snapshot.numel()))
            fill(part)
            flying.append((part, *self._post(snapshot[part], own, chunk)))
        while flying:
            yield from self._land(flying, total)

    def _post(self, values: Tensor, weight: float, chunk: int) -> tuple[Tensor, Request]:
        buffer = self._free.pop() if self._free else values.new_empty(chunk)
        into = buffer[: values.numel()]
        self.bytes_sent += 2 * (self._comm.size - 1) * values.nbytes // self._comm.size
        if weight == 1:
            return into, self._comm.iallreduce(values, into)
        if weight == 0:
            into.zero_()  # a replica that does not count may hold anything, nan as well
        else:
            torch.mul(values, weight, out=into)
        return into, self._comm.iallreduce(into)

    def _land(self, flying: deque[tuple[slice, Tensor, Request]], total: float) -> Slices:
        part, values, request = flying.popleft()
        self._poller.wait([request])
        exact = math.frexp(total)[0] == 0.5  # a power of two: its reciprocal gives the same, faster
        yield part, values.mul_(1 / total) if exact else values.div_(total)
        self._free.append(_whole(values))


class OwnerMean(Reducer):
    """The weighted mean, summed by the owner of each slice in rank order: `Ialltoall`, sum, `Iallgather`.

    As many bytes as a ring allreduce; the result is bit-identical on every rank and does not depend on the MPI
    library's choice of algorithm. With `wire_dtype` (float16 or bfloat16) half as many: what travels is the distance
    of the snapshot from the last mean, which all ranks know, so that small steps are not rounded away; sums are
    formed in the snapshot's own precision. That last mean costs one more vector.

    Args:
        comm: used by this reducer alone.
        poller: how to wait.
        wire_dtype: dtype of what travels; None for the snapshot's.
        chunk_bytes: size of the blocks that are exchanged.
    """

    def __init__(
        self,
        comm: Communicator,
        poller: Poller,
        *,
        wire_dtype: torch.dtype | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._comm, self._poller = comm, poller
        self._wire_dtype = wire_dtype
        self._chunk_bytes = chunk_bytes
        self._reference: Tensor | None = None

    def rebase(self, anchor: Tensor) -> None:
        """Keep `anchor` as what distances are taken from, where a narrower dtype travels."""
        if self._wire_dtype is not None:
            self._reference = anchor.clone()

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        shards = Shards(snapshot.numel(), self._comm.size)
        flying: deque[tuple[list[slice], Tensor, Request]] = deque()
        for rows in shards.blocks(max(1, self._chunk_bytes // snapshot.element_size())):
            outgoing = pack(rows, self._narrow(rows, snapshot))
            incoming = torch.empty_like(outgoing)
            flying.append((rows, incoming, self._comm.ialltoall(outgoing, incoming)))
            self.bytes_sent += 2 * (self._comm.size - 1) * outgoing[0].nbytes
            if len(flying) == 2:
                yield from self._land(flying, weights, snapshot.dtype)
        while flying:
            yield from self._land(flying, weights, snapshot.dtype)

    def _land(
        self, flying: deque[tuple[list[slice], Tensor, Request]], weights: Sequence[float], dtype: torch.dtype
    ) -> Slices:
        rows, incoming, request = flying.popleft()
        self._poller.wait([request])
        mean = _weighted_mean(incoming, weights, dtype).to(incoming.dtype)
        gathered = torch.empty_like(incoming)
        self._poller.wait([self._comm.iallgather(mean, gathered)])
        for part, values in zip(rows, gathered, strict=True):
            if part.stop > part.start:
                yield part, self._widen(part, values[: part.stop - part.start], dtype)

    def _narrow(self, rows: list[slice], snapshot: Tensor) -> list[Tensor]:
        if self._wire_dtype is None:
            return [snapshot[part] for part in rows]
        reference = self._known(snapshot)
        largest = torch.finfo(self._wire_dtype).max
        return [(snapshot[part] - reference[part]).clamp_(-largest, largest).to(self._wire_dtype) for part in rows]

    def _widen(self, part: slice, values: Tensor, dtype: torch.dtype) -> Tensor:
        if self._reference is None:
            return values
        return self._reference[part].add_(values.to(dtype))

    def _known(self, snapshot: Tensor) -> Tensor:
        if self._reference is None:
            self._reference = torch.zeros_like(snapshot)
        return self._reference


def _weighted_mean(rows: Tensor, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=dtype)
    for row, weight in zip(rows, weights, strict=True):
        if weight:
            total.add_(row.to(dtype), alpha=weight)
    return total.div_(sum(weights))


def _whole(values: Tensor) -> Tensor:
    """Return the buffer that `values` is the beginning of."""
    return values._base if values._base is not None else values
