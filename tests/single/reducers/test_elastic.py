"""The elastic center: against a sequential reference, with all ranks at once, and in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from ranks_as_threads import TIMEOUT_S, on_ranks
from recording import Recorded
from torch import Tensor

from hvd_shadowsync.algorithms import ElasticAveraging
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.tuning import MPI_DEFAULTS
from hvd_shadowsync.reducers import ElasticCenter, ElasticInTurn, elastic
from hvd_shadowsync.reducers.base import Shards

PLAIN, SYMMETRIC = ElasticAveraging(alpha=0.3), ElasticAveraging(alpha=0.3, symmetric=True)
rules = pytest.mark.parametrize("algorithm", [PLAIN, SYMMETRIC], ids=["plain", "symmetric"])
SHAPES = [(1, 10), (2, 33), (3, 32), (3, 2), (4, 0), (4, 129)]


class World(NamedTuple):
    """The rank's exchange, with what it needs to answer the others until all are through."""

    comm: Communicator
    reducer: ElasticCenter

    def exchange(self, snapshot: Tensor) -> Tensor:
        answers = torch.full_like(snapshot, float("nan"))
        for part, values in self.reducer.reduce(snapshot, [1.0] * self.comm.size):
            assert answers[part].isnan().all(), "a slice came twice"
            answers[part] = values
        return answers

    def serve_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not done() and time.monotonic() < deadline:
            self.reducer.serve()
            time.sleep(0)

    def serve_until_all_are_through(self) -> None:
        Poller().wait([self.comm.dup().iallreduce(torch.zeros(1))], meanwhile=self.reducer.serve)
        assert self.reducer.idle

    def whole_center(self) -> Tensor:
        return torch.cat(self.comm.allgather_object(self.reducer.center.clone()))


def world(comm: Communicator, algorithm: ElasticAveraging, anchor: Tensor, *, chunk_bytes: int = 40) -> World:
    rule = algorithm.elastic
    return World(comm, ElasticCenter(comm.dup(), comm.dup(), Poller(), rule, anchor, chunk_bytes=chunk_bytes))


def vector(seed: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequential(algorithm: ElasticAveraging, center: Tensor, replicas: list[Tensor], rounds: int) -> list[Tensor]:
    """Return the replicas, then the center, after rounds in rank order on one machine; alpha as a plain share."""
    center, replicas = center.clone(), [each.clone() for each in replicas]
    for _ in range(rounds):
        for rank, replica in enumerate(replicas):
            moved = center + algorithm.alpha * (replica - center)
            answer = center if algorithm.symmetric else moved
            replicas[rank] = replica + algorithm.alpha * (answer - replica)
            center = moved
    return [*replicas, center]


# --- each rank on its own ---------------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize(("size", "numel"), SHAPES)
def test_one_rank_after_the_other_is_the_sequential_algorithm(
    algorithm: ElasticAveraging, size: int, numel: int
) -> None:
    rounds, anchor = 3, vector(99, numel)
    turns = [threading.Event() for _ in range(rounds * size + 1)]
    turns[0].set()

    def program(comm: Communicator) -> tuple[Tensor, Tensor]:
        here, replica = world(comm, algorithm, anchor), vector(comm.rank, numel)
        for number in range(comm.rank, rounds * size, size):
            here.serve_until(turns[number].is_set)
            replica += algorithm.alpha * (here.exchange(replica) - replica)
            turns[number + 1].set()
        here.serve_until_all_are_through()
        return replica, here.whole_center()

    *replicas, center = sequential(algorithm, anchor, [vector(rank, numel) for rank in range(size)], rounds)
    for (replica, whole), expected in zip(on_ranks(size, program), replicas, strict=True):
        torch.testing.assert_close(replica, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(whole, center, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [2, 3])
def test_all_at_once_the_symmetric_exchange_keeps_the_sum(size: int) -> None:
    """sum(w) + z moves by the steps alone, in whatever order slices meet."""
    numel, rounds, anchor = 60, 15, vector(99, 60)

    def program(comm: Communicator) -> tuple[Tensor, Tensor]:
        here, replica = world(comm, SYMMETRIC, anchor), vector(comm.rank, numel)
        for _ in range(rounds):
            snapshot = replica.clone()
            answers = here.exchange(snapshot)
            replica += 0.01 * (comm.rank + 1)  # a step in flight
            replica += SYMMETRIC.alpha * (answers - snapshot)
        here.serve_until_all_are_through()
        return replica, here.whole_center()

    results = on_ranks(size, program)
    before = anchor + sum(vector(rank, numel) for rank in range(size))
    steps = rounds * 0.01 * size * (size + 1) / 2
    torch.testing.assert_close(
        sum(replica for replica, _ in results) + results[0][1], before + steps, rtol=0, atol=1e-11
    )


@rules
def test_all_at_once_replicas_and_center_come_together(algorithm: ElasticAveraging) -> None:
    """Each exchange is a weighted mean: without steps all end where all are the same, inside what they started from."""
    numel, rounds = 40, 200

    def program(comm: Communicator) -> tuple[Tensor, Tensor]:
        here, replica = world(comm, algorithm, vector(99, numel)), vector(comm.rank, numel)
        for _ in range(rounds):
            replica += algorithm.alpha * (here.exchange(replica) - replica)
            Poller().wait([comm.iallreduce(torch.zeros(1))], meanwhile=here.reducer.serve)
        return replica, here.whole_center()

    started = torch.stack([vector(seed, numel) for seed in (0, 1, 2, 99)])
    for replica, center in on_ranks(3, program):
        torch.testing.assert_close(replica, center, rtol=1e-9, atol=1e-9)
        assert (center <= started.amax(0)).all() and (center >= started.amin(0)).all()


def test_symmetric_answers_are_the_center_before_and_plain_ones_the_center_after() -> None:
    def program(comm: Communicator) -> list[float]:
        found = []
        for algorithm in (PLAIN, SYMMETRIC):
            here = world(comm, algorithm, torch.zeros(2))
            found += [*here.exchange(torch.ones(2)).tolist(), *here.reducer.center.tolist()]
        return found

    assert on_ranks(1, program)[0] == pytest.approx([0.3] * 4 + [0.0] * 2 + [0.3] * 2)


@pytest.mark.parametrize(("size", "numel"), SHAPES)
def test_shards_of_the_center_start_from_the_anchor_and_are_set_to_it(size: int, numel: int) -> None:
    anchor, other = vector(1, numel), vector(2, numel)

    def program(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        here = world(comm, PLAIN, anchor)
        mine = here.reducer.center.clone()
        assert here.reducer.own == Shards(numel, size).of(comm.rank)
        first = here.whole_center()
        here.reducer.rebase(other)
        return mine, first, here.whole_center()

    results = on_ranks(size, program)
    assert torch.equal(torch.cat([mine for mine, _, _ in results]), anchor)
    assert all(torch.equal(first, anchor) and torch.equal(then, other) for _, first, then in results)


def test_the_anchor_is_not_written_to() -> None:
    def program(comm: Communicator) -> list[float]:
        anchor = torch.zeros(4)
        for reducer in (world(comm, PLAIN, anchor).reducer, ElasticInTurn(comm, Poller(), PLAIN.elastic, anchor)):
            list(reducer.reduce(torch.ones(4), [1.0]))
            assert reducer.center.tolist() != [0.0] * 4
        return anchor.tolist()

    assert on_ranks(1, program) == [[0.0] * 4]


def messages(size: int, numel: int, *, chunk_bytes: int) -> list[list[tuple[int, int]]]:
    """Return (owner, tag) of what each rank asks for in one exchange."""

    def program(comm: Communicator) -> list[tuple[int, int]]:
        requests = Recorded(comm.dup())
        reducer = ElasticCenter(
            requests, comm.dup(), Poller(), PLAIN.elastic, torch.zeros(numel), chunk_bytes=chunk_bytes
        )
        here = World(comm, reducer)
        here.exchange(torch.zeros(numel))
        here.serve_until_all_are_through()
        return requests.record.messages

    return on_ranks(size, program)


def test_requests_go_to_the_other_owners_in_turn_the_next_rank_first() -> None:
    for rank, sent in enumerate(messages(3, 30, chunk_bytes=16)):
        assert [owner for owner, _ in sent] == [(rank + 1) % 3, (rank + 2) % 3] * 3
        assert len({tag for _, tag in sent}) == len(sent)


def test_tags_stay_below_what_mpi_allows_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "LARGEST_TAG", 20)
    tags = [tag for sent in messages(3, 100, chunk_bytes=4) for _, tag in sent]
    assert 10 < max(tags) <= 20


def test_a_request_stays_below_the_rendezvous_limit() -> None:
    assert int(MPI_DEFAULTS["OMPI_MCA_btl_tcp_eager_limit"]) > elastic.REQUEST_BYTES


@pytest.mark.parametrize(("exchange_s", "longest_s"), [(0.05, 0.001), (0.5, 0.005), (60.0, 0.01)])
def test_pauses_grow_with_the_time_that_an_exchange_takes(exchange_s: float, longest_s: float) -> None:
    assert elastic.pauses_for(Poller(longest_s=0.001), exchange_s).longest_s == pytest.approx(longest_s)


@pytest.mark.parametrize(("size", "numel"), [(1, 9), (2, 33), (3, 32)])
def test_bytes_sent_are_requests_there_and_answers_back(size: int, numel: int) -> None:
    def program(comm: Communicator) -> tuple[int, int]:
        here = world(comm, PLAIN, torch.zeros(numel))
        here.exchange(torch.zeros(numel))
        here.serve_until_all_are_through()
        own = here.reducer.own
        return here.reducer.bytes_sent, 4 * ((numel - (own.stop - own.start)) + (size - 1) * (own.stop - own.start))

    for sent, expected in on_ranks(size, program):
        assert sent == expected


# --- all ranks in turn ------------------------------------------------------------------------------------------------


def in_turn(
    algorithm: ElasticAveraging,
    size: int,
    numel: int,
    *,
    rounds: int = 3,
    weights: list[float] | None = None,
    chunk_bytes: int = 40,
    jitter: float = 0.0,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return replica, last answers and center as each rank has them."""

    def program(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        anchor, replica = vector(99, numel), vector(comm.rank, numel)
        reducer = ElasticInTurn(comm.dup(), Poller(), algorithm.elastic, anchor, chunk_bytes=chunk_bytes)
        for number in range(rounds):
            time.sleep(jitter * ((comm.rank + number) % size))
            answers = torch.full_like(replica, float("nan"))
            for part, values in reducer.reduce(replica, weights or [1.0] * size):
                answers[part] = values
            replica += algorithm.alpha * (answers - replica)
        return replica, answers, torch.cat(comm.allgather_object(reducer.center))

    return on_ranks(size, program)


@rules
@pytest.mark.parametrize(("size", "numel"), SHAPES)
def test_in_turn_is_the_sequential_algorithm(algorithm: ElasticAveraging, size: int, numel: int) -> None:
    *replicas, center = sequential(algorithm, vector(99, numel), [vector(rank, numel) for rank in range(size)], 3)
    for (replica, _, whole), expected in zip(in_turn(algorithm, size, numel), replicas, strict=True):
        torch.testing.assert_close(replica, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(whole, center, rtol=1e-13, atol=1e-13)


@rules
def test_in_turn_is_deterministic(algorithm: ElasticAveraging) -> None:
    """Bit for bit, whoever comes first."""
    first = in_turn(algorithm, 3, 50)
    second = in_turn(algorithm, 3, 50, jitter=0.003)
    assert all(
        torch.equal(left, right) for a, b in zip(first, second, strict=True) for left, right in zip(a, b, strict=True)
    )


@rules
def test_in_turn_ranks_of_weight_0_only_look(algorithm: ElasticAveraging) -> None:
    size, numel = 3, 20
    first, center = vector(0, numel), vector(99, numel)
    moved = center + 0.3 * (first - center)
    results = in_turn(algorithm, size, numel, rounds=1, weights=[1.0, 0.0, 1.0])
    torch.testing.assert_close(results[1][1], moved, rtol=1e-13, atol=1e-13)
    expected = moved + 0.3 * (vector(2, numel) - moved)
    torch.testing.assert_close(results[0][2], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("size", "numel", "chunk_bytes", "row"), [(2, 33, 1 << 20, 17), (3, 2, 1 << 20, 1), (1, 9, 40, 9)]
)
def test_in_turn_bytes_sent(size: int, numel: int, chunk_bytes: int, row: int) -> None:
    """A padded row to each other rank, and a row of answers back to each."""

    def program(comm: Communicator) -> int:
        reducer = ElasticInTurn(comm, Poller(), PLAIN.elastic, torch.zeros(numel), chunk_bytes=chunk_bytes)
        for _ in reducer.reduce(torch.zeros(numel), [1.0] * size):
            pass
        return reducer.bytes_sent

    assert on_ranks(size, program) == [2 * (size - 1) * row * 4] * size


def test_in_turn_rebase() -> None:
    def program(comm: Communicator) -> Tensor:
        reducer = ElasticInTurn(comm, Poller(), PLAIN.elastic, torch.zeros(7))
        reducer.rebase(torch.arange(7.0))
        return reducer.center

    assert torch.cat(on_ranks(3, program)).tolist() == list(range(7))
