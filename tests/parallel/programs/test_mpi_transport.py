"""MpiCommunicator: every operation on real ranks, all dtypes, communicators apart from one another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hvd_shadowsync.comm import mpi, waiting
from hvd_shadowsync.comm.base import Communicator, Message, Request
from hvd_shadowsync.comm.poll import Poller

SUMMED = [torch.float32, torch.float64, torch.int64]
MOVED = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
LENGTHS = [0, 1, 7, 4099]


def wait(*requests: Request) -> None:
    Poller().wait(requests)


def values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return numbers that tell the rank and the place, exact in every dtype."""
    return ((torch.arange(numel) * 3 + rank * 7) % 97).to(dtype)


def await_message(comm: Communicator) -> Message:
    poller, polls = Poller(), 0
    while (message := comm.probe()) is None:
        polls += 1
        poller.pause(polls)
    return message


@pytest.fixture
def duplicate(comm: Communicator) -> Iterator[Communicator]:
    copy = comm.dup()
    yield copy
    copy.free()


@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_iallreduce_sums(comm: Communicator, dtype: torch.dtype, numel: int) -> None:
    tensor = values(comm.rank, numel, dtype)
    wait(comm.iallreduce(tensor))
    assert torch.equal(tensor, sum(values(rank, numel, dtype) for rank in range(comm.size)))


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_iallgather(comm: Communicator, dtype: torch.dtype) -> None:
    for numel in LENGTHS:
        send, recv = values(comm.rank, numel, dtype), torch.zeros(comm.size * numel, dtype=dtype)
        wait(comm.iallgather(send, recv))
        assert torch.equal(recv, torch.cat([values(rank, numel, dtype) for rank in range(comm.size)]))


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_ialltoall(comm: Communicator, dtype: torch.dtype) -> None:
    for numel in LENGTHS:
        send = torch.stack([values(10 * comm.rank + to, numel, dtype) for to in range(comm.size)])
        recv = torch.zeros_like(send)
        wait(comm.ialltoall(send, recv))
        wanted = [values(10 * rank + comm.rank, numel, dtype) for rank in range(comm.size)]
        assert torch.equal(recv, torch.stack(wanted))


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_ibcast_from_each_root(comm: Communicator, dtype: torch.dtype) -> None:
    for root in range(comm.size):
        tensor = values(comm.rank, 33, dtype)
        wait(comm.ibcast(tensor, root))
        assert torch.equal(tensor, values(root, 33, dtype))


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_isend_and_irecv_around_a_ring(comm: Communicator, dtype: torch.dtype) -> None:
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    outgoing = [values(comm.rank + tag, 50 + tag, dtype) for tag in range(4)]
    incoming = [torch.zeros_like(each) for each in outgoing]
    receives = [comm.irecv(each, before, tag) for tag, each in reversed(list(enumerate(incoming)))]
    wait(*receives, *(comm.isend(each, after, tag) for tag, each in enumerate(outgoing)))
    assert all(torch.equal(each, values(before + tag, 50 + tag, dtype)) for tag, each in enumerate(incoming))


def test_probe_gives_source_tag_and_message(comm: Communicator) -> None:
    assert comm.probe() is None
    comm.allgather_object(None)
    sends = [comm.isend(values(comm.rank, 20, torch.float32), to, 100 + comm.rank) for to in range(comm.size)]
    sources = set()
    for _ in range(comm.size):
        message, buffer = await_message(comm), torch.zeros(64)
        wait(message.irecv(buffer))
        assert message.tag == 100 + message.source
        assert torch.equal(buffer[:20], values(message.source, 20, torch.float32))
        assert not buffer[20:].any()
        sources.add(message.source)
    wait(*sends)
    assert sources == set(range(comm.size))
    assert comm.probe() is None


def test_collectives_in_flight_together_complete_in_any_order(comm: Communicator) -> None:
    tensors = [values(comm.rank + number, 1000, torch.float64) for number in range(6)]
    requests = [comm.iallreduce(tensor) for tensor in tensors]
    for request in reversed(requests):
        wait(request)
    for number, tensor in enumerate(tensors):
        assert torch.equal(tensor, sum(values(rank + number, 1000, torch.float64) for rank in range(comm.size)))


def test_a_complete_request_stays_complete(comm: Communicator) -> None:
    request = comm.iallreduce(torch.ones(3))
    wait(request)
    assert request.test() is True
    assert request.test() is True


def test_traffic_of_a_duplicate_is_apart(comm: Communicator, duplicate: Communicator) -> None:
    assert (duplicate.rank, duplicate.size) == (comm.rank, comm.size)
    peer = (comm.rank + 1) % comm.size
    here, there = torch.full((4,), 1.0), torch.full((4,), 2.0)
    sends = [comm.isend(here, peer, 5), duplicate.isend(there, peer, 5)]
    on_duplicate, on_comm = torch.zeros(4), torch.zeros(4)
    wait(await_message(duplicate).irecv(on_duplicate), await_message(comm).irecv(on_comm), *sends)
    assert on_duplicate.tolist() == [2.0] * 4
    assert on_comm.tolist() == [1.0] * 4


def test_collectives_on_two_communicators_in_opposite_order(comm: Communicator, duplicate: Communicator) -> None:
    first, second = torch.ones(10), torch.full((10,), 2.0)
    pairs = [(comm, first), (duplicate, second)]
    wait(*(each.iallreduce(tensor) for each, tensor in (pairs if comm.rank % 2 else pairs[::-1])))
    assert first.tolist() == [comm.size] * 10
    assert second.tolist() == [2.0 * comm.size] * 10


def test_allgather_object(comm: Communicator) -> None:
    value = {"rank": comm.rank, "tensor": torch.full((comm.rank + 1,), comm.rank)}
    everyone = comm.allgather_object(value)
    assert [each["rank"] for each in everyone] == list(range(comm.size))
    assert [each["tensor"].numel() for each in everyone] == [rank + 1 for rank in range(comm.size)]


def test_a_duplicate_outlives_its_origin() -> None:
    origin = mpi.world()
    copy = origin.dup()
    origin.free()
    tensor = torch.ones(5)
    wait(copy.iallreduce(tensor))
    assert tensor.tolist() == [copy.size] * 5
    copy.free()


def test_ranks_of_a_part_of_the_job(comm: Communicator) -> None:
    members = list(range(0, comm.size, 2)) if comm.rank % 2 == 0 else list(range(1, comm.size, 2))
    part = mpi.world(members)
    tensor = torch.tensor([float(comm.rank)])
    wait(part.iallreduce(tensor))
    assert part.size == len(members)
    assert part.rank == members.index(comm.rank)
    assert tensor.item() == sum(members)
    part.free()


def test_a_part_without_the_calling_rank_is_refused(comm: Communicator) -> None:
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    with pytest.raises(ValueError, match=f"rank {comm.rank} of {comm.size}"):
        mpi.world(others)
    with pytest.raises(ValueError, match=f"{comm.size}"):
        mpi.world([comm.rank, comm.size])


def test_many_communicators_one_after_the_other() -> None:
    for _ in range(300):
        part = mpi.world()
        copy = part.dup()
        copy.free()
        part.free()


def test_shared_memory_is_seen_by_all_ranks_of_a_host(comm: Communicator) -> None:
    """All ranks of these tests are on one host; parts differ in size, and begin with zeros."""
    own = comm.dup()
    memory = own.share(1000 * (comm.rank + 1))
    assert memory is not None
    assert [each.numel() for each in memory.segments] == [1000 * (rank + 1) for rank in range(comm.size)]
    assert not any(each.any() for each in memory.segments)
    assert all(each.data_ptr() % 64 == 0 for each in memory.segments)
    comm.allgather_object("looked")
    memory.segments[comm.rank].fill_(comm.rank + 1)
    memory.fence()
    comm.allgather_object("written")
    for rank, segment in enumerate(memory.segments):
        assert segment.unique().tolist() == [rank + 1]
    comm.allgather_object("read")
    own.free()


def test_parts_by_color_keep_the_order_of_ranks(comm: Communicator) -> None:
    assert comm.hosts() == [0] * comm.size
    halves = comm.split(comm.rank % 2)
    assert halves is not None
    assert halves.allgather_object(comm.rank) == list(range(comm.rank % 2, comm.size, 2))
    assert halves.hosts() == [0] * halves.size
    halves.free()
    first = comm.split(0 if comm.rank == 0 else None)
    assert (first is None) == (comm.rank > 0)
    if first is not None:
        assert first.size == 1
        first.free()


def test_requests_wait_without_pythons_lock(comm: Communicator) -> None:
    if waiting.load() is None:
        pytest.skip("the library was not built")
    for numel in (1, 300_000):
        values = torch.full((numel,), float(comm.rank))
        request = comm.iallreduce(values)
        assert request.wait(Poller())
        assert request.test()
        assert values.eq(comm.size * (comm.size - 1) / 2).all()
