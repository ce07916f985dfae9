"""`ShardedEmbeddingBag` on ranks that are threads, against `nn.EmbeddingBag` in one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from embeddings import DIVIDED, TABLES, Problem, placements, train_plain, train_sharded
from hypothesis import given
from hypothesis import strategies as st
from ranks_as_threads import on_ranks

from hvd_shadowsync.embedding import SGD, Adagrad, Adam, EmbeddingTable, Plan, RowWiseAdagrad
from hvd_shadowsync.embedding.kernels import choose
from hvd_shadowsync.embedding.optimizers import SparseOptimizer

pytestmark = pytest.mark.usefixtures("hosts")

RULES = [SGD(0.5), RowWiseAdagrad(0.1, eps=1e-8), Adagrad(0.1), Adam(0.05)]


def _is_here(name: str) -> bool:
    try:
        choose(name)
    except ValueError:
        return False
    return True


KERNELS = ["compiled", "plain", *(["fbgemm"] if _is_here("fbgemm") else [])]
"""`test_embedding_kernels` says why one is missing."""


def name_of(rule: SparseOptimizer) -> str:
    return type(rule).__name__


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strategy", [*DIVIDED, "mixed"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums_are_exact(size: int, strategy: str, kernel: str) -> None:
    problem, rule = Problem(), SGD(0.5)
    expected = train_plain(problem, size, rule, 20)
    found = on_ranks(
        size, lambda comm: train_sharded(comm, problem, placements(problem, strategy, size), rule, 20, kernel=kernel)
    )
    for rank, trained in enumerate(found):
        assert all(map(torch.equal, trained.outputs[0], expected.outputs[rank]))
        assert trained.tables.keys() == expected.tables.keys()
        assert all(torch.equal(trained.tables[name], expected.tables[name]) for name in expected.tables)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("strategy", [*DIVIDED, "mixed"])
def test_every_optimizer_on_unequal_batches(strategy: str, rule: SparseOptimizer, kernel: str) -> None:
    problem = Problem(sizes=(5, 0, 9), exact=False)
    plan = placements(problem, strategy, 3)
    expected = train_plain(problem, 3, rule, 20, plan=plan)
    found = on_ranks(3, lambda comm: train_sharded(comm, problem, plan, rule, 20, kernel=kernel))
    for rank, trained in enumerate(found):
        for one, other in zip(trained.outputs[0], expected.outputs[rank], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        for name, table in expected.tables.items():
            torch.testing.assert_close(trained.tables[name], table, rtol=1e-9, atol=1e-11)


def test_single_precision_is_close() -> None:
    problem, rule = Problem(sizes=(8, 3), exact=False, dtype=torch.float32), RowWiseAdagrad(0.1, eps=1e-8)
    expected = train_plain(problem, 2, rule, 20)
    found = on_ranks(2, lambda comm: train_sharded(comm, problem, placements(problem, "row-wise", 2), rule, 20))
    for name, table in expected.tables.items():
        torch.testing.assert_close(found[0].tables[name].float(), table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn", [True, False], ids=["learned", "given"])
@pytest.mark.parametrize("strategy", [*DIVIDED, "mixed"])
def test_weights_and_their_gradients(strategy: str, learn: bool) -> None:
    problem = Problem(weighted=frozenset({"user", "title", "text"}), sizes=(4,))
    plan, rule = placements(problem, strategy, 2), SGD(0.25)
    expected = train_plain(problem, 2, rule, 3)
    found = on_ranks(2, lambda comm: train_sharded(comm, problem, plan, rule, 3, learn_weights=learn))
    for rank, trained in enumerate(found):
        assert all(map(torch.equal, trained.outputs[0], expected.outputs[rank]))
        for one, other in zip(trained.weight_gradients[0], expected.weight_gradients[rank], strict=True):
            assert one.keys() == (problem.weighted if learn else set())
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(torch.equal(trained.tables[name], expected.tables[name]) for name in expected.tables)


def test_summed_gradients() -> None:
    problem, rule = Problem(sizes=(4, 2)), SGD(0.25)
    expected = train_plain(problem, 2, rule, 3, sums=True)
    plan = placements(problem, "mixed", 2)
    found = on_ranks(2, lambda comm: train_sharded(comm, problem, plan, rule, 3, gradients="sum"))
    assert all(torch.equal(found[1].tables[name], expected.tables[name]) for name in expected.tables)


def test_the_scale_of_gradients_matters() -> None:
    """The parity tests see a scale that is wrong by the number of ranks."""
    problem, rule = Problem(sizes=(4,)), SGD(0.25)
    right = train_plain(problem, 2, rule, 1)
    wrong = train_plain(problem, 2, rule, 1, sums=True)
    assert any(not torch.equal(right.tables[name], wrong.tables[name]) for name in right.tables)


def test_more_ranks_than_tables() -> None:
    problem, rule = Problem(tables=TABLES[:1]), SGD(0.5)
    expected = train_plain(problem, 4, rule, 3)
    plan = Plan.of(problem.tables, 4, {"users": "table-wise"})
    found = on_ranks(4, lambda comm: train_sharded(comm, problem, plan, rule, 3))
    assert all(torch.equal(trained.tables["users"], expected.tables["users"]) for trained in found)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, Plan]:
    size = draw(st.integers(1, 4))
    tables = []
    for index in range(draw(st.integers(1, 4))):
        rows, dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        features = [f"f{index}{letter}" for letter in "ab"[: draw(st.integers(1, 2))]]
        pooling = draw(st.sampled_from(["sum", "mean"]))
        tables.append(EmbeddingTable(f"t{index}", rows, dim, pooling, features))
    chosen = {table.name: draw(st.sampled_from(DIVIDED)) for table in tables}
    sums = [name for table in tables if table.pooling == "sum" for name in table.features]
    weighted = frozenset(draw(st.lists(st.sampled_from(sums)))) if sums else frozenset()
    sizes = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    problem = Problem(tables, sizes, exact=False, weighted=weighted, seed=draw(st.integers(0, 1000)))
    return problem, Plan.of(tables, size, chosen)


@given(problems(), st.sampled_from(KERNELS))
def test_any_tables_any_placement_any_batches(made: tuple[Problem, Plan], kernel: str) -> None:
    problem, plan = made
    expected = train_plain(problem, plan.world_size, SGD(0.5), 2)
    found = on_ranks(plan.world_size, lambda comm: train_sharded(comm, problem, plan, SGD(0.5), 2, kernel=kernel))
    for rank, trained in enumerate(found):
        for one, other in zip(trained.outputs[0], expected.outputs[rank], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for name, table in expected.tables.items():
        torch.testing.assert_close(found[0].tables[name], table, rtol=1e-10, atol=1e-12)
