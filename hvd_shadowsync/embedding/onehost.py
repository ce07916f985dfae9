"""Batches of ranks that are all on one host: through memory that they share, without messages and without copies.

A rank lays its ids down in its own part of a slot, and the owners of the rows pool straight into its output, which lies
there too; where the rows of a table are divided, each owner but the first leaves a part of the sum, for the rank to add
up. Gradients are laid down in the same slot, and read there by the owners.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, SharedMemory
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.embedding.carrier import Carrier, Offer, Way
from hvd_shadowsync.embedding.inputs import Batch
from hvd_shadowsync.embedding.kernels.base import Gradient, Pooling
from hvd_shadowsync.embedding.layout import Piece
from hvd_shadowsync.embedding.meeting import Meetings, Word
from hvd_shadowsync.embedding.routing import Lookup, Router, Traffic, pack, unpack
from hvd_shadowsync.errors import EmbeddingError, RankLostError

LINE = 64
SPARE = 1.5
"""More memory than the present batch needs, for larger ones."""
KEPT = 8
"""Slots from which on an output is a copy, unless enough others are free: the caller may hold it for long."""
MOST = 32
"""Slots, when all of which are held, by outputs or by lookups whose backward is to come, a lookup goes in messages."""
FAILED = -1
"""In place of the number of a rank's last lookup."""
IN_TURN = 2
"""Slots that training takes in turns: while others may be reading one, the next lookup needs another."""


class _Place(NamedTuple):
    """What lies where in a rank's part of a slot, in bytes, after `num_samples` and the messages' sizes, int64 each."""

    messages: list[tuple[int, int]]  # (start, elements), by owner
    output: int
    parts: int
    gradient: int
    end: int


class _Slot:
    """Memory of every rank for one lookup, from its ids to the update.

    Attributes:
        capacity: bytes, of each rank's part.
        lookup, output: of this rank, while something holds on to them.
        updated_in: the meeting of this rank's last update here: until the next one others may be reading.
    """

    def __init__(self, memory: SharedMemory, capacity: int) -> None:
        self.memory, self.capacity = memory, capacity
        self.lookup: weakref.ref[Lookup] | None = None
        self.output: weakref.ref[memoryview] | None = None
        self.updated_in = -1

    def is_free(self, meetings: int) -> bool:
        held = any(each is not None and each() is not None for each in (self.lookup, self.output))
        return not held and meetings > self.updated_in

    def part(self, rank: int, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return a part of a rank's memory."""
        num_bytes = dtype.itemsize
        for each in shape:
            num_bytes *= each
        return self.memory.segments[rank][start : start + num_bytes].view(dtype).view(shape)

    def lend(self, rank: int, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
        """As `part`, knowing as long as any tensor is left that it is in use."""
        part = self.part(rank, start, dtype, *shape)
        if not part.numel():
            return part
        lent = memoryview(part.view(-1).numpy())  # type: ignore[arg-type]
        self.output = weakref.ref(lent)
        return torch.frombuffer(lent, dtype=dtype).view(shape)


@dataclass
class _Reached:
    """A request that is complete when all ranks have come to lookup `number`.

    Raises:
        EmbeddingError: a rank will never come there.
    """

    counters: list[Tensor]
    number: int
    comm: Communicator

    def test(self) -> bool:
        found = [each.item() for each in self.counters]
        if failure := _failure_in(found):
            raise EmbeddingError(failure)
        if min(found) >= self.number:
            return True
        self.comm.check()
        return False


def _failure_in(found: Sequence[float]) -> str:
    """Return what is to be said where a rank has failed, given all counters."""
    if FAILED not in found:
        return ""
    return f"rank {found.index(FAILED)} failed while it looked rows up, so that no rank can go on; see its error"


class OneHost(Carrier):
    """See `Carrier`.

    Args:
        counters: memory of every rank, for the number of the last lookup that it has answered.
    """

    def __init__(
        self, comm: Communicator, router: Router, poller: Poller, traffic: Traffic, meetings: Meetings,
        counters: SharedMemory,
    ) -> None:  # fmt: skip
        self._comm, self._router, self._poller, self._traffic = comm, router, poller, traffic
        self._meetings = meetings
        self._counters, self._fence = [each.view(torch.int64)[0] for each in counters.segments], counters.fence
        self._slots: list[_Slot] = []
        self._divided = [piece for pieces in router.layout.pieces for piece in pieces if piece.part]
        self._parts: dict[tuple[int, int, int], int] = {}
        self._width_of_parts = 0
        for piece in self._divided:
            self._parts[_key(piece)] = self._width_of_parts
            self._width_of_parts += piece.dim
        self._of_others = _joined(sorted(
            (piece.column, piece.column + piece.dim) for owner in router.others for piece in router.layout.pieces[owner]
        ))  # fmt: skip

    @classmethod
    def of(
        cls, comm: Communicator, router: Router, poller: Poller, traffic: Traffic, meetings: Meetings
    ) -> OneHost | None:
        """Return one, or None on every rank where they share no memory (collective)."""
        counters = comm.share(LINE) if comm.size > 1 else None
        return None if counters is None else cls(comm, router, poller, traffic, meetings, counters)

    @property
    def failure(self) -> str:
        """What is to be said of a rank that has failed, or nothing.

        Others may still read what this rank has left for the lookup that failed: it must leave nothing more.
        """
        return _failure_in([each.item() for each in self._counters])

    def grow(self, num_bytes: int) -> bool:
        """Have one more slot, of at least so many bytes a rank; tell whether there is one now (collective).

        Smaller ones go, where no rank uses them any more.
        """
        capacity = int(num_bytes * SPARE)
        free = [n for n in self._free(0) if self._slots[n].capacity < capacity]
        unused = set(free).intersection(*self._comm.allgather_object(free))
        self._slots = [slot for number, slot in enumerate(self._slots) if number not in unused]
        memory = self._comm.share(capacity)
        if memory is not None:
            self._slots.append(_Slot(memory, capacity))
        return memory is not None

    def offer(self, batch: Batch, dtype: torch.dtype) -> Offer | None:
        """See `Carrier.offer`; the size is the number of the slot, or the bytes that it would have to have."""
        asked = self._router.ask(batch, pooled=True)
        messages = [pack(asks) if owner in self._router.others else None for owner, asks in enumerate(asked)]
        head = [batch.num_samples, *(0 if message is None else len(message) for message in messages)]
        place = self._place(head, dtype)
        free = self._free(place.end)
        if not free and len(self._slots) >= MOST:
            return None
        if not free:
            return Offer(Way.MORE, [place.end] * self._comm.size, asked)
        number = free[0]
        slot, rank = self._slots[number], self._comm.rank
        slot.part(rank, 0, torch.int64, len(head)).copy_(torch.tensor(head))
        for (start, count), message in zip(place.messages, messages, strict=True):
            if message is not None and count:
                slot.part(rank, start, torch.int32, count).copy_(message)
                self._traffic.id_bytes += message.nbytes
        self._fence()
        return Offer(Way.SHARED, [number] * self._comm.size, asked, place)

    def look_up(self, lookup: Lookup, offer: Offer | None, words: Sequence[Word], dtype: torch.dtype) -> None:
        """See `Carrier.look_up`."""
        try:
            self._look_up(lookup, offer, words, dtype)
        except RankLostError:  # the others notice that by themselves
            raise
        except (Exception, KeyboardInterrupt, SystemExit):
            if all(each.item() != FAILED for each in self._counters):
                self._counters[self._comm.rank].fill_(FAILED)  # the others wait for it
            raise

    def _look_up(self, lookup: Lookup, offer: Offer | None, words: Sequence[Word], dtype: torch.dtype) -> None:
        rank, router = self._comm.rank, self._router
        lookup.out = torch.empty(0, router.layout.width, dtype=dtype)
        lookup.staged = [None] * self._comm.size
        self._fence()
        if offer is not None:
            slot, place = self._slots[words[rank].size], offer.content
            slot.lookup = weakref.ref(lookup)
            lookup.out = slot.lend(rank, place.output, dtype, lookup.batch.num_samples, router.layout.width)
            for index in router.layout.local:
                lookup.out[:, slice(*router.layout.columns[index])] = 0
        poolings: list[Pooling] = []
        for source, word in enumerate(words):
            if word.way == Way.SHARED:
                poolings += self._poolings_for(source, self._slots[word.size], lookup, dtype)
        router.pool(poolings)
        self._fence()
        if self._counters[rank].item() != FAILED:
            self._counters[rank].fill_(lookup.number)
        self._poller.wait([_Reached(self._counters, lookup.number, self._comm)])
        self._fence()
        if offer is not None:
            self._add_parts(lookup.out, slot, place)
            router.divide_means(lookup)
            if len(self._slots) >= KEPT and len(self._free(slot.capacity)) < IN_TURN:
                lookup.out = lookup.out.clone()

    def stage(self, lookup: Lookup, gradient: Tensor, *, keep: bool) -> Tensor:
        """See `Carrier.stage`."""
        staged = lookup.staged[self._comm.rank]
        if staged is None:
            return gradient
        means = list(self._router.means(lookup.batch))
        if not keep and not means and gradient.stride(-1) == 1:
            for columns in self._of_others:
                staged[:, columns].copy_(gradient[:, columns])
        else:
            staged.copy_(gradient)
            for index, counts in means:
                staged[:, slice(*self._router.layout.columns[index])] /= counts
            gradient = staged
        self._traffic.gradient_bytes += len(staged) * staged.itemsize * sum(c.stop - c.start for c in self._of_others)
        self._fence()
        return gradient

    def update(self, lookup: Lookup, gradient: Tensor, exponent: int, words: Sequence[Word]) -> None:
        """See `Carrier.update`."""
        self._fence()
        router = self._router
        found: list[tuple[int, Gradient]] = []
        for source, scale in enumerate(lookup.scales):  # in this order, so that sums do not depend on who is the owner
            staged = lookup.staged[source]
            if source == self._comm.rank:
                found += router.own_gradients(lookup, gradient, scale)
            elif staged is not None:
                found += router.gradients_in(lookup.received[source], staged, scale)
        router.update(found)
        for slot in self._slots:
            if slot.lookup is not None and slot.lookup() is lookup:
                slot.updated_in = self._meetings.held

    # --- slots --------------------------------------------------------------------------------------------------------

    def _place(self, head: Sequence[int], dtype: torch.dtype) -> _Place:
        """Return what lies where, given the number of samples and of elements for each owner."""
        num_samples, *counts = head
        at, messages = _lines(torch.int64.itemsize * len(head)), []
        for count in counts:
            messages.append((at, count))
            at += _lines(torch.int32.itemsize * count)
        row = num_samples * dtype.itemsize
        parts = at + _lines(row * self._router.layout.width)
        gradient = parts + _lines(row * self._width_of_parts)
        return _Place(messages, at, parts, gradient, gradient + _lines(row * self._router.layout.width))

    def _free(self, num_bytes: int) -> list[int]:
        """Return the slots that a lookup of so many bytes could have."""
        held = self._meetings.held
        return [n for n, slot in enumerate(self._slots) if slot.capacity >= num_bytes and slot.is_free(held)]

    def _poolings_for(self, source: int, slot: _Slot, lookup: Lookup, dtype: torch.dtype) -> list[Pooling]:
        """Return what is to be pooled for one rank."""
        rank, router = self._comm.rank, self._router
        head = slot.part(source, 0, torch.int64, 1 + self._comm.size).tolist()
        place, samples, width = self._place(head, dtype), head[0], router.layout.width
        if not samples:
            return []
        output = slot.part(source, place.output, dtype, samples, width)
        lookup.staged[source] = slot.part(source, place.gradient, dtype, samples, width)
        if source == rank:
            bags = [ask.sent for ask in lookup.asked[rank]]
        else:
            start, count = place.messages[rank]
            bags = unpack(slot.part(source, start, torch.int32, count), len(router.pieces), dtype) if count else []
            lookup.received[source] = bags
            self._traffic.vector_bytes += samples * dtype.itemsize * sum(piece.dim for piece in router.pieces)
        found = []
        for piece, each in zip(router.pieces, bags, strict=True):
            target = self._target(piece, slot, source, place, output)
            found.append(Pooling(router.shards[piece.shard].weight, each, target))
        return found

    def _target(self, piece: Piece, slot: _Slot, source: int, place: _Place, output: Tensor) -> Tensor:
        if not piece.part:
            return output[:, piece.column : piece.column + piece.dim]
        start = place.parts + self._parts[_key(piece)] * len(output) * output.itemsize
        return slot.part(source, start, output.dtype, len(output), piece.dim)

    def _add_parts(self, out: Tensor, slot: _Slot, place: _Place) -> None:
        for piece in self._divided:
            out[:, piece.column : piece.column + piece.dim] += self._target(piece, slot, self._comm.rank, place, out)


def _key(piece: Piece) -> tuple[int, int, int]:
    return piece.feature, piece.column, piece.part


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE) * LINE


def _joined(ranges: Sequence[tuple[int, int]]) -> list[slice]:
    """Return sorted ranges as slices, those that touch or overlap as one."""
    found: list[slice] = []
    for start, stop in ranges:
        if found and start <= found[-1].stop:
            found[-1] = slice(found[-1].start, max(stop, found[-1].stop))
        else:
            found.append(slice(start, stop))
    return found
