"""The weighted mean over several hosts: through shared memory inside a host, one rank of each on the network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.transfer import Transfer
from hvd_shadowsync.reducers.base import Fill, Reducer, Slices, as_it_is, chunks
from hvd_shadowsync.reducers.host import WAITING, HostMemory, Reached
from hvd_shadowsync.reducers.mean import ChunkedMean

AHEAD = 2


class Hosts:
    """The ranks by host: a communicator over those of this host, and one over the first of each (collective).

    Attributes:
        number: of each rank's host, by rank.
        own: this rank's host.
        local: over the ranks of this host.
        leaders: over the first rank of each host; None on the others.
    """

    def __init__(self, comm: Communicator) -> None:
        self.number = comm.hosts()
        self.own = self.number[comm.rank]
        local = comm.split(self.own)
        assert local is not None, "split gives a communicator where a color is given"
        self.local = local
        self.leaders = comm.split(0 if local.rank == 0 else None)

    @staticmethod
    def matter(comm: Communicator) -> bool:
        """Tell whether there are several hosts, one of them with several ranks (collective)."""
        return 1 < len(set(comm.hosts())) < comm.size

    def weights(self, weights: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the weights of this host's ranks, and those of all hosts, by the order of their first ranks.

        Hosts of the same weight weigh 1 each, which saves their reduction a multiplication.
        """
        hosts = dict.fromkeys(self.number, 0.0)
        for host, weight in zip(self.number, weights, strict=True):
            hosts[host] += weight
        own = [each for each, host in zip(weights, self.number, strict=True) if host == self.own]
        return own, list(hosts.values()) if len(set(hosts.values())) > 1 else [1.0] * len(hosts)

    def free(self) -> None:
        """Give the communicators back (collective)."""
        for comm in (self.leaders, self.local):
            if comm is not None:
                comm.free()


class HierarchicalMean(Reducer):
    """The weighted mean of snapshots of which those of one host lie in memory that its ranks share.

    Chunk by chunk: the ranks of a host form its mean, each a shard of it; the first of them reduces it with those of
    the other hosts, and lays the result down for the rest. The network carries one vector a host, however many ranks
    it has. Ranks run ahead of the network by the chunks that are in flight there and `AHEAD` more.

    Args:
        hosts: which ranks are where.
        memory: of this host, with room for a whole vector of sums and this rank's snapshot, which `reduce` is called
            with.
        network: over `hosts.leaders`; None on the other ranks.
        poller: how to wait for the ranks of this host.
    """

    sliced = tunable = True

    def __init__(self, hosts: Hosts, memory: HostMemory, network: ChunkedMean | None, poller: Poller = WAITING) -> None:
        self._hosts, self._memory, self._network, self._poller = hosts, memory, network, poller
        self.use(Transfer.between(len(set(hosts.number))))
        self._begun = memory.counted(Reached.SUMMED, memory.rank)

    def rebase(self, anchor: Tensor) -> None:
        """See `Reducer.rebase`."""
        if self._network is not None:
            self._network.rebase(anchor)

    def use(self, transfer: Transfer) -> None:
        """See `Reducer.use`."""
        self._transfer = transfer
        if self._network is not None:
            self._network.use(transfer)

    def reduce(self, snapshot: Tensor, weights: Sequence[float], fill: Fill = as_it_is) -> Slices:
        """See `Reducer.reduce`."""
        memory = self._memory
        assert snapshot.data_ptr() == memory.snapshots[memory.rank].data_ptr(), "the snapshot is in shared memory"
        own, by_host = self._hosts.weights(weights)
        ahead = self._transfer.in_flight + AHEAD
        mean = _HostsShare(memory, chunks(snapshot, self._transfer.chunk_bytes), own, fill, self._begun, ahead)
        if self._network is None:
            yield from self._follow(mean)
        else:
            yield from self._lead(mean, self._network, by_host)
        self._begun += len(mean.blocks)

    def _lead(self, mean: _HostsShare, network: ChunkedMean, by_host: Sequence[float]) -> Slices:
        memory, sums = self._memory, self._memory.sums
        sent = network.bytes_sent
        done = 0

        def have(part: slice) -> None:
            needed, polls = part.start // mean.blocks[0].stop + 1, 0
            while mean.summed < needed or memory.counted(Reached.SUMMED) < self._begun + needed:
                if mean.go_on(done):
                    polls = 0
                    continue
                memory.check()
                network.poke()  # what is on the network would wait for this host's slowest rank
                self._poller.pause(polls := polls + 1)
            memory.fence()

        for part, values in network.reduce(sums[: memory.numel], by_host, have):
            sums[part].copy_(values)
            done += 1
            memory.count(Reached.REDUCED, self._begun + done)
            yield part, sums[part]
        self.bytes_sent += network.bytes_sent - sent

    def _follow(self, mean: _HostsShare) -> Slices:
        polls = 0
        for done, part in enumerate(mean.blocks):
            while self._memory.counted(Reached.REDUCED, 0) <= self._begun + done:
                if mean.go_on(done):
                    polls = 0
                    continue
                self._memory.check()
                self._poller.pause(polls := polls + 1)
            self._memory.fence()
            yield part, self._memory.sums[part]


class _HostsShare:
    """This rank's share of the mean of its host, in one reduction: how far it is, and the next bit of work."""

    def __init__(
        self, memory: HostMemory, blocks: list[slice], weights: Sequence[float], fill: Fill, begun: int, ahead: int
    ) -> None:
        self.blocks, self.summed = blocks, 0
        self._filled = 0
        self._memory, self._weights, self._fill, self._begun, self._ahead = memory, weights, fill, begun, ahead

    def go_on(self, done: int) -> bool:
        """Fill or sum the next block that may be, where `done` have been reduced; tell whether there was one."""
        memory, limit = self._memory, min(len(self.blocks), done + self._ahead)
        if self.summed < limit and memory.counted(Reached.FILLED) > self._begun + self.summed:
            memory.fence()
            block = self.blocks[self.summed]
            memory.average(block, self._weights, memory.sums[block])
            self.summed += 1
            memory.count(Reached.SUMMED, self._begun + self.summed)
            return True
        if self._filled < limit:
            self._fill(self.blocks[self._filled])
            self._filled += 1
            memory.count(Reached.FILLED, self._begun + self._filled)
            return True
        return False
