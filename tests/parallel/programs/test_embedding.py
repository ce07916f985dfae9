"""Sharded embeddings over MPI: parity with one process on the whole batch, uneven data, errors, the dense wrapper."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from embeddings import DIVIDED, Problem, make, placements, train_plain, train_sharded, whole_tables

from hvd_shadowsync import EmbeddingError, ShadowSync
from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import SGD, Adagrad, Adam, RowWiseAdagrad
from hvd_shadowsync.embedding.optimizers import SparseOptimizer

pytestmark = pytest.mark.usefixtures("hosts")

RULES = [RowWiseAdagrad(0.1, eps=1e-8), Adagrad(0.1), Adam(0.05)]


@pytest.fixture(scope="module")
def comm() -> Iterator[Communicator]:
    found = mpi.world()
    yield found
    found.free()


@pytest.mark.parametrize("kernel", ["compiled", "plain"])
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("strategy", [*DIVIDED, "mixed"])
def test_sums_are_exact(comm: Communicator, strategy: str, steps: int, kernel: str) -> None:
    problem, rule = Problem(), SGD(0.5)
    expected = train_plain(problem, comm.size, rule, steps)
    found = train_sharded(comm, problem, placements(problem, strategy, comm.size), rule, steps, kernel=kernel)
    assert all(map(torch.equal, found.outputs[0], expected.outputs[comm.rank]))
    assert all(torch.equal(found.tables[name], expected.tables[name]) for name in expected.tables)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("strategy", [*DIVIDED, "mixed"])
def test_every_optimizer_on_unequal_batches(comm: Communicator, strategy: str, rule: SparseOptimizer) -> None:
    problem = Problem(sizes=(5, 0, 9, 1), exact=False, weighted=frozenset({"user", "query"}))
    plan = placements(problem, strategy, comm.size)
    expected = train_plain(problem, comm.size, rule, 20, plan=plan)
    found = train_sharded(comm, problem, plan, rule, 20)
    for one, other in zip(found.outputs[0], expected.outputs[comm.rank], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for name, table in expected.tables.items():
        torch.testing.assert_close(found.tables[name], table, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [3000])
def test_messages_of_many_chunks(comm: Communicator, size: int) -> None:
    problem, rule = Problem(sizes=(size,), exact=False, dtype=torch.float32), Adagrad(0.1)
    plan = placements(problem, "mixed", comm.size)
    expected = train_plain(problem, comm.size, rule, 3)
    found = train_sharded(comm, problem, plan, rule, 3)
    for name, table in expected.tables.items():
        torch.testing.assert_close(found.tables[name].float(), table, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_uneven_data_and_lookups_ahead(comm: Communicator, depth: int) -> None:
    problem = Problem(sizes=(4,))
    module = make(comm, problem, placements(problem, "mixed", comm.size), SGD(0.5))
    steps = 3 + 4 * comm.rank if comm.rank != 2 else 0
    for _ in range(2):
        batches = [{n: (i, a) for n, (i, a, _) in problem.bags(comm.rank, step).items()} for step in range(steps)]
        for step, batch in enumerate(module.prefetch(batches, depth=depth)):
            problem.loss(module(batch), comm.rank, step).backward()
    tables = whole_tables(comm, module)
    module.close()
    everyone = comm.allgather_object({name: table.sum().item() for name, table in tables.items()})
    assert all(each == everyone[0] for each in everyone)
    assert not any(table.isnan().any() for table in tables.values())


@pytest.mark.parametrize("strategy", ["table-wise", "mixed"])
def test_served_without_lockstep(comm: Communicator, strategy: str) -> None:
    """SGD on gradients that do not depend on the rows: whatever the interleaving, the tables end alike."""
    problem = Problem(sizes=(4,))
    expected = train_plain(problem, comm.size, SGD(0.5), 10)
    module = make(comm, problem, placements(problem, strategy, comm.size), SGD(0.5), mode="served")
    for step in range(10):
        bags = {name: (ids, at) for name, (ids, at, _) in problem.bags(comm.rank, step).items()}
        problem.loss(module(bags), comm.rank, step).backward()
    module.wait()
    comm.allgather_object(None)
    tables = whole_tables(comm, module)
    module.close()
    for name, table in expected.tables.items():
        torch.testing.assert_close(tables[name], table, rtol=0, atol=1e-12)


def test_a_wrong_id_is_an_error_on_every_rank(comm: Communicator) -> None:
    problem = Problem()
    module = make(comm, problem, placements(problem, "mixed", comm.size), SGD(0.5))
    bags = {name: (ids, at) for name, (ids, at, _) in problem.bags(comm.rank, 0).items()}
    last = comm.size - 1
    if comm.rank == last:
        bags["ad"] = (bags["ad"][0] + 11, bags["ad"][1])
    where = f"^rank {last}: " if comm.size > 1 else "^"
    with pytest.raises(EmbeddingError, match=where + "feature 'ad' has the id .* table 'ads' has rows 0 to 10"):
        module(bags)
    module.close()


def test_beside_the_dense_wrapper_with_uneven_data(comm: Communicator) -> None:
    problem = Problem(sizes=(4,), dtype=torch.float32)
    module = make(comm, problem, placements(problem, "mixed", comm.size), RowWiseAdagrad(0.1))
    model = torch.nn.ModuleDict({"embedding": module, "top": torch.nn.Linear(121, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=2)
    for step in range(6 * comm.rank):
        bags = {name: (ids, at) for name, (ids, at, _) in problem.bags(comm.rank, step).items()}
        optimizer.zero_grad()
        model["top"](module(bags)).square().mean().backward()
        optimizer.step()
    sync.synchronize()
    everyone = sync.gather(model["top"].weight.detach().clone())
    assert all(torch.equal(each, everyone[0]) for each in everyone)
    sync.close()
    module.close()
