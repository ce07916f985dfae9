"""Served lookups and updates: no lockstep, the owners' threads answer."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from embeddings import DIVIDED, Problem, make, placements, train_plain, whole_tables
from ranks_as_threads import on_ranks
from torch import Tensor

from hvd_shadowsync import EmbeddingError, ShadowSync
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import SGD, EmbeddingTable, RowWiseAdagrad, ShardedEmbeddingBag

PROBLEM = Problem(sizes=(4,))


def inputs(rank: int, step: int, problem: Problem = PROBLEM) -> dict[str, Any]:
    return {name: (ids, at) for name, (ids, at, _) in problem.bags(rank, step).items()}


@pytest.mark.parametrize("wire", [None, torch.float16])
@pytest.mark.parametrize("strategy", [*DIVIDED, "mixed"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_with_linear_losses_the_order_of_updates_does_not_matter(
    size: int, strategy: str, wire: torch.dtype | None
) -> None:
    """SGD on gradients that do not depend on the rows: whatever the interleaving, the tables end alike."""
    expected = train_plain(PROBLEM, size, SGD(0.5), 10)

    def program(comm: Communicator) -> dict[str, Tensor]:
        plan = placements(PROBLEM, strategy, comm.size)
        module = make(comm, PROBLEM, plan, SGD(0.5), mode="served", wire_dtype=wire)
        for step in range(10):
            PROBLEM.loss(module(inputs(comm.rank, step)), comm.rank, step).backward()
        module.wait()
        comm.allgather_object(None)
        tables = whole_tables(comm, module)
        module.close()
        return tables

    for tables in on_ranks(size, program):
        for name, table in expected.tables.items():
            torch.testing.assert_close(tables[name], table, rtol=0, atol=1e-12 if wire is None else 0.02)


def test_one_rank_alone_is_exact_step_by_step() -> None:
    """A rank sees all of its own updates; the others only serve."""
    problem = Problem(sizes=(4,))
    expected = train_plain(problem, 1, RowWiseAdagrad(0.1), 8)

    def program(comm: Communicator) -> list[Tensor]:
        module = make(
            comm, problem, placements(problem, "row-wise", 3), RowWiseAdagrad(0.1), mode="served", gradients="sum"
        )
        outputs = []
        for step in range(8 if comm.rank == 0 else 0):
            vectors = module(inputs(0, step, problem))
            outputs.append(vectors.detach().clone())
            problem.loss(vectors, 0, step).backward()
        module.close()
        return outputs

    for one, other in zip(on_ranks(3, program)[0], expected.outputs[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_rank_that_stands_still_holds_nobody_up() -> None:
    stands, done = threading.Event(), threading.Event()

    def program(comm: Communicator) -> bool:
        module = make(comm, PROBLEM, placements(PROBLEM, "mixed", 2), SGD(0.5), mode="served")
        waited = True
        if comm.rank == 1:
            PROBLEM.loss(module(inputs(1, 0)), 1, 0).backward()
            stands.set()
            waited = done.wait(20)
        else:
            stands.wait(20)
            for step in range(20):
                PROBLEM.loss(module(inputs(0, step)), 0, step).backward()
            done.set()
        module.close()
        return waited

    assert on_ranks(2, program) == [True, True]


def test_uneven_data_beside_the_dense_wrapper_and_lookups_ahead() -> None:
    def program(comm: Communicator) -> Any:
        tables = (EmbeddingTable("a", 10, 4), EmbeddingTable("b", 6, 2))
        plan = {"a": "row-wise", "b": "table-wise"}
        module = ShardedEmbeddingBag(tables, plan, RowWiseAdagrad(0.1), mode="served", communicator=comm)
        model = torch.nn.ModuleDict({"embedding": module, "top": torch.nn.Linear(6, 1)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=1)
        batches = [torch.full((2, 2), step % 6) for step in range(4 * comm.rank)]
        for ids in module.prefetch(batches, depth=1):
            optimizer.zero_grad()
            model["top"](module(ids)).sum().backward()
            optimizer.step()
        sync.synchronize()
        weights = sync.gather(model["top"].weight.detach().clone())
        sync.close()
        module.close()
        return weights

    weights = on_ranks(3, program)[0]
    assert all(torch.equal(each, weights[0]) for each in weights)


def test_a_wrong_input_is_an_error_of_its_rank() -> None:
    def program(comm: Communicator) -> str:
        module = make(comm, PROBLEM, placements(PROBLEM, "mixed", 2), SGD(0.5), mode="served")
        message = ""
        batch = inputs(comm.rank, 0)
        if comm.rank == 1:
            batch["ad"] = (batch["ad"][0] + 11, batch["ad"][1])
            with pytest.raises(EmbeddingError) as caught:
                module(batch)
            message = str(caught.value)
        else:
            module(batch).sum().backward()
        module.close()
        return message

    assert "feature 'ad' has the id" in on_ranks(2, program)[1]


def test_backward_of_a_lookup_that_is_too_old_is_an_error_of_its_rank() -> None:
    def program(comm: Communicator) -> str:
        module = make(comm, PROBLEM, placements(PROBLEM, "table-wise", 2), SGD(0.5), mode="served")
        message = ""
        if comm.rank == 1:
            PROBLEM.loss(module(inputs(1, 0)), 1, 0).backward()
            module.wait()
        comm.allgather_object(None)  # what has failed serves no more
        if comm.rank == 0:
            lookups = [module(inputs(0, step)) for step in range(66)]
            with pytest.raises(EmbeddingError) as caught:
                lookups[0].sum().backward()
                module.wait()
            message = str(caught.value)
        comm.allgather_object(None)
        module._worker._failure = None  # close() would say it again
        module.close()
        return message

    assert "more than 64 lookups old" in on_ranks(2, program)[0]


def test_the_dtype_stays() -> None:
    def program(comm: Communicator) -> None:
        module = make(comm, PROBLEM, placements(PROBLEM, "table-wise", 2), SGD(0.5), mode="served")
        with pytest.raises(ValueError, match=r"cannot change dtype from torch\.float64 to torch\.float32"):
            module.float()
        module.close()

    on_ranks(2, program)


def test_saving_while_another_rank_closes_is_an_error() -> None:
    def program(comm: Communicator) -> str:
        module = make(comm, PROBLEM, placements(PROBLEM, "table-wise", 2), SGD(0.5), mode="served")
        message = ""
        if comm.rank == 0:
            with pytest.raises(EmbeddingError) as caught:
                list(module.global_state_dict())
            message = str(caught.value)
        module.close()
        return message

    assert "rank 1 is in close()" in on_ranks(2, program)[0]
