"""The collective way of a batch to the owners of rows and back: ids out, pooled vectors in, gradients out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.embedding.inputs import Batch, empty_batch
from hvd_shadowsync.embedding.kernels.base import Gradient
from hvd_shadowsync.embedding.meeting import Call, Meetings, Word, takes_part
from hvd_shadowsync.embedding.routing import (
    Ask,
    Lookup,
    Router,
    Run,
    Traffic,
    exponent_of,
    pack,
    runs,
    runs_of,
    unpack,
)
from hvd_shadowsync.errors import EmbeddingError

IDS_TAG, VECTORS_TAG, GRADIENTS_TAG = 1, 1 << 8, 1 << 14


class _Arriving(NamedTuple):
    """A run of vectors on its way to this rank."""

    run: Run
    buffer: Tensor
    requests: list[Request]


class Exchange:
    """Looks up and updates, together with all ranks; for one thread at a time.

    Args:
        comm: used by this exchange alone.
        wire_dtype: of vectors and gradients on their way; None: as they are.
        sum_gradients: leave the scale of gradients as it is, in place of each rank's share of the global batch.
        debug: see `Meetings`.
    """

    def __init__(
        self,
        comm: Communicator,
        router: Router,
        poller: Poller,
        *,
        wire_dtype: torch.dtype | None,
        sum_gradients: bool,
        debug: bool,
    ) -> None:
        self._comm, self._router, self._poller = comm, router, poller
        self._wire_dtype, self._sum_gradients = wire_dtype, sum_gradients
        self.meetings = Meetings(comm, poller, debug=debug)
        self.traffic = Traffic()
        self._served: dict[int, Lookup] = {}

    def lookup(self, batch: Batch, *, wants_gradient: bool, dtype: torch.dtype) -> Lookup:
        """Look `batch` up; the vectors are in `Lookup.out`, [samples, width] (collective).

        Raises:
            EmbeddingError: see `Meetings.meet`.
        """
        asked = self._router.ask(batch)
        messages = {owner: pack(asked[owner]) for owner in self._router.others}
        sizes = [len(messages[rank]) if rank in messages else 0 for rank in range(self._comm.size)]
        weighted = "".join("w" if each.weights is not None else "-" for each in batch.features)
        words = self._meet(
            Call.LOOKUP,
            sizes,
            about=int(wants_gradient),
            samples=batch.num_samples,
            always=str(dtype),
            what=f"lookup {weighted}",
        )
        lookup = self._begin(words, batch, asked, dtype)
        self._finish(lookup, messages, words)
        return lookup

    def update(self, lookup: Lookup, gradient: Tensor, *, trails: bool = False) -> None:
        """Update the rows that `lookup` touched; `gradient` is that of `lookup.out` (collective).

        A rank that `trails` has no more batches: it takes part in lookups that others make before this update.
        """
        gradient = self._router.of_sums(lookup, gradient)
        exponent = exponent_of(gradient, self._wire_dtype)
        while True:
            words = self._meet(
                Call.UPDATE,
                about=lookup.number,
                exponent=exponent,
                trails=trails,
                always=f"{gradient.dtype} {self._router.shards.rule}",
            )
            if takes_part(words[self._comm.rank], words):
                break
            self._serve(Call.LOOKUP, words, gradient.dtype)
        self._update(lookup, gradient, words)

    def serve(self, dtype: torch.dtype, *, closing: bool) -> None:
        """Take part in what the others do, without a batch, until all are here, or all are closing (collective)."""
        own = Call.CLOSE if closing else Call.JOIN
        while True:
            words = self._meet(own)
            calls = {Call(word.call) for word in words if takes_part(word, words)}
            if calls:
                self._serve(calls.pop(), words, dtype)
            elif not closing or all(word.call == Call.CLOSE for word in words):
                self._served.clear()
                return

    def free(self) -> None:
        """Give back what this object made: nothing."""

    def leave_unused(self, lookup: Lookup) -> None:
        """Say that `lookup` will have no gradient here; while this rank serves others, it counts as zero."""
        lookup.out = torch.zeros_like(lookup.out)
        self._served[lookup.number] = lookup

    def _serve(self, call: Call, words: list[Word], dtype: torch.dtype) -> None:
        nothing = empty_batch(self._router.layout.features)
        about = next(word.about for word in words if word.call == call)
        if call is Call.LOOKUP:
            asked: list[list[Ask]] = [[] for _ in range(self._comm.size)]
            lookup = self._begin(words, nothing, asked, dtype)
            self._finish(lookup, {}, words)
            if about:
                self._served[lookup.number] = lookup
        elif call is Call.UPDATE:
            if about not in self._served:
                raise EmbeddingError(
                    f"others run backward of lookup {about}, which this rank did not run; join() after it"
                )
            lookup = self._served.pop(about)
            self._update(lookup, lookup.out, words)

    def _meet(self, call: Call, sizes: Sequence[int] = (), **more: object) -> list[Word]:
        words = self.meetings.meet(call, sizes, **more)  # type: ignore[arg-type]
        self.meetings.raise_failure(words)
        return words

    def _begin(self, words: list[Word], batch: Batch, asked: list[list[Ask]], dtype: torch.dtype) -> Lookup:
        total = sum(word.samples for word in words)
        scales = [1.0 if self._sum_gradients else word.samples / total if total else 0.0 for word in words]
        number = next(word.number for word in words if word.call == Call.LOOKUP)
        return Lookup(number, asked, [[] for _ in words], scales, batch, self._router.output(batch, dtype))

    def _finish(self, lookup: Lookup, messages: dict[int, Tensor], words: list[Word]) -> None:
        router, dtype = self._router, lookup.out.dtype
        sending = [self._comm.isend(message, owner, IDS_TAG) for owner, message in messages.items() if len(message)]
        self.traffic.id_bytes += sum(message.nbytes for message in messages.values())
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
                self.traffic.vector_bytes += self._wire_bytes(vectors)
        router.look_up_own(lookup)
        for owner, parts in answers.items():
            for part in parts:
                self._poller.wait(part.requests)
                router.put_in(lookup, owner, part.run, part.buffer)
        router.divide_means(lookup)
        self._poller.wait(sending)
        self.traffic.lookups += 1

    def _update(self, lookup: Lookup, gradient: Tensor, words: list[Word]) -> None:
        router, dtype = self._router, gradient.dtype
        arriving = {
            source: self._receive(source, runs(bags, router.pieces, dtype), dtype, GRADIENTS_TAG)
            for source, bags in enumerate(lookup.received)
            if bags
        }
        sending: list[Request] = []
        factor = 2.0 ** words[self._comm.rank].exponent
        for owner in router.others:
            for number, run in enumerate(runs_of(lookup.asked[owner], dtype)):
                vectors = router.gradients_for(lookup.asked[owner], run, gradient)
                sending += self._send(vectors if factor == 1 else vectors * factor, owner, GRADIENTS_TAG + number)
                self.traffic.gradient_bytes += self._wire_bytes(vectors)
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
        self.traffic.updates += 1

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
