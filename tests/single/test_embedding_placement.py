"""Tables and where they lie: parts cover each row and column exactly once, and wrong arguments are named."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from hvd_shadowsync.embedding.placement import (
    COLUMN_WISE,
    REPLICATED,
    ROW_HASHED,
    ROW_WISE,
    STRATEGIES,
    TABLE_WISE,
    Placement,
    Plan,
    RowHash,
    RowRange,
    hash_multiplier,
)
from hvd_shadowsync.embedding.tables import EmbeddingTable, check_tables


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Some small tables, each placed in any way that is possible, on ranks in any order."""
    world_size = draw(st.integers(1, 6))
    tables, placements = [], []
    for i in range(draw(st.integers(1, 5))):
        table = EmbeddingTable(f"t{i}", draw(st.integers(1, 60)), draw(st.integers(1, 12)))
        strategy = draw(st.sampled_from(STRATEGIES))
        limits = {TABLE_WISE: 1, REPLICATED: 0, COLUMN_WISE: table.embedding_dim}
        parts = draw(st.integers(min(1, limits.get(strategy, 1)), min(limits.get(strategy, 60), world_size)))
        order = draw(st.permutations(range(world_size)))
        tables.append(table)
        placements.append(Placement(strategy, tuple(order[: min(parts, table.num_embeddings)])))
    return Plan(tuple(tables), world_size, tuple(placements))


@hypothesis.settings(max_examples=150)
@hypothesis.given(plans())
def test_each_weight_is_in_one_shard(plan: Plan) -> None:
    covered = [torch.zeros(table.num_embeddings, table.embedding_dim, dtype=torch.int64) for table in plan.tables]
    for shard in plan.shards:
        ids, rows = shard.rows.within(0, plan.tables[shard.table].num_embeddings)
        assert sorted(rows.tolist()) == list(range(shard.rows.num_rows)), "no gaps, and no row twice, in the shard"
        assert shard.numel == len(ids) * shard.dim > 0
        covered[shard.table][ids, shard.columns[0] : shard.columns[1]] += 1
    for index, counts in enumerate(covered):
        assert (counts == (0 if index in plan.replicated else 1)).all()


@hypothesis.given(plans())
def test_shards_lie_on_the_ranks_of_their_placement(plan: Plan) -> None:
    for index, placement in enumerate(plan.placements):
        assert tuple(shard.rank for shard in plan.shards if shard.table == index) == placement.ranks
    by_rank = [shard for rank in range(plan.world_size) for shard in plan.of_rank(rank)]
    assert sorted(by_rank, key=plan.shards.index) == list(plan.shards)


@hypothesis.given(plans())
def test_parts_differ_by_one_row_or_column_at_most(plan: Plan) -> None:
    for index in range(len(plan.tables)):
        sizes = {(shard.rows.num_rows, shard.dim) for shard in plan.shards if shard.table == index}
        for side in zip(*sizes, strict=True):
            assert max(side) - min(side) <= 1


@hypothesis.given(plans(), st.integers(1, 20))
def test_blocks_of_rows_add_up(plan: Plan, block: int) -> None:
    for shard in plan.shards:
        last = plan.tables[shard.table].num_embeddings
        found = [shard.rows.within(first, min(first + block, last)) for first in range(0, last, block)]
        ids, rows = shard.rows.within(0, last)
        assert torch.equal(torch.cat([each[0] for each in found]), ids)
        assert torch.equal(torch.cat([each[1] for each in found]), rows)
        assert ids.dtype == rows.dtype == torch.int64


@hypothesis.given(st.integers(1, 2**31))
def test_the_hash_is_a_permutation(num_embeddings: int) -> None:
    multiplier = hash_multiplier(num_embeddings)
    assert 1 <= multiplier <= num_embeddings
    assert math.gcd(multiplier, num_embeddings) == 1
    assert multiplier * num_embeddings < 2**63, "products fit int64"


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 64))
def test_hashed_parts_have_all_rows(num_embeddings: int, parts: int) -> None:
    parts = min(parts, num_embeddings)
    assert sum(RowHash(num_embeddings, part, parts).num_rows for part in range(parts)) == num_embeddings


@pytest.mark.parametrize("num_embeddings", [4096, 10_007, 1_000_000])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_hashing_spreads_runs_of_ids(num_embeddings: int, parts: int) -> None:
    first = 1000 * parts
    counts = [len(RowHash(num_embeddings, part, parts).within(first, first + 100 * parts)[0]) for part in range(parts)]
    assert min(counts) >= 60
    assert max(counts) <= 140


def test_a_large_table_is_not_written_out() -> None:
    ids, rows = RowHash(2**31, 3, 7).within(2**31 - 100, 2**31)
    assert 5 <= len(ids) <= 25
    assert 0 <= int(rows.min()) <= int(rows.max()) < RowHash(2**31, 3, 7).num_rows
    assert [each.tolist() for each in RowRange(10, 20).within(15, 10**9)] == [[15, 16, 17, 18, 19], [5, 6, 7, 8, 9]]
    assert [each.tolist() for each in RowRange(10, 20).within(0, 5)] == [[], []]


def test_placements_by_name() -> None:
    tables = [EmbeddingTable("a", 10, 4), EmbeddingTable("b", 2, 4), EmbeddingTable("c", 10, 3)]
    given = {"c": TABLE_WISE, "b": ROW_WISE, "a": Placement(COLUMN_WISE, [3, 1])}  # type: ignore[arg-type]
    plan = Plan.of(tables, 4, given)
    assert plan.placements == (Placement(COLUMN_WISE, (3, 1)), Placement(ROW_WISE, (0, 1)), Placement(TABLE_WISE, (2,)))
    assert Plan.of(tables, 2, {**given, "a": REPLICATED}).replicated == (0,)
    assert Plan.of(tables, 2, dict.fromkeys("abc", COLUMN_WISE)).placements == (Placement(COLUMN_WISE, (0, 1)),) * 3


def test_plans_are_compared_by_where_things_lie() -> None:
    tables = (EmbeddingTable("a", 10, 4),)
    placements = (Placement(TABLE_WISE, (0,)),)
    assert Plan(tables, 1, placements, (3.0,)) == Plan(tables, 1, placements)
    assert Plan(tables, 2, placements) != Plan(tables, 2, (Placement(TABLE_WISE, (1,)),))


def test_costs_of_ranks() -> None:
    tables = tuple(EmbeddingTable(name, 10, 4) for name in "abc")
    placements = (Placement(TABLE_WISE, (1,)), Placement(ROW_HASHED, (0, 2)), Placement(REPLICATED))
    assert Plan(tables, 3, placements, (5.0, 4.0, 3.0)).rank_costs == (3.0, 6.0, 3.0)


@pytest.mark.parametrize(
    ("strategy", "ranks", "message"),
    [
        ("diagonal", (0,), "strategy='diagonal' is unknown; give one of 'table-wise', 'row-wise'"),
        (TABLE_WISE, (-1,), "ranks=-1 is below 0"),
        (TABLE_WISE, (0, 1), r"table 'a' is placed table-wise on ranks \[0, 1\]; give between 1 and 1 of them"),
        (TABLE_WISE, (), "give between 1 and 1 of them"),
        (TABLE_WISE, (4,), "ranks have to be different and below the world size, 4"),
        (ROW_WISE, (1, 1), "ranks have to be different and below the world size, 4"),
        (ROW_WISE, (0, 1, 2, 3), "give between 1 and 3 of them"),
        (ROW_HASHED, (0, 1, 2, 3), "give between 1 and 3 of them"),
        (COLUMN_WISE, (0, 1, 2), "give between 1 and 2 of them"),
        (REPLICATED, (0,), "a replicated table is on every rank: leave ranks out"),
    ],
)
def test_wrong_placements(strategy: str, ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan((EmbeddingTable("a", 3, 2),), 4, (Placement(strategy, ranks),))


@pytest.mark.parametrize(
    ("world_size", "placements", "message"),
    [
        (2, {"a": TABLE_WISE, "z": TABLE_WISE}, "placements has 'z', which is no table; known are a, b"),
        (2, {"b": TABLE_WISE}, "placements lacks table 'a'; give one for every table"),
        (2, {"a": TABLE_WISE, "b": "diagonal"}, "strategy of table 'b'='diagonal' is unknown; give one of"),
        (0, {"a": REPLICATED, "b": REPLICATED}, "world_size=0 is below 1"),
    ],
)
def test_wrong_plans_by_name(world_size: int, placements: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of([EmbeddingTable("a", 3, 2), EmbeddingTable("b", 3, 2)], world_size, placements)


def test_a_placement_for_each_table() -> None:
    with pytest.raises(ValueError, match="placements has 0 entries for 1 tables"):
        Plan((EmbeddingTable("a", 3, 2),), 2, ())


def test_a_table_has_one_feature_of_its_name() -> None:
    table = EmbeddingTable("a", 3, 2)
    assert table.features == ("a",)
    assert table.numel == 6
    assert EmbeddingTable("a", 3, 2, features=["x", "y"]).features == ("x", "y")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": ""}, "name='' is no name for a table; give a string of its own, without dots"),
        ({"name": 3}, "name=3 is no name"),
        ({"num_embeddings": 0}, "num_embeddings=0 is below 1"),
        ({"num_embeddings": 2.0}, "num_embeddings=2.0 is not a whole number"),
        ({"embedding_dim": 0}, "embedding_dim=0 is below 1"),
        ({"pooling": "max"}, "pooling='max' is unknown; give one of 'sum', 'mean'"),
        ({"features": "x"}, r"features='x' is not a list of names; give strings, such as \['a'\]"),
        ({"features": [1]}, r"features=\[1\] is not a list of names"),
        ({"init": 0.1}, "init=0.1 cannot be called; give a function such as torch.nn.init.normal_"),
    ],
)
def test_wrong_tables(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        EmbeddingTable(**{"name": "a", "num_embeddings": 3, "embedding_dim": 2, **given})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "tables is empty; give at least one EmbeddingTable"),
        (["a"], r"tables has a str; give EmbeddingTable\(name, rows, dim, ...\)"),
        ([EmbeddingTable("a", 1, 1)] * 2, "tables have the table 'a' 2 times; names have to be unique"),
        (
            [EmbeddingTable("a", 1, 1, features=["x"]), EmbeddingTable("b", 1, 1, features=["y", "x"])],
            "tables have the feature 'x' 2 times",
        ),
    ],
)
def test_wrong_lists_of_tables(tables: list[Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_tables(tables)
