"""The in-process transport: what every communicator promises, and how a rank that hangs or fails is told of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks_as_threads import on_ranks

from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator, Message, Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.errors import RankLostError, TransportError

SUMMED = [torch.float32, torch.float64, torch.int64]
MOVED = [*SUMMED, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
sizes = pytest.mark.parametrize("size", [1, 3])
numels = pytest.mark.parametrize("numel", [0, 5])


def wait(*requests: Request) -> None:
    Poller().wait(requests)


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ((torch.arange(numel) * 3 + rank * 7) % 97).to(dtype)


def await_message(comm: Communicator) -> Message:
    deadline = time.monotonic() + 20
    while (message := comm.probe()) is None:
        assert time.monotonic() < deadline
        time.sleep(0)
    return message


# --- collectives ------------------------------------------------------------------------------------------------------


@sizes
@numels
@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_iallreduce(size: int, numel: int, dtype: torch.dtype, in_place: bool) -> None:
    def program(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        send, recv = values(comm.rank, numel, dtype), torch.full((numel,), -1, dtype=dtype)
        wait(comm.iallreduce(send) if in_place else comm.iallreduce(send, recv))
        return send, recv

    total = sum(values(rank, numel, dtype) for rank in range(size))
    for rank, (send, recv) in enumerate(on_ranks(size, program)):
        assert torch.equal(send if in_place else recv, total)
        if not in_place:
            assert torch.equal(send, values(rank, numel, dtype))


@sizes
@numels
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_iallgather(size: int, numel: int, dtype: torch.dtype) -> None:
    def program(comm: Communicator) -> torch.Tensor:
        recv = torch.zeros(size, numel, dtype=dtype)
        wait(comm.iallgather(values(comm.rank, numel, dtype), recv))
        return recv

    wanted = torch.stack([values(rank, numel, dtype) for rank in range(size)])
    assert all(torch.equal(recv, wanted) for recv in on_ranks(size, program))


@sizes
@numels
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_ialltoall(size: int, numel: int, dtype: torch.dtype) -> None:
    def program(comm: Communicator) -> torch.Tensor:
        send = torch.stack([values(10 * comm.rank + to, numel, dtype) for to in range(size)])
        recv = torch.zeros_like(send)
        wait(comm.ialltoall(send, recv))
        return recv

    for rank, recv in enumerate(on_ranks(size, program)):
        assert torch.equal(recv, torch.stack([values(10 * source + rank, numel, dtype) for source in range(size)]))


@sizes
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_ibcast(size: int, dtype: torch.dtype) -> None:
    def program(comm: Communicator) -> list[torch.Tensor]:
        tensors = [values(comm.rank, 5, dtype) for _ in range(size)]
        for root, tensor in enumerate(tensors):
            wait(comm.ibcast(tensor, root))
        return tensors

    for tensors in on_ranks(size, program):
        assert all(torch.equal(tensor, values(root, 5, dtype)) for root, tensor in enumerate(tensors))


def test_a_collective_is_complete_when_the_last_rank_has_joined() -> None:
    first, second = local.world(2)
    here, there = torch.ones(2), torch.ones(2)
    request = first.iallreduce(here)
    assert not request.test()
    assert here.tolist() == [1.0, 1.0]
    other = second.iallreduce(there)
    assert request.test() and other.test()
    assert here.tolist() == there.tolist() == [2.0, 2.0]


def test_several_collectives_may_be_under_way() -> None:
    def program(comm: Communicator) -> list[float]:
        tensors = [torch.full((2,), float(index + comm.rank)) for index in range(5)]
        requests = [comm.iallreduce(tensor) for tensor in tensors]
        wait(*reversed(requests))
        return [tensor[0].item() for tensor in tensors]

    assert on_ranks(2, program) == [[1.0, 3.0, 5.0, 7.0, 9.0]] * 2


def test_ranks_that_call_different_collectives_are_told() -> None:
    first, second = local.world(2)
    first.ibcast(torch.ones(1))
    with pytest.raises(TransportError, match="rank 1 calls iallreduce where another rank calls ibcast"):
        second.iallreduce(torch.ones(1))


@sizes
def test_allgather_object(size: int) -> None:
    results = on_ranks(size, lambda comm: comm.allgather_object({"rank": comm.rank}))
    assert results == [[{"rank": rank} for rank in range(size)]] * size


def test_objects_are_copies_as_they_are_between_processes() -> None:
    def program(comm: Communicator) -> list[float]:
        tensor = torch.full((1,), float(comm.rank))
        gathered = comm.allgather_object(tensor)
        tensor.fill_(99.0)
        comm.allgather_object(None)
        return [each.item() for each in gathered]

    assert on_ranks(2, program) == [[0.0, 1.0]] * 2


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_messages_are_matched_by_source_and_tag(dtype: torch.dtype) -> None:
    def program(comm: Communicator) -> list[torch.Tensor]:
        other = 1 - comm.rank
        sends = [comm.isend(values(comm.rank + 10 * tag, 4, dtype), other, tag) for tag in (1, 2, 3)]
        received = [torch.zeros(4, dtype=dtype) for _ in range(3)]
        wait(*sends, *(comm.irecv(received[tag - 1], other, tag) for tag in (3, 1, 2)))
        return received

    for rank, received in enumerate(on_ranks(2, program)):
        wanted = [values(1 - rank + 10 * tag, 4, dtype) for tag in (1, 2, 3)]
        assert all(torch.equal(left, right) for left, right in zip(received, wanted, strict=True))


def test_messages_of_one_tag_keep_their_order() -> None:
    first, second = local.world(2)
    for number in range(4):
        first.isend(torch.tensor([float(number)]), 1, 7)
    received = [torch.zeros(1) for _ in range(4)]
    wait(*(second.irecv(tensor, 0, 7) for tensor in received))
    assert [tensor.item() for tensor in received] == [0, 1, 2, 3]


def test_what_was_sent_may_be_overwritten_once_the_request_is_complete() -> None:
    first, second = local.world(2)
    tensor, received = torch.ones(2), torch.zeros(2)
    wait(first.isend(tensor, 1, 0))
    tensor.zero_()
    wait(second.irecv(received, 0, 0))
    assert received.tolist() == [1.0, 1.0]


def test_a_receive_waits_for_its_message() -> None:
    first, second = local.world(2)
    received = torch.zeros(1)
    request = second.irecv(received, 0, 5)
    first.isend(torch.ones(1), 1, 6)
    assert not request.test()
    first.isend(torch.ones(1), 1, 5)
    assert request.test()
    assert request.test(), "a complete request stays complete"
    assert received.item() == 1


def test_probe_takes_any_message_and_does_not_block() -> None:
    def program(comm: Communicator) -> set[tuple[int, int, float]]:
        if comm.rank == 0:
            assert comm.probe() is None
            comm.allgather_object("probed")
            found = set()
            for _ in range(4):
                message, buffer = await_message(comm), torch.full((5,), -1.0)
                wait(message.irecv(buffer))
                assert buffer[1:].tolist() == [-1.0] * 4, "a message may be shorter than its buffer"
                found.add((message.source, message.tag, buffer[0].item()))
            assert comm.probe() is None
            return found
        comm.allgather_object("probed")
        wait(*(comm.isend(torch.tensor([10.0 * comm.rank + tag]), 0, tag) for tag in (1, 2)))
        return set()

    assert on_ranks(3, program)[0] == {(1, 1, 11.0), (1, 2, 12.0), (2, 1, 21.0), (2, 2, 22.0)}


# --- communicators ----------------------------------------------------------------------------------------------------


def test_duplicates_are_apart() -> None:
    def program(comm: Communicator) -> tuple[list[float], bool]:
        first, second = comm.dup(), comm.dup()
        other = 1 - comm.rank
        assert {(each.rank, each.size) for each in (first, second)} == {(comm.rank, 2)}
        first.isend(torch.ones(1), other, 0)
        comm.allgather_object(None)
        unseen = second.probe() is None and comm.probe() is None
        tensors = [torch.ones(1), torch.full((1,), 10.0)]
        calls = [first.iallreduce(tensors[0]), second.iallreduce(tensors[1])]
        wait(*calls)
        for each in (first, second):
            each.free()
        return [tensor.item() for tensor in tensors], unseen

    assert on_ranks(2, program) == [([2.0, 20.0], True)] * 2


def test_duplicates_may_be_used_in_different_orders() -> None:
    def program(comm: Communicator) -> list[float]:
        duplicates = [comm.dup(), comm.dup()]
        tensors = [torch.ones(1), torch.full((1,), 10.0)]
        order = (0, 1) if comm.rank else (1, 0)
        wait(*(duplicates[index].iallreduce(tensors[index]) for index in order))
        return [tensor.item() for tensor in tensors]

    assert on_ranks(2, program) == [[2.0, 20.0]] * 2


def test_ranks_of_one_process_need_not_take_part_until_the_job_ends() -> None:
    assert not local.world(1)[0].spans_processes


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_returns_results_by_rank_and_names_threads_after_ranks() -> None:
    assert local.run(3, lambda comm: (comm.rank, comm.size, threading.current_thread().name)) == [
        (rank, 3, f"rank-{rank}") for rank in range(3)
    ]


def failing(error: BaseException) -> Callable[[Communicator], Any]:
    def program(comm: Communicator) -> None:
        if comm.rank == 1:
            raise error

    return program


@pytest.mark.parametrize("error", [KeyError("lost"), SystemExit(3)])
def test_run_raises_what_a_rank_raised(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        local.run(2, failing(error))
    assert caught.value is error


def test_run_names_the_ranks_that_hang() -> None:
    release = threading.Event()

    def program(comm: Communicator) -> None:
        if comm.rank != 1:
            release.wait(20)

    with pytest.raises(TransportError, match=r"still running after 1.0 s: rank-0, rank-2"):
        local.run(3, program, timeout_s=1.0)
    release.set()


def test_objects_that_are_waited_for_in_vain_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BLOCKING_TIMEOUT_S", 0.05)
    with pytest.raises(TransportError, match=r"rank 0 waited 0.05 s in allgather_object"):
        local.world(2)[0].allgather_object(1)


def test_hosts_and_parts() -> None:
    def program(comm: Communicator) -> tuple[list[int], int, list[int], bool, bool]:
        part = comm.split(comm.hosts()[comm.rank])
        assert part is not None
        nobody = comm.split(None)
        return comm.hosts(), part.rank, part.allgather_object(comm.rank), nobody is None, part.share(1) is not None

    assert local.run(3, program, hosts=[4, 9, 4]) == [
        ([0, 1, 0], 0, [0, 2], True, True),
        ([0, 1, 0], 0, [1], True, True),
        ([0, 1, 0], 1, [0, 2], True, True),
    ]
    assert local.run(3, lambda comm: comm.share(1) is None, hosts=[4, 9, 4]) == [True] * 3


def test_messages_that_fit_several_receives_are_for_the_first_one() -> None:
    def program(comm: Communicator) -> list[float]:
        if comm.rank == 0:
            for value in (1.0, 2.0, 3.0):
                comm.isend(torch.tensor([value]), 1, 7)
            return []
        received = [torch.zeros(1) for _ in range(3)]
        requests = [comm.irecv(each, 0, 7) for each in received]
        for request in reversed(requests):
            while not request.test():
                pass
        return [float(each) for each in received]

    assert local.run(2, program, timeout_s=10.0)[1] == [1.0, 2.0, 3.0]


def test_what_a_rank_has_given_to_a_collective_that_failed_is_its_own_again() -> None:
    """A thread of the lost rank that had begun the call before completes nothing with what is in the memory now."""
    comms = local.world(3, kill={})
    sent = [torch.full((3,), rank) for rank in range(3)]
    received = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    first = comms[0].ialltoall(sent[0], received[0])
    late = comms[1]._shared.join
    comms[1].die()
    with pytest.raises(RankLostError):
        first.test()
    sent[0].fill_(9)
    last = comms[2].ialltoall(sent[2], received[2])
    late(0, "ialltoall", 1, (sent[1], received[1]), lambda _: pytest.fail("completed"))
    assert not last.test()
    assert [each.tolist() for each in received] == [[0] * 3] * 3
    comms[0].revoke()
    with pytest.raises(RankLostError):
        last.test()


def test_a_rank_that_is_declared_lost_is_lost() -> None:
    comms = local.world(3, kill={})
    comms[0].check()
    assert comms[0].declare_lost(2)
    with pytest.raises(RankLostError):
        comms[0].check()
    assert local.world(2, kill={})[0].dup().declare_lost(1)


def test_one_that_has_replaced_a_lost_rank_is_declared_lost_itself() -> None:
    """It has the lost one's number, and is another process."""
    rank = local.world(2, kill={1: 1})[0]
    grown = local.LocalCommunicator(rank._shared.of([0]).with_one_more(1, 7), 0)
    assert grown.members == (0, 1)
    assert grown.declare_lost(1)
    assert grown._shared.fate.dead == {7}
