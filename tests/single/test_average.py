"""Averaging named tensors, over one flat vector."""

from __future__ import annotations

import pytest
import torch
from ranks_as_threads import on_ranks
from recording import Recorded
from torch import Tensor

from hvd_shadowsync.average import mean_of
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.replica import NamedTensor, Replica


def tensors(rank: int) -> list[Tensor]:
    return [
        torch.full((2, 3), float(rank)),
        torch.full((3, 2), 2.0 * rank).t(),
        torch.tensor(4.0 * rank, dtype=torch.float64),
        torch.full((2,), complex(rank, -rank)),
        torch.full((5,), 8.0 * rank, dtype=torch.bfloat16),
        torch.empty(0),
    ]


@pytest.mark.parametrize(("weights", "mean"), [((1.0, 1.0, 1.0), 1.0), ((0.0, 0.0, 1.0), 2.0), ((3.0, 0.0, 1.0), 0.5)])
def test_tensors_of_all_kinds_become_their_mean(weights: tuple[float, ...], mean: float) -> None:
    def program(comm: Communicator) -> list[Tensor]:
        given = tensors(comm.rank)
        kept = [(each.data_ptr(), each.stride(), each.dtype) for each in given]
        replica = Replica([NamedTensor(str(index), each) for index, each in enumerate(given)])
        flat = replica.empty()
        replica.read(flat)
        replica.write(mean_of(comm, Poller(), flat, weights))
        assert kept == [(each.data_ptr(), each.stride(), each.dtype) for each in given]
        return given

    wanted = [each * mean for each in tensors(1)]
    for given in on_ranks(3, program):
        assert all(torch.equal(left, right) for left, right in zip(given, wanted, strict=True))


def test_what_is_averaged_stays_as_it_is() -> None:
    def program(comm: Communicator) -> tuple[float, float]:
        flat = torch.full((3,), float(comm.rank))
        return float(mean_of(comm, Poller(), flat, (1.0, 1.0)).sum()), float(flat.sum())

    assert on_ranks(2, program) == [(1.5, 0.0), (1.5, 3.0)]


def test_nothing_is_averaged_without_traffic() -> None:
    def program(comm: Communicator) -> list[tuple[str, int]]:
        watched = Recorded(comm)
        mean_of(watched, Poller(), torch.empty(0), (1.0, 1.0))
        return watched.record.calls

    assert on_ranks(2, program) == [[], []]
