"""A batch's way to the rows' owners and back: ids out, pooled vectors in, gradients out.

A rank asks an owner for vectors in one of two ways, whichever moves fewer bytes. *Pooled*: it sends the ids of each
bag, and the owner returns their sum. *Rows*: it sends each different id once, as a bag of its own, gets the rows, and
pools them itself; gradients are summed by row before they travel. An owner does the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.embedding.inputs import Batch, empty_batch
from hvd_shadowsync.embedding.kernels.base import Bags, Gradient, Kernel, Part, Pooling, Scattering
from hvd_shadowsync.embedding.layout import Layout, Piece
from hvd_shadowsync.embedding.meeting import Call, Meetings, Word, takes_part
from hvd_shadowsync.embedding.shards import Shards
from hvd_shadowsync.errors import EmbeddingError

CHUNK_BYTES = 1 << 20
IDS_TAG, VECTORS_TAG, GRADIENTS_TAG = 1, 1 << 8, 1 << 14
PIECE_WORDS = 3
HAS_LENGTHS, HAS_WEIGHTS = 1, 2
SEEN_AGAIN = 64
"""Lookups until ids of a piece are looked through for repetitions again, where that did not pay."""
MOST_EXPONENT = 100
"""Of the factor that half-precision gradients travel with; 2 to this is a float32."""
OFTEN = 4
"""Ids a bag up to which they are always looked through."""


class Ask(NamedTuple):
    """What this rank asks of one piece.

    Attributes:
        sent: as the owner sees it.
        local: how rows are pooled here; None where the owner pools.
        place: of the piece's ids among all ids of the feature; None: all of them.
    """

    piece: Piece
    sent: Bags
    local: Bags | None
    place: Tensor | None


@dataclass
class Lookup:
    """One batch under way, from its lookup to its update.

    Attributes:
        number: of its meeting.
        samples: of this rank.
        asked: by owner; of this rank's own shards as well.
        received: by source, the bags that it asks of this rank, in the order of its pieces; None for this rank.
        scales: by source, of its gradients.
        batch: of this rank.
        out: [samples, width], the vectors.
        rows: of features whose weights want gradients, the row of each id, by owner and place of the piece.
    """

    number: int
    samples: int
    asked: list[list[Ask]]
    received: list[list[Bags]]
    scales: list[float]
    batch: Batch
    out: Tensor
    rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass
class Traffic:
    """Bytes that this rank has sent, and lookups and updates that it took part in."""

    lookups: int = 0
    updates: int = 0
    id_bytes: int = 0
    vector_bytes: int = 0
    gradient_bytes: int = 0


class Exchange:
    """Looks up and updates, together with all ranks; for one thread at a time.

    Args:
        comm: used by this exchange alone.
        sum_gradients: leave the scale of gradients as it is, in place of each rank's share of the global batch.
    """

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        shards: Shards,
        kernel: Kernel,
        poller: Poller,
        *,
        wire_dtype: torch.dtype | None,
        sum_gradients: bool,
        debug: bool,
    ) -> None:
        self._comm, self._layout, self._shards, self._kernel, self._poller = comm, layout, shards, kernel, poller
        self._wire_dtype, self._sum_gradients = wire_dtype, sum_gradients
        self.meetings = Meetings(comm, poller, debug=debug)
        self.traffic = Traffic()
        self._served: dict[int, Lookup] = {}
        self._not_worth: dict[tuple[int, int], int] = {}
        self._others = [rank for rank in range(comm.size) if rank != comm.rank]
        self._pieces = layout.pieces[comm.rank]

    # --- what a rank does with its own batch --------------------------------------------------------------------------

    def lookup(self, batch: Batch, *, wants_gradient: bool, dtype: torch.dtype) -> Lookup:
        """Look `batch` up; the vectors are in `Lookup.out`, [samples, width] (collective).

        Raises:
            EmbeddingError: see `Meetings.meet`.
        """
        asked = self._ask(batch)
        messages = {owner: _pack(asked[owner]) for owner in self._others}
        sizes = [len(messages[rank]) if rank in messages else 0 for rank in range(self._comm.size)]
        weighted = "".join("w" if each.weights is not None else "-" for each in batch.features)
        words = self._meet(
            Call.LOOKUP, sizes, about=int(wants_gradient), samples=batch.num_samples, what=f"lookup {weighted}"
        )
        lookup = self._begin(words, batch, asked, dtype)
        self._finish(lookup, messages, words)
        return lookup

    def update(self, lookup: Lookup, gradient: Tensor, *, trails: bool = False) -> None:
        """Update the rows that `lookup` touched; `gradient` is that of `lookup.out` (collective).

        A rank that `trails` has no more batches: it takes part in lookups that others make before this update.
        """
        gradient = self._of_sums(lookup, gradient)
        peak = gradient.abs().amax().item() if self._wire_dtype is torch.float16 and gradient.numel() else 0.0
        exponent = min(8 - math.frexp(peak)[1], MOST_EXPONENT) if peak and math.isfinite(peak) else 0
        while True:
            words = self._meet(Call.UPDATE, about=lookup.number, exponent=exponent, what="update", trails=trails)
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

    def leave_unused(self, lookup: Lookup) -> None:
        """Say that `lookup` will have no gradient here; while this rank serves others, it counts as zero."""
        lookup.out = torch.zeros_like(lookup.out)
        self._served[lookup.number] = lookup

    def _serve(self, call: Call, words: list[Word], dtype: torch.dtype) -> None:
        nothing = empty_batch(self._layout.features)
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

    # --- ids ----------------------------------------------------------------------------------------------------------

    def _ask(self, batch: Batch) -> list[list[Ask]]:
        """Take a batch apart by owner."""
        parts: dict[int, list[Part]] = {}
        unique: dict[tuple[int, int], tuple[Tensor, Tensor] | None] = {}
        asked: list[list[Ask]] = []
        for owner, pieces in enumerate(self._layout.pieces):
            asked.append([])
            for piece in pieces:
                bags, place = batch.features[piece.feature], None
                if (division := self._layout.divisions[piece.feature]) is not None:
                    if piece.feature not in parts:
                        parts[piece.feature] = self._kernel.split(bags, division)
                    bags, place = parts[piece.feature][piece.part]
                if owner == self._comm.rank:
                    asked[owner].append(Ask(piece, bags, None, place))
                    continue
                key = (piece.feature, piece.part)
                if key not in unique:
                    unique[key] = self._unique(key, bags, piece.dim, must=piece.feature in batch.learned)
                if (found := unique[key]) is None:
                    asked[owner].append(Ask(piece, bags, None, place))
                else:
                    local = Bags(found[1], bags.lengths, bags.weights)
                    asked[owner].append(Ask(piece, Bags(found[0]), local, place))
        return asked

    def _unique(self, key: tuple[int, int], bags: Bags, dim: int, *, must: bool) -> tuple[Tensor, Tensor] | None:
        """Return the different ids and where each is used, if asking for rows moves fewer bytes than pooled vectors."""
        num_ids, num_bags = len(bags.ids), bags.num_bags
        waiting = self._not_worth.get(key, 0)
        if not must and num_ids > OFTEN * num_bags and waiting:
            self._not_worth[key] = waiting - 1
            return None
        found = self._kernel.unique(bags.ids)
        as_rows = len(found[0]) * (1 + 2 * dim)
        as_vectors = num_bags * (2 * dim + 1) + num_ids * (1 if bags.weights is None else 2)
        if must or as_rows < as_vectors:
            return found
        self._not_worth[key] = SEEN_AGAIN
        return None

    # --- the exchange -------------------------------------------------------------------------------------------------

    def _meet(self, call: Call, sizes: Sequence[int] = (), **more: object) -> list[Word]:
        words = self.meetings.meet(call, sizes, **more)  # type: ignore[arg-type]
        self.meetings.raise_failure(words)
        return words

    def _begin(self, words: list[Word], batch: Batch, asked: list[list[Ask]], dtype: torch.dtype) -> Lookup:
        total = sum(word.samples for word in words)
        scales = [1.0 if self._sum_gradients else word.samples / total if total else 0.0 for word in words]
        out = torch.empty(batch.num_samples, self._layout.width, dtype=dtype)
        number = next(word.number for word in words if word.call == Call.LOOKUP)
        return Lookup(number, batch.num_samples, asked, [[] for _ in words], scales, batch, out)

    def _finish(self, lookup: Lookup, messages: dict[int, Tensor], words: list[Word]) -> None:
        sending = [self._comm.isend(message, owner, IDS_TAG) for owner, message in messages.items() if len(message)]
        self.traffic.id_bytes += sum(message.nbytes for message in messages.values())
        arriving = {}
        for source in self._others:
            if words[source].size:
                buffer = torch.empty(words[source].size, dtype=torch.int32)
                arriving[source] = (buffer, self._comm.irecv(buffer, source, IDS_TAG))
        dtype = lookup.out.dtype
        replies = self._receive({o: lookup.asked[o] for o in self._others if lookup.asked[o]}, dtype, VECTORS_TAG)
        for source, (buffer, request) in arriving.items():
            self._poller.wait([request])
            lookup.received[source] = _unpack(buffer, len(self._pieces), dtype)
            sending += self._answer(source, lookup.received[source], dtype)
        for index, column in enumerate(self._layout.columns):
            if self._layout.divisions[index] is not None or index in self._layout.local:
                lookup.out[:, slice(*column)] = 0
        self._pool_own(lookup)
        for owner, chunks in replies.items():
            for chunk in chunks:
                self._poller.wait(chunk.requests)
                self._combine(lookup, owner, chunk)
        self._divide_means(lookup, lookup.out)
        self._poller.wait(sending)
        self.traffic.lookups += 1

    def _answer(self, source: int, received: list[Bags], dtype: torch.dtype) -> list[Request]:
        """Pool what `source` asks for and send it, chunk by chunk."""
        sending = []
        sizes = [bags.num_bags * piece.dim for bags, piece in zip(received, self._pieces, strict=True)]
        for number, (first, last) in enumerate(_chunks(sizes, dtype)):
            buffer = torch.empty(sum(sizes[first:last]), dtype=dtype)
            vectors = _views(buffer, received[first:last], self._pieces[first:last])
            self._kernel.pool(
                [
                    Pooling(self._shards[piece.shard].weight, bags, view)
                    for piece, bags, view in zip(self._pieces[first:last], received[first:last], vectors, strict=True)
                ]
            )
            sending += self._send(buffer, source, VECTORS_TAG + number)
            self.traffic.vector_bytes += self._wire_bytes(buffer)
        return sending

    def _pool_own(self, lookup: Lookup) -> None:
        poolings = []
        for place, (piece, bags, _, _) in enumerate(lookup.asked[self._comm.rank]):
            rows = self._shards[piece.shard].weight
            poolings.append(Pooling(rows, bags, _columns(lookup.out, piece), piece.add))
            if piece.feature in lookup.batch.learned:
                lookup.rows[self._comm.rank, place] = rows[bags.ids]
        self._kernel.pool(poolings)

    def _combine(self, lookup: Lookup, owner: int, chunk: _Chunk) -> None:
        asks = lookup.asked[owner][chunk.first : chunk.last]
        buffer = chunk.buffer.to(lookup.out.dtype)
        views = _views(buffer, [ask.sent for ask in asks], [ask.piece for ask in asks])
        poolings = []
        for place, ((piece, _, local, _), vectors) in enumerate(zip(asks, views, strict=True), chunk.first):
            out = _columns(lookup.out, piece)
            if local is not None:
                poolings.append(Pooling(vectors, local, out, piece.add))
                if piece.feature in lookup.batch.learned:
                    lookup.rows[owner, place] = vectors[local.ids]
            elif piece.add:
                out += vectors
            else:
                out.copy_(vectors)
        self._kernel.pool(poolings)

    def _update(self, lookup: Lookup, gradient: Tensor, words: list[Word]) -> None:
        dtype = gradient.dtype
        sources = {s: bags for s, bags in enumerate(lookup.received) if bags}
        asks = {
            s: [Ask(p, b, None, None) for p, b in zip(self._pieces, bags, strict=True)] for s, bags in sources.items()
        }
        arriving = self._receive(asks, dtype, GRADIENTS_TAG)
        sending: list[Request] = []
        exponent = words[self._comm.rank].exponent
        for owner in self._others:
            sending += self._send_gradients(lookup.asked[owner], gradient, owner, exponent)
        found: list[list[Gradient]] = [[] for _ in range(len(self._shards))]
        for source in range(self._comm.size):
            scale = lookup.scales[source]
            if source == self._comm.rank:
                for piece, bags, _, _ in lookup.asked[source]:
                    found[piece.shard].append(Gradient(bags, _columns(gradient, piece), scale))
                continue
            for chunk in arriving.get(source, []):
                self._poller.wait(chunk.requests)
                bags_of = lookup.received[source][chunk.first : chunk.last]
                pieces = self._pieces[chunk.first : chunk.last]
                vectors = _views(chunk.buffer.to(dtype), bags_of, pieces)
                for piece, bags, view in zip(pieces, bags_of, vectors, strict=True):
                    found[piece.shard].append(Gradient(bags, view, math.ldexp(scale, -words[source].exponent)))
        self._shards.update(self._kernel, found)
        self._poller.wait(sending)
        self.traffic.updates += 1

    def _send_gradients(self, asks: list[Ask], gradient: Tensor, owner: int, exponent: int) -> list[Request]:
        sending = []
        sizes = [ask.sent.num_bags * ask.piece.dim for ask in asks]
        for number, (first, last) in enumerate(_chunks(sizes, gradient.dtype)):
            buffer = torch.empty(sum(sizes[first:last]), dtype=gradient.dtype)
            part = asks[first:last]
            scatterings = []
            for ask, view in zip(part, _views(buffer, [a.sent for a in part], [a.piece for a in part]), strict=True):
                if ask.local is None:
                    view.copy_(_columns(gradient, ask.piece))
                else:
                    scatterings.append(Scattering(ask.local, _columns(gradient, ask.piece), view))
            self._kernel.scatter(scatterings)
            if exponent:
                buffer *= 2.0**exponent
            sending += self._send(buffer, owner, GRADIENTS_TAG + number)
            self.traffic.gradient_bytes += self._wire_bytes(buffer)
        return sending

    # --- messages -----------------------------------------------------------------------------------------------------

    def _send(self, buffer: Tensor, dest: int, tag: int) -> list[Request]:
        if not len(buffer):
            return []
        return [self._comm.isend(buffer if self._wire_dtype is None else buffer.to(self._wire_dtype), dest, tag)]

    def _wire_bytes(self, buffer: Tensor) -> int:
        return buffer.numel() * (self._wire_dtype or buffer.dtype).itemsize

    def _receive(self, asks: dict[int, list[Ask]], dtype: torch.dtype, tag: int) -> dict[int, list[_Chunk]]:
        """Begin to receive the vectors of `asks`, by rank that sends them."""
        arriving: dict[int, list[_Chunk]] = {}
        for rank, asked in asks.items():
            sizes = [ask.sent.num_bags * ask.piece.dim for ask in asked]
            arriving[rank] = []
            for number, (first, last) in enumerate(_chunks(sizes, dtype)):
                buffer = torch.empty(sum(sizes[first:last]), dtype=self._wire_dtype or dtype)
                requests = [self._comm.irecv(buffer, rank, tag + number)] if len(buffer) else []
                arriving[rank].append(_Chunk(first, last, buffer, requests))
        return arriving

    # --- means and weights --------------------------------------------------------------------------------------------

    def _divide_means(self, lookup: Lookup, vectors: Tensor) -> None:
        for index, counts in self._means(lookup.batch):
            vectors[:, slice(*self._layout.columns[index])] /= counts

    def _of_sums(self, lookup: Lookup, gradient: Tensor) -> Tensor:
        """Return the gradient of what owners sum up, rows contiguous."""
        means = list(self._means(lookup.batch))
        gradient = gradient.clone() if means else gradient
        for index, counts in means:
            gradient[:, slice(*self._layout.columns[index])] /= counts
        return gradient if gradient.stride(-1) == 1 or not gradient.numel() else gradient.contiguous()

    def _means(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        for index, feature in enumerate(self._layout.features):
            lengths = batch.features[index].lengths
            if feature.table.pooling == "mean" and lengths is not None and index not in self._layout.local:
                yield index, lengths.clamp(min=1).unsqueeze(1)

    @staticmethod
    def weight_gradients(lookup: Lookup, gradient: Tensor) -> dict[int, Tensor]:
        """Return the gradients of the weights that want one, by feature: the rows' products with `gradient`."""
        found = {index: gradient.new_zeros(len(lookup.batch.features[index].ids)) for index in lookup.batch.learned}
        for (owner, place), rows in lookup.rows.items():
            piece, sent, local, among = lookup.asked[owner][place]
            bags = sent if local is None else local
            vectors = _columns(gradient, piece)
            if bags.lengths is not None:
                vectors = vectors.repeat_interleave(bags.lengths, 0)
            found[piece.feature][slice(None) if among is None else among] += (vectors * rows).sum(1)
        return found


@dataclass
class _Chunk:
    """Vectors of the pieces [first, last), which arrive together."""

    first: int
    last: int
    buffer: Tensor
    requests: list[Request]


def _columns(vectors: Tensor, piece: Piece) -> Tensor:
    return vectors[:, piece.column : piece.column + piece.dim]


def _chunks(sizes: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Divide pieces into runs of at least `CHUNK_BYTES`, the last one excepted, which may even be without elements."""
    first = elements = 0
    for index, size in enumerate(sizes):
        elements += size
        if elements * dtype.itemsize >= CHUNK_BYTES or index == len(sizes) - 1:
            yield first, index + 1
            first, elements = index + 1, 0


def _views(buffer: Tensor, bags: Sequence[Bags], pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the parts of a flat buffer as [bags, dim]."""
    views, at = [], 0
    for each, piece in zip(bags, pieces, strict=True):
        size = each.num_bags * piece.dim
        views.append(buffer[at : at + size].view(each.num_bags, piece.dim))
        at += size
    return views


def _pack(asks: list[Ask]) -> Tensor:
    """Return all that is asked of one owner as one int32 message: a head of three words a piece, then its arrays."""
    head: list[int] = []
    arrays: list[Tensor] = []
    for ask in asks:
        ids, lengths, weights = ask.sent
        flags = (HAS_LENGTHS if lengths is not None else 0) | (HAS_WEIGHTS if weights is not None else 0)
        head += [ask.sent.num_bags, len(ids), flags]
        arrays.append(ids.int())
        arrays += [] if lengths is None else [lengths]
        arrays += [] if weights is None else [weights.detach().contiguous().view(torch.int32)]
    if not any(head):
        return torch.empty(0, dtype=torch.int32)
    return torch.cat([torch.tensor(head, dtype=torch.int32), *arrays])


def _unpack(message: Tensor, num_pieces: int, dtype: torch.dtype) -> list[Bags]:
    """Return what `_pack` was given."""
    at = PIECE_WORDS * num_pieces
    head = message[:at].tolist()

    def take(count: int) -> Tensor:
        nonlocal at
        at += count
        return message[at - count : at]

    found = []
    for number in range(num_pieces):
        num_bags, num_ids, flags = head[PIECE_WORDS * number : PIECE_WORDS * (number + 1)]
        ids = take(num_ids)
        lengths = take(num_bags) if flags & HAS_LENGTHS else None
        weights = take(num_ids * dtype.itemsize // 4).clone().view(dtype) if flags & HAS_WEIGHTS else None
        found.append(Bags(ids, lengths, weights))
    return found
