"""Averaging named tensors in place."""

from __future__ import annotations

import pytest
import torch
from ranks_as_threads import on_ranks
from torch import Tensor

from hvd_shadowsync.average import average_in_place
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.reducers import OwnerMean
from hvd_shadowsync.replica import NamedTensor


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
        named = [NamedTensor(str(index), each) for index, each in enumerate(given)]
        average_in_place(OwnerMean(comm, Poller()), named, weights)
        assert kept == [(each.data_ptr(), each.stride(), each.dtype) for each in given]
        return given

    wanted = [each * mean for each in tensors(1)]
    for given in on_ranks(3, program):
        assert all(torch.equal(left, right) for left, right in zip(given, wanted, strict=True))


def test_nothing_is_averaged_without_traffic() -> None:
    def program(comm: Communicator) -> int:
        mean = OwnerMean(comm, Poller())
        average_in_place(mean, [], (1.0, 1.0))
        return mean.bytes_sent

    assert on_ranks(2, program) == [0, 0]
