"""Whole tables and checkpoints of sharded embeddings: any world size, any plan, plain modules, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_as_threads import on_ranks
from torch import Tensor, nn

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import (
    SGD,
    Adagrad,
    Adam,
    EmbeddingTable,
    Placement,
    Plan,
    RowWiseAdagrad,
    ShardedEmbeddingBag,
    files,
    whole,
)
from hvd_shadowsync.embedding import saved as saved_module
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.embedding.whole import Block
from hvd_shadowsync.errors import CheckpointError, EmbeddingError, ShadowSyncError

PLACEMENTS: dict[str, Placement | str] = {
    "table": "table-wise",
    "rows": "row-wise",
    "hashed": "row-wise hashed",
    "columns": "column-wise",
    "everywhere": "replicated",
}
TABLES = (
    EmbeddingTable("table", 23, 4, "mean"),
    EmbeddingTable("rows", 50, 3, features=["a", "b"]),
    EmbeddingTable("hashed", 41, 5),
    EmbeddingTable("columns", 17, 8),
    EmbeddingTable("everywhere", 9, 2),
)
RULES = [SGD(0.5), RowWiseAdagrad(0.3, initial_accumulator=0.25), Adagrad(0.3), Adam(0.1)]
OTHERWISE = dict(zip(PLACEMENTS, ["row-wise hashed", "column-wise", "row-wise", "table-wise", "row-wise"], strict=True))
Content = dict[tuple[str, str], Tensor]
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def on_modules(
    size: int,
    use: Callable[[ShardedEmbeddingBag], Any],
    rule: SparseOptimizer = RULES[1],
    placements: dict[str, Placement | str] = PLACEMENTS,
    *,
    tables: Sequence[EmbeddingTable] = TABLES,
    **more: Any,
) -> list[Any]:
    """Return what `use` gives on each rank."""

    def program(comm: Communicator) -> Any:
        plan = Plan.of(tables, size, {table.name: placements.get(table.name, "table-wise") for table in tables})
        module = ShardedEmbeddingBag(tables, plan, rule, communicator=comm, **{"dtype": torch.float64, **more})
        result = use(module)
        module.close()
        return result

    return on_ranks(size, program)


def train(module: ShardedEmbeddingBag, steps: int = 3) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + module.rank)
        inputs = {
            name: torch.randint(0, table.num_embeddings, (6, 2), generator=generator)
            for table in module.tables
            for name in table.features
        }
        module(inputs).square().mean().backward()


def content(module: ShardedEmbeddingBag) -> Content:
    """Return whole tables and state by table and slot, put together here and not by what is tested (collective)."""
    parts = []
    for index, shard in enumerate(module.shards.owned):
        weight, state, steps = module.shards[index]
        table = module.tables[shard.table]
        ids, rows = shard.rows.within(0, table.num_embeddings)
        parts += [(table, slot, ids, shard.columns, t[rows]) for slot, t in {"weight": weight, **state}.items()]
        parts.append((table, "steps", None, shard.columns, steps.clone()))
    for index in module.plan.replicated if module.rank == 0 else ():
        table = module.tables[index]
        weight = getattr(module.replicated, table.name).detach().clone()
        parts.append((table, "weight", torch.arange(len(weight)), (0, table.embedding_dim), weight))
    gathered = [each for mine in module.group.comm.allgather_object(parts) for each in mine]
    columns = {table.name: sorted({c for t, _, _, c, _ in gathered if t == table}) for table in module.tables}
    found: Content = {}
    for table, slot, ids, (start, stop), values in gathered:
        key, dim = (table.name, slot), table.embedding_dim
        if ids is None:
            assert torch.equal(found.setdefault(key, values), values)
        elif values.dim() == 2:
            found.setdefault(key, values.new_full((table.num_embeddings, dim), torch.nan))[ids, start:stop] = values
        else:
            place = columns[table.name].index((start, stop))
            shape = (table.num_embeddings, len(columns[table.name]))
            found.setdefault(key, values.new_full(shape, torch.nan))[ids, place] = values
    return found


def streamed(module: ShardedEmbeddingBag, **more: Any) -> Content:
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for block in module.global_state_dict(**more):
        assert block.first_row == sum(map(len, parts.get(block[:2], [])))
        parts.setdefault(block[:2], []).append(block.values)
    return {key: torch.cat(blocks) for key, blocks in parts.items()}


def trained(module: ShardedEmbeddingBag) -> Content:
    train(module)
    return content(module)


def saved(folder: Path, size: int = 4, rule: SparseOptimizer = RULES[1], *more: Any, **options: Any) -> Content:
    """Train and save; return what was saved."""

    def use(module: ShardedEmbeddingBag) -> Content:
        train(module)
        files.save(folder, module)
        return content(module)

    return on_modules(size, use, rule, *more, **options)[0]


def loaded(folder: Path, size: int, rule: SparseOptimizer = RULES[1], *more: Any, **options: Any) -> Content:
    def use(module: ShardedEmbeddingBag) -> Content:
        train(module, 1)
        files.load(folder, module)
        return content(module)

    return on_modules(size, use, rule, *more, **options)[0]


def same(left: Content, right: Content, *, but: Sequence[tuple[str, str]] = ()) -> bool:
    keys = left.keys() - set(but)
    return keys == right.keys() - set(but) and all(torch.equal(left[key], right[key]) for key in keys)


def refused(use: Callable[[ShardedEmbeddingBag], Any], kind: type[Exception] = CheckpointError) -> Any:
    def run(module: ShardedEmbeddingBag) -> str:
        with pytest.raises(kind) as caught:
            use(module)
        return str(caught.value)

    return run


# --- whole tables -----------------------------------------------------------------------------------------------------


@by_rule
@pytest.mark.parametrize("size", [1, 3])
def test_whole_tables_are_put_together(rule: SparseOptimizer, size: int) -> None:
    def use(module: ShardedEmbeddingBag) -> tuple[Content, Content, Content]:
        expected = trained(module)
        return expected, streamed(module, block_rows=7), streamed(module, root=size - 1, state=False)

    for rank, (expected, everything, weights) in enumerate(on_modules(size, use, rule)):
        assert same(everything, expected)
        assert not any(each.isnan().any() for each in everything.values())
        wanted = {key: each for key, each in expected.items() if key[1] == "weight"}
        assert same(weights, wanted if rank == size - 1 else {})


def test_blocks_are_no_larger_than_asked_for_and_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "BLOCK_BYTES", 8 * 8 * 5)

    def use(module: ShardedEmbeddingBag) -> list[tuple[str, int]]:
        before = content(module)
        blocks = []
        for block in module.global_state_dict(block_rows=11):
            blocks.append((block.table, len(block.values)))
            block.values.fill_(-1)
        assert same(content(module), before)
        return blocks

    blocks = on_modules(2, use)[0]
    assert max(rows for table, rows in blocks if table == "rows") == 11
    assert max(rows for table, rows in blocks if table == "columns") == 5


def test_bounds_of_the_arguments() -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        with pytest.raises(ValueError, match="block_rows=0"):
            module.global_state_dict(block_rows=0)
        with pytest.raises(ValueError, match="root=2 is no rank of 2"):
            module.global_state_dict(root=2)

    on_modules(2, use)


def test_a_rank_that_leaves_off_iterating_is_named() -> None:
    def use(module: ShardedEmbeddingBag) -> str:
        blocks = module.global_state_dict(block_rows=10)
        next(blocks)
        if module.rank == 1:
            return ""
        return str(refused(lambda module: list(blocks), EmbeddingError)(module))

    messages = on_modules(3, use)
    assert "rank 1 is in close() while this rank is in global_state_dict(block_rows=10" in messages[0] == messages[2]


def test_different_calls_are_refused_on_every_rank(tmp_path: Path) -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        if module.rank:
            files.load(tmp_path, module)
        else:
            files.save(tmp_path, module)

    assert (
        on_modules(2, refused(use, EmbeddingError))
        == ["rank 0 and rank 1 save or load different things; do the same on every rank"] * 2
    )


def test_a_rank_that_joined_takes_part_when_it_comes(tmp_path: Path) -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        train(module)
        if module.rank == 0:
            module.join()
        else:
            train(module, 2)
        files.save(tmp_path, module)
        train(module, 1)

    on_modules(3, use)
    assert (tmp_path / "index.json").exists()


def test_saving_between_lookups_that_were_begun_ahead(tmp_path: Path) -> None:
    def batches(rank: int) -> list[dict[str, Tensor]]:
        ids = [torch.arange(step, step + 6).view(3, 2) + rank for step in range(3)]
        names = [name for table in TABLES[:2] for name in table.features]
        return [dict.fromkeys(names, each) for each in ids]

    def use(module: ShardedEmbeddingBag) -> Content:
        found: Content = {}
        for step, batch in enumerate(module.prefetch(batches(module.rank), depth=2)):
            module(batch).square().sum().backward()
            if step == 1:
                files.save(tmp_path, module)
                found = content(module)
        return found

    expected = on_modules(2, use, tables=TABLES[:2])[0]
    assert same(loaded(tmp_path, 1, tables=TABLES[:2]), expected)


def test_nothing_is_saved_or_loaded_after_close(tmp_path: Path) -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        module.close()
        for call in (
            lambda: files.save(tmp_path, module),
            lambda: list(module.global_state_dict()),
            lambda: module.load_global_state_dict({}),
        ):
            with pytest.raises(ShadowSyncError, match="after close"):
                call()

    on_modules(2, use)


# --- and taken apart --------------------------------------------------------------------------------------------------


@by_rule
def test_whole_tables_go_on_at_another_world_size(rule: SparseOptimizer) -> None:
    def blocks(module: ShardedEmbeddingBag) -> tuple[list[Block], Content]:
        train(module)
        return list(module.global_state_dict(block_rows=9)), content(module)

    given, expected = on_modules(4, blocks, rule)[0]

    def use(module: ShardedEmbeddingBag) -> Content:
        train(module, 1)
        module.load_global_state_dict(iter(given))
        return content(module)

    for size in (1, 3):
        found = on_modules(size, use, rule)[0]
        divided = [("columns", "sum")] if isinstance(rule, RowWiseAdagrad) else []
        assert same(found, expected, but=divided)


def test_whole_weights_of_plain_modules() -> None:
    bags = {t.name: nn.EmbeddingBag(t.num_embeddings, t.embedding_dim) for t in TABLES}

    def use(module: ShardedEmbeddingBag) -> Content:
        train(module)
        module.load_global_state_dict({name: bag.weight for name, bag in bags.items()})
        return content(module)

    found = on_modules(3, use)[0]
    for name, bag in bags.items():
        assert torch.equal(found[name, "weight"], bag.weight.double())
    for name in set(PLACEMENTS) - {"everywhere"}:
        assert bool((found[name, "sum"] == 0.25).all()), "state begins anew"
        assert int(found[name, "steps"]) == 0


def test_row_wise_sums_become_means_over_old_parts() -> None:
    table = [EmbeddingTable("columns", 6, 12)]
    old = torch.rand(6, 4, dtype=torch.float64)

    def use(module: ShardedEmbeddingBag) -> Content:
        weight = torch.zeros(6, 12)
        state = [Block("columns", "sum", 0, old), Block("columns", "steps", 0, torch.tensor([5]))]
        module.load_global_state_dict([Block("columns", "weight", 0, weight), *state])
        return content(module)

    expected = {
        1: old.mean(1, keepdim=True),
        2: torch.stack([old[:, :2].mean(1), old[:, 2:].mean(1)], 1),
        3: torch.stack([(3 * old[:, i] + old[:, j]) / 4 for i, j in ((0, 1), (1, 2), (3, 2))], 1),
        4: old,
    }
    expected[3][:, 1] = (old[:, 1] + old[:, 2]) / 2
    for size, wanted in expected.items():
        found = on_modules(size, use, tables=table)[0]
        assert torch.allclose(found["columns", "sum"], wanted, rtol=1e-12)
        assert int(found["columns", "steps"]) == 5
    assert torch.equal(on_modules(4, use, tables=table)[0]["columns", "sum"], old)


def zeros(table: EmbeddingTable, slot: str = "weight", first: int = 0, rows: int = 0, columns: int = 0) -> Block:
    return Block(table.name, slot, first, torch.zeros(rows or table.num_embeddings, columns or table.embedding_dim))


def broken() -> Iterator[Block]:
    yield zeros(TABLES[0])
    raise OSError("the disk is gone")


WHOLE = [zeros(table) for table in TABLES]
WRONG = {
    "unknown": (
        [*WHOLE, Block("b", "weight", 0, torch.zeros(1, 1))],
        "blocks have table 'b', which is none; known are",
    ),
    "missing": (WHOLE[1:], "blocks have 0 of 23 rows of 'weight' of table 'table'; give all"),
    "short": ([zeros(TABLES[0], rows=20), *WHOLE[1:]], "blocks have 20 of 23 rows of 'weight' of table 'table'"),
    "long": ([zeros(TABLES[0], rows=24)], "ends at row 24 of 23; give a table of that size"),
    "gap": ([zeros(TABLES[0], first=5, rows=2)], "at row 5 comes where row 0 is due; give blocks in order"),
    "narrow": ([zeros(TABLES[0], columns=3)], "has 3 columns instead of 4; give the table's own"),
    "state": ([*WHOLE, zeros(TABLES[0], "sum", columns=5)], "has 5 columns instead of 1 to 4; leave the state out"),
    "half a state": ([*WHOLE, zeros(TABLES[0], "sum", rows=3)], "3 of 23 rows of 'sum' of table 'table'"),
    "integers": ([Block("table", "weight", 0, torch.zeros(23, 4).long())], "is no float tensor [rows, 4]; give one"),
    "no blocks": ([("table", 1)], "blocks ended in AttributeError"),
    "unknown name": ({"b": torch.zeros(1)}, "blocks have table 'b', which is none"),
    "missing name": ({"table": torch.zeros(23, 4)}, "blocks lacks table 'rows'; give the weights of every table"),
    "wrong shape": ({"table": torch.zeros(22, 4)}, "blocks['table'] is (22, 4), the table is (23, 4); give its whole"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_on_every_rank(name: str) -> None:
    given, message = WRONG[name]
    messages = on_modules(2, refused(lambda module: module.load_global_state_dict(given)))
    assert messages[0] == messages[1]
    assert message in messages[0]


def test_an_iterator_that_fails_on_one_rank_fails_on_all() -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        module.load_global_state_dict(broken() if module.rank == 1 else WHOLE)

    assert on_modules(3, refused(use)) == ["rank 1: blocks ended in OSError('the disk is gone')"] * 3


def test_a_mapping_that_is_refused_on_one_rank_changes_nothing() -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        before = content(module)
        fit = {table.name: torch.zeros(table.num_embeddings, table.embedding_dim) for table in TABLES}
        refused(lambda module: module.load_global_state_dict({} if module.rank else fit))(module)
        assert same(content(module), before)

    on_modules(2, use)


# --- files ------------------------------------------------------------------------------------------------------------


@by_rule
def test_four_ranks_to_one_two_and_three(rule: SparseOptimizer, tmp_path: Path) -> None:
    expected = saved(tmp_path, 4, rule)
    divided = [("columns", "sum")] if isinstance(rule, RowWiseAdagrad) else []
    for size in (4, 1, 2, 3):
        assert same(loaded(tmp_path, size, rule), expected, but=divided if size < 4 else [])


@by_rule
@pytest.mark.parametrize("rows", [1, 4, 1 << 16])
def test_another_plan(rule: SparseOptimizer, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_module, "BLOCK_ROWS", rows)
    monkeypatch.setattr(files, "FILE_BYTES", 200)
    expected = saved(tmp_path, 3, rule)
    found = loaded(tmp_path, 2, rule, OTHERWISE)
    assert len(list(tmp_path.iterdir())) > 12
    unlike = [key for key in found if key[0] == "everywhere" and key[1] != "weight"]
    if isinstance(rule, RowWiseAdagrad):
        unlike += [("columns", "sum"), ("rows", "sum")]
        assert torch.equal(found["rows", "sum"], expected["rows", "sum"].expand(-1, 2)), "each part has the whole's"
        assert bool((found["everywhere", "sum"] == 0.25).all()), "it had no state"
    assert same(found, expected, but=unlike)


def test_whoever_may_read_one_file_may_read_all(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / "any").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_files_in_each_others_place_are_refused(tmp_path: Path) -> None:
    divided = dict.fromkeys(PLACEMENTS, "row-wise")
    saved(tmp_path, 2, SGD(0.5), divided)
    first, second = sorted(tmp_path.glob("rows-*"))
    spare = tmp_path / "spare"
    for old, new in ((first, spare), (second, first), (spare, second)):
        old.rename(new)
    found = on_modules(2, refused(lambda module: files.load(tmp_path, module)), SGD(0.5), divided)
    assert all("is not the file that was saved under this name" in each for each in found), found


def test_columns_that_come_together_have_the_mean_of_their_sums(tmp_path: Path) -> None:
    expected = saved(tmp_path, 4)["columns", "sum"]
    found = loaded(tmp_path, 2)["columns", "sum"]
    assert torch.allclose(found, expected.view(17, 2, 2).mean(2), rtol=1e-12)


def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def use(module: ShardedEmbeddingBag) -> Content:
        train(module)
        files.save(tmp_path, module)
        return trained(module)

    def resume(module: ShardedEmbeddingBag) -> Content:
        files.load(tmp_path, module)
        return trained(module)

    assert same(on_modules(2, use, RULES[3])[0], on_modules(2, resume, RULES[3])[0])


def test_dtypes_are_converted(tmp_path: Path) -> None:
    expected = saved(tmp_path, 2, Adam(0.1))
    found = loaded(tmp_path, 3, Adam(0.1), dtype=torch.float32)
    assert {each.dtype for key, each in found.items() if key[1] != "steps"} == {torch.float32}
    assert same(found, {key: each if key[1] == "steps" else each.float() for key, each in expected.items()})
    saved(tmp_path, 2, Adam(0.1), dtype=torch.float32)
    assert loaded(tmp_path, 2, Adam(0.1))["hashed", "exp_avg"].dtype == torch.float64


def test_state_of_another_optimizer_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = saved(tmp_path, 2, Adagrad(0.3))
    with caplog.at_level(logging.WARNING):
        found = loaded(tmp_path, 3, RowWiseAdagrad(0.3, initial_accumulator=0.5))
    assert all(torch.equal(found[name, "weight"], expected[name, "weight"]) for name in PLACEMENTS)
    assert all(bool((found[name, "sum"] == 0.5).all()) for name in ("table", "rows", "hashed", "columns"))
    assert all(int(found[name, "steps"]) == 0 for name in ("table", "rows", "hashed", "columns"))
    assert [record.getMessage() for record in caplog.records] == [
        f"the optimizer's state begins anew for table, rows, hashed, columns: {tmp_path} has none that fits"
    ]
    caplog.clear()
    assert same(loaded(tmp_path, 2, Adagrad(0.1, eps=1e-3)), expected), "other settings are no other optimizer"
    assert not caplog.records


def test_the_index_describes_the_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "made", 2)
    index = json.loads((tmp_path / "made" / "index.json").read_text())
    assert index["world_size"] == 2
    settings = {"lr": 0.3, "eps": 1e-10, "initial_accumulator": 0.25}
    assert index["optimizer"] == {"name": "RowWiseAdagrad", "settings": settings, "slots": {"sum": False}}
    assert [each["name"] for each in index["tables"]] == list(PLACEMENTS)
    rows = index["tables"][1]
    assert (rows["num_embeddings"], rows["embedding_dim"], rows["pooling"]) == (50, 3, "sum")
    assert [shard["rows"] for shard in rows["shards"]] == [{"start": 0, "stop": 25}, {"start": 25, "stop": 50}]
    assert [shard["steps"] for shard in rows["shards"]] == [3, 3]
    assert [shard["steps"] for shard in index["tables"][4]["shards"]] == [None]
    mentioned = set(re.findall(r"rows-[\w-]+\.safetensors", json.dumps(index)))
    assert mentioned | {"index.json"} == {path.name for path in (tmp_path / "made").iterdir()}


def test_read_and_load_into_plain_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILE_BYTES", 200)
    expected = saved(tmp_path, 3)
    for table in TABLES:
        blocks = list(files.read(tmp_path, table.name, block_rows=10))
        assert [first for first, _ in blocks] == list(range(0, table.num_embeddings, 10))
        assert torch.equal(torch.cat([rows for _, rows in blocks]), expected[table.name, "weight"])
    bags: dict[str, Any] = {t.name: nn.EmbeddingBag(t.num_embeddings, t.embedding_dim) for t in TABLES[:3]}
    bags["columns"] = nn.Embedding(17, 8, dtype=torch.float64)
    files.load_into(tmp_path, {**bags, "everywhere": (weight := nn.Parameter(torch.empty(9, 2)))})
    assert torch.equal(weight, expected["everywhere", "weight"].float())
    for name, bag in bags.items():
        assert torch.equal(bag.weight, expected[name, "weight"].to(bag.weight.dtype))
        assert bag.weight.requires_grad


def test_plain_modules_that_do_not_fit(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    fits = torch.full((23, 4), 7.0)
    for targets, error, message in (
        ({"tabel": fits}, CheckpointError, "has no table 'tabel'; it has table, rows, hashed, columns, everywhere"),
        (
            {"table": fits, "rows": torch.zeros(50, 4)},
            CheckpointError,
            "targets['rows'] has shape (50, 4), table 'rows'",
        ),
        ({"rows": nn.Linear(3, 50)}, TypeError, "targets['rows'] is a Linear; give an nn.EmbeddingBag"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            files.load_into(tmp_path, targets)
    assert bool((fits == 7).all()), "nothing is changed"
    with pytest.raises(CheckpointError, match="has no table 'tabel'"):
        files.read(tmp_path, "tabel")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        files.read(tmp_path / "elsewhere", "table")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def failures(folder: Path, size: int = 3, tables: Sequence[EmbeddingTable] = TABLES) -> str:
    """Load; return the error, which is the same on every rank and leaves the rows as they were."""

    def use(module: ShardedEmbeddingBag) -> str:
        before = content(module)
        message = refused(lambda module: files.load(folder, module))(module)
        assert same(content(module), before)
        return str(message)

    messages = on_modules(size, use, tables=tables)
    assert len(set(messages)) == 1
    return str(messages[0])


def test_other_tables_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    assert "table 'table' is (24, 4), (23, 4) in" in failures(
        tmp_path, tables=[replace(TABLES[0], num_embeddings=24), *TABLES[1:]]
    )
    assert "has no table 'new'; it has table, rows" in failures(tmp_path, tables=[replace(TABLES[0], name="new")])
    assert "has no table 'new'" in failures(tmp_path, tables=[*TABLES, EmbeddingTable("new", 3, 3)])
    assert "has table 'everywhere', which is none here; make it as well" in failures(tmp_path, tables=TABLES[:-1])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    path = max(tmp_path.glob("rows-*-00000-*"))
    other = max(tmp_path.glob("rows-*-00001-*")).read_bytes()
    whole_file = path.read_bytes()
    for damaged, message in (
        (whole_file[:-8], "cannot be read"),
        (whole_file[:100], "cannot be read"),
        (b"", "cannot be read"),
        (b"\0" * len(whole_file), "cannot be read"),
        (other, "cannot be read"),
        (whole_file.replace(b"generation", b"gemeration"), "is not the file that was saved under this name"),
    ):
        path.write_bytes(damaged)
        text = failures(tmp_path)
        assert str(path) in text
        assert message in text
    path.unlink()
    assert f"{path} is missing; give the whole folder" in failures(tmp_path)
    with pytest.raises(CheckpointError, match="is missing"):
        list(files.read(tmp_path, "table"))


def test_damaged_indices_are_refused(tmp_path: Path) -> None:
    assert "there is no checkpoint" in failures(tmp_path)
    saved(tmp_path, 2)
    path = tmp_path / "index.json"
    index = path.read_text()
    lacks_rows = json.loads(index)
    del lacks_rows["tables"][1]["shards"][0]

    def changed(table: int, **values: Any) -> str:
        content = json.loads(index)
        for shard in content["tables"][table]["shards"]:
            shard.update(values)
        return json.dumps(content)

    for text, message in (
        (index[:-100], "is it whole?"),
        ("", "is it whole?"),
        ("[]", "is no index of hvd_shadowsync.embedding, version 1; save with embedding.files.save"),
        (index.replace('"version": 1', '"version": 2'), "is no index of"),
        (json.dumps(lacks_rows), "shards of 'rows' are not the whole table"),
        (changed(3, columns=[0, 4]), "shards of 'columns' are not the whole table, or overlap"),
        (changed(0, dtype="int64"), "'table' is of torch.int64"),
        (changed(1, steps="3"), "steps='3' is no count"),
        (changed(1, steps=2**70), "is no count"),
        (index.replace("rows-", "../rows-"), "is no file of a checkpoint"),
        (index.replace('"first_row": 0', '"first_row": 1'), "are missing"),
        (index.replace('"slots"', '"spots"'), "is damaged (KeyError: 'slots')"),
    ):
        path.write_text(text)
        assert message in failures(tmp_path), message


def test_ranks_that_find_different_checkpoints_are_told_so(tmp_path: Path) -> None:
    for name in ("one", "two"):
        saved(tmp_path / name, 1)

    def use(module: ShardedEmbeddingBag) -> None:
        files.load(tmp_path / ("two" if module.rank == 2 else "one"), module)

    messages = on_modules(3, refused(use))
    assert all("rank 0 and rank 2 find different checkpoints" in each for each in messages)


def test_a_folder_that_cannot_be_used_is_named_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "no" / "folder", tmp_path / "file"):
        messages = on_modules(2, refused(lambda module, folder=folder: files.save(folder, module)))
        assert messages[0] == messages[1]
        assert messages[0].startswith(f"rank 0: {folder} cannot be used")


def test_ranks_that_do_not_share_the_folder_are_named(tmp_path: Path) -> None:
    message = on_modules(2, refused(lambda module: files.save(tmp_path / str(module.rank), module)))[0]
    assert "rank 0: " in message
    assert "of rank 1; give a folder that all hosts see" in message
    assert not list((tmp_path / "0").iterdir()) + list((tmp_path / "1").iterdir())


@pytest.mark.parametrize("fails", ["-00002-", "index.json"])
def test_a_save_that_fails_leaves_the_old_one(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace_file = os.replace

    def full(source: Path, target: Path) -> None:
        if fails in str(target):
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    def use(module: ShardedEmbeddingBag) -> str:
        train(module, 5)
        return str(refused(lambda module: files.save(tmp_path, module))(module))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        messages = on_modules(3, use)
    rank = 2 if fails == "-00002-" else 0
    assert messages[0] == messages[1] == messages[2]
    assert f"rank {rank}: {tmp_path} cannot be used ([Errno 28] No space left on device)" in messages[0]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(loaded(tmp_path, 3), expected)


def test_an_index_that_is_there_though_the_system_reported_an_error_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS sends a rename again when the answer is lost, and says that there is no such file."""
    saved(tmp_path, 2)
    replace_file = os.replace

    def again(source: Path, target: Path) -> None:
        replace_file(source, target)
        if "index.json" in str(target):
            raise OSError(2, "No such file or directory")

    def use(module: ShardedEmbeddingBag) -> Content:
        train(module, 5)
        with pytest.raises(CheckpointError, match="No such file"):
            files.save(tmp_path, module)
        return content(module)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", again)
        expected = on_modules(2, use)[0]
    assert same(loaded(tmp_path, 2), expected)


@pytest.mark.parametrize("dies", ["-00000-", "index.json"])
def test_a_rank_that_dies_while_it_saves_leaves_the_old_one(
    dies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(tmp_path, 2)
    replace_file = os.replace

    def killed(source: Path, target: Path) -> None:
        if dies in str(target):
            raise SystemExit(9)
        replace_file(source, target)

    def use(module: ShardedEmbeddingBag) -> None:
        train(module, 5)
        files.save(tmp_path, module)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(SystemExit):
            on_modules(1, use)
    assert len(list(tmp_path.iterdir())) == (3 if dies == "-00000-" else 4)
    assert same(loaded(tmp_path, 2), expected), "the old index is there, and its files"
    expected = saved(tmp_path, 2, Adam(0.1))
    assert len(list(tmp_path.iterdir())) == 3, "what the dead left is removed"
    assert same(loaded(tmp_path, 3, Adam(0.1)), expected)


def test_a_new_index_is_valid_whatever_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2, Adagrad(0.3))

    def unwilling(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise OSError("read-only now")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unwilling)
        expected = saved(tmp_path, 3)
    assert len(list(tmp_path.glob("rows-*"))) == 5
    assert same(loaded(tmp_path, 3), expected)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rows-of-mine.safetensors").write_text("precious")
    saved(tmp_path, 1)
    for name in (".rows-0123456789ab-00003-00000.safetensors.tmp", ".index.json.tmp"):  # of a rank that was killed
        (tmp_path / name).write_text("half")
    saved(tmp_path, 1)
    assert (tmp_path / "rows-of-mine.safetensors").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_model_is_not_its_tables(tmp_path: Path) -> None:
    for use in (files.save, files.load):
        with pytest.raises(TypeError, match="module is a Linear; give the ShardedEmbeddingBag itself"):
            use(tmp_path, nn.Linear(1, 1))  # type: ignore[arg-type]
