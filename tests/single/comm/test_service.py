"""Requests answered by their owner's thread: replies, several at a time, order of answers, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from ranks_as_threads import on_ranks
from recording import Recorded
from torch import Tensor

from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.service import Answer, Service

LARGEST = 12


def length(tag: int) -> int:
    return tag % LARGEST + 1


def doubled(source: int, tag: int, buffer: Tensor) -> Tensor:
    return buffer[: length(tag)] * 2 + source


def service(comm: Communicator, answer: Answer = doubled, *, in_flight: int = 8) -> Service:
    return Service(comm.dup(), comm.dup(), answer, torch.zeros(LARGEST), Poller(), in_flight)


def until_all_are_through(here: Service, comm: Communicator) -> None:
    Poller().wait([comm.iallreduce(torch.zeros(1))], meanwhile=here.serve)
    while not here.idle:
        here.serve()


def calls_to(owners: Iterator[int] | list[int], count: int) -> list[tuple[int, int, Tensor]]:
    return [
        (owner, 100 * index + number, torch.full((length(100 * index + number),), float(number)))
        for index, owner in enumerate(owners)
        for number in range(count)
    ]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("in_flight", [1, 3, 50])
def test_every_rank_asks_every_other_while_it_answers(size: int, in_flight: int) -> None:
    def program(comm: Communicator) -> int:
        here = service(comm, in_flight=in_flight)
        calls = calls_to([rank for rank in range(size) if rank != comm.rank], 15)
        payloads = {tag: payload.clone() for _, tag, payload in calls}
        replies = {tag: reply for tag, reply in here.call(calls)}
        until_all_are_through(here, comm)
        assert replies.keys() == payloads.keys()
        assert all(torch.equal(reply, payloads[tag] * 2 + comm.rank) for tag, reply in replies.items())
        return len(replies)

    assert on_ranks(size, program) == [15 * (size - 1)] * size


def test_a_rank_may_ask_itself() -> None:
    def program(comm: Communicator) -> list[tuple[int, list[float]]]:
        return [(tag, reply.tolist()) for tag, reply in service(comm).call([(0, 1, torch.ones(2))])]

    assert on_ranks(1, program) == [[(1, [2.0, 2.0])]]


def test_no_calls_no_replies() -> None:
    assert list(service(local.world(2)[0]).call([])) == []


def test_calls_under_way_are_bounded_and_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def calls(count: int) -> Iterator[tuple[int, int, Tensor]]:
        for number in range(count):
            taken.append(number)
            yield 1, number, torch.zeros(length(number))

    def program(comm: Communicator) -> int:
        requests = Recorded(comm.dup())
        here = Service(requests, comm.dup(), doubled, torch.zeros(LARGEST), Poller(), 4)
        ahead = 0
        if comm.rank == 0:
            for landed, _ in enumerate(here.call(calls(30))):
                ahead = max(ahead, len(taken) - landed)
        until_all_are_through(here, comm)
        return ahead

    assert on_ranks(2, program)[0] == 4
    assert taken == list(range(30))


def test_who_asks_and_with_which_tag_is_told_to_the_answer() -> None:
    def program(comm: Communicator) -> set[tuple[int, int]]:
        asked: set[tuple[int, int]] = set()

        def answer(source: int, tag: int, buffer: Tensor) -> Tensor:
            asked.add((source, tag))
            return buffer[: length(tag)]

        here = service(comm, answer)
        for _ in here.call([((comm.rank + 1) % 3, 5 + comm.rank, torch.zeros(length(5 + comm.rank)))]):
            pass
        until_all_are_through(here, comm)
        return asked

    assert on_ranks(3, program) == [{(2, 7)}, {(0, 5)}, {(1, 6)}]


def test_serve_tells_whether_there_was_anything_to_do() -> None:
    client, server = local.world(2)
    there = service(server)
    requests, replies = client.dup(), client.dup()
    assert there.serve() is False
    requests.isend(torch.ones(length(3)), 1, 3)
    assert there.serve() is True
    received = torch.zeros(length(3))
    Poller().wait([replies.irecv(received, 1, 3)])
    assert received.tolist() == [2.0] * length(3)
    there.serve()
    assert there.idle
    assert there.serve() is False


def test_what_arrives_while_a_call_waits_is_answered() -> None:
    """Two ranks that ask each other at once would otherwise wait for ever."""

    def program(comm: Communicator) -> list[float]:
        here = service(comm, in_flight=1)
        replies = [reply[0].item() for _, reply in here.call(calls_to([1 - comm.rank], 5))]
        until_all_are_through(here, comm)
        return replies

    assert on_ranks(2, program) == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_buffers_are_used_again() -> None:
    def program(comm: Communicator) -> int:
        places: set[int] = set()

        def answer(source: int, tag: int, buffer: Tensor) -> Tensor:
            places.add(buffer.data_ptr())
            assert buffer.numel() == LARGEST
            return buffer[: length(tag)]

        here = service(comm, answer, in_flight=1)
        if comm.rank == 0:
            for _ in here.call(calls_to([1], 40)):
                pass
        until_all_are_through(here, comm)
        return len(places)

    assert on_ranks(2, program)[1] <= 2


def test_the_error_of_an_answer_reaches_who_serves() -> None:
    client, server = local.world(2)

    def answer(source: int, tag: int, buffer: Tensor) -> Tensor:
        raise KeyError(tag)

    there = service(server, answer)
    client.dup().isend(torch.ones(1), 1, 3)
    with pytest.raises(KeyError, match="3"):
        serve(there.serve)


def serve(step: Callable[[], bool]) -> None:
    while step():
        pass
