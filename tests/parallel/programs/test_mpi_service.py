"""Service over MPI: every rank asks every other while it answers them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.service import Service

LARGEST = 3000


def length(tag: int) -> int:
    return 1 + (tag * 37) % LARGEST


@pytest.fixture
def pair(comm: Communicator) -> Iterator[tuple[Communicator, Communicator]]:
    requests, replies = comm.dup(), comm.dup()
    yield requests, replies
    comm.allgather_object("done")
    replies.free()
    requests.free()


def serve_until_all_are_done(service: Service, comm: Communicator) -> None:
    here = torch.zeros(1)
    Poller().wait([comm.iallreduce(here)], meanwhile=service.serve)
    while not service.idle:
        service.serve()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_flight", [1, 8])
def test_all_ask_all(
    comm: Communicator, pair: tuple[Communicator, Communicator], dtype: torch.dtype, in_flight: int
) -> None:
    answered: list[tuple[int, int]] = []

    def answer(source: int, tag: int, buffer: Tensor) -> Tensor:
        answered.append((source, tag))
        return buffer[: length(tag)].mul_(2).add_(comm.rank)

    service = Service(*pair, answer, torch.zeros(LARGEST, dtype=dtype), Poller(), in_flight)
    owners = [rank for rank in range(comm.size) if rank != comm.rank]
    owner_of = {25 * index + number: owner for index, owner in enumerate(owners) for number in range(25)}
    calls = [(owner, tag, torch.full((length(tag),), tag % 25, dtype=dtype)) for tag, owner in owner_of.items()]
    replies = {tag: reply.clone() for tag, reply in service.call(calls)}
    assert replies.keys() == owner_of.keys()
    for tag, reply in replies.items():
        assert torch.equal(reply, torch.full((length(tag),), 2 * (tag % 25) + owner_of[tag], dtype=dtype))
    serve_until_all_are_done(service, comm)
    assert len(answered) == 25 * len(owners)
    assert {source for source, _ in answered} == set(owners)


def test_a_rank_that_asks_nothing_still_answers(comm: Communicator, pair: tuple[Communicator, Communicator]) -> None:
    service = Service(*pair, lambda source, tag, buffer: buffer.neg_(), torch.zeros(10), Poller())
    if comm.rank != 0:
        calls = [(0, tag, torch.full((10,), float(comm.rank * 100 + tag))) for tag in range(20)]
        for tag, reply in service.call(calls):
            assert reply.tolist() == [-float(comm.rank * 100 + tag)] * 10
    serve_until_all_are_done(service, comm)
    assert service.idle
