"""Plans of embedding tables: they are balanced, fit into memory, and what an error advises succeeds."""

from __future__ import annotations

import re
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from hvd_shadowsync.embedding.costs import CostModel, TableCost
from hvd_shadowsync.embedding.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad, SparseOptimizer
from hvd_shadowsync.embedding.placement import (
    COLUMN_WISE,
    REPLICATED,
    ROW_HASHED,
    ROW_WISE,
    STRATEGIES,
    TABLE_WISE,
    Plan,
)
from hvd_shadowsync.embedding.planner import PLANNED, plan
from hvd_shadowsync.embedding.tables import EmbeddingTable

Problem = tuple[list[EmbeddingTable], int, dict[str, TableCost]]

# As in recommendation: the tables with the most rows are not those with the most ids in a bag.
TYPICAL = [EmbeddingTable(f"t{i}", int(1e7 / (i + 1) ** 1.5) + 1, 64) for i in range(26)]
TYPICAL_COSTS = {f"t{i}": TableCost(max(1.0, 50 / (1 + 7 * i % 26))) for i in range(26)}


def power(u: float, high: float) -> float:
    """Return a number in [1, high] with density x^-1.5, for u in [0, 1]."""
    return (1 - u * (1 - high**-0.5)) ** -2


@st.composite
def problems(draw: st.DrawFn, max_tables: int = 30, max_rows: float = 1e8) -> Problem:
    """Tables whose rows, and traffic, are from power laws."""
    unit = st.floats(0, 1)
    tables, costs = [], {}
    for i in range(draw(st.integers(1, max_tables))):
        name = f"t{i}"
        dim = draw(st.sampled_from([1, 8, 16, 64, 100, 128, 256]))
        features = [f"{name}-{k}" for k in range(draw(st.integers(1, 3)))]
        tables.append(EmbeddingTable(name, int(power(draw(unit), max_rows)), dim, features=features))
        measured = draw(st.none() | unit.map(lambda u: 1000 * power(u, 1e3)))
        costs[name] = TableCost(power(draw(unit), 200.0), draw(st.floats(0.05, 1)), measured)
    return tables, draw(st.integers(1, 17)), costs


optimizers = st.sampled_from([None, SGD(0.1), RowWiseAdagrad(0.1), Adagrad(0.1), Adam(0.1)])


def imbalance(found: Plan) -> float:
    return max(found.rank_costs) * found.world_size / sum(found.rank_costs)


def held(found: Plan, optimizer: SparseOptimizer | None = None, element_bytes: int = 4) -> list[int]:
    """Return the bytes on each rank, reckoned here anew."""
    per_weight, per_row = optimizer.state_per_row if optimizer else (0, 0)
    small = [found.tables[index] for index in found.replicated]
    always = sum(table.numel * (1 + per_weight) + table.num_embeddings * per_row for table in small)
    return [
        element_bytes
        * (always + sum(s.numel * (1 + per_weight) + s.rows.num_rows * per_row for s in found.of_rank(rank)))
        for rank in range(found.world_size)
    ]


def strategies_of(found: Plan) -> list[str]:
    return [placement.strategy for placement in found.placements]


@hypothesis.settings(max_examples=200)
@hypothesis.given(problems())
def test_balanced_is_never_worse_than_round_robin(problem: Problem) -> None:
    found, dealt = plan(*problem), plan(*problem, strategy="round-robin")
    assert imbalance(found) <= imbalance(dealt) * (1 + 1e-9)
    assert max(found.rank_costs) <= max(dealt.rank_costs) * (1 + 1e-9), "not even by wasting the others' time"


@hypothesis.given(problems())
def test_dividing_never_costs_less_in_all(problem: Problem) -> None:
    tables, world_size, costs = problem
    least = sum(plan(*problem, strategy=TABLE_WISE).costs)
    for strategy in (ROW_WISE, ROW_HASHED, COLUMN_WISE):
        assert sum(plan(tables, world_size, costs, strategy=strategy).costs) >= least * (1 - 1e-9)


def test_a_typical_example() -> None:
    found = plan(TYPICAL, 8, TYPICAL_COSTS)
    dealt = plan(TYPICAL, 8, TYPICAL_COSTS, strategy="round-robin")
    assert imbalance(found) < 1.15
    assert imbalance(dealt) > 2
    assert max(found.rank_costs) < max(dealt.rank_costs) / 2
    assert set(strategies_of(found)) == {TABLE_WISE, ROW_HASHED}, "divided where it helps, and only there"


def test_round_robin_deals_in_order() -> None:
    found = plan(TYPICAL, 8, TYPICAL_COSTS, strategy="round-robin")
    assert [placement.ranks for placement in found.placements] == [(i % 8,) for i in range(26)]
    assert set(strategies_of(found)) == {TABLE_WISE}


@hypothesis.given(problems(), st.sampled_from(PLANNED), optimizers)
def test_a_plan_is_the_same_every_time(problem: Problem, strategy: str, optimizer: SparseOptimizer | None) -> None:
    tables, world_size, costs = problem
    first = plan(tables, world_size, costs, strategy=strategy, optimizer=optimizer)
    again = plan(tuple(tables), world_size, dict(reversed(costs.items())), strategy=strategy, optimizer=optimizer)
    assert first == again
    assert first.costs == again.costs
    assert min(first.costs) >= 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [2, 5])
def test_a_word_forces_all_tables(strategy: str, world_size: int) -> None:
    tables = [EmbeddingTable("a", 100, 16), EmbeddingTable("b", 7, 8), EmbeddingTable("c", 1, 1)]
    expected = strategy if strategy in (TABLE_WISE, REPLICATED) else TABLE_WISE
    assert strategies_of(plan(tables, world_size, strategy=strategy)) == [strategy, strategy, expected]


@hypothesis.given(problems())
def test_one_rank_has_everything(problem: Problem) -> None:
    tables, _, costs = problem
    for strategy in (word for word in PLANNED if word != REPLICATED):
        found = plan(tables, 1, costs, strategy=strategy, replicate_below_bytes=10**9)
        assert {(each.strategy, each.ranks) for each in found.placements} == {(TABLE_WISE, (0,))}


@pytest.mark.parametrize("strategy", PLANNED)
def test_more_ranks_than_tables(strategy: str) -> None:
    found = plan([EmbeddingTable("a", 10, 4), EmbeddingTable("b", 3, 2)], 12, strategy=strategy)
    assert found.world_size == 12
    assert sum(shard.numel for shard in found.shards) == (0 if strategy == REPLICATED else 46)


def test_a_table_alone_is_shared_by_all_ranks() -> None:
    found = plan([EmbeddingTable("a", 10**6, 64)], 4, {"a": TableCost(20.0)})
    assert found.placements[0].strategy == ROW_HASHED
    assert sorted(found.placements[0].ranks) == [0, 1, 2, 3]


def test_wide_tables_with_few_ids_a_bag_are_divided_by_columns() -> None:
    # Sums of row-wise parts would go over the wire four times; the ids of column-wise ones are small beside the rows.
    cost = {"a": TableCost(4.0)}
    wide = plan([EmbeddingTable("a", 10**6, 512)], 4, cost)
    assert wide.placements[0].strategy == COLUMN_WISE
    assert [shard.dim for shard in wide.shards] == [128] * 4
    narrow = plan([EmbeddingTable("a", 10**6, 127)], 4, cost)
    assert narrow.placements[0].strategy == ROW_HASHED


def test_memory_is_spread_without_a_limit_too() -> None:
    tables = [EmbeddingTable("huge", 10**8, 64)] + [EmbeddingTable(f"t{i}", 1000, 64) for i in range(40)]
    found = plan(tables, 4, {f"t{i}": TableCost(30.0) for i in range(40)})
    assert found.placements[0].strategy == ROW_HASHED, "its traffic is small, but it is 25 GB"
    assert max(held(found)) <= 2.01 * sum(held(found)) / 4


def test_small_tables_are_replicated_where_asked() -> None:
    tables = [EmbeddingTable("small", 100, 16), EmbeddingTable("large", 101, 16)]
    assert plan(tables, 2).replicated == ()
    assert plan(tables, 2, replicate_below_bytes=6400).replicated == (0,)
    assert plan(tables, 2, replicate_below_bytes=6400, element_bytes=8).replicated == ()
    assert plan(tables, 2, replicate_below_bytes=6400, strategy=TABLE_WISE).replicated == ()


def test_measured_times_count() -> None:
    tables = [EmbeddingTable(name, 1000, 16) for name in "abcd"]
    slow = plan(tables, 2, {"a": TableCost(compute_us=3e5), "b": TableCost(compute_us=3e5)}, strategy=TABLE_WISE)
    assert slow.placements[0].ranks != slow.placements[1].ranks
    assert slow.costs[0] > 2 * 3e5 > slow.costs[2]


def test_measured_times_are_scaled_to_the_batch_of_the_plan() -> None:
    tables = [EmbeddingTable("a", 1000, 16)]
    costs = [
        plan(tables, 2, {"a": cost}, batch_size=2000, strategy=TABLE_WISE).costs
        for cost in (TableCost(compute_us=1e3, batch_size=500.0), TableCost(compute_us=4e3))
    ]
    assert costs[0] == pytest.approx(costs[1])


def test_the_cost_model() -> None:
    table = EmbeddingTable("a", 1000, 64)
    model = CostModel(world_size=4, batch_size=100, element_bytes=4)
    cost = TableCost(10.0)
    # 400 bags: 4000 ids and 400 lengths of 4 bytes, 400 vectors of 256 bytes each way; a fourth stays on the rank
    assert model.wire_bytes(table, cost, TABLE_WISE, 1) == 0.75 * (4400 * 4 + 2 * 400 * 256)
    assert model.wire_bytes(table, cost, ROW_HASHED, 4) == 0.75 * (1400 * 4 + 2 * 400 * 256)
    assert model.wire_bytes(table, cost, COLUMN_WISE, 4) == 0.75 * (4400 * 4 + 2 * 400 * 64)
    assert model.wire_bytes(table, cost, REPLICATED, 4) == 0.75 * 2 * 256_000
    assert model.wire_bytes(table, TableCost(0.5), TABLE_WISE, 1) == 0.75 * (600 * 4 + 2 * 200 * 256), "empty bags"
    whole = model.compute_us(table, cost, TABLE_WISE, 1)
    assert whole == pytest.approx(30 + 4000 * (0.005 + 256 / 30_000) + 4000 * (0.015 + 3 * 0.0256) + 2 * 400 * 0.0256)
    assert model.compute_us(table, TableCost(10.0, 0.5), TABLE_WISE, 1) == pytest.approx(
        whole - 2000 * (0.015 + 0.0768)
    )
    adam = CostModel(4, 100, 4, state=(2, 0)).compute_us(table, cost, TABLE_WISE, 1)
    assert adam == pytest.approx(whole + 4000 * 2 * 0.0512), "twice a row's bytes of state, read and written"
    assert (
        whole / 4 < model.compute_us(table, cost, ROW_WISE, 4) < model.compute_us(table, cost, COLUMN_WISE, 4) < whole
    )
    assert CostModel(1, 100, 4).wire_bytes(table, cost, TABLE_WISE, 1) == 0


@hypothesis.given(problems(max_tables=8, max_rows=1e4), optimizers, st.sampled_from(PLANNED), st.floats(0.3, 3))
def test_limits_are_kept_and_advice_is_true(
    problem: Problem, optimizer: SparseOptimizer | None, strategy: str, tightness: float
) -> None:
    tables, world_size, costs = problem
    given: dict[str, Any] = {"costs": costs, "strategy": strategy, "optimizer": optimizer}
    whole = plan(tables, 1, **given)
    limit = max(int(tightness * sum(held(whole, optimizer)) / world_size), 1)
    try:
        found = plan(tables, world_size, memory_limit=limit, **given)
    except ValueError as error:
        check_advice(str(error), tables, world_size, limit, given)
    else:
        assert max(held(found, optimizer)) <= limit


def check_advice(text: str, tables: list[EmbeddingTable], world_size: int, limit: int, given: dict[str, Any]) -> None:
    facts, _, advice = text.rpartition("; give ")
    (enough,) = map(int, re.findall(r"memory_limit=(\d+) or more", advice))
    for remedy in (enough, enough + 1, 10 * enough):
        assert max(held(plan(tables, world_size, memory_limit=remedy, **given), given["optimizer"])) <= remedy
    for ranks in map(int, re.findall(r"world_size=(\d+)", advice)):
        assert ranks > world_size
        assert max(held(plan(tables, ranks, memory_limit=limit, **given), given["optimizer"])) <= limit
    for strategy in re.findall(r"strategy='(.*?)'", advice):
        plan(tables, world_size, memory_limit=limit, **{**given, "strategy": strategy})
    total = sum(held(plan(tables, 1, **{**given, "strategy": TABLE_WISE}), given["optimizer"]))
    assert f"memory_limit={limit} bytes" in facts
    assert f"need {total} bytes in all, {enough} on the fullest rank" in facts


def test_what_does_not_fit() -> None:
    tables = [EmbeddingTable("big", 1000, 16), EmbeddingTable("small", 100, 16)]
    with pytest.raises(ValueError) as caught:
        plan(tables, 2, memory_limit=20_000, optimizer=RowWiseAdagrad(0.1))
    assert str(caught.value) == (
        "memory_limit=20000 bytes a rank is too little for strategy='balanced' with world_size=2: weights and "
        "optimizer state need 74800 bytes in all, 37400 on the fullest rank; the largest table is 'big', 68000 bytes; "
        "give "
        "world_size=4, or memory_limit=37400 or more"
    )
    with pytest.raises(ValueError, match="give strategy='balanced', or memory_limit=64000 or more"):
        plan(tables, 2, memory_limit=40_000, strategy=TABLE_WISE)
    with pytest.raises(ValueError, match="give memory_limit=35200 or more"):
        plan(tables, 2, memory_limit=1)


def test_a_limit_that_fits_exactly() -> None:
    tables = [EmbeddingTable(f"t{i}", 100, 4) for i in range(4)]
    assert held(plan(tables, 2, memory_limit=3200)) == [3200, 3200]
    with pytest.raises(ValueError, match="memory_limit=3200 or more"):
        plan(tables, 2, memory_limit=3199)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world_size": 0}, "world_size=0 is below 1"),
        ({"memory_limit": 0}, "memory_limit=0 is below 1"),
        ({"memory_limit": 1e9}, "memory_limit=1000000000.0 is not a whole number"),
        ({"strategy": "greedy"}, "strategy='greedy' is unknown; give one of 'balanced', 'round-robin', 'table-wise'"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"element_bytes": 0}, "element_bytes=0 is below 1"),
        ({"replicate_below_bytes": -1}, "replicate_below_bytes=-1 is below 0"),
        ({"costs": {"b": TableCost()}}, "costs has 'b', which is no table; known are a"),
        ({"costs": {"a": 3.0}}, r"costs\['a'\]=3.0 is no TableCost"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is no SparseOptimizer"),
        ({"tables": []}, "tables is empty"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        plan(**{"tables": [EmbeddingTable("a", 10, 4)], "world_size": 2, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pooling_factor": -1.0}, "pooling_factor=-1.0 is outside"),
        ({"pooling_factor": float("inf")}, "pooling_factor=inf is outside"),
        ({"unique_fraction": 1.5}, "unique_fraction=1.5 is outside"),
        ({"compute_us": -0.1}, "compute_us=-0.1 is outside"),
        ({"batch_size": 0.5}, "batch_size=0.5 is outside"),
    ],
)
def test_wrong_costs(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableCost(**given)


def test_tables_without_traffic() -> None:
    tables = [EmbeddingTable(name, 10, 4) for name in "ab"]
    for cost in (TableCost(0.0), TableCost(0.0, 0.0, 0.0)):
        for world_size in (1, 2, 3):
            assert plan(tables, world_size, {"a": cost, "b": cost}).world_size == world_size


def test_the_printed_form() -> None:
    tables = [EmbeddingTable("users", 1_000_000, 64), EmbeddingTable("days", 7, 8), EmbeddingTable("items", 50_000, 64)]
    costs = {"users": TableCost(1.0), "items": TableCost(5.0, compute_us=2000.0)}
    found = plan(tables, 4, costs, replicate_below_bytes=1000)
    lines = str(found).split("\n")
    assert lines[0].split() == ["table", "rows", "x", "dim", "MB", "strategy", "ranks", "cost"]
    assert lines[1].startswith("users  1000000 x 64  256.00  row-wise hashed  ")
    assert lines[2].split()[:7] == ["days", "7", "x", "8", "0.00", "replicated", "all"]
    assert len({len(line) for line in lines[:4]}) == 1, "aligned"
    assert lines[5].split() == ["rank", "MB", "load"]
    shares = [float(line.split()[2]) for line in lines[6:]]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert sum(float(line.split()[1]) for line in lines[6:]) == pytest.approx(268.8, abs=0.02)


def test_the_printed_form_of_a_plan_that_was_not_reckoned() -> None:
    tables = [EmbeddingTable("a", 1_000_000, 8), EmbeddingTable("b", 10, 4), EmbeddingTable("c", 10, 4)]
    found = Plan.of(tables, 2, {"a": ROW_WISE, "b": TABLE_WISE, "c": REPLICATED})
    assert str(found) == "\n".join(
        [
            "table   rows x dim     MB  strategy    ranks  cost",
            "a      1000000 x 8  32.00  row-wise    0-1       -",
            "b           10 x 4   0.00  table-wise  1         -",
            "c           10 x 4   0.00  replicated  all       -",
            "",
            "rank     MB  load",
            "   0  16.00     -",
            "   1  16.00     -",
        ]
    )
    assert found.rank_costs == (0.0, 0.0)


def test_plans_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    plan(TYPICAL, 8, TYPICAL_COSTS)
    assert capsys.readouterr() == ("", "")
