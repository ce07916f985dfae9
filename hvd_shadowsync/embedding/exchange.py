"""The collective way of a batch to the owners of rows and back: ids out, pooled vectors in, gradients out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.embedding.carrier import Carrier, Way
from hvd_shadowsync.embedding.inputs import Batch, empty_batch
from hvd_shadowsync.embedding.meeting import Call, Meetings, Word, takes_part
from hvd_shadowsync.embedding.messages import Messages
from hvd_shadowsync.embedding.onehost import OneHost
from hvd_shadowsync.embedding.replicas import Replicas
from hvd_shadowsync.embedding.routing import KEPT, Ask, Lookup, Router, Traffic, exponent_of, remember
from hvd_shadowsync.errors import EmbeddingError


class Exchange:
    """Looks up and updates, together with all ranks; for one thread at a time.

    Args:
        comm: used by this exchange alone.
        wire_dtype: of vectors and gradients on their way; None: as they are.
        sum_gradients: leave the scale of gradients as it is, in place of each rank's share of the global batch.
        share_memory: let ranks that are all on one host, and have no `wire_dtype`, do without messages.
        debug, owner: see `Meetings`.
        replicas: of rows, if there are any.
        view: how often ranks have been lost; what was begun in an earlier one is void.
        traffic: so far; lookups are numbered from there.
    """

    def __init__(
        self,
        comm: Communicator,
        router: Router,
        poller: Poller,
        *,
        wire_dtype: torch.dtype | None,
        sum_gradients: bool,
        share_memory: bool,
        debug: bool,
        owner: threading.Thread | None = None,
        replicas: Replicas | None = None,
        view: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        self._comm, self._router, self._poller = comm, router, poller
        self._wire_dtype, self._sum_gradients = wire_dtype, sum_gradients
        self.meetings = Meetings(comm, poller, debug=debug, owner=owner)
        self._view, self.traffic = view, Traffic() if traffic is None else traffic
        self._messages = Messages(comm, router, poller, self.traffic, wire_dtype)
        share = share_memory and wire_dtype is None
        self._host = OneHost.of(comm, router, poller, self.traffic, self.meetings) if share else None
        self._shares = self._host is not None
        self.replicas = replicas
        router.after_update = None if replicas is None else replicas.follow
        self._served: dict[int, Lookup] = {}
        self._begun: weakref.WeakValueDictionary[int, Lookup] = weakref.WeakValueDictionary()

    def lookup(self, batch: Batch, *, wants_gradient: bool, dtype: torch.dtype) -> Lookup:
        """Look `batch` up; the vectors are in `Lookup.out`, [samples, width] (collective).

        Raises:
            EmbeddingError: see `Meetings.meet`.
        """
        if self._host is not None and (failure := self._host.failure):
            try:
                self.meetings.fail(failure)
            except EmbeddingError:
                raise EmbeddingError(failure) from None
        weighted = "".join("w" if each.weights is not None else "-" for each in batch.features)
        carrier: Carrier = (
            self._host if self._host is not None and self._shares and not batch.learned else self._messages
        )
        settled = False
        while not settled:
            offer = carrier.offer(batch, dtype) or self._messages.offer(batch, dtype)
            words = self._meet(
                Call.LOOKUP,
                offer.sizes,
                about=int(wants_gradient),
                samples=batch.num_samples,
                always=str(dtype),
                what=f"lookup {weighted}",
                way=offer.way,
            )
            carrier, settled = self._carrier(words)
        lookup = self._begin(words, offer.asked, batch, dtype)
        carrier.look_up(lookup, offer, words, dtype)
        self.traffic.lookups += 1
        if wants_gradient:
            self._begun[lookup.number] = lookup
        return lookup

    def stage(self, lookup: Lookup, gradient: Tensor, *, keep: bool) -> Tensor:
        """See `Carrier.stage`; may be called by another thread."""
        if lookup.view != self._view:
            return gradient
        return self._carrier_of(lookup).stage(lookup, gradient, keep=keep)

    def update(self, lookup: Lookup, gradient: Tensor, *, trails: bool = False) -> None:
        """Update the rows that `lookup` touched; `gradient` is what was staged (collective).

        A rank that `trails` has no more batches: it takes part in lookups that others make before this update.

        Of lookups from before a rank was lost nothing is updated; where others have looked up once more since, this
        rank takes part with nothing of its own.
        """
        if lookup.view != self._view:
            if lookup.number not in self._served:
                return
            lookup = self._served.pop(lookup.number)
            gradient = lookup.out
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
        self._update(lookup, gradient, exponent, words)

    def serve(self, dtype: torch.dtype, *, closing: bool, agree: Callable[[], None]) -> None:
        """Take part in what the others do, without a batch, until all are here, or all are closing (collective).

        All `agree` that they have heard so of each other: a rank that is lost then may be lost to some of them alone.
        """
        own = Call.CLOSE if closing else Call.JOIN
        while True:
            words = self._meet(own, about=len(self._begun))
            calls = {Call(word.call) for word in words if takes_part(word, words)}
            if calls:
                self._serve(calls.pop(), words, dtype)
                continue
            agree()
            if not closing or all(word.call == Call.CLOSE for word in words):
                awaited = any(word.about for word in words)  # a rank may run backward through what it looked up yet
                if closing or not awaited:
                    self._served.clear()
                return

    def serve_lookup(self, dtype: torch.dtype) -> None:
        """Take part in one lookup of others, without a batch (collective)."""
        number = self.traffic.lookups + 1
        while self.traffic.lookups < number:
            self._serve(Call.LOOKUP, self._meet(Call.JOIN), dtype)

    def free(self) -> None:
        """Give back what this object made: nothing."""

    def leave_unused(self, lookup: Lookup) -> None:
        """Say that `lookup` will have no gradient here; while this rank serves others, it counts as zero."""
        if lookup.view != self._view:
            return
        self._begun.pop(lookup.number, None)
        lookup.out = self.stage(lookup, torch.zeros_like(lookup.out), keep=True)
        remember(self._served, lookup.number, lookup)

    def _serve(self, call: Call, words: list[Word], dtype: torch.dtype) -> None:
        nothing = empty_batch(self._router.layout.features)
        about = next(word.about for word in words if word.call == call)
        if call is Call.LOOKUP:
            carrier, settled = self._carrier(words)
            if not settled:
                return
            lookup = self._begin(words, [[] for _ in words], nothing, dtype)
            carrier.look_up(lookup, None, words, dtype)
            self.traffic.lookups += 1
            if about:
                remember(self._served, lookup.number, lookup)
        elif call is Call.UPDATE:
            if about not in self._served:
                raise EmbeddingError(
                    f"others run backward of lookup {about}, which this rank did not run (join() after it), or of "
                    f"which it remembers the last {KEPT} only (look up under torch.no_grad() where no backward follows)"
                )
            lookup = self._served.pop(about)
            self._update(lookup, lookup.out, 0, words)

    def _update(self, lookup: Lookup, gradient: Tensor, exponent: int, words: list[Word]) -> None:
        updating = [rank for rank, word in enumerate(words) if takes_part(word, words)]
        if len(updating) < self._comm.size:
            self._take_settings_of(updating[0])
        self._begun.pop(lookup.number, None)
        self._carrier_of(lookup).update(lookup, gradient, exponent, words)
        self.traffic.updates += 1

    def _take_settings_of(self, rank: int) -> None:
        """Let ranks that have no batches update their rows as those do that have (collective)."""
        shards = self._router.shards
        mine = torch.tensor([shards.rule.settings], dtype=torch.float64)
        everyone = mine.new_empty(self._comm.size, mine.shape[1])
        self._poller.wait([self._comm.iallgather(mine, everyone)])
        shards.rule = shards.rule.with_settings(everyone[rank].tolist())

    def _carrier_of(self, lookup: Lookup) -> Carrier:
        return self._host if lookup.staged and self._host is not None else self._messages

    def _meet(self, call: Call, sizes: Sequence[int] = (), **more: object) -> list[Word]:
        stale = self.replicas is not None and self.replicas.is_stale
        words = self.meetings.meet(call, sizes, stale=stale, **more)  # type: ignore[arg-type]
        self.meetings.raise_failure(words)
        if self.replicas is not None and all(word.call != Call.GLOBAL for word in words):
            self.replicas.renew([bool(word.stale) for word in words])
        return words

    def _begin(self, words: list[Word], asked: list[list[Ask]], batch: Batch, dtype: torch.dtype) -> Lookup:
        total = sum(word.samples for word in words)
        scales = [1.0 if self._sum_gradients else word.samples / total if total else 0.0 for word in words]
        number = self.traffic.lookups + 1  # the same on all ranks, which take part in all of them
        out = torch.empty(0, dtype=dtype)
        return Lookup(number, asked, [[] for _ in words], scales, batch, out, view=self._view)

    def _carrier(self, words: list[Word]) -> tuple[Carrier, bool]:
        """Return how batches go, and whether they are all ready to; else the ranks meet again (the same on all)."""
        ways = {word.way for word in words if word.call == Call.LOOKUP}
        if self._host is None or Way.MESSAGES in ways:
            return self._messages, ways == {Way.MESSAGES}
        if Way.MORE in ways:
            self._shares = self._host.grow(max(word.size for word in words if word.way == Way.MORE))
            return self._host if self._shares else self._messages, False
        return self._host, ways == {Way.SHARED}
