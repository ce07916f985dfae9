"""The mean through shared memory: its values and bits, round after round, with ranks that are early or late."""

from __future__ import annotations

import time
from collections.abc import Sequence

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from ranks_as_threads import on_ranks, reduced_in_place
from recording import Apart, Recorded
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.reducers import HostMean, HostMemory


class Rank:
    """One rank: what it would train, its snapshot in shared memory, and the reducer."""

    def __init__(self, comm: Communicator, live: Tensor, chunk_bytes: int = 64) -> None:
        memory = HostMemory.of(comm, live.numel(), live.dtype, room=2 * max(1, chunk_bytes // live.itemsize))
        assert memory is not None
        self.live, self.memory = live, memory
        self.snapshot = memory.snapshots[comm.rank]
        self.reducer = HostMean(memory)

    def mean(self, weights: Sequence[float], pause_s: float = 0.0) -> Tensor:
        return reduced_in_place(self.reducer, self.live, self.snapshot, weights, pause_s)


def vectors(size: int, numel: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator, dtype=dtype) for _ in range(size)]


def weighted(given: list[Tensor], weights: Sequence[float]) -> np.ndarray:
    return np.average(np.stack([each.double().numpy() for each in given]), axis=0, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("numel", [0, 1, 4, 64, 65])
def test_the_mean(dtype: torch.dtype, size: int, numel: int) -> None:
    given = vectors(size, numel, dtype=dtype)
    means = on_ranks(size, lambda comm: Rank(comm, given[comm.rank]).mean([1.0] * size))
    tolerance = 4 * size * torch.finfo(dtype).eps
    for mean in means:
        assert mean.dtype == dtype
        assert torch.equal(mean, means[0])
        np.testing.assert_allclose(mean.numpy(), weighted(given, [1.0] * size), rtol=tolerance, atol=tolerance)


@hypothesis.given(
    weights=strategies.lists(strategies.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=2, max_size=4).filter(any),
    numel=strategies.integers(0, 40),
    chunk_bytes=strategies.integers(1, 200),
    seed=strategies.integers(0, 99),
)
def test_any_weights_lengths_and_blocks(weights: list[float], numel: int, chunk_bytes: int, seed: int) -> None:
    given = vectors(len(weights), numel, seed=seed, dtype=torch.float64)
    for mean in on_ranks(len(weights), lambda comm: Rank(comm, given[comm.rank], chunk_bytes).mean(weights)):
        np.testing.assert_allclose(mean.numpy(), weighted(given, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rank_of_weight_0_does_not_matter(value: float) -> None:
    given = [*vectors(2, 50), torch.full((50,), value)]
    means = on_ranks(3, lambda comm: Rank(comm, given[comm.rank]).mean([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(means[2].numpy(), weighted(given[:2], [1, 1]), rtol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_round_after_round_with_a_rank_that_is_slow(size: int) -> None:
    """Nobody overwrites what another has still to read, whoever is early."""

    def program(comm: Communicator) -> list[Tensor]:
        rank = Rank(comm, torch.zeros(70))
        means = []
        for turn in range(12):
            rank.live.copy_(torch.arange(70) + 100.0 * turn + 7 * comm.rank)
            means.append(rank.mean([1.0] * size, pause_s=0.001 * (turn % size == comm.rank)))
            time.sleep(0.001 * ((turn + 1) % size == comm.rank))
        return means

    for means in on_ranks(size, program):
        for turn, mean in enumerate(means):
            expected = torch.arange(70) + 100.0 * turn + 7 * (size - 1) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)


def test_another_reducer_goes_on_in_the_same_memory() -> None:
    given = vectors(2, 50)

    def program(comm: Communicator) -> list[Tensor]:
        rank = Rank(comm, given[comm.rank])
        means = [rank.mean([1.0, 1.0])]
        comm.allgather_object("both are through")
        rank.reducer = HostMean(rank.memory)
        return [*means, rank.mean([1.0, 1.0]), rank.mean([1.0, 1.0])]

    for means in on_ranks(2, program):
        assert all(torch.equal(mean, means[0]) for mean in means)


def test_no_messages_and_as_many_bytes_as_a_ring() -> None:
    def program(comm: Communicator) -> tuple[list[tuple[str, int]], int]:
        watched = Recorded(comm)
        rank = Rank(watched, torch.ones(1000))
        rank.mean([1.0] * 4)
        return watched.record.calls, rank.reducer.bytes_sent

    assert on_ranks(4, program) == [([], 2 * 3 * 4000 // 4)] * 4


def test_there_is_no_memory_between_hosts() -> None:
    assert on_ranks(2, lambda comm: HostMemory.of(Apart(comm), 10, torch.float32)) == [None, None]
