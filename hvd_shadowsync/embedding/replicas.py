"""A copy of each rank's rows on the next rank, from which they go on when the rank is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.embedding.kernels.base import Gradient, Kernel
from hvd_shadowsync.embedding.placement import Plan
from hvd_shadowsync.embedding.routing import Traffic
from hvd_shadowsync.embedding.shards import Rows, Shards

SIZE_TAG, ROWS_TAG, WHOLE_TAG = 1 << 20, (1 << 20) + 1, (1 << 20) + 2
BLOCK_BYTES = 1 << 26


class Touched(NamedTuple):
    """The index of a shard, and the rows of it that an update has changed, each once."""

    shard: int
    rows: Tensor


class Replicas:
    """This rank's rows on the next one, and those of the one before here; for the thread that exchanges.

    After each update its owner sends the rows that it has changed, as they are now with their state: so a copy is bit
    by bit what the owner has, or lacks the one update in which the owner was lost.

    Args:
        comm: two ranks or more; calls of this object come in between those of the exchange.
        shards: of this rank.
        copies: of the rank before.
        traffic: so far; what copies send counts there.
    """

    def __init__(
        self, comm: Communicator, poller: Poller, kernel: Kernel, shards: Shards, copies: Shards, traffic: Traffic
    ) -> None:
        self._comm, self._poller, self._kernel, self._traffic = comm, poller, kernel, traffic
        self._shards, self.copies = shards, copies
        self._are_whole = True
        self._next, self._before = (comm.rank + 1) % comm.size, before(comm.rank, comm.size)

    @property
    def is_stale(self) -> bool:
        """Whether rows of this rank were set by other means than an update since they were last sent as a whole."""
        return self._shards.was_set

    @property
    def usable(self) -> Shards | None:
        """The copies; None where they are not those of one moment, or of rows that were set since (as all ranks do)."""
        return self.copies if self._are_whole and not self.is_stale else None

    def follow(self, gradients: Sequence[Sequence[Gradient]]) -> None:
        """Send the rows that an update of `gradients`, by shard, has changed, and take in the others' (collective)."""
        message = self._pack(list(self._touched(gradients)))
        size, theirs = torch.tensor([len(message)]), torch.zeros(1, dtype=torch.int64)
        arriving = self._comm.irecv(theirs, self._before, SIZE_TAG)
        sending = [self._comm.isend(size, self._next, SIZE_TAG), self._comm.isend(message, self._next, ROWS_TAG)]
        self._poller.wait([arriving])
        received = torch.empty(int(theirs), dtype=torch.uint8)
        self._poller.wait([self._comm.irecv(received, self._before, ROWS_TAG), *sending])
        self._unpack(received)
        self._traffic.replica_bytes += size.nbytes + message.nbytes

    def renew(self, stale: Sequence[bool]) -> None:
        """Send all rows of the ranks that are `stale` (collective)."""
        requests: list[Request] = []
        if stale[self._comm.rank]:
            for block in _blocks(self._shards):
                requests.append(self._comm.isend(block, self._next, WHOLE_TAG))
                self._traffic.replica_bytes += block.nbytes
        if stale[self._before]:
            self._are_whole = False
            requests += [self._comm.irecv(block, self._before, WHOLE_TAG) for block in _blocks(self.copies)]
        self._poller.wait(requests)
        self._are_whole = True
        if stale[self._comm.rank]:
            self._shards.was_set = False

    def _touched(self, gradients: Sequence[Sequence[Gradient]]) -> Iterator[Touched]:
        for index, found in enumerate(gradients):
            ids = [each.bags.ids.int() for each in found if each.bags.ids.numel()]
            if ids:
                yield Touched(index, self._kernel.unique(torch.cat(ids))[0])

    def _pack(self, touched: Sequence[Touched]) -> Tensor:
        """Return a head of a count and the steps of each shard, int64, then ids, weights and state of each shard."""
        head = torch.zeros(len(self._shards), 2, dtype=torch.int64)
        for index in range(len(self._shards)):
            head[index, 1] = self._shards[index].steps
        for index, ids in touched:
            head[index, 0] = len(ids)
        places = list(_places(head, self._shards))
        message = torch.empty(places[-1].stop if places else 0, dtype=torch.uint8)
        _view(message, places[0], head).copy_(head)
        number = 1
        for index, ids in touched:
            _view(message, places[number], ids).copy_(ids)
            rows = self._shards[index]
            for tensor in (rows.weight, *rows.state.values()):
                number += 1
                shape = (len(ids), *tensor.shape[1:])
                torch.index_select(tensor, 0, ids, out=_view(message, places[number], tensor).view(shape))
            number += 1
        return message

    def _unpack(self, message: Tensor) -> None:
        head = message[: 16 * len(self.copies)].view(torch.int64).view(-1, 2)
        places = iter(_places(head, self.copies))
        next(places)
        for index, (count, steps) in enumerate(head.tolist()):
            rows = self.copies[index]
            rows.steps.fill_(steps)
            if count:
                ids = _view(message, next(places), torch.empty(0, dtype=torch.int32)).long()
                for tensor in (rows.weight, *rows.state.values()):
                    tensor.index_copy_(0, ids, _view(message, next(places), tensor).view(count, *tensor.shape[1:]))


def before(rank: int, size: int) -> int:
    """Return the rank whose rows `rank` has a copy of."""
    return (rank - 1) % size


def copies_of(plan: Plan, rank: int, shards: Shards, seed: int | None) -> Shards:
    """Return what `rank` has of the rank before: with a `seed` its initial values, else nothing yet."""
    return Shards(plan, before(rank, plan.world_size), shards.rule, shards.dtype, seed)


def _blocks(shards: Shards) -> Iterator[Tensor]:
    """Iterate over the memory of `shards`, in the same blocks wherever they are."""
    for index in range(len(shards)):
        rows: Rows = shards[index]
        yield rows.steps
        for tensor in (rows.weight, *rows.state.values()):
            step = max(1, BLOCK_BYTES // max(1, tensor[:1].nbytes))
            yield from (tensor[first : first + step] for first in range(0, len(tensor), step))


def _places(head: Tensor, shards: Shards) -> Iterator[slice]:
    """Iterate over where in a message its head is, and what follows it; each begins at a multiple of 8 bytes."""
    end = head.nbytes
    yield slice(0, end)
    for index, count in enumerate(head[:, 0].tolist()):
        if count:
            rows = shards[index]
            sizes = [count * torch.int32.itemsize]
            sizes += [count * tensor[:1].nbytes for tensor in (rows.weight, *rows.state.values())]
            for num_bytes in sizes:
                start = end + -end % 8
                end = start + num_bytes
                yield slice(start, end)


def _view(message: Tensor, place: slice, like: Tensor) -> Tensor:
    """Return a part of `message` as a vector of the dtype of `like`, or as `like` where that is as large."""
    values = message[place].view(like.dtype)
    return values.view(like.shape) if values.numel() == like.numel() else values
