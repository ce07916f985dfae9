"""Which reducer rounds use, by the algorithm and by where the ranks are; its memory, and how it sends."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_shadowsync.algorithms import Algorithm, ElasticAveraging
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.transfer import Search, Transfer
from hvd_shadowsync.gpus import PageLock
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.reducers import (
    AllReduceMean,
    ElasticCenter,
    ElasticInTurn,
    HierarchicalMean,
    HostMean,
    HostMemory,
    Hosts,
    OwnerMean,
    Reducer,
)
from hvd_shadowsync.replica import Replica

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundOptions:
    """How rounds are made; the same on every rank.

    Attributes:
        algorithm: the update rule.
        merge: "delta" or "interpolate".
        wire_dtype: torch.float16 or torch.bfloat16 to halve what travels; None for the replica's own precision.
        foreground: whether the training thread runs the rounds (deterministic twins).
        hierarchical: whether ranks of one host reduce through shared memory and one of them goes on the network, where
            there are several hosts with several ranks: "auto" where they can, True (says why where they cannot) or
            False.
        max_distance: of a replica from the anchor, over the anchor's norm, beyond which it is reported; None for never.
    """

    algorithm: Algorithm
    merge: str = "delta"
    wire_dtype: torch.dtype | None = None
    foreground: bool = False
    hierarchical: bool | str = "auto"
    max_distance: float | None = None


class Reduction:
    """Owns what one reducer after the other works with: communicators, shared memory, the search for how to send.

    Args:
        comm: the rounds', which stays theirs.
        replica: what is synchronised first; memory that is shared is for vectors of its layout.
        options: how rounds are made.
        metrics: where it is said how bytes are sent.
        poller: how to wait.
    """

    def __init__(
        self, comm: Communicator, replica: Replica, options: RoundOptions, metrics: RoundMetrics, poller: Poller
    ) -> None:
        self._comm, self._options, self._metrics, self._poller = comm, options, metrics, poller
        background_center = options.algorithm.asynchronous and not options.foreground
        self._center_comms = (comm.dup(), comm.dup()) if background_center else None
        self._hosts = self._take_apart(replica)
        self._memory = self._share_memory(replica)
        self._layout = (replica.numel, replica.dtype)
        self._search: Search | None = None
        self._page_lock: PageLock | None = None

    def snapshot_of(self, replica: Replica) -> Tensor:
        """Return a vector for snapshots of `replica`, in shared memory where that has its layout."""
        memory, layout = self._memory, (replica.numel, replica.dtype)
        if layout != self._layout:
            self._layout, self._search = layout, None
        if memory is not None and layout != (memory.numel, memory.dtype):
            self._memory = memory = None  # new memory would have to be asked for on the training threads
            if self._options.hierarchical is True:
                logger.warning("hierarchical=True: parameters were added, from here on every rank sends its own")
        self._unlock()
        if memory is None:
            return replica.empty()
        snapshot = memory.snapshots[memory.rank]
        self._page_lock = PageLock(snapshot, replica.gpus[0]) if replica.gpus else None
        return snapshot

    def begin(self, anchor: Tensor) -> Reducer:
        """Return a reducer for vectors like `anchor`, at which all replicas stand."""
        self._reducer = self._make_reducer(anchor)
        self._reducer.rebase(anchor)
        if self._reducer.tunable and not self._options.foreground:  # the training thread has nothing better to do
            self._search = self._search or Search(Transfer.between(self._num_senders()), anchor.nbytes)
            self._tune(self._search)
        return self._reducer

    def observe(self, cost_us: int) -> None:
        """Let the search know what the last round cost the rank that it cost most, microseconds."""
        if self._search is not None and not self._search.is_over:
            self._search.observe(cost_us)
            self._tune(self._search)

    def free(self) -> None:
        """Give communicators and memory back (collective)."""
        self._unlock()
        self._memory = None
        self._reducer = OwnerMean(self._comm, self._poller)
        if self._hosts is not None:
            self._hosts.free()
        for comm in self._center_comms or ():
            comm.free()

    def _unlock(self) -> None:
        if self._page_lock is not None:
            self._page_lock.release()
            self._page_lock = None

    def _take_apart(self, replica: Replica) -> Hosts | None:
        """Return who is on which host, where rounds are to go one way inside hosts and another between them."""
        options = self._options
        if options.algorithm.asynchronous or options.foreground or not options.hierarchical:
            return None
        return Hosts(self._comm) if Hosts.matter(self._comm) else None

    def _share_memory(self, replica: Replica) -> HostMemory | None:
        """Return memory for the snapshots of this host's ranks, where rounds can use it."""
        options, hosts = self._options, self._hosts
        if hosts is not None:
            memory = HostMemory.of(hosts.local, replica.numel, replica.dtype, room=replica.numel)
            return memory if all(self._comm.allgather_object(memory is not None)) else None
        if options.algorithm.asynchronous or options.foreground or options.wire_dtype is not None:
            return None
        return HostMemory.of(self._comm, replica.numel, replica.dtype)

    def _make_reducer(self, anchor: Tensor) -> Reducer:
        algorithm, comm, poller = self._options.algorithm, self._comm, self._poller
        if isinstance(algorithm, ElasticAveraging):
            if self._center_comms is None:
                return ElasticInTurn(comm, poller, algorithm.elastic, anchor)
            pauses = Transfer.between(comm.size).poller(poller)
            return ElasticCenter(*self._center_comms, pauses, algorithm.elastic, anchor)
        if self._memory is None:
            return self._network_mean(comm)
        if self._hosts is None:
            return HostMean(self._memory)
        leaders = self._hosts.leaders
        return HierarchicalMean(self._hosts, self._memory, None if leaders is None else self._network_mean(leaders))

    def _network_mean(self, comm: Communicator) -> AllReduceMean | OwnerMean:
        if self._options.wire_dtype is not None or self._options.foreground:
            return OwnerMean(comm, self._poller, wire_dtype=self._options.wire_dtype)
        return AllReduceMean(comm, self._poller)

    def _num_senders(self) -> int:
        """Return how many ranks are on the network for a round."""
        return self._comm.size if self._hosts is None or self._memory is None else len(set(self._hosts.number))

    def _tune(self, search: Search) -> None:
        transfer = search.transfer
        self._reducer.use(transfer)
        with self._metrics.lock:
            self._metrics.chunk_bytes, self._metrics.chunks_in_flight = transfer.chunk_bytes, transfer.in_flight
            self._metrics.pause_ms, self._metrics.searching = 1000 * transfer.pause_s, not search.is_over
