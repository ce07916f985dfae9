"""The elastic center, sharded over the ranks: exchanged with asynchronously, or by all ranks in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.service import Service
from hvd_shadowsync.comm.tuning import EAGER_BYTES
from hvd_shadowsync.finite import all_finite
from hvd_shadowsync.reducers.base import CHUNK_BYTES, Fill, Reducer, Shards, Slices, as_it_is, pack

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(center, replica) -> (center after the exchange, answer to the replica)."""

REQUEST_BYTES = EAGER_BYTES // 2
SHARE_OF_AN_EXCHANGE, LONGEST_CALLING_PAUSE_S = 0.01, 0.01
HOPELESS = 3
"""So many exchanges in a row that were refused to every rank are the end."""
LARGEST_TAG = 32_767  # the smallest upper bound of tags that the MPI standard allows


class ElasticCenter(Reducer):
    """A center that each rank exchanges with on its own, slice by slice, answered by the owners' communicator threads.

    Rank r owns the r-th shard. `serve` has to be called all the time by the thread that owns this reducer, for the
    others' exchanges; requests travel on `comm`, replies on `replies`. NaN and infinity do not move the center: they
    are answered with it as it is.

    Args:
        comm, replies: used by this reducer alone.
        poller: how to wait; its pauses grow to a hundredth of what an exchange takes, and 10 ms at most.
        rule: the exchange of a slice of the center with a replica's, `ElasticAveraging.elastic`.
        anchor: flat vector that the center starts from, the same on every rank.
        chunk_bytes: size of a request; default 256 KiB, which MPI sends over TCP without asking first, as it is set up
            here: only then do the way up and the way down overlap.
    """

    def __init__(
        self,
        comm: Communicator,
        replies: Communicator,
        poller: Poller,
        rule: Rule,
        anchor: Tensor,
        *,
        chunk_bytes: int = REQUEST_BYTES,
    ) -> None:
        self._rank = comm.rank
        self._rule, self._poller = rule, poller
        self._shards = Shards(anchor.numel(), comm.size)
        self.center = anchor[self._shards.of(self._rank)].clone()
        chunk = max(1, chunk_bytes // anchor.element_size(), -(-anchor.numel() // (LARGEST_TAG - comm.size)))
        self._pieces = [piece for rank in range(comm.size) for piece in self._cut(rank, chunk)]
        self._refused = [0] * comm.size
        self._service = Service(comm, replies, self._answer, anchor.new_empty(min(chunk, anchor.numel())), poller)

    @property
    def own(self) -> slice:
        """The part of the vector whose center this rank owns."""
        return self._shards.of(self._rank)

    def serve(self) -> bool:
        """Answer the exchanges that have come in; tell whether there was anything to do."""
        return self._service.serve()

    @property
    def is_hopeless(self) -> bool:
        """Whether every rank has come with NaN several times in a row, each time after it was given the center."""
        return min(self._refused) >= HOPELESS

    @property
    def idle(self) -> bool:
        """Whether no exchange of another rank is half done."""
        return self._service.idle

    def rebase(self, anchor: Tensor) -> None:
        """Set this rank's shard of the center to its part of `anchor`."""
        self.center.copy_(anchor[self.own])

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """Exchange `snapshot` with the center; yield the center's answers. `weights` do not matter here."""
        theirs = [
            (owner, tag, snapshot[piece]) for tag, (owner, piece) in enumerate(self._pieces) if owner != self._rank
        ]
        begun = time.monotonic()
        for tag, reply in self._service.call(self._dealt(theirs)):
            self.bytes_sent += reply.nbytes
            yield self._pieces[tag][1], reply
        self._service.poller = pauses_for(self._poller, time.monotonic() - begun)
        for tag, (owner, piece) in enumerate(self._pieces):
            if owner == self._rank:
                yield piece, self._exchange(self._rank, tag, snapshot[piece])

    def _cut(self, rank: int, chunk: int) -> Iterator[tuple[int, slice]]:
        shard = self._shards.of(rank)
        for start in range(shard.start, shard.stop, chunk):
            yield rank, slice(start, min(start + chunk, shard.stop))

    def _dealt(self, calls: list[tuple[int, int, Tensor]]) -> list[tuple[int, int, Tensor]]:
        """Return `calls` in turns over the owners, the next rank first, so that all links are in use from the start."""
        turns: dict[int, int] = {}
        order = {}
        for owner, tag, _ in calls:
            order[tag] = (turns.setdefault(owner, 0), (owner - self._rank) % self._shards.size)
            turns[owner] += 1
        return sorted(calls, key=lambda call: order[call[1]])

    def _answer(self, source: int, tag: int, buffer: Tensor) -> Tensor:
        piece = self._pieces[tag][1]
        reply = buffer[: piece.stop - piece.start]
        self.bytes_sent += reply.nbytes
        return reply.copy_(self._exchange(source, tag, reply))

    def _exchange(self, source: int, tag: int, replica: Tensor) -> Tensor:
        piece = self._pieces[tag][1]
        center = self.center[piece.start - self.own.start : piece.stop - self.own.start]
        if piece.start == self.own.start:
            self._refused[source] = self._refused[source] + 1 if bool(replica[0].isnan()) else 0
        moved, answer = _exchanged(self._rule, center, replica)
        answer = answer.clone() if answer is center else answer
        center.copy_(moved)
        return answer


def _exchanged(rule: Rule, center: Tensor, replica: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `rule` makes of the two; where that is NaN or infinity, the center twice."""
    moved, answer = rule(center, replica)
    if all_finite(moved):
        return moved, answer
    good = moved.isfinite()
    return torch.where(good, moved, center), torch.where(good, answer, center)


def gather_center(
    center: Tensor | None, owners: Sequence[int], comm: Communicator, poller: Poller, out: Tensor
) -> None:
    """Fill the shards of the center that are left into `out`, on every rank of `comm` (collective).

    Args:
        center: this rank's shard; None where it has none.
        owners: whose the shards are, by `Communicator.members`; those of ranks that are not in `comm` are lost.
        comm: over the ranks that are left.
        poller: how to wait.
        out: flat vector; it stays as it is where shards are lost.
    """
    shards = Shards(out.numel(), len(owners))
    for place, owner in enumerate(owners):
        if owner in comm.members:
            root, part = comm.members.index(owner), out[shards.of(place)]
            if root == comm.rank:
                assert center is not None, "it is an owner"
                part.copy_(center)
            poller.wait([comm.ibcast(part, root)])


def pauses_for(poller: Poller, exchange_s: float) -> Poller:
    """Return `poller` with pauses that suit an exchange of `exchange_s`."""
    longest_s = min(SHARE_OF_AN_EXCHANGE * exchange_s, LONGEST_CALLING_PAUSE_S)
    return replace(poller, longest_s=max(poller.longest_s, longest_s))


class ElasticInTurn(Reducer):
    """The same center met by all ranks together, in rank order: deterministic, for the foreground twin.

    Args:
        comm: used by this reducer alone.
        poller, rule, anchor, chunk_bytes: as for `ElasticCenter`.
    """

    def __init__(
        self, comm: Communicator, poller: Poller, rule: Rule, anchor: Tensor, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._comm, self._poller, self._rule = comm, poller, rule
        self._chunk_bytes = chunk_bytes
        self._shards = Shards(anchor.numel(), comm.size)
        self.center = anchor[self.own].clone()

    @property
    def own(self) -> slice:
        """The part of the vector whose center this rank owns."""
        return self._shards.of(self._comm.rank)

    def rebase(self, anchor: Tensor) -> None:
        """Set this rank's shard of the center to its part of `anchor`."""
        self.center.copy_(anchor[self.own])

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """Exchange all snapshots with the center, rank after rank; ranks of weight 0 only look."""
        for rows in self._shards.blocks(max(1, self._chunk_bytes // snapshot.element_size())):
            outgoing = pack(rows, [snapshot[part] for part in rows])
            incoming, answers = torch.empty_like(outgoing), torch.empty_like(outgoing)
            self._poller.wait([self._comm.ialltoall(outgoing, incoming)])
            self._meet(rows[self._comm.rank], incoming, weights)
            self._poller.wait([self._comm.ialltoall(incoming, answers)])
            self.bytes_sent += 2 * (self._comm.size - 1) * outgoing[0].nbytes
            for part, values in zip(rows, answers, strict=True):
                if part.stop > part.start:
                    yield part, values[: part.stop - part.start]

    def _meet(self, piece: slice, replicas: Tensor, weights: Sequence[float]) -> None:
        center = self.center[piece.start - self.own.start : piece.stop - self.own.start]
        for replica, weight in zip(replicas[:, : center.numel()], weights, strict=True):
            moved, answer = _exchanged(self._rule, center, replica)
            replica.copy_(answer if weight else center)
            if weight:
                center.copy_(moved)
