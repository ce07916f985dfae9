"""Batches that go to the owners of their rows in messages, many under way at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.embedding.carrier import Carrier, Offer, Way
from hvd_shadowsync.embedding.inputs import Batch
from hvd_shadowsync.embedding.kernels.base import Gradient
from hvd_shadowsync.embedding.meeting import Word
from hvd_shadowsync.embedding.routing import Lookup, Router, Run, Traffic, pack, runs, runs_of, unpack

IDS_TAG, VECTORS_TAG, GRADIENTS_TAG = 1, 1 << 8, 1 << 14


class _Arriving(NamedTuple):
    """A run of vectors on its way to this rank."""

    run: Run
    buffer: Tensor
    requests: list[Request]


class Messages(Carrier):
    """See `Carrier`.

    Args:
        wire_dtype: of vectors and gradients on their way; None: as they are.
    """

    def __init__(
        self, comm: Communicator, router: Router, poller: Poller, traffic: Traffic, wire_dtype: torch.dtype | None
    ) -> None:
        self._comm, self._router, self._poller = comm, router, poller
        self._traffic, self._wire_dtype = traffic, wire_dtype

    def offer(self, batch: Batch, dtype: torch.dtype) -> Offer:
        """See `Carrier.offer`; sizes are those of the messages, in elements."""
        asked = self._router.ask(batch)
        messages = {owner: pack(asked[owner]) for owner in self._router.others}
        sizes = [len(messages[rank]) if rank in messages else 0 for rank in range(self._comm.size)]
        return Offer(Way.MESSAGES, sizes, asked, messages)

    def look_up(self, lookup: Lookup, offer: Offer | None, words: Sequence[Word], dtype: torch.dtype) -> None:
        """See `Carrier.look_up`."""
        router, messages = self._router, {} if offer is None else offer.content
        lookup.out = router.output(lookup.batch, dtype)
        sending = [self._comm.isend(message, owner, IDS_TAG) for owner, message in messages.items() if len(message)]
        self._traffic.id_bytes += sum(message.nbytes for message in messages.values())
        arriving = {}
        for source in router.others:
            if words[source].size:
                buffer = torch.empty(words[source].size, dtype=torch.int32)
                arriving[source] = (buffer, self._comm.irecv(buffer, source, IDS_TAG))
        answers = {o: self._receive(o, runs_of(lookup.asked[o], dtype), dtype, VECTORS_TAG) for o in router.others}
        for source, (buffer, request) in arriving.items():
            self._poller.wait([request])
            lookup.received[source] = unpack(buffer, len(router.pieces), dtype)
            for number, run in enumerate(runs(lookup.received[source], router.pieces, dtype)):
                vectors = router.answer(lookup.received[source], run, dtype)
                sending += self._send(vectors, source, VECTORS_TAG + number)
                self._traffic.vector_bytes += self._wire_bytes(vectors)
        router.look_up_own(lookup)
        for owner, parts in answers.items():
            for part in parts:
                self._poller.wait(part.requests)
                router.put_in(lookup, owner, part.run, part.buffer)
        router.divide_means(lookup)
        self._poller.wait(sending)

    def stage(self, lookup: Lookup, gradient: Tensor, *, keep: bool) -> Tensor:
        """See `Carrier.stage`."""
        return self._router.of_sums(lookup, gradient, keep=keep)

    def update(self, lookup: Lookup, gradient: Tensor, exponent: int, words: Sequence[Word]) -> None:
        """See `Carrier.update`."""
        router, dtype = self._router, gradient.dtype
        arriving = {
            source: self._receive(source, runs(bags, router.pieces, dtype), dtype, GRADIENTS_TAG)
            for source, bags in enumerate(lookup.received)
            if bags
        }
        sending: list[Request] = []
        factor = 2.0**exponent
        for owner in router.others:
            for number, run in enumerate(runs_of(lookup.asked[owner], dtype)):
                vectors = router.gradients_for(lookup.asked[owner], run, gradient)
                sending += self._send(vectors if factor == 1 else vectors * factor, owner, GRADIENTS_TAG + number)
                self._traffic.gradient_bytes += self._wire_bytes(vectors)
        found: list[tuple[int, Gradient]] = []
        for source, scale in enumerate(lookup.scales):  # in this order, so that sums do not depend on who is the owner
            if source == self._comm.rank:
                found += router.own_gradients(lookup, gradient, scale)
            for part in arriving.get(source, []):
                self._poller.wait(part.requests)
                whole = math.ldexp(scale, -words[source].exponent)
                found += router.gradients_of(lookup.received[source], part.run, part.buffer.to(dtype), whole)
        router.update(found)
        self._poller.wait(sending)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _send(self, buffer: Tensor, dest: int, tag: int) -> list[Request]:
        if not len(buffer):
            return []
        return [self._comm.isend(buffer if self._wire_dtype is None else buffer.to(self._wire_dtype), dest, tag)]

    def _wire_bytes(self, buffer: Tensor) -> int:
        return buffer.numel() * (self._wire_dtype or buffer.dtype).itemsize

    def _receive(self, source: int, expected: list[Run], dtype: torch.dtype, tag: int) -> list[_Arriving]:
        """Begin to receive vectors from `source`."""
        arriving = []
        for number, run in enumerate(expected):
            buffer = torch.empty(run.numel, dtype=self._wire_dtype or dtype)
            requests = [self._comm.irecv(buffer, source, tag + number)] if run.numel else []
            arriving.append(_Arriving(run, buffer, requests))
        return arriving
