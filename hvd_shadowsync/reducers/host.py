"""The weighted mean of replicas that are all on one host: through memory that their ranks share, without messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, SharedMemory
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.reducers.base import Fill, Reducer, Shards, Slices, as_it_is

BLOCK_BYTES = 2 << 20
PAGE = 4096
COUNTER_BYTES = 64  # a cache line for each rank's counters
WAITING = Poller(spin_s=0.00005, eager=0, shortest_s=0.00002, growth=1.2)


class HostMemory:
    """What the ranks of one host share for `HostMean`: their snapshots, two blocks of sums, and counters.

    Args:
        comm: over ranks that are all on one host.
        memory: what `of` asked for.
        numel, dtype: of a snapshot.
        chunk_bytes: size of a block.
    """

    def __init__(
        self, comm: Communicator, memory: SharedMemory, numel: int, dtype: torch.dtype, chunk_bytes: int
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.numel, self.dtype = numel, dtype
        self.fence = memory.fence
        self.chunk = _chunk(numel, dtype, chunk_bytes)
        common, counters = memory.segments[0], comm.size * COUNTER_BYTES
        self.counters = common[:counters].view(torch.int64).view(comm.size, -1).numpy()
        sums = common[counters : counters + 2 * self.chunk * dtype.itemsize].view(dtype)
        self.sums = (sums[: self.chunk], sums[self.chunk :])
        self.snapshots = [segment[-(numel * dtype.itemsize) :].view(dtype)[:numel] for segment in memory.segments]

    @classmethod
    def of(
        cls, comm: Communicator, numel: int, dtype: torch.dtype, *, chunk_bytes: int = BLOCK_BYTES
    ) -> HostMemory | None:
        """Return memory for snapshots of `numel` elements; None on every rank where they cannot share (collective)."""
        own = -(-numel * dtype.itemsize // PAGE) * PAGE or PAGE
        if comm.rank == 0:
            common = comm.size * COUNTER_BYTES + 2 * _chunk(numel, dtype, chunk_bytes) * dtype.itemsize
            own += -(-common // PAGE) * PAGE
        memory = comm.share(own)
        return None if memory is None else cls(comm, memory, numel, dtype, chunk_bytes)


def _chunk(numel: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    return max(1, min(chunk_bytes // dtype.itemsize, numel))


@dataclass
class _Reached:
    """A request that is complete when all ranks have counted to `number`."""

    memory: HostMemory
    column: int
    number: int

    def test(self) -> bool:
        return bool(self.memory.counters[:, self.column].min() >= self.number)


FILLED, SUMMED = 0, 1


class HostMean(Reducer):
    """The weighted mean of snapshots that lie in shared memory, block by block.

    Each rank sums its shard of a block over all snapshots and then reads the whole block of sums, so that a rank reads
    the snapshots once and the sums once, however many ranks there are; the result is bit-identical on every rank. Two
    counters of each rank say how far it is: blocks filled, blocks whose shard it has summed. A rank fills block j + 1
    before it waits for block j, and only after it is through with block j - 1: hence two blocks of sums are enough.

    Args:
        memory: with this rank's snapshot, `memory.snapshots[rank]`, which `reduce` is called with.
        poller: how to wait. The default sleeps early: nobody has to make progress for the others here, and a thread
            that sleeps is woken on a core that is free, where one that yields stays where it is, with the other rank.
    """

    sliced = True

    def __init__(self, memory: HostMemory, poller: Poller = WAITING) -> None:
        self._memory, self._poller = memory, poller
        self._shards = Shards(memory.chunk, memory.size)
        self._begun = int(memory.counters[memory.rank, SUMMED])

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        memory, chunk = self._memory, self._memory.chunk
        assert snapshot.data_ptr() == memory.snapshots[memory.rank].data_ptr(), "the snapshot is in shared memory"
        blocks = [slice(start, min(start + chunk, memory.numel)) for start in range(0, memory.numel, chunk)]
        for index, block in enumerate(blocks):
            if index == 0:
                self._fill(block, fill, 1)
            if index + 1 < len(blocks):
                self._fill(blocks[index + 1], fill, index + 2)
            self._await(FILLED, index + 1)
            self._sum(block, weights, memory.sums[(self._begun + index) % 2])
            self._publish(SUMMED, index + 1)
            self._await(SUMMED, index + 1)
            yield block, memory.sums[(self._begun + index) % 2][: block.stop - block.start]
        self._begun += len(blocks)
        self.bytes_sent += 2 * (memory.size - 1) * snapshot.nbytes // memory.size

    def _fill(self, block: slice, fill: Fill, number: int) -> None:
        fill(block)
        self._publish(FILLED, number)

    def _sum(self, block: slice, weights: Sequence[float], sums: Tensor) -> None:
        shard = self._shards.of(self._memory.rank)
        out = sums[: block.stop - block.start][shard]
        counted = [
            (each[block][shard], weight) for each, weight in zip(self._memory.snapshots, weights, strict=True) if weight
        ]
        (first, weight), *others = counted
        if len(others) == 1 and weight == others[0][1]:
            torch.add(first, others[0][0], out=out).mul_(weight / sum(weights))
            return
        torch.mul(first, weight, out=out)
        for each, weight in others:
            out.add_(each, alpha=weight)
        out.div_(sum(weights))

    def _publish(self, column: int, number: int) -> None:
        self._memory.fence()
        self._memory.counters[self._memory.rank, column] = self._begun + number

    def _await(self, column: int, number: int) -> None:
        self._poller.wait([_Reached(self._memory, column, self._begun + number)])
        self._memory.fence()
