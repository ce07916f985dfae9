"""Profiles of embedding tables: counts are exact, times come in the right order, memory stays that of the stand-ins."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_shadowsync.embedding import (
    SGD,
    Adagrad,
    Adam,
    EmbeddingTable,
    Jagged,
    Padded,
    RowWiseAdagrad,
    TableCost,
    kernels,
    plan,
    profile,
)
from hvd_shadowsync.embedding.kernels.base import Pooling, Update
from hvd_shadowsync.embedding.kernels.plain import PlainKernel
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.embedding.placement import TABLE_WISE

MODULE = importlib.import_module("hvd_shadowsync.embedding.profile")  # the package's attribute is the function
RULES = [SGD(0.1), RowWiseAdagrad(0.1), Adagrad(0.1), Adam(0.1)]
USERS = EmbeddingTable("users", 100, 8)
ITEMS = EmbeddingTable("items", 50, 4, features=["seen", "bought"])
SEEN = [[1, 2, 2], [], [7, 1]]
BOUGHT = [[2], [9, 9], []]


def counted(found: dict[str, TableCost]) -> dict[str, tuple[float, float]]:
    return {name: (cost.pooling_factor, cost.unique_fraction) for name, cost in found.items()}


def flat(bags: Sequence[Sequence[int]]) -> list[int]:
    return [each for bag in bags for each in bag]


def offsets_of(bags: Sequence[Sequence[int]]) -> list[int]:
    return [len(flat(bags[:bag])) for bag in range(len(bags))]


def as_offsets(bags: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(flat(bags), dtype=torch.int64), torch.tensor(offsets_of(bags), dtype=torch.int64)


def as_padded(bags: Sequence[Sequence[int]]) -> Padded:
    most = max(map(len, bags))
    ids = torch.tensor([[*bag, *[0] * (most - len(bag))] for bag in bags])
    return Padded(ids, torch.tensor([len(bag) for bag in bags]))


def constant_ids(rows: int, samples: int, ids: int) -> Tensor:
    """Return [samples, ids], ids spread over all rows."""
    return (torch.arange(samples * ids) * 7919 % rows).view(samples, ids)


# --- counts -----------------------------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "offsets": {"users": torch.tensor([3, 3, 4]), "seen": as_offsets(SEEN), "bought": as_offsets(BOUGHT)},
    "padded": {"users": torch.tensor([3, 3, 4]).int(), "seen": as_padded(SEEN), "bought": as_padded(BOUGHT)},
    "jagged": Jagged(
        ["users", "seen", "bought"],
        torch.tensor([3, 3, 4, *flat(SEEN), *flat(BOUGHT)]),
        torch.tensor([1, 1, 1, *map(len, SEEN), *map(len, BOUGHT)]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_exact_in_any_form(form: str) -> None:
    found = profile([USERS, ITEMS], [FORMS[form]], optimizer=SGD(0.1), repeats=1)
    assert counted(found) == {"users": (1.0, 2 / 3), "items": (8 / 6, 4 / 8)}, "1, 2, 7, 9, over both features"
    assert {cost.batch_size for cost in found.values()} == {3.0}


def test_offsets_may_end_with_the_number_of_ids() -> None:
    given = {"users": (torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))}
    found = profile([USERS], [given], optimizer=SGD(0.1), include_last_offset=True)
    assert counted(found) == {"users": (1.5, 1.0)}


def test_weights_may_want_gradients() -> None:
    weights = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    given = {"users": (torch.tensor([[1, 2, 3], [3, 4, 5]]), None, weights)}
    found = profile([USERS], [given], optimizer=SGD(0.1), dtype=torch.float64)
    assert counted(found) == {"users": (3.0, 5 / 6)}
    assert weights.grad is None


bags = st.lists(st.lists(st.integers(0, 49), max_size=6), max_size=8)


@hypothesis.given(st.lists(bags, min_size=1, max_size=4), st.sampled_from(RULES), st.integers(1, 60))
def test_counts_are_those_of_python(batches: list[list[list[int]]], rule: SparseOptimizer, sample_rows: int) -> None:
    hypothesis.assume(any(batches))
    table = EmbeddingTable("a", 50, 4)
    given = [{"a": as_offsets(batch)} for batch in batches]
    (found,) = profile([table], given, optimizer=rule, repeats=1, sample_rows=sample_rows).values()
    ids = [flat(batch) for batch in batches]
    total, used = sum(map(len, ids)), [batch for batch in batches if batch]
    assert found.pooling_factor == total / sum(map(len, batches))
    assert found.unique_fraction == (sum(len(set(each)) for each in ids) / total if total else 1.0)
    assert found.batch_size == pytest.approx(sum(map(len, used)) / len(used)), "empty batches count for nothing"
    assert found.compute_us is not None and found.compute_us > 0


def test_no_more_batches_are_read_than_said() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(len(read))
            yield torch.tensor([[len(read)]])

    profile([USERS], endless(), optimizer=SGD(0.1), repeats=1)
    assert len(read) == MODULE.MOST_BATCHES == 64


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", "plain"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_more_ids_cost_more(rule: SparseOptimizer, kernel: str) -> None:
    tables = [EmbeddingTable(name, 1000, 16) for name in ("few", "many")]
    batch = {"few": constant_ids(1000, 500, 1), "many": constant_ids(1000, 500, 50)}
    found = profile(tables, [batch, batch], optimizer=rule, kernel=kernel)
    assert found["many"].compute_us > found["few"].compute_us  # type: ignore[operator]


def test_a_table_with_many_ids_is_placed_apart() -> None:
    tables = [EmbeddingTable(name, 1000, 16) for name in ("a", "many", "b")]
    batch = {table.name: constant_ids(1000, 2000, 20 if table.name == "many" else 1) for table in tables}
    # The dearest table is placed first, the others opposite: all that counts is that 20 times the ids cost more.
    found = plan(tables, 2, profile(tables, [batch] * 3, optimizer=SGD(0.1)), strategy=TABLE_WISE, batch_size=2000)
    a, many, b = (placement.ranks for placement in found.placements)
    assert a == b != many


class Metered(PlainKernel):
    """A kernel with a clock that ids alone move on: 1 us for look-up, 2 us for update, and `hiccup` us now and then."""

    def __init__(self, hiccup: float = 0.0) -> None:
        self.now_us = 0.0
        self.hiccup = hiccup
        self.calls: list[tuple[str, int]] = []

    def clock(self) -> float:
        return 1e-6 * self.now_us

    def pool(self, poolings: Sequence[Pooling]) -> None:
        super().pool(poolings)
        self.now_us += sum(len(each.bags.ids) for each in poolings)
        self.calls.append(("pool", len(poolings)))

    def update(self, rule: SparseOptimizer, step: int, updates: Sequence[Update]) -> None:
        super().update(rule, step, updates)
        self.now_us += 2 * sum(len(each.bags.ids) for update in updates for each in update.gradients)
        self.now_us += self.hiccup * (step % 3 == 0)
        self.calls.append(("update", step))


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> Metered:
    kernel = Metered()
    monkeypatch.setattr(kernels, "choose", lambda name: kernel)
    monkeypatch.setattr(MODULE, "perf_counter", kernel.clock)
    return kernel


def test_times_are_the_mean_over_batches_of_the_median_over_repeats(metered: Metered) -> None:
    metered.hiccup = 1e6
    batches = [{"users": torch.arange(n), "seen": torch.zeros(n, 2).int(), "bought": torch.arange(n)} for n in (4, 10)]
    found = profile([USERS, ITEMS], batches, optimizer=SGD(0.1), repeats=5)
    assert found["users"].compute_us == pytest.approx(3 * 7)
    assert found["items"].compute_us == pytest.approx(3 * 21)
    assert found["items"].batch_size == 7.0


def test_steps_are_those_of_training(metered: Metered) -> None:
    profile([USERS, ITEMS], [torch.ones(2, 3).int()], optimizer=Adam(0.1), repeats=2)
    assert metered.calls == [
        call for step in (1, 2, 3) for call in (("pool", 1), ("pool", 2), ("update", step), ("update", step))
    ], "look-up of all tables, then their update; a round to warm up, then two"


def test_a_balanced_plan_places_a_table_with_many_ids_apart(metered: Metered) -> None:
    tables = [EmbeddingTable(f"t{i}", 1000, 16) for i in range(20)]
    batch = {table.name: constant_ids(1000, 512, 20 if table.name == "t7" else 1) for table in tables}
    found = plan(tables, 2, costs=profile(tables, [batch], optimizer=SGD(0.1)))
    (apart,) = found.placements[7].ranks
    assert {placement.ranks for placement in found.placements if placement != found.placements[7]} == {(1 - apart,)}
    assert max(found.rank_costs) < 1.05 * min(found.rank_costs), "19 tables on one side, one on the other"


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest memory that any tensor has, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, Tensor):
                self.num_bytes = max(self.num_bytes, each.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("kernel", ["auto", "plain"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_large_tables_are_stood_in_for(rule: SparseOptimizer, kernel: str) -> None:
    rows = 10**12
    ids = torch.tensor([[0, 1000], [rows - 1, 2000], [5, 5]])
    with Largest() as largest:
        found = profile([EmbeddingTable("a", rows, 16)], [{"a": ids}], optimizer=rule, kernel=kernel, sample_rows=1000)
    assert counted(found) == {"a": (2.0, 5 / 6)}, "counted before ids fall together"
    assert largest.num_bytes <= 1000 * 16 * 4 + 64


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_stand_ins_of_many_tables_share_memory(rule: SparseOptimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "SHARED_BYTES", 10_000)
    tables = [EmbeddingTable(f"t{i}", 10 * i + 1, 5) for i in range(30)]
    batch = {table.name: constant_ids(table.num_embeddings, 4, 3) for table in tables}
    with Largest() as largest:
        found = profile(tables, [batch], optimizer=rule, repeats=1)
    assert list(found) == [table.name for table in tables]
    assert largest.num_bytes <= 10_000


def test_memory_is_that_of_the_largest_stand_in_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "SHARED_BYTES", 1)
    tables = [EmbeddingTable("small", 10, 4), EmbeddingTable("large", 10_000, 4), EmbeddingTable("other", 9_000, 4)]
    with Largest() as largest:
        profile(tables, [torch.ones(2, 3).int()], optimizer=Adam(0.1), repeats=1)
    assert largest.num_bytes == 10_000 * 4 * 4


# --- manners ----------------------------------------------------------------------------------------------------------


def test_plans_stay_pure_and_costs_can_be_sent() -> None:
    tables = [USERS, ITEMS]
    costs = profile(tables, [torch.ones(5, 3).int()], optimizer=SGD(0.1))
    before = dict(costs)
    first, again = plan(tables, 3, costs), plan(tables, 3, pickle.loads(pickle.dumps(costs)))
    assert first == again
    assert first.costs == again.costs
    assert costs == before


def test_any_thread_may_call_and_no_random_numbers_are_used() -> None:
    state, found = torch.get_rng_state(), []
    thread = threading.Thread(
        target=lambda: found.append(profile([USERS], [torch.ones(2, 1).int()], optimizer=Adam(0.1)))
    )
    thread.start()
    thread.join()
    assert counted(found[0]) == {"users": (1.0, 0.5)}
    assert torch.equal(torch.get_rng_state(), state)


def test_mpi_is_not_needed() -> None:
    code = """
import sys, torch
sys.modules["mpi4py"] = None
from hvd_shadowsync.embedding import SGD, EmbeddingTable, profile
print(profile([EmbeddingTable("a", 10, 4)], [torch.ones(2, 1).int()], optimizer=SGD(0.1))["a"].pooling_factor)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1.0\n", done.stderr


GOOD = torch.ones(2, 1).int()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tables": []}, "tables is empty"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is no optimizer of rows; give one such as"),
        ({"optimizer": SparseOptimizer(0.1)}, "is no optimizer of rows"),
        ({"kernel": "gpu"}, "kernel='gpu' is unknown; give one of"),
        ({"repeats": 0}, "repeats=0 is below 1"),
        ({"sample_rows": 0}, "sample_rows=0 is below 1"),
        ({"sample_rows": 1e6}, "sample_rows=1000000.0 is not a whole number"),
        ({"dtype": torch.float16}, "dtype=torch.float16 is not supported; give torch.float32 or torch.float64"),
        ({"include_last_offset": 1}, "include_last_offset=1 is neither True nor False"),
        ({"batches": []}, "batches has no sample; give at least one batch"),
        ({"batches": [GOOD[:0]]}, "batches has no sample"),
        ({"batches": 3}, "batches is a int; give an iterable of batches"),
        ({"batches": GOOD}, "batches is a Tensor, which is one batch; give an iterable of batches, such as a list"),
        ({"batches": {"users": GOOD}}, "batches is a dict, which is one batch"),
        ({"batches": [GOOD, 100 * GOOD]}, "batch 1 of batches: feature 'users' has the id 100 at place 0"),
        ({"batches": [(GOOD, GOOD)]}, "batch 0 of batches: inputs is a tuple; give a dict of features"),
        ({"batches": [GOOD.float()]}, "batch 0 of batches: ids of feature 'users' is of torch.float32"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"tables": [USERS], "batches": [GOOD], "optimizer": SGD(0.1)}
    with pytest.raises((TypeError, ValueError), match=message):
        profile(**{**good, **given})
