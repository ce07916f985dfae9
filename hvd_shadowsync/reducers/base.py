"""What a reducer is, and how a flat vector is cut into shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from hvd_shadowsync.comm.transfer import Transfer

CHUNK_BYTES = 1 << 20

Slices = Iterator[tuple[slice, Tensor]]
Fill = Callable[[slice], None]


def as_it_is(part: slice) -> None:
    """Fill nothing in: the snapshot was taken as a whole."""


class Reducer(ABC):
    """Turns the ranks' snapshots into what the algorithm's `update` takes.

    It yields `(slice, values)` as slices arrive; later slices are under way while the caller works on one. The values
    are valid until the next one is asked for. One thread uses a reducer.
    """

    bytes_sent = 0
    """What this rank has put on the wire so far, bytes (as the reduction's algorithm has it; local copies left out)."""

    sliced = False
    """Whether `reduce` asks for the snapshot slice by slice."""

    tunable = False
    """Whether it matters how bytes are sent: whether `use` changes anything."""

    @abstractmethod
    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """Reduce the flat `snapshot`; `weights[r]` is how much rank r counts, the same list on every rank.

        With `sliced`, `fill` is called with a slice before it is read: it may take that part of the snapshot only then.
        """

    def use(self, transfer: Transfer) -> None:  # noqa: B027 (where nothing is sent in chunks)
        """Send as `transfer` says, from the next reduction on; the same on every rank."""

    def rebase(self, anchor: Tensor) -> None:  # noqa: B027 (most reducers remember nothing)
        """Take note that all replicas stand at `anchor` (flat, bit-identical on every rank)."""


def chunks(snapshot: Tensor, chunk_bytes: int) -> list[slice]:
    """Return the parts of the flat `snapshot` that go into one call each, in order."""
    numel = snapshot.numel()
    chunk = max(1, min(chunk_bytes // snapshot.element_size(), numel))
    return [slice(start, min(start + chunk, numel)) for start in range(0, numel, chunk)]


class Shards:
    """A flat vector in equal contiguous shards, one a rank; the last ones may be short or empty."""

    def __init__(self, numel: int, size: int) -> None:
        self.numel, self.size = numel, size
        self.length = -(-numel // size)

    def of(self, rank: int) -> slice:
        """Return the part of the vector that `rank` owns."""
        return slice(min(rank * self.length, self.numel), min((rank + 1) * self.length, self.numel))

    def blocks(self, chunk: int) -> Iterator[list[slice]]:
        """Iterate over lists with a slice of each rank's shard, which together have about `chunk` elements."""
        step = max(1, chunk // self.size)
        for start in range(0, self.length, step):
            yield [self._piece(self.of(rank), start, start + step) for rank in range(self.size)]

    @staticmethod
    def _piece(shard: slice, start: int, stop: int) -> slice:
        return slice(min(shard.start + start, shard.stop), min(shard.start + stop, shard.stop))


def pack(rows: list[slice], values: list[Tensor]) -> Tensor:
    """Return `values` as the equal rows of one matrix, padded with zeros."""
    packed = values[0].new_zeros(len(rows), max(part.stop - part.start for part in rows))
    for row, value in zip(packed, values, strict=True):
        row[: value.numel()].copy_(value)
    return packed
