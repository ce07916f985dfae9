"""Lookups and updates without lockstep: requests that the rows' owners answer in a thread of their own.

As the embedding servers of ShadowSync (Zheng et al. 2020, arXiv 2003.03477): an owner takes each rank's gradients when
they come, on their own, and rows are read as they are at that moment. Nothing is locked: only the owner's thread
touches its rows.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.service import Service
from hvd_shadowsync.embedding.inputs import Batch
from hvd_shadowsync.embedding.kernels.base import Bags
from hvd_shadowsync.embedding.meeting import Call, Meetings, Word
from hvd_shadowsync.embedding.routing import KEPT, Lookup, Router, Run, Traffic, exponent_of, pack, remember, unpack
from hvd_shadowsync.errors import EmbeddingError

LOOKUP, UPDATE = 0, 1
TICKETS = 1 << 13
APPLIED, FORGOTTEN = 0, 1
HEAD = struct.Struct("dd")
"""What an update begins with: the scale of its gradients, and nothing, so that they begin at a multiple of 16."""


class Served:
    """The client of all owners and the server of this rank's rows; used by one thread per rank, which calls `serve`.

    Args:
        comm: used by this object alone, for meetings; it makes two more.
        wire_dtype: of vectors and gradients on their way; None: as they are.
        scale: of each rank's gradients.
        owner: see `Meetings`.
        view: how often ranks have been lost; what was begun in an earlier one is void.
        traffic: so far; lookups are numbered from there.
    """

    def __init__(
        self,
        comm: Communicator,
        router: Router,
        poller: Poller,
        *,
        dtype: torch.dtype,
        wire_dtype: torch.dtype | None,
        scale: float,
        debug: bool,
        owner: threading.Thread | None = None,
        view: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        self._comm, self._router, self._poller = comm, router, poller
        self._dtype, self._wire_dtype, self._scale = dtype, wire_dtype, scale
        self.meetings = Meetings(comm, poller, debug=debug, owner=owner)
        self._view, self.traffic = view, Traffic() if traffic is None else traffic
        self._pair = comm.dup(), comm.dup()
        self._service = Service(*self._pair, self._answer, None, poller, max(comm.size, 2))
        self._tickets = 0
        self._received: list[dict[int, list[Bags]]] = [{} for _ in range(comm.size)]

    def lookup(self, batch: Batch, *, wants_gradient: bool, dtype: torch.dtype) -> Lookup:
        """Look `batch` up, serving others meanwhile."""
        router = self._router
        asked = router.ask(batch)
        self._tickets += 1
        lookup = Lookup(self._tickets, asked, [], [], batch, router.output(batch, dtype), view=self._view)
        router.look_up_own(lookup)
        tag = self._tickets % TICKETS * 2 + LOOKUP
        calls, replies = [], {}
        for owner in router.others:
            if len(message := pack(asked[owner])):
                run = _whole([ask.sent for ask in asked[owner]], [ask.piece.dim for ask in asked[owner]])
                replies[owner] = run, torch.empty(run.numel, dtype=self._wire_dtype or dtype)
                flag = torch.tensor([wants_gradient], dtype=torch.int32)
                calls.append((owner, tag, torch.cat([flag, message]), replies[owner][1]))
                self.traffic.id_bytes += 4 + message.nbytes
        for _ in self._service.call(calls):
            pass
        for owner, (run, reply) in replies.items():
            router.put_in(lookup, owner, run, reply)
        router.divide_means(lookup)
        self.traffic.lookups += 1
        return lookup

    def stage(self, lookup: Lookup, gradient: Tensor, *, keep: bool) -> Tensor:
        """See `Carrier.stage`."""
        return self._router.of_sums(lookup, gradient, keep=keep)

    def update(self, lookup: Lookup, gradient: Tensor, *, trails: bool = False) -> None:
        """Give the owners their gradients; return when they have applied them, serving others meanwhile.

        Those of lookups from before a rank was lost nobody is given.
        """
        if lookup.view != self._view:
            return
        router = self._router
        exponent = exponent_of(gradient, self._wire_dtype)
        tag = lookup.number % TICKETS * 2 + UPDATE
        head = torch.frombuffer(bytearray(HEAD.pack(math.ldexp(self._scale, -exponent), 0.0)), dtype=torch.uint8)
        calls, said = [], {}
        for owner in router.others:
            asks = lookup.asked[owner]
            run = _whole([ask.sent for ask in asks], [ask.piece.dim for ask in asks])
            if len(pack(asks)):
                vectors = router.gradients_for(asks, run, gradient) * 2.0**exponent
                wire = vectors.to(self._wire_dtype or vectors.dtype)
                said[owner] = torch.empty(1, dtype=torch.uint8)
                calls.append((owner, tag, torch.cat([head, wire.view(torch.uint8)]), said[owner]))
                self.traffic.gradient_bytes += wire.nbytes
        router.update(router.own_gradients(lookup, gradient, self._scale))
        for _ in self._service.call(calls):
            pass
        if any(int(each) == FORGOTTEN for each in said.values()):
            raise EmbeddingError(
                f"backward ran through a lookup that is more than {KEPT} lookups old, which its owners have forgotten; "
                "run it sooner, or look up under torch.no_grad() where no backward follows"
            )
        self.traffic.updates += 1

    def leave_unused(self, lookup: Lookup) -> None:
        """See `Exchange.leave_unused`: nothing is to be done, since nobody waits for a gradient."""

    def serve(self, dtype: torch.dtype, *, closing: bool, agree: Callable[[], None]) -> None:
        """Serve until all ranks are closing (collective); nothing else: ranks that join serve anyway.

        See `Exchange.serve` for `agree`.
        """
        if closing:
            words: list[Word] = []
            while not words or any(word.call != Call.CLOSE for word in words):
                words = self.meetings.meet(Call.CLOSE, meanwhile=self._service.serve)
            while not self._service.idle:
                self._service.serve()
            agree()

    def free(self) -> None:
        """Give the communicators back, when no thread serves any more (collective)."""
        for comm in self._pair:
            comm.free()

    def serve_some(self) -> bool:
        """Answer what has come in; tell whether anything was done. The thread calls it when it has nothing to do."""
        return self._service.serve()

    def _answer(self, source: int, tag: int, payload: Tensor) -> Tensor:
        return self._update_for(source, tag >> 1, payload) if tag & 1 else self._look_up_for(source, tag >> 1, payload)

    def _look_up_for(self, source: int, ticket: int, payload: Tensor) -> Tensor:
        words = payload.view(torch.int32)
        bags = unpack(words[1:], len(self._router.pieces), self._dtype)
        if words[0]:
            remember(self._received[source], ticket, bags)
        vectors = self._router.answer(bags, _whole(bags, [piece.dim for piece in self._router.pieces]), self._dtype)
        reply = vectors.to(self._wire_dtype or vectors.dtype)
        self.traffic.vector_bytes += reply.nbytes
        return reply

    def _update_for(self, source: int, ticket: int, payload: Tensor) -> Tensor:
        bags = self._received[source].pop(ticket, None)
        if bags is None:
            return torch.tensor([FORGOTTEN], dtype=torch.uint8)
        scale, _ = HEAD.unpack(payload[: HEAD.size].numpy().tobytes())
        vectors = payload[HEAD.size :].view(self._wire_dtype or self._dtype).to(self._dtype)
        run = _whole(bags, [piece.dim for piece in self._router.pieces])
        self._router.update(self._router.gradients_of(bags, run, vectors, scale))
        return torch.tensor([APPLIED], dtype=torch.uint8)


def _whole(bags: list[Bags], dims: list[int]) -> Run:
    return Run(0, len(bags), sum(each.num_bags * dim for each, dim in zip(bags, dims, strict=True)))
