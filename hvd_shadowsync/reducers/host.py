"""The weighted mean of replicas that are all on one host: through memory that their ranks share, without messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

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
    """What the ranks of one host share: their snapshots, room for sums, and counters of how far each of them is.

    Args:
        comm: over ranks that are all on one host.
        memory: what `of` asked for.
        numel, dtype: of a snapshot.
        room: elements for sums.
    """

    def __init__(self, comm: Communicator, memory: SharedMemory, numel: int, dtype: torch.dtype, room: int) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.numel, self.dtype = numel, dtype
        self._fence = memory.fence
        common, counters = memory.segments[0], comm.size * COUNTER_BYTES
        self._counters = common[:counters].view(torch.int64).view(comm.size, -1).numpy()
        self.sums = common[counters : counters + room * dtype.itemsize].view(dtype)
        self.snapshots = [segment[-(numel * dtype.itemsize) :].view(dtype)[:numel] for segment in memory.segments]

    @classmethod
    def of(cls, comm: Communicator, numel: int, dtype: torch.dtype, *, room: int | None = None) -> HostMemory | None:
        """Return memory for snapshots of `numel` elements; None on every rank where they cannot share (collective).

        `room` is for sums, in elements; by default what `HostMean` needs.
        """
        room = 2 * _chunk(numel, dtype, BLOCK_BYTES) if room is None else room
        own = _whole_pages(numel * dtype.itemsize) or PAGE
        if comm.rank == 0:
            own += _whole_pages(comm.size * COUNTER_BYTES + room * dtype.itemsize)
        memory = comm.share(own)
        return None if memory is None else cls(comm, memory, numel, dtype, room)

    def count(self, column: Reached, number: int) -> None:
        """Tell the others that this rank has got as far as `number`: they see all that it wrote before."""
        self._fence()
        self._counters[self.rank, column] = number

    def counted(self, column: Reached, rank: int | None = None) -> int:
        """Return how far `rank` has got; by default that of all ranks which is least far."""
        if rank is not None:
            return int(self._counters[rank, column])
        return int(self._counters[:, column].min())

    def wait(self, poller: Poller, column: Reached, number: int) -> None:
        """Return when all ranks have got as far as `number`; what they wrote before is there then."""
        poller.wait([_Count(self, column, number)])
        self._fence()

    def check(self) -> None:
        """Raise where a rank is lost, which would be waited for without end."""
        self._comm.check()

    def fence(self) -> None:
        """Order this rank's reads after what it has read of the others' counters."""
        self._fence()

    def average(self, block: slice, weights: Sequence[float], out: Tensor) -> None:
        """Write this rank's shard of the weighted mean of all snapshots' `block` into `out`, as long as the block.

        Nothing where no rank counts.
        """
        shard = Shards(block.stop - block.start, self.size).of(self.rank)
        out = out[shard]
        counted = [(each[block][shard], weight) for each, weight in zip(self.snapshots, weights, strict=True) if weight]
        if not counted:
            return
        (first, weight), *others = counted
        if len(others) == 1 and weight == others[0][1]:
            torch.add(first, others[0][0], out=out).mul_(weight / sum(weights))
            return
        torch.mul(first, weight, out=out)
        for each, weight in others:
            out.add_(each, alpha=weight)
        out.div_(sum(weights))


class Reached(IntEnum):
    """What a rank counts in shared memory: blocks of the vector, over all rounds."""

    FILLED = 0  # its snapshot is there
    SUMMED = 1  # its shard of the host's mean is there
    REDUCED = 2  # the mean over all hosts is there (the host's first rank counts)


@dataclass
class _Count:
    """A request that is complete when all ranks have counted to `number`."""

    memory: HostMemory
    column: Reached
    number: int

    def test(self) -> bool:
        if self.memory.counted(self.column) >= self.number:
            return True
        self.memory.check()
        return False


def _chunk(numel: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    return max(1, min(chunk_bytes // dtype.itemsize, numel))


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


class HostMean(Reducer):
    """The weighted mean of snapshots that lie in shared memory, block by block.

    Each rank sums its shard of a block over all snapshots and then reads the whole block of sums, so that a rank reads
    the snapshots once and the sums once, however many ranks there are; the result is bit-identical on every rank. A
    rank fills block j + 1 before it waits for block j, and only after it is through with block j - 1: hence two blocks
    of sums are enough.

    Args:
        memory: with this rank's snapshot, `memory.snapshots[rank]`, which `reduce` is called with.
        poller: how to wait. The default sleeps early: nobody has to make progress for the others here, and a thread
            that sleeps is woken on a core that is free, where one that yields stays where it is, with the other rank.
    """

    sliced = True

    def __init__(self, memory: HostMemory, poller: Poller = WAITING) -> None:
        self._memory, self._poller = memory, poller
        self._chunk = max(1, memory.sums.numel() // 2)
        self._begun = memory.counted(Reached.SUMMED, memory.rank)

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        memory, chunk = self._memory, self._chunk
        assert snapshot.data_ptr() == memory.snapshots[memory.rank].data_ptr(), "the snapshot is in shared memory"
        blocks = [slice(start, min(start + chunk, memory.numel)) for start in range(0, memory.numel, chunk)]
        for number, block in enumerate(blocks, self._begun + 1):
            following = blocks[number - self._begun : number - self._begun + 1]
            for each in ([block] if block.start == 0 else []) + following:
                fill(each)
                memory.count(Reached.FILLED, number + (each is not block))
            memory.wait(self._poller, Reached.FILLED, number)
            sums = memory.sums[number % 2 * chunk :][: block.stop - block.start]
            memory.average(block, weights, sums)
            memory.count(Reached.SUMMED, number)
            memory.wait(self._poller, Reached.SUMMED, number)
            yield block, sums
        self._begun += len(blocks)
        self.bytes_sent += 2 * (memory.size - 1) * snapshot.nbytes // memory.size
