"""Lookups and gradients through memory that the ranks of one host share: what may be held, what grows, what cannot."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from embeddings import Problem, make, placements, plain_modules
from ranks_as_threads import TIMEOUT_S, on_ranks
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.local import LocalCommunicator
from hvd_shadowsync.embedding import SGD, EmbeddingTable, ShardedEmbeddingBag
from hvd_shadowsync.embedding.carrier import Offer
from hvd_shadowsync.embedding.meeting import Meetings
from hvd_shadowsync.embedding.onehost import KEPT, MOST, OneHost
from hvd_shadowsync.embedding.routing import Router
from hvd_shadowsync.errors import EmbeddingError

STRATEGIES = ["table-wise", "row-wise", "column-wise", "mixed"]


def on_two(
    use: Callable[[ShardedEmbeddingBag], Any], problem: Problem, strategy: str = "table-wise", **more: Any
) -> list[Any]:
    def program(comm: Communicator) -> Any:
        module = make(comm, problem, placements(problem, strategy, 2), SGD(0.5), **more)
        try:
            return use(module)
        finally:
            module.close()

    return on_ranks(2, program)


def slots(module: ShardedEmbeddingBag) -> int:
    carrier = module._exchange._host  # type: ignore[union-attr]
    assert isinstance(carrier, OneHost)
    return len(carrier._slots)


def ids_of(problem: Problem, rank: int, step: int) -> dict[str, Any]:
    return {name: (ids, at) for name, (ids, at, _) in problem.bags(rank, step).items()}


@pytest.mark.parametrize("trains", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_keep_their_values_while_they_are_held(strategy: str, trains: bool) -> None:
    problem = Problem(sizes=(4, 7))

    def use(module: ShardedEmbeddingBag) -> int:
        held: list[tuple[Tensor, Tensor]] = []
        for step in range(3 * KEPT):
            with torch.set_grad_enabled(trains):
                vectors = module(ids_of(problem, module.rank, step))
            held.append((vectors, vectors.detach().clone()))
            if trains:
                problem.loss(vectors, module.rank, step).backward()
            assert all(torch.equal(one.detach(), other) for one, other in held)
        return slots(module)

    assert max(on_two(use, problem, strategy)) <= KEPT + 2


def test_a_slot_rests_while_another_rank_may_be_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 lays its next batch down while rank 1 is about to read the gradients of the last."""
    problem = Problem(sizes=(4,))
    laid_down = threading.Event()
    offer, update = OneHost.offer, OneHost.update

    def offering(carrier: OneHost, *arguments: Any) -> Offer:
        found = offer(carrier, *arguments)
        if carrier._comm.rank == 0 and carrier._traffic.updates:
            laid_down.set()
        return found

    def updating(carrier: OneHost, *arguments: Any) -> None:
        if carrier._comm.rank == 1:
            assert laid_down.wait(30)
        update(carrier, *arguments)

    def use(module: ShardedEmbeddingBag) -> Tensor:
        for step in range(2):
            problem.loss(module(ids_of(problem, module.rank, step)), module.rank, step).backward()
        with torch.no_grad():
            vectors: Tensor = module(ids_of(problem, module.rank, 0))
        return vectors

    expected = on_two(use, problem, share_memory=False)
    monkeypatch.setattr(OneHost, "offer", offering)
    monkeypatch.setattr(OneHost, "update", updating)
    assert all(map(torch.equal, on_two(use, problem), expected))


def test_smaller_slots_go_when_batches_grow() -> None:
    def use(module: ShardedEmbeddingBag) -> int:
        for size in range(1, 60):
            module({name: torch.zeros(size, 2, dtype=torch.int64) for name, _ in Problem().features}).sum().backward()
        return slots(module)

    assert max(on_two(use, Problem())) <= 4


def test_many_lookups_that_are_held_go_in_messages() -> None:
    problem = Problem(sizes=(4,))

    def use(module: ShardedEmbeddingBag) -> tuple[int, list[Tensor]]:
        outputs = [module(ids_of(problem, module.rank, step)) for step in range(MOST + 8)]
        for step, vectors in enumerate(outputs):
            problem.loss(vectors, module.rank, step).backward()
        if more_than_slots := module._exchange._host is not None:  # type: ignore[union-attr]
            assert slots(module) == MOST
        return more_than_slots, [*outputs, *module.shards.buffers()]

    shared, messages = on_two(use, problem), on_two(use, problem, share_memory=False)
    for (one, found), (other, expected) in zip(shared, messages, strict=True):
        assert one
        assert not other
        assert all(map(torch.equal, found, expected))


def test_a_rank_that_fails_while_it_looks_up_is_an_error_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on those that catch it and go on, as some do where memory is short."""
    problem = Problem(sizes=(4,))
    pool = Router.pool

    def failing(router: Router, poolings: Any) -> None:
        if router.rank == 1 and fails:
            fails.pop()
            raise MemoryError("no room")
        pool(router, poolings)

    def use(module: ShardedEmbeddingBag) -> list[str]:
        said = []
        for step in range(3):
            try:
                module(ids_of(problem, module.rank, step))
            except (MemoryError, EmbeddingError) as error:
                said.append(str(error))
        return said

    fails = [True]
    monkeypatch.setattr(Router, "pool", failing)
    theirs, own = on_two(use, problem)
    said = "rank 1 failed while it looked rows up, so that no rank can go on; see its error"
    assert theirs == [said] * 3
    assert own == ["no room", said, said]


def test_a_rank_that_fails_and_goes_on_leaves_the_others_what_they_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that change beside their lengths would be read beyond their end."""
    problem = Problem(sizes=(4,))
    pool, meet = Router.pool, Meetings.meet
    fails, reads, goes_on, unchanged = [True], threading.Event(), threading.Event(), []

    def failing(router: Router, poolings: Any) -> None:
        if router.rank == 1 and fails:
            assert reads.wait(TIMEOUT_S)
            fails.pop()
            raise MemoryError("no room")
        before = [each.bags.ids.clone() for each in poolings]
        reads.set()
        assert goes_on.wait(TIMEOUT_S)
        unchanged.append(all(torch.equal(each.bags.ids, ids) for each, ids in zip(poolings, before, strict=True)))
        if unchanged[-1]:
            pool(router, poolings)

    def meeting(meetings: Meetings, *arguments: Any, **more: Any) -> Any:
        if meetings._comm.rank == 1 and not fails:
            goes_on.set()
        return meet(meetings, *arguments, **more)

    def use(module: ShardedEmbeddingBag) -> int:
        failed = 0
        for step in range(2):
            try:
                module(ids_of(problem, module.rank, step))
            except (MemoryError, EmbeddingError):  # without a name: that would hold the lookup, and its slot
                failed += 1
        return failed

    monkeypatch.setattr(Router, "pool", failing)
    monkeypatch.setattr(Meetings, "meet", meeting)
    assert on_two(use, problem) == [2, 2]
    assert unchanged == [True]


def test_a_training_loop_needs_few_slots() -> None:
    problem = Problem(sizes=(4, 7))

    def use(module: ShardedEmbeddingBag) -> int:
        for step in range(30):
            problem.loss(module(ids_of(problem, module.rank, step)), module.rank, step).backward()
        return slots(module)

    assert max(on_two(use, problem)) <= 3


def test_lookups_that_wait_for_their_backward() -> None:
    """More of them than slots, backward in the order of the lookups."""
    problem = Problem(sizes=(4,))

    def use(module: ShardedEmbeddingBag) -> Tensor:
        losses = [
            problem.loss(module(ids_of(problem, module.rank, step)), module.rank, step) for step in range(2 * KEPT)
        ]
        for loss in losses:
            loss.backward()
        return torch.cat([module.shards[i].weight.flatten() for i in range(len(module.shards))])

    shared, sent = on_two(use, problem), on_two(use, problem, share_memory=False)
    assert all(map(torch.equal, shared, sent))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_that_grow_and_shrink(strategy: str) -> None:
    sizes = [2, 300, 5, 0, 1200]
    problems = [Problem(sizes=(size, size // 2 + 1)) for size in sizes]

    def use(module: ShardedEmbeddingBag) -> list[Tensor]:
        with torch.no_grad():
            return [module(ids_of(problem, module.rank, 0)) for problem in problems]

    bags = plain_modules(problems[0])
    for rank, found in enumerate(on_two(use, problems[0], strategy)):
        for vectors, problem in zip(found, problems, strict=True):
            inputs = ids_of(problem, rank, 0)
            expected = torch.cat([bags[table.name](*inputs[name]) for name, table in problem.features], 1)
            assert torch.equal(vectors, expected)


def test_an_output_outlives_its_module() -> None:
    problem = Problem(sizes=(40,))

    def program(comm: Communicator) -> tuple[Tensor, Tensor]:
        module = make(comm, problem, placements(problem, "row-wise", 2), SGD(0.5))
        with torch.no_grad():
            vectors = module(ids_of(problem, comm.rank, 0))
        before = vectors.clone()
        module.close()
        del module
        gc.collect()
        return vectors, before

    for vectors, before in on_ranks(2, program):
        assert torch.equal(vectors, before)


def test_weights_that_are_learned_on_one_rank_alone() -> None:
    table = EmbeddingTable("a", 10, 4)
    problem = Problem(tables=[table], sizes=(3,))

    def use(module: ShardedEmbeddingBag) -> tuple[Tensor, Tensor | None]:
        weights = torch.ones(6, dtype=torch.float64, requires_grad=module.rank == 1)
        vectors = module({"a": (torch.arange(6), torch.tensor([0, 2, 4]), weights)})
        vectors.sum().backward()
        return module(torch.arange(3).view(3, 1)).detach(), weights.grad

    shared, sent = on_two(use, problem), on_two(use, problem, share_memory=False)
    assert torch.equal(shared[0][0], sent[0][0]) and torch.equal(shared[1][0], sent[1][0])
    assert shared[0][1] is None and shared[1][1] is not None
    assert torch.equal(shared[1][1], sent[1][1])


def test_where_no_more_memory_can_be_had_messages_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(sizes=(4,))
    share, asked = LocalCommunicator.share, {0: 0, 1: 0}

    def limited(comm: LocalCommunicator, num_bytes: int) -> Any:
        asked[comm.rank] += 1
        return share(comm, num_bytes) if asked[comm.rank] <= 2 else None  # the counters and one slot

    def use(module: ShardedEmbeddingBag) -> Tensor:
        first = module(ids_of(problem, module.rank, 0))
        second = module(ids_of(problem, module.rank, 1))  # the first one's slot is in use: this goes in messages
        problem.loss(first, module.rank, 0).backward()
        problem.loss(second, module.rank, 1).backward()
        third: Tensor = module(ids_of(problem, module.rank, 2))
        return third.detach()

    expected = on_two(use, problem, share_memory=False)
    monkeypatch.setattr(LocalCommunicator, "share", limited)
    assert all(map(torch.equal, on_two(use, problem), expected))
    assert asked == {0: 3, 1: 3}


def test_without_shared_memory_there_are_messages() -> None:
    ids = torch.zeros(50, 1, dtype=torch.int64)

    def use(module: ShardedEmbeddingBag) -> float:
        module(ids)
        return module.metrics()["id_bytes"]

    problem = Problem(tables=[EmbeddingTable("a", 10, 4)])
    assert on_two(use, problem, share_memory=False) == [0.0, 16.0]  # an id that repeats is asked for once
    assert on_two(use, problem) == [0.0, 4.0 * (3 + 50)]
