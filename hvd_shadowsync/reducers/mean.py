"""The weighted mean of the replicas: by `Iallreduce`, or summed by the owner of each slice."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.transfer import Transfer
from hvd_shadowsync.reducers.base import Fill, Reducer, Slices, as_it_is


class ChunkedMean(Reducer):
    """What the two have in common: the vector goes on the wire in chunks, a few of them in flight.

    Args:
        comm: used by this reducer alone.
        poller: how to wait.
        chunk_bytes: size of a chunk; by default what `Transfer.between` says.
        in_flight: chunks under way at a time; by default the same.
    """

    sliced = tunable = True

    def __init__(
        self, comm: Communicator, poller: Poller, *, chunk_bytes: int | None = None, in_flight: int | None = None
    ) -> None:
        start = Transfer.between(comm.size)
        self._comm, self._poller = comm, poller
        self._chunk_bytes, self._in_flight = chunk_bytes or start.chunk_bytes, in_flight or start.in_flight

    def use(self, transfer: Transfer) -> None:
        """See `Reducer.use`."""
        self._chunk_bytes, self._in_flight = transfer.chunk_bytes, transfer.in_flight
        self._poller = transfer.poller(self._poller)

    def _chunk(self, snapshot: Tensor) -> int:
        return max(1, min(self._chunk_bytes // snapshot.element_size(), snapshot.numel()))

    def _chunks(self, snapshot: Tensor) -> Iterator[slice]:
        chunk = self._chunk(snapshot)
        for start in range(0, snapshot.numel(), chunk):
            yield slice(start, min(start + chunk, snapshot.numel()))


class AllReduceMean(ChunkedMean):
    """The weighted mean of the snapshots by `Iallreduce`; arguments as for `ChunkedMean`."""

    def __init__(
        self, comm: Communicator, poller: Poller, *, chunk_bytes: int | None = None, in_flight: int | None = None
    ) -> None:
        super().__init__(comm, poller, chunk_bytes=chunk_bytes, in_flight=in_flight)
        self._free: list[Tensor] = []

    def use(self, transfer: Transfer) -> None:
        """See `Reducer.use`."""
        super().use(transfer)
        self._free = []

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        own, total = weights[self._comm.rank], sum(weights)
        flying: deque[tuple[slice, Tensor, Request]] = deque()
        for part in self._chunks(snapshot):
            if len(flying) == self._in_flight:
                yield from self._land(flying, total)
            fill(part)
            flying.append((part, *self._post(snapshot[part], own, self._chunk(snapshot))))
        while flying:
            yield from self._land(flying, total)

    def _post(self, values: Tensor, weight: float, chunk: int) -> tuple[Tensor, Request]:
        buffer = self._free.pop() if self._free else values.new_empty(chunk)
        if buffer.numel() < chunk:  # of a shorter vector
            buffer = values.new_empty(chunk)
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


class OwnerMean(ChunkedMean):
    """The weighted mean, each rank summing its row of a chunk in rank order: `Ialltoall`, sum, `Iallgather`.

    As many bytes as a ring allreduce; the result is bit-identical on every rank and depends neither on the MPI
    library's choice of algorithm nor on the chunks. With `wire_dtype` (float16 or bfloat16) half as many: what travels
    is the distance of the snapshot from the last mean, which all ranks know, so that small steps are not rounded away;
    sums are formed in the snapshot's own precision. That last mean costs one more vector.

    Args:
        comm, poller, chunk_bytes, in_flight: as for `ChunkedMean`.
        wire_dtype: dtype of what travels; None for the snapshot's.
    """

    def __init__(
        self,
        comm: Communicator,
        poller: Poller,
        *,
        wire_dtype: torch.dtype | None = None,
        chunk_bytes: int | None = None,
        in_flight: int | None = None,
    ) -> None:
        super().__init__(comm, poller, chunk_bytes=chunk_bytes, in_flight=in_flight)
        self._wire_dtype = wire_dtype
        self._reference: Tensor | None = None

    def rebase(self, anchor: Tensor) -> None:
        """Keep `anchor` as what distances are taken from, where a narrower dtype travels."""
        if self._wire_dtype is not None:
            self._reference = anchor.clone()

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        out: deque[tuple[slice, Tensor, Request]] = deque()
        back: deque[tuple[slice, Tensor, Request]] = deque()
        for part in self._chunks(snapshot):
            if len(out) + len(back) >= self._in_flight and back:
                yield self._land(back, snapshot.dtype)
            if len(out) >= max(1, self._in_flight // 2):
                back.append(self._sum(out, weights, snapshot.dtype))
            fill(part)
            rows = self._rows(part, snapshot)
            incoming = torch.empty_like(rows)
            self.bytes_sent += 2 * (self._comm.size - 1) * rows[0].nbytes
            out.append((part, incoming, self._comm.ialltoall(rows, incoming)))
        while out or back:
            if out:
                back.append(self._sum(out, weights, snapshot.dtype))
            if len(back) >= self._in_flight or not out:
                yield self._land(back, snapshot.dtype)

    def _sum(
        self, out: deque[tuple[slice, Tensor, Request]], weights: Sequence[float], dtype: torch.dtype
    ) -> tuple[slice, Tensor, Request]:
        part, incoming, request = out.popleft()
        self._poller.wait([request])
        mean = _weighted_mean(incoming, weights, dtype).to(incoming.dtype)
        gathered = torch.empty_like(incoming)
        return part, gathered, self._comm.iallgather(mean, gathered)

    def _land(self, back: deque[tuple[slice, Tensor, Request]], dtype: torch.dtype) -> tuple[slice, Tensor]:
        part, gathered, request = back.popleft()
        self._poller.wait([request])
        values = gathered.view(-1)[: part.stop - part.start]
        return part, values if self._reference is None else self._reference[part].add_(values.to(dtype))

    def _rows(self, part: slice, snapshot: Tensor) -> Tensor:
        """Return what travels of `part` as one row a rank, the last ones padded with zeros."""
        values, size = snapshot[part], self._comm.size
        if self._wire_dtype is not None:
            largest = torch.finfo(self._wire_dtype).max
            values = (values - self._known(snapshot)[part]).clamp_(-largest, largest).to(self._wire_dtype)
        length = -(-values.numel() // size)
        if length * size == values.numel():
            return values.view(size, length)
        rows = values.new_zeros(size, length)
        rows.view(-1)[: values.numel()].copy_(values)
        return rows

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
