"""What one rank does with a batch and with what others ask of it; nothing here waits for anybody.

A rank asks an owner for vectors in one of two ways, whichever moves fewer bytes. *Pooled*: it sends the ids of each
bag, and the owner returns their sum. *Rows*: it sends each different id once, as a bag of its own, gets the rows, and
pools them itself; gradients are summed by row before they travel. An owner does the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hvd_shadowsync.embedding.inputs import Batch
from hvd_shadowsync.embedding.kernels.base import Bags, Gradient, Kernel, Part, Pooling, Scattering
from hvd_shadowsync.embedding.layout import Layout, Piece
from hvd_shadowsync.embedding.shards import Shards

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
KEPT = 64
"""Lookups of another rank that one remembers, from the last on; older ones can have no update any more."""
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
        number: from 1; in mode "served" of its ticket.
        asked: by owner; of this rank's own shards as well.
        received: by source, the bags that it asks of this rank, in the order of its pieces; None for this rank.
        scales: by source, of its gradients.
        batch: of this rank.
        out: [samples, width], the vectors.
        rows: of features whose weights want gradients, the row of each id, by owner and place of the piece.
        view: how often ranks had been lost before it.
        staged: by source, [samples, width], where its gradient lies when all ranks have met for the update; None for
            ranks without a batch. Empty where gradients travel in messages.
    """

    number: int
    asked: list[list[Ask]]
    received: list[list[Bags]]
    scales: list[float]
    batch: Batch
    out: Tensor
    rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    view: int = 0
    staged: list[Tensor | None] = field(default_factory=list)


@dataclass
class Traffic:
    """Bytes that this rank has sent, and lookups and updates that it took part in."""

    lookups: int = 0
    updates: int = 0
    id_bytes: int = 0
    vector_bytes: int = 0
    gradient_bytes: int = 0
    replica_bytes: int = 0


class Run(NamedTuple):
    """The pieces [first, last) of one owner, whose vectors travel together, `numel` elements."""

    first: int
    last: int
    numel: int


class Router:
    """Takes batches apart by owner, puts vectors together, sums gradients; for one thread at a time.

    Args:
        rank: this one.
    """

    def __init__(self, layout: Layout, rank: int, shards: Shards, kernel: Kernel) -> None:
        self.layout, self.rank, self.shards, self._kernel = layout, rank, shards, kernel
        self.pieces = layout.pieces[rank]
        self.others = [each for each in range(len(layout.pieces)) if each != rank]
        self.after_update: Callable[[Sequence[Sequence[Gradient]]], None] | None = None
        """Called with the gradients of each update, by shard, when it is done."""
        self._not_worth: dict[tuple[int, int], int] = {}

    # --- lookups ------------------------------------------------------------------------------------------------------

    def ask(self, batch: Batch, *, pooled: bool = False) -> list[list[Ask]]:
        """Take a batch apart by owner; with `pooled` all owners pool, whatever that moves."""
        parts: dict[int, list[Part]] = {}
        unique: dict[tuple[int, int], tuple[Tensor, Tensor] | None] = {}
        asked: list[list[Ask]] = []
        for owner, pieces in enumerate(self.layout.pieces):
            asked.append([])
            for piece in pieces:
                bags, place = batch.features[piece.feature], None
                if (division := self.layout.divisions[piece.feature]) is not None:
                    if piece.feature not in parts:
                        parts[piece.feature] = self._kernel.split(bags, division)
                    bags, place = parts[piece.feature][piece.part]
                if owner == self.rank or pooled:
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
        num_ids, num_bags = bags.ids.numel(), bags.num_bags
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

    def output(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Return memory for the vectors of `batch`, [samples, width]; zeros where they are sums of several owners'."""
        out = torch.empty(batch.num_samples, self.layout.width, dtype=dtype)
        for index, column in enumerate(self.layout.columns):
            if self.layout.divisions[index] is not None or index in self.layout.local:
                out[:, slice(*column)] = 0
        return out

    def answer(self, received: list[Bags], run: Run, dtype: torch.dtype) -> Tensor:
        """Return the vectors that another rank asks for."""
        buffer = torch.empty(run.numel, dtype=dtype)
        pieces, bags = self.pieces[run.first : run.last], received[run.first : run.last]
        found = zip(pieces, bags, views(buffer, bags, pieces), strict=True)
        self._kernel.pool([Pooling(self.shards[piece.shard].weight, each, view) for piece, each, view in found])
        return buffer

    def look_up_own(self, lookup: Lookup) -> None:
        """Put in the vectors of this rank's own shards."""
        poolings = []
        for place, (piece, bags, _, _) in enumerate(lookup.asked[self.rank]):
            rows = self.shards[piece.shard].weight
            poolings.append(Pooling(rows, bags, _columns(lookup.out, piece), piece.add))
            if piece.feature in lookup.batch.learned:
                lookup.rows[self.rank, place] = rows[bags.ids]
        self._kernel.pool(poolings)

    def put_in(self, lookup: Lookup, owner: int, run: Run, buffer: Tensor) -> None:
        """Put in what `owner` answered."""
        asks = lookup.asked[owner][run.first : run.last]
        found = views(buffer.to(lookup.out.dtype), [ask.sent for ask in asks], [ask.piece for ask in asks])
        poolings = []
        for place, ((piece, _, local, _), vectors) in enumerate(zip(asks, found, strict=True), run.first):
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

    def pool(self, poolings: Sequence[Pooling]) -> None:
        """Pool."""
        self._kernel.pool(poolings)

    # --- gradients ----------------------------------------------------------------------------------------------------

    def gradients_for(self, asks: list[Ask], run: Run, gradient: Tensor) -> Tensor:
        """Return the gradients that go to one owner."""
        buffer = torch.empty(run.numel, dtype=gradient.dtype)
        part = asks[run.first : run.last]
        scatterings = []
        for ask, view in zip(part, views(buffer, [a.sent for a in part], [a.piece for a in part]), strict=True):
            if ask.local is None:
                view.copy_(_columns(gradient, ask.piece))
            else:
                scatterings.append(Scattering(ask.local, _columns(gradient, ask.piece), view))
        self._kernel.scatter(scatterings)
        return buffer

    def own_gradients(self, lookup: Lookup, gradient: Tensor, scale: float) -> list[tuple[int, Gradient]]:
        """Return this rank's gradients for its own shards, with the index of each shard."""
        return [
            (piece.shard, Gradient(bags, _columns(gradient, piece), scale))
            for piece, bags, _, _ in lookup.asked[self.rank]
        ]

    def gradients_of(self, received: list[Bags], run: Run, buffer: Tensor, scale: float) -> list[tuple[int, Gradient]]:
        """Return another rank's gradients, which came in `buffer`, with the index of each shard."""
        pieces, bags = self.pieces[run.first : run.last], received[run.first : run.last]
        found = zip(pieces, bags, views(buffer, bags, pieces), strict=True)
        return [(piece.shard, Gradient(each, view, scale)) for piece, each, view in found]

    def gradients_in(self, received: list[Bags], gradient: Tensor, scale: float) -> list[tuple[int, Gradient]]:
        """Return another rank's gradients, which lie in that of its output, with the index of each shard."""
        found = zip(self.pieces, received, strict=True)
        return [(piece.shard, Gradient(each, _columns(gradient, piece), scale)) for piece, each in found]

    def update(self, gradients: Sequence[tuple[int, Gradient]]) -> None:
        """Take one step on the shards of this rank that have gradients."""
        by_shard: list[list[Gradient]] = [[] for _ in range(len(self.shards))]
        for shard, gradient in gradients:
            by_shard[shard].append(gradient)
        self.shards.update(self._kernel, by_shard)
        if self.after_update is not None:
            self.after_update(by_shard)

    # --- means and weights --------------------------------------------------------------------------------------------

    def divide_means(self, lookup: Lookup) -> None:
        """Make means of the sums that are to be means."""
        for index, counts in self.means(lookup.batch):
            lookup.out[:, slice(*self.layout.columns[index])] /= counts

    def of_sums(self, lookup: Lookup, gradient: Tensor, *, keep: bool) -> Tensor:
        """Return the gradient of what owners sum up, rows contiguous; with `keep` no memory of the caller."""
        means = list(self.means(lookup.batch))
        gradient = gradient.clone() if means or keep else gradient
        for index, counts in means:
            gradient[:, slice(*self.layout.columns[index])] /= counts
        return gradient if gradient.stride(-1) == 1 or not gradient.numel() else gradient.contiguous()

    def means(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """Yield the features whose sums are to be means, and what to divide by, [samples, 1]."""
        for index, feature in enumerate(self.layout.features):
            lengths = batch.features[index].lengths
            if feature.table.pooling == "mean" and lengths is not None and index not in self.layout.local:
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


def runs(bags: Sequence[Bags], pieces: Sequence[Piece], dtype: torch.dtype) -> list[Run]:
    """Divide pieces into runs of at least `CHUNK_BYTES`, the last one excepted, which may even be without elements."""
    found = []
    first = numel = 0
    for index, (each, piece) in enumerate(zip(bags, pieces, strict=True)):
        numel += each.num_bags * piece.dim
        if numel * dtype.itemsize >= CHUNK_BYTES or index == len(pieces) - 1:
            found.append(Run(first, index + 1, numel))
            first, numel = index + 1, 0
    return found


def runs_of(asks: Sequence[Ask], dtype: torch.dtype) -> list[Run]:
    """Divide what is asked of one owner."""
    return runs([ask.sent for ask in asks], [ask.piece for ask in asks], dtype)


def exponent_of(gradient: Tensor, wire_dtype: torch.dtype | None) -> int:
    """Return e such that 2^e times `gradient` is well within half precision; 0 where it travels as it is."""
    peak = gradient.abs().amax().item() if wire_dtype is torch.float16 and gradient.numel() else 0.0
    return min(8 - math.frexp(peak)[1], MOST_EXPONENT) if peak and math.isfinite(peak) else 0


def remember(lookups: dict[int, T], number: int, lookup: T) -> None:
    """Keep what the update of another rank's lookup needs; forget the oldest of more than `KEPT`."""
    lookups[number] = lookup
    while len(lookups) > KEPT:
        del lookups[next(iter(lookups))]


def _columns(vectors: Tensor, piece: Piece) -> Tensor:
    return vectors[:, piece.column : piece.column + piece.dim]


def views(buffer: Tensor, bags: Sequence[Bags], pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the parts of a flat buffer as [bags, dim]."""
    views, at = [], 0
    for each, piece in zip(bags, pieces, strict=True):
        size = each.num_bags * piece.dim
        views.append(buffer[at : at + size].view(each.num_bags, piece.dim))
        at += size
    return views


def pack(asks: list[Ask]) -> Tensor:
    """Return all that is asked of one owner as one int32 message: a head of three words a piece, then its arrays."""
    head: list[int] = []
    arrays: list[Tensor] = []
    for ask in asks:
        ids, lengths, weights = ask.sent
        flags = (HAS_LENGTHS if lengths is not None else 0) | (HAS_WEIGHTS if weights is not None else 0)
        head += [ask.sent.num_bags, ids.numel(), flags]
        arrays.append(ids.int())
        arrays += [] if lengths is None else [lengths]
        arrays += [] if weights is None else [weights.detach().contiguous().view(torch.int32)]
    if not any(head):
        return torch.empty(0, dtype=torch.int32)
    return torch.cat([torch.tensor(head, dtype=torch.int32), *arrays])


def unpack(message: Tensor, num_pieces: int, dtype: torch.dtype) -> list[Bags]:
    """Return what `pack` was given."""
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
