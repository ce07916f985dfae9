"""The mean over several hosts: its values and bits, what goes on the network, ranks that are early or late."""

from __future__ import annotations

import time
from collections.abc import Sequence

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from ranks_as_threads import TIMEOUT_S, reduced_in_place
from recording import Recorded
from torch import Tensor

from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.transfer import Transfer
from hvd_shadowsync.reducers import AllReduceMean, ChunkedMean, HierarchicalMean, HostMemory, Hosts, OwnerMean

UNEQUAL = [0, 0, 0, 1, 2, 2]
INTERLEAVED = [0, 1, 0, 1]


class Rank:
    """One rank: what it would train, its snapshot in its host's memory, and the reducer."""

    def __init__(
        self, comm: Communicator, live: Tensor, transfer: Transfer, wire_dtype: torch.dtype | None = None
    ) -> None:
        self.hosts = Hosts(comm)
        memory = HostMemory.of(self.hosts.local, live.numel(), live.dtype, room=live.numel())
        assert memory is not None
        self.live, self.snapshot = live, memory.snapshots[memory.rank]
        self.record = None
        network: ChunkedMean | None = None
        if self.hosts.leaders is not None:
            leaders = Recorded(self.hosts.leaders)
            self.record = leaders.record
            network = OwnerMean(leaders, Poller(), wire_dtype=wire_dtype) if wire_dtype else None
            network = network or AllReduceMean(leaders, Poller())
        self.reducer = HierarchicalMean(self.hosts, memory, network)
        self.reducer.use(transfer)

    def mean(self, weights: Sequence[float], pause_s: float = 0.0) -> Tensor:
        return reduced_in_place(self.reducer, self.live, self.snapshot, weights, pause_s)


def on_hosts(hosts: list[int], program: object) -> list[Tensor]:
    return local.run(len(hosts), program, timeout_s=TIMEOUT_S, hosts=hosts)  # type: ignore[arg-type]


def vectors(size: int, numel: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator, dtype=dtype) for _ in range(size)]


def weighted(given: list[Tensor], weights: Sequence[float]) -> np.ndarray:
    return np.average(np.stack([each.double().numpy() for each in given]), axis=0, weights=weights)


def small(in_flight: int = 2, chunk_bytes: int = 64) -> Transfer:
    return Transfer(chunk_bytes, in_flight, 0.0001)


@pytest.mark.parametrize("hosts", [[0, 0, 1], [0, 1, 1], INTERLEAVED, UNEQUAL], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 16, 17, 150])
@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_the_mean(hosts: list[int], numel: int, in_flight: int) -> None:
    given = vectors(len(hosts), numel)
    weights = [1.0] * len(hosts)
    means = on_hosts(hosts, lambda comm: Rank(comm, given[comm.rank], small(in_flight)).mean(weights))
    for mean in means:
        assert torch.equal(mean, means[0])
        np.testing.assert_allclose(mean.numpy(), weighted(given, weights), rtol=1e-5, atol=1e-5)


@hypothesis.given(
    weights=strategies.lists(strategies.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=6, max_size=6).filter(any),
    numel=strategies.integers(0, 60),
    chunk_bytes=strategies.integers(8, 200),
    in_flight=strategies.integers(1, 4),
    seed=strategies.integers(0, 99),
)
def test_any_weights_lengths_and_chunks(
    weights: list[float], numel: int, chunk_bytes: int, in_flight: int, seed: int
) -> None:
    given = vectors(6, numel, seed=seed, dtype=torch.float64)
    transfer = small(in_flight, chunk_bytes)
    for mean in on_hosts(UNEQUAL, lambda comm: Rank(comm, given[comm.rank], transfer).mean(weights)):
        np.testing.assert_allclose(mean.numpy(), weighted(given, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("away", [[3], [4, 5], [0]], ids=str)
def test_ranks_and_hosts_of_weight_0_do_not_matter(value: float, away: list[int]) -> None:
    given = vectors(6, 50)
    weights = [0.0 if rank in away else 1.0 for rank in range(6)]
    expected = weighted(given, weights)
    for rank in away:
        given[rank].fill_(value)
    for mean in on_hosts(UNEQUAL, lambda comm: Rank(comm, given[comm.rank], small()).mean(weights)):
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("late", [0, 1, 3])
def test_round_after_round_with_a_rank_that_is_slow(late: int) -> None:
    def program(comm: Communicator) -> list[Tensor]:
        rank = Rank(comm, torch.zeros(70), small())
        means = []
        for turn in range(6):
            comm.allgather_object("the vote")
            rank.live.copy_(torch.arange(70) + 100.0 * turn + 7 * comm.rank)
            time.sleep(0.002 * (comm.rank == late))
            means.append(rank.mean([1.0] * 4, pause_s=0.001 * (comm.rank == late)))
        return means

    for means in on_hosts(INTERLEAVED, program):
        for turn, mean in enumerate(means):
            torch.testing.assert_close(mean, torch.arange(70) + 100.0 * turn + 10.5, rtol=1e-6, atol=0)


def test_one_vector_a_host_goes_on_the_network() -> None:
    def program(comm: Communicator) -> tuple[list[tuple[str, int]] | None, int]:
        rank = Rank(comm, torch.ones(32), small())
        rank.mean([1.0] * 4)
        return rank.record and rank.record.calls, rank.reducer.bytes_sent

    calls = [("iallreduce", 64)] * 2
    assert on_hosts([0, 0, 1, 1], program) == [(calls, 128), (None, 0)] * 2  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("wire_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_between_hosts(wire_dtype: torch.dtype) -> None:
    """Distances from the anchor are rounded, on the way there and back, and nothing else."""
    anchor = 100 * vectors(1, 90, seed=7)[0]
    given = [anchor + each for each in vectors(4, 90)]

    def program(comm: Communicator) -> Tensor:
        rank = Rank(comm, given[comm.rank], small(), wire_dtype)
        rank.reducer.rebase(anchor)
        return rank.mean([1.0] * 4)

    means = on_hosts([0, 0, 1, 1], program)
    unit = torch.finfo(wire_dtype).eps
    bound = unit * (torch.stack(given) - anchor).abs().max() + 1e-4
    for mean in means:
        assert torch.equal(mean, means[0])
        assert (mean - torch.stack(given).mean(0)).abs().max() < bound


def test_other_settings_from_round_to_round() -> None:
    given = vectors(4, 100)

    def program(comm: Communicator) -> list[Tensor]:
        rank = Rank(comm, given[comm.rank], small())
        means = []
        for transfer in (small(), small(1, 24), small(5, 4000), small(3, 40)):
            comm.allgather_object("the vote")
            rank.reducer.use(transfer)
            means.append(rank.mean([1.0] * 4))
        return means

    for means in on_hosts(INTERLEAVED, program):
        for mean in means:
            np.testing.assert_allclose(mean.numpy(), weighted(given, [1.0] * 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("hosts", "expected"), [([0, 0, 0], False), ([0, 1, 2], False), ([0, 1, 1], True), ([0], False)]
)
def test_where_hosts_matter(hosts: list[int], expected: bool) -> None:
    assert on_hosts(hosts, lambda comm: Hosts.matter(comm)) == [expected] * len(hosts)  # type: ignore[comparison-overlap]


def test_who_is_where() -> None:
    def program(comm: Communicator) -> tuple[list[int], int, int, int | None, tuple[list[float], list[float]]]:
        hosts = Hosts(comm)
        leader = hosts.leaders and hosts.leaders.rank
        found = (hosts.number, hosts.local.rank, hosts.local.size, leader, hosts.weights([1.0, 2.0, 3.0, 4.0]))
        hosts.free()
        return found

    first, second = ([1.0, 3.0], [4.0, 6.0]), ([2.0, 4.0], [4.0, 6.0])
    assert on_hosts([5, 7, 5, 7], program) == [  # type: ignore[comparison-overlap]
        ([0, 1, 0, 1], 0, 2, 0, first),
        ([0, 1, 0, 1], 0, 2, 1, second),
        ([0, 1, 0, 1], 1, 2, None, first),
        ([0, 1, 0, 1], 1, 2, None, second),
    ]
