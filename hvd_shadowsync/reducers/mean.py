"""The weighted mean of the replicas: by `Iallreduce`, or summed by the owner of each slice."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.transfer import Transfer
from hvd_shadowsync.finite import all_finite
from hvd_shadowsync.reducers.base import Fill, Reducer, Slices, as_it_is, chunks
from hvd_shadowsync.reducers.halves import add_widened, mean_of_rows, narrow_distance


class Spare:
    """Buffers to be used again: a new one of a MiB costs as much in page faults as several passes over it."""

    def __init__(self) -> None:
        self._free: dict[torch.dtype, list[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor whose values do not matter."""
        kept = self._free.setdefault(dtype, [])
        while kept:
            whole = kept.pop()
            if whole.numel() >= numel:  # else of a shorter vector
                return whole[:numel]
        with torch.inference_mode(False):  # a caller in inference mode would leave buffers that are good for no other
            return torch.empty(numel, dtype=dtype)

    def give(self, *tensors: Tensor) -> None:
        """Take tensors back that `take` returned."""
        for each in tensors:
            whole = each._base if each._base is not None else each
            self._free.setdefault(whole.dtype, []).append(whole)


class ChunkedMean(Reducer):
    """What the two have in common: the vector goes on the wire in chunks, a few of them in flight.

    Args:
        comm: used by this reducer alone.
        poller: how to wait.
        chunk_bytes: size of a chunk; by default what `Transfer.between` says.
        in_flight: chunks under way at a time, at least 2 where owners sum; by default the same.
    """

    sliced = tunable = True

    def __init__(
        self, comm: Communicator, poller: Poller, *, chunk_bytes: int | None = None, in_flight: int | None = None
    ) -> None:
        start = Transfer.between(comm.size)
        self._comm, self._poller = comm, poller
        self._chunk_bytes, self._in_flight = chunk_bytes or start.chunk_bytes, in_flight or start.in_flight
        self._spare = Spare()

    def use(self, transfer: Transfer) -> None:
        """See `Reducer.use`."""
        self._chunk_bytes, self._in_flight = transfer.chunk_bytes, transfer.in_flight
        self._poller = transfer.poller(self._poller)
        self.forget()

    @abstractmethod
    def poke(self) -> None:
        """Let what is under way make progress, while the caller of a reduction waits for something else."""

    def forget(self) -> None:
        """Give buffers that are kept for the next reduction back to the system."""
        self._spare = Spare()


class AllReduceMean(ChunkedMean):
    """The weighted mean of the snapshots by `Iallreduce`; arguments as for `ChunkedMean`."""

    def __init__(
        self, comm: Communicator, poller: Poller, *, chunk_bytes: int | None = None, in_flight: int | None = None
    ) -> None:
        super().__init__(comm, poller, chunk_bytes=chunk_bytes, in_flight=in_flight)
        self._flying: deque[tuple[slice, Tensor, Request]] = deque()

    def poke(self) -> None:
        """See `ChunkedMean.poke`."""
        for _, _, request in self._flying:
            request.test()

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        own, total = weights[self._comm.rank], sum(weights)
        flying = self._flying
        flying.clear()
        for part in chunks(snapshot, self._chunk_bytes):
            if len(flying) == self._in_flight:
                yield from self._land(flying, total)
            fill(part)
            flying.append((part, *self._post(snapshot[part], own)))
        while flying:
            yield from self._land(flying, total)

    def _post(self, values: Tensor, weight: float) -> tuple[Tensor, Request]:
        into = self._spare.take(values.numel(), values.dtype)
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
        self._spare.give(values)


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
        self._out: deque[tuple[slice, Tensor, Tensor, Request]] = deque()
        self._back: deque[tuple[slice, Tensor, Tensor, Request]] = deque()

    def rebase(self, anchor: Tensor) -> None:
        """Keep `anchor` as what distances are taken from, where a narrower dtype travels."""
        if self._wire_dtype is not None:
            self._reference = self._known(anchor).copy_(anchor)

    def poke(self) -> None:
        """See `ChunkedMean.poke`."""
        for *_, request in (*self._out, *self._back):
            request.test()

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        out, back = self._out, self._back
        out.clear()
        back.clear()
        for part in chunks(snapshot, self._chunk_bytes):
            if len(out) + len(back) >= self._in_flight and back:
                yield from self._land(back)
            if len(out) >= max(1, self._in_flight // 2):
                back.append(self._sum(out, weights, snapshot.dtype))
            fill(part)
            out.append(self._post(part, snapshot))
        while out or back:
            if out:
                back.append(self._sum(out, weights, snapshot.dtype))
            if len(back) >= self._in_flight or not out:
                yield from self._land(back)

    def _post(self, part: slice, snapshot: Tensor) -> tuple[slice, Tensor, Tensor, Request]:
        rows = self._rows(part, snapshot)
        incoming = self._spare.take(rows.numel(), rows.dtype)
        self.bytes_sent += 2 * (self._comm.size - 1) * rows.nbytes // self._comm.size
        return part, rows, incoming, self._comm.ialltoall(rows, incoming)

    def _rows(self, part: slice, snapshot: Tensor) -> Tensor:
        """Return what travels of `part`: equal rows for the ranks, one after the other, the last padded with zeros."""
        numel, size = part.stop - part.start, self._comm.size
        length = -(-numel // size)
        rows = self._spare.take(length * size, self._wire_dtype or snapshot.dtype)
        rows[numel:].zero_()
        if self._wire_dtype is None:
            rows[:numel].copy_(snapshot[part])
            return rows
        narrow_distance(snapshot[part], self._known(snapshot)[part], rows[:numel])
        return rows

    def _sum(
        self, out: deque[tuple[slice, Tensor, Tensor, Request]], weights: Sequence[float], dtype: torch.dtype
    ) -> tuple[slice, Tensor, Tensor, Request]:
        part, rows, incoming, request = out.popleft()
        self._poller.wait([request])
        self._spare.give(rows)
        length = incoming.numel() // self._comm.size
        mean = self._spare.take(length, incoming.dtype)
        mean_of_rows(incoming.view(self._comm.size, length), weights, mean, dtype)
        return part, mean, incoming, self._comm.iallgather(mean, incoming)

    def _land(self, back: deque[tuple[slice, Tensor, Tensor, Request]]) -> Slices:
        part, mean, gathered, request = back.popleft()
        self._poller.wait([request])
        self._spare.give(mean)
        values = gathered[: part.stop - part.start]
        if self._reference is None:
            yield part, values
        else:
            yield part, self._moved(self._reference[part], values)
        self._spare.give(gathered)

    @staticmethod
    def _moved(known: Tensor, values: Tensor) -> Tensor:
        """Return the reference moved by the mean distance; it stays where it is where that has bad numbers."""
        if math.isfinite(float(values.sum())):
            add_widened(known, values)
            return known
        moved = known + values.to(known.dtype)
        return known.copy_(moved) if all_finite(moved) else moved

    def _known(self, snapshot: Tensor) -> Tensor:
        if self._reference is None or self._reference.numel() != snapshot.numel():
            with torch.inference_mode(False):
                self._reference = torch.zeros(snapshot.numel(), dtype=snapshot.dtype)
        return self._reference
