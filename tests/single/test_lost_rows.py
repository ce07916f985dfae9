"""Sharded tables of which ranks are lost at any moment: others have their rows from a checkpoint, or copies of them."""

from __future__ import annotations

import errno
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks_as_threads import TIMEOUT_S
from torch import Tensor

from hvd_shadowsync import (
    Checkpointer,
    EmbeddingError,
    EmbeddingTable,
    RankLostError,
    ShadowSync,
    ShardedEmbeddingBag,
)
from hvd_shadowsync.checkpointing import folder as folders
from hvd_shadowsync.checkpointing import tables
from hvd_shadowsync.checkpointing.folder import Draft
from hvd_shadowsync.checkpointing.tables import Tables
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import SGD, Adagrad, Adam, RowWiseAdagrad, files, recovery, replicas
from hvd_shadowsync.embedding.exchange import Exchange
from hvd_shadowsync.embedding.holding import Group
from hvd_shadowsync.embedding.lost import cut_short
from hvd_shadowsync.embedding.meeting import Call, Meetings
from hvd_shadowsync.embedding.placement import Placement, Plan
from hvd_shadowsync.embedding.saved import Saved
from hvd_shadowsync.errors import CheckpointError

TABLES = [
    EmbeddingTable("users", 50, 4, pooling="sum"),
    EmbeddingTable("items", 23, 6, pooling="mean"),
    EmbeddingTable("shops", 7, 2, pooling="sum"),
    EmbeddingTable("days", 9, 3, pooling="sum"),
]
PLAN: Mapping[str, Placement | str] = {
    "users": "row-wise hashed",
    "items": "column-wise",
    "shops": Placement("table-wise", (1,)),
    "days": "row-wise",
}
MODES: list[dict[str, Any]] = [{"mode": "alltoall"}, {"mode": "served"}]
CALLS = [*range(1, 40, 2), *range(40, 140, 9), 10**9]
"""Numbers of the call, of whichever communicator, in which a rank is lost."""


def weights() -> dict[str, Tensor]:
    """Return rows that no initialisation gives."""
    return {
        table.name: torch.arange(table.numel).view(table.num_embeddings, -1) * 1.0 + index * 1000
        for index, table in enumerate(TABLES)
    }


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `weights()`, and of state that no optimizer begins with, of a world of two ranks."""
    folder = tmp_path_factory.mktemp("saved")

    def program(comm: Communicator) -> None:
        module = ShardedEmbeddingBag(TABLES, PLAN_OF_TWO, RowWiseAdagrad(lr=0.0), communicator=comm)
        module.load_global_state_dict(weights())
        for index in range(len(module.shards)):
            module.shards[index].state["sum"].fill_(5.0)
        files.save(folder / "tables", module)
        module.close()

    local.run(2, program, timeout_s=TIMEOUT_S)
    return folder / "tables"


JOB = 12 * "a"
PLAN_OF_TWO: Mapping[str, Placement | str] = {**PLAN, "shops": Placement("table-wise", (0,)), "users": "row-wise"}


def batch(rank: int, step: int) -> dict[str, Tensor]:
    """Return ids [6] of each feature."""
    return {table.name: (torch.arange(6) * 5 + 3 * rank + step) % table.num_embeddings for table in TABLES}


def whole(module: ShardedEmbeddingBag) -> dict[str, Tensor]:
    """Return all weights and state."""
    found: dict[str, list[Tensor]] = {}
    for block in module.global_state_dict():
        found.setdefault(f"{block.table}/{block.slot}", []).append(block.values)
    return {name: torch.cat(values) for name, values in found.items()}


def train(module: ShardedEmbeddingBag, steps: int, *, first: int = 0) -> None:
    for step in range(first, first + steps):
        module(batch(module.rank, step)).square().sum().backward()


def train_in_ways(module: ShardedEmbeddingBag, how: str) -> None:
    if how == "prefetch":
        for each in module.prefetch([batch(module.rank, step) for step in range(5)], depth=2):
            module(each).square().sum().backward()
    elif how == "unequal":
        train(module, 3 + module.rank)
        module.join()
    else:
        train(module, 5)
    module.wait()


def job(comm: Communicator, saved: Path, rule: Any, how: str, **options: Any) -> tuple[int, dict[str, Tensor]] | None:
    """Train with every call that a training makes; return how many ranks are left, and the tables.

    None where a rank was lost in the construction.
    """
    assert isinstance(comm, local.LocalCommunicator)
    try:
        module = ShardedEmbeddingBag(TABLES, PLAN, rule, communicator=comm, recover_from=saved, **options)
    except RankLostError:  # which a process does not outlive
        comm.die()
        return None
    again(lambda: files.load(saved, module))
    train_in_ways(module, how)
    with torch.no_grad():
        module(batch(module.rank, 9))
    found = again(lambda: whole(module))
    size = module.size
    module.close()
    return size, found


def again(call: Callable[[], Any]) -> Any:
    """Return what `call` returns; once more where a rank is lost meanwhile, as its error says."""
    for _ in range(4):
        try:
            return call()
        except EmbeddingError as error:
            if "make the call again" not in str(error):
                raise
    raise AssertionError("not in four times")


@pytest.mark.parametrize("how", ["steps", "prefetch", "unequal"])
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.leaves_threads
def test_whenever_a_rank_is_lost_its_rows_are_those_of_the_checkpoint(
    hosts: str, options: dict[str, Any], how: str, saved: Path
) -> None:
    """With a learning rate of 0 nothing else changes any row."""
    rule = RowWiseAdagrad(lr=0.0)
    seen = set()
    for call in CALLS:
        ended = local.run(3, lambda comm: job(comm, saved, rule, how, **options), timeout_s=TIMEOUT_S, kill={1: call})
        for each in (ended[0], ended[2]):
            if each is None:
                continue
            size, found = each
            seen.add(size)
            for name, weight in weights().items():
                torch.testing.assert_close(found[f"{name}/weight"], weight, rtol=0, atol=0)
                assert bool((found[f"{name}/sum"] >= 5).all())
    assert {2, 3} <= seen


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.leaves_threads
def test_several_are_lost_one_after_the_other(options: dict[str, Any], saved: Path) -> None:
    """Each at another of its calls; the last one has it all."""
    left = set()
    for first, second in [(30, 60), (45, 46), (50, 80), (60, 90), (9, 70)]:
        ended = local.run(
            3, lambda comm: job(comm, saved, RowWiseAdagrad(lr=0.0), "steps", **options), timeout_s=TIMEOUT_S,
            kill={0: first, 2: second},
        )  # fmt: skip
        if ended[1] is None:
            continue
        size, found = ended[1]
        left.add(size)
        for name, weight in weights().items():
            torch.testing.assert_close(found[f"{name}/weight"], weight, rtol=0, atol=0)
    assert 1 in left


@pytest.mark.parametrize("how", ["steps", "prefetch"])
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.leaves_threads
def test_rows_go_on_learning_and_all_ranks_see_the_same(
    hosts: str, options: dict[str, Any], how: str, saved: Path
) -> None:
    def program(comm: Communicator) -> dict[str, Tensor]:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, PLAN, Adagrad(lr=0.1), communicator=comm, recover_from=saved, **options)
        files.load(saved, module)
        batches = [batch(comm.rank, step) for step in range(6)]
        for step, each in enumerate(batches if how == "steps" else module.prefetch(batches, depth=2)):
            module(each).square().sum().backward()
            if comm.rank == 1 and step == 3:
                comm.die()
        found = again(lambda: whole(module))
        assert module.size == 2
        assert module.metrics()["ranks_lost"] == 1
        module.close()
        return found

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert ended[0] is not None
    assert ended[2] is not None
    for name, values in ended[0].items():
        assert bool(values.isfinite().all())
        torch.testing.assert_close(values, ended[2][name], rtol=0, atol=0)
    assert bool((ended[0]["users/weight"] != weights()["users"]).any())


def lost(comm: Communicator, source: Any, **options: Any) -> str:
    """Lose rank 1 between two steps; return the error of the others once they meet with it, or "none"."""
    assert isinstance(comm, local.LocalCommunicator)
    module = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.1), communicator=comm, recover_from=source, **options)
    try:
        train(module, 2)
        if comm.rank == 1:
            module.wait()
            comm.die()
        while module.size == 3:  # which may be some steps on where tables are served
            train(module, 1)
    except EmbeddingError as error:
        assert "a rank was lost (rank 1), and" in str(error)
        for call in (lambda: train(module, 1), module.close):
            with pytest.raises(EmbeddingError, match="start the job again from its last checkpoint"):
                call()
        return str(error)
    module.close()
    return "none"


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (5, TypeError, "recover_from=5 is no path; give a str or a pathlib.Path"),
        (float("nan"), TypeError, "recover_from=nan is no path"),
        (b"x", TypeError, "recover_from=b'x' is no path"),
        ([1], TypeError, r"recover_from=\[1\] is no path"),
        ("", ValueError, "recover_from='' is empty; give the path of a folder"),
    ],
)
def test_what_is_no_source(source: Any, error: type[Exception], words: str) -> None:
    def program(comm: Communicator) -> None:
        with pytest.raises(error, match=words):
            ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.1), communicator=comm, recover_from=source)

    local.run(2, program, timeout_s=TIMEOUT_S)


def _raise() -> None:
    raise OSError("no such file system")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no checkpoint is known that has them"),
        (lambda: None, "no checkpoint has them yet"),
        (_raise, r"recover_from\(\) raised OSError\('no such file system'\)"),
        (lambda: 5, "recover_from gives a int; let it give the folder of a checkpoint"),
        ("/nowhere", "there is no checkpoint /nowhere/index.json"),
    ],
    ids=["none", "not yet", "raises", "no folder", "missing"],
)
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.leaves_threads
def test_without_a_checkpoint_it_is_an_error_everywhere_and_stays_one(
    hosts: str, options: dict[str, Any], source: Any, message: str
) -> None:
    ended = local.run(3, lambda comm: lost(comm, source, **options), timeout_s=TIMEOUT_S, kill={})
    for each in (ended[0], ended[2]):
        assert each is not None
        assert "with it the rows of the sharded tables that were its own" in each
        assert re.search(message, each)


@pytest.mark.leaves_threads
def test_other_tables_are_not_taken(saved: Path, tmp_path: Path) -> None:
    def save(comm: Communicator) -> None:
        tables = [replace(TABLES[0], num_embeddings=51), *TABLES[1:]]
        module = ShardedEmbeddingBag(tables, None, SGD(lr=0.1), communicator=comm)
        files.save(tmp_path / "other", module)
        module.close()

    local.run(1, save, timeout_s=TIMEOUT_S)
    ended = local.run(3, lambda comm: lost(comm, tmp_path / "other"), timeout_s=TIMEOUT_S, kill={})
    assert all("table 'users' is (50, 4), (51, 4) in" in str(each) for each in (ended[0], ended[2]))
    assert local.run(3, lambda comm: lost(comm, saved), timeout_s=TIMEOUT_S, kill={})[0] == "none"


@pytest.mark.leaves_threads
def test_other_checkpoints_of_the_same_name_are_not_mixed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on hosts whose folders are their own."""

    class Own(Saved):
        def fill_some(self, *arguments: Any) -> None:
            super().fill_some(*arguments)
            self.generation += threading.current_thread().name

    monkeypatch.setattr(recovery, "Saved", Own)
    ended = local.run(3, lambda comm: lost(comm, saved), timeout_s=TIMEOUT_S, kill={})
    assert all("rank 0 and rank 2 find different checkpoints in" in str(each) for each in (ended[0], ended[2]))


@pytest.mark.leaves_threads
def test_a_checkpoint_that_gives_way_to_a_newer_one_is_asked_for_again(saved: Path, tmp_path: Path) -> None:
    answers = [tmp_path / "removed meanwhile", saved]
    ended = local.run(3, lambda comm: lost(comm, lambda: answers.pop(0)), timeout_s=TIMEOUT_S, kill={})
    assert [ended[0], ended[2]] == ["none"] * 2
    assert answers == []


@pytest.mark.leaves_threads
def test_state_of_another_optimizer_begins_anew_and_that_is_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    def program(comm: Communicator) -> float:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, PLAN, Adagrad(lr=0.0), communicator=comm, recover_from=saved)
        if comm.rank == 1:
            comm.die()
        found = again(lambda: whole(module))
        module.close()
        return float(found["shops/sum"].abs().max())

    with caplog.at_level(logging.WARNING):
        ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert (ended[0], ended[2]) == (0.0, 0.0)
    assert any("the optimizer's state begins anew for" in each and "shops" in each for each in caplog.messages)


@pytest.mark.leaves_threads
def test_a_lost_rank_without_rows_takes_nothing_with_it() -> None:
    plan = {table.name: Placement("table-wise", (2 * (index % 2),)) for index, table in enumerate(TABLES)}

    def program(comm: Communicator) -> int:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, plan, SGD(lr=0.1), communicator=comm)
        train(module, 2)
        if comm.rank == 1:
            comm.die()
        train(module, 3)
        lost = int(module.metrics()["ranks_lost"])
        assert module.metrics()["lookups"] == 5
        module.close()
        return lost

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert [ended[0], ended[2]] == [1, 1]


@pytest.mark.leaves_threads
def test_a_checkpointer_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    def program(comm: Communicator) -> dict[str, Tensor]:
        assert isinstance(comm, local.LocalCommunicator)
        bags = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.0), communicator=comm)
        bags.load_global_state_dict(weights())
        model = torch.nn.Sequential(bags, torch.nn.Linear(15, 1))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=1)
        checkpointer = Checkpointer(tmp_path, model, sync, every_steps=1000, end_signals=())
        assert checkpointer.save_now() is not None
        if comm.rank == 1:
            comm.die()
        for step in range(3):
            optimizer.zero_grad()
            model(batch(comm.rank, step)).square().mean().backward()
            optimizer.step()
        found = whole(bags)
        assert checkpointer.save_now() is not None
        checkpointer.close()
        sync.close()
        bags.close()
        return found

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    newest = Checkpointer.latest(tmp_path)
    assert newest is not None
    for name, weight in weights().items():
        assert ended[0] is not None
        torch.testing.assert_close(ended[0][f"{name}/weight"], weight, rtol=0, atol=0)
        rows = torch.cat([values for _, values in files.read(newest / "model.pt.0", name)])
        torch.testing.assert_close(rows, weight, rtol=0, atol=0)


def test_a_checkpointer_that_is_refused_leaves_tables_as_they_were(tmp_path: Path) -> None:
    def program(comm: Communicator) -> None:
        plain = torch.nn.Linear(2, 1)
        bags = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.0), communicator=comm)
        model = torch.nn.Sequential(bags, torch.nn.Linear(15, 1))
        handles = [
            ShadowSync(torch.optim.SGD(part.parameters(), lr=0.1), model=whole, communicator=comm, sync_every=1)
            for part, whole in ((plain, plain), (model[1], model))
        ]
        checkpointers = [Checkpointer(tmp_path / "a", plain, handles[0])]
        with pytest.raises(ValueError, match="another Checkpointer's"):
            Checkpointer(tmp_path / "a", model, handles[1])
        assert bags.recover_from is None
        checkpointers.append(Checkpointer(tmp_path / "b", model, handles[1]))
        assert checkpointers[1].save_now() is not None
        assert bags.recover_from() == tmp_path / "b" / "step-0" / "model.pt.0"
        for each in (*checkpointers, *handles, bags):
            each.close()

    local.run(2, program, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    ("saves", "loads", "dies_early", "listed"),
    [
        (False, False, True, True),
        (False, False, False, True),
        (False, True, False, True),
        (True, False, False, True),
        (True, True, False, True),
        (False, False, False, False),
    ],
)
@pytest.mark.leaves_threads
def test_rows_come_from_no_other_runs_checkpoint(
    saves: bool, loads: bool, dies_early: bool, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But from one that this run has loaded, or written itself; a rank is lost that has a Checkpointer, or not yet.

    Nor where it was not known which there were, as the folder could not be listed.
    """

    def program(comm: Communicator, first: bool) -> dict[str, Tensor] | str:
        assert isinstance(comm, local.LocalCommunicator)
        bags = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.0), communicator=comm)
        bags.load_global_state_dict({name: rows * (2 if first else 1) for name, rows in weights().items()})
        model = torch.nn.Sequential(bags, torch.nn.Linear(15, 1))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=1)
        if comm.rank == 1 and dies_early and not first:
            comm.die()
        checkpointer = Checkpointer(tmp_path, model, sync, every_steps=1000, end_signals=())
        if loads and not first:
            checkpointer.load_latest()
        if saves or first:
            assert checkpointer.save_now() is not None
        if comm.rank == 1 and not first:
            comm.die()
        if not first:
            try:
                for step in range(3):
                    optimizer.zero_grad()
                    model(batch(comm.rank, step)).square().mean().backward()
                    optimizer.step()
            except EmbeddingError as error:
                return str(error)
        found = whole(bags)
        checkpointer.close()
        sync.close()
        bags.close()
        return found

    local.run(3, lambda comm: program(comm, True), timeout_s=TIMEOUT_S, kill={})
    if not listed:
        entries, away = folders._entries, iter([True, True])  # what dead writers left is not seen, nor what there is

        def some(folder: Path, pattern: Any) -> list[Path]:
            if folder == tmp_path and next(away, False):  # no other: what killed ranks of other tests left looks too
                raise CheckpointError(f"{folder} cannot be listed")
            return entries(folder, pattern)

        monkeypatch.setattr(folders, "_entries", some)
    for ended in local.run(3, lambda comm: program(comm, False), timeout_s=TIMEOUT_S, kill={})[::2]:
        if not (saves or loads):
            assert "no checkpoint has them yet" in ended
            continue
        for name, weight in weights().items():
            torch.testing.assert_close(ended[f"{name}/weight"], weight * (2 if loads else 1), rtol=0, atol=0)


def test_a_rank_that_takes_rows_over_while_it_writes_says_whose_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group changes at every look."""
    folder = tmp_path / f".step-1-{JOB}-0.tmp"
    folder.mkdir()
    (folder / "request.json").write_text('{"generation": "0123456789ab"}')
    written: list[list[int]] = []

    class Bag:
        looks = 0

        @property
        def group(self) -> Any:
            self.looks += 1
            return SimpleNamespace(comm=SimpleNamespace(members=list(range(1, 9 - self.looks)), rank=0))

    def write_shards(path: Path, generation: str, module: Any, group: Any, **more: Any) -> list[Any]:
        written.append(group.comm.members)
        return []

    monkeypatch.setattr(files, "write_shards", write_shards)
    bags: Any = {"bags": Bag()}
    tables.Tables(bags).answer(tmp_path, JOB)
    assert json.loads((folder / "done-1.json").read_bytes())["members"] == {"bags": written[0]}


def test_an_answer_that_cannot_be_left_in_the_folder_is_left_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are written once."""
    folder = tmp_path / f".step-1-{JOB}-0.tmp"
    folder.mkdir()
    (folder / "request.json").write_text('{"generation": "0123456789ab"}')
    written: list[Path] = []

    class Bag:
        group = SimpleNamespace(comm=SimpleNamespace(members=[0, 1], rank=1))

    def write_shards(path: Path, *_: Any, **__: Any) -> list[Any]:
        written.append(path)
        return []

    def away(*_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(files, "write_shards", write_shards)
    bags: Any = {"bags": Bag()}
    ours = tables.Tables(bags)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale"):
        patch.setattr(tables, "write_whole", away)
        ours.answer(tmp_path, JOB)
    for _ in range(2):
        ours.answer(tmp_path, JOB)
    assert written == [folder / "bags"]
    assert json.loads((folder / "done-1.json").read_bytes())["members"] == {"bags": [0, 1]}


def test_a_draft_with_the_name_of_one_that_a_lost_rank_has_left_is_answered_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next rank that writes counts its attempts anew."""
    folder = tmp_path / f".step-1-{JOB}-0.tmp"
    folder.mkdir()
    written: list[str] = []

    class Bag:
        group = SimpleNamespace(comm=SimpleNamespace(members=[0, 1], rank=1))

    def write_shards(_: Path, generation: str, *__: Any, **___: Any) -> list[Any]:
        written.append(generation)
        return []

    monkeypatch.setattr(files, "write_shards", write_shards)
    bags: Any = {"bags": Bag()}
    ours = tables.Tables(bags)
    ours.answer(tmp_path, JOB)  # nothing is asked for yet
    for generation in ("0123456789ab", "ba9876543210"):
        (folder / "request.json").write_text(json.dumps({"generation": generation}))
        for _ in range(2):
            ours.answer(tmp_path, JOB)
        assert (folder / "done-1.json").exists()
        (folder / "done-1.json").unlink()
    assert written == ["0123456789ab", "ba9876543210"]


@pytest.mark.leaves_threads
def test_a_checkpoint_does_not_wait_for_the_rows_of_a_lost_rank(tmp_path: Path) -> None:
    """Nobody has noticed the loss: the tables were not used since."""
    both = threading.Barrier(2)

    def program(comm: Communicator) -> None:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, None, SGD(lr=0.1), communicator=comm)
        both.wait(TIMEOUT_S)
        if comm.rank == 1:
            comm.die()
        both.wait(TIMEOUT_S)
        if comm.rank == 0:
            with pytest.raises(CheckpointError, match="a rank with rows of the sharded tables was lost meanwhile"):
                Tables({"tables": module}).write(Draft(tmp_path, JOB, 1, 1), lambda: True)

    local.run(2, program, timeout_s=TIMEOUT_S, kill={})


# --- copies -----------------------------------------------------------------------------------------------------------


RULES = [SGD(lr=0.1), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1), Adam(lr=0.1)]


@pytest.mark.parametrize("dies", [[1], [1, 0], [2, 1], [0, 1]], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.leaves_threads
def test_a_copy_is_bit_by_bit_what_its_owner_had(hosts: str, rule: Any, dtype: torch.dtype, dies: list[int]) -> None:
    """Ranks die one after the other, between two steps; copies are made anew in between."""

    def program(comm: Communicator) -> int:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, PLAN, rule, communicator=comm, replication=2)
        if dtype is torch.float64:
            module.double()
        train(module, 3)
        for number in dies:
            had, sent = whole(module), module.metrics()["replica_bytes"]
            assert sent > 0
            if number == comm.rank:
                comm.die()
            has = again(lambda: whole(module))
            assert has.keys() == had.keys()
            for name, values in had.items():
                torch.testing.assert_close(has[name], values, rtol=0, atol=0)
            train(module, 3, first=3)
            assert (module.metrics()["replica_bytes"] > sent) == (module.size > 1)
        size = module.size
        module.close()
        return size

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert [each for each in ended if each is not None] == [3 - len(dies)] * (3 - len(dies))


@pytest.mark.parametrize("how", ["steps", "prefetch", "unequal"])
@pytest.mark.leaves_threads
def test_whenever_a_rank_is_lost_in_training_its_rows_are_those_of_its_copy(hosts: str, how: str) -> None:
    """With a learning rate of 0 rows stay what they were at first."""

    def program(comm: Communicator) -> dict[str, Tensor]:
        assert isinstance(comm, local.LocalCommunicator)
        try:
            module = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.0), communicator=comm, replication=2)
        except RankLostError:
            comm.die()
            raise
        train_in_ways(module, how)
        found: dict[str, Tensor] = again(lambda: whole(module))
        module.close()
        return found

    undisturbed = local.run(3, program, timeout_s=TIMEOUT_S)[0]
    for call in CALLS:
        ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={1: call})
        for each in (ended[0], ended[2]):
            for name in weights() if each is not None else ():
                torch.testing.assert_close(each[f"{name}/weight"], undisturbed[f"{name}/weight"], rtol=0, atol=0)


@pytest.mark.leaves_threads
def test_rows_that_were_loaded_are_copied_at_the_next_lookup() -> None:
    def program(comm: Communicator, before: bool) -> str:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, PLAN, Adagrad(lr=0.0), communicator=comm, replication=2)
        state = {name: torch.full_like(each, 5.0) for name, each in module.state_dict().items()}
        module.load_state_dict(state)
        if not before:
            train(module, 1)
        if comm.rank == 1:
            comm.die()
        try:
            found = again(lambda: whole(module))
        except EmbeddingError as error:
            return str(error)
        assert all(bool((each == 5).all()) for name, each in found.items() if name.endswith("weight"))
        module.load_global_state_dict(weights())
        train(module, 1)
        module.close()
        return "copied"

    ended = local.run(3, lambda comm: program(comm, False), timeout_s=TIMEOUT_S, kill={})
    assert [ended[0], ended[2]] == ["copied"] * 2
    ended = local.run(3, lambda comm: program(comm, True), timeout_s=TIMEOUT_S, kill={})
    assert all("no checkpoint is known that has them" in each for each in (ended[0], ended[2]))


@pytest.mark.leaves_threads
def test_a_copy_of_which_a_part_has_come_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 alone has loaded rows, and is lost while it sends them."""

    def program(comm: Communicator) -> str:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, PLAN, Adagrad(lr=0.0), communicator=comm, replication=2)
        train(module, 1)
        if comm.rank == 1:
            module.load_state_dict({name: torch.full_like(each, 5.0) for name, each in module.state_dict().items()})
            isend, sent = module.group.comm.isend, []

            def send_three(tensor: Tensor, dest: int, tag: int) -> Any:
                sent.append(tag)
                if sent.count(replicas.WHOLE_TAG) == 4:
                    comm.die()
                return isend(tensor, dest, tag)

            monkeypatch.setattr(module.group.comm, "isend", send_three)
        try:
            train(module, 1)
        except EmbeddingError as error:
            return str(error)
        return "a mixture"

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert all("no checkpoint is known that has them" in each for each in (ended[0], ended[2]))


@pytest.mark.leaves_threads
def test_what_has_no_copy_left_comes_from_the_checkpoint(saved: Path) -> None:
    """Rank 2 has the copies of rank 1, and both are lost at once."""
    together = threading.Barrier(4)

    def program(comm: Communicator, source: Path | None) -> Any:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(
            TABLES, PLAN, RowWiseAdagrad(lr=0.0), communicator=comm, replication=2, recover_from=source
        )
        files.load(saved, module)
        train(module, 2)
        module.wait()
        together.wait(TIMEOUT_S)
        if comm.rank in (1, 2):
            comm.die()
        together.wait(TIMEOUT_S)
        try:
            found = again(lambda: whole(module))
        except EmbeddingError as error:
            return str(error)
        module.close()
        return found

    ended = local.run(4, lambda comm: program(comm, saved), timeout_s=TIMEOUT_S, kill={})
    for each in (ended[0], ended[3]):
        for name, weight in weights().items():
            torch.testing.assert_close(each[f"{name}/weight"], weight, rtol=0, atol=0)
    ended = local.run(4, lambda comm: program(comm, None), timeout_s=TIMEOUT_S, kill={})
    assert all("(rank 1, rank 2), and with it the rows" in each for each in (ended[0], ended[3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replication": 3}, "replication=3 is not supported; give 1"),
        ({"replication": 0}, "replication=0"),
        ({"replication": 2, "mode": "served"}, "replication=2 needs mode='alltoall'"),
    ],
    ids=str,
)
def test_other_numbers_of_copies_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.1), communicator=local.world(1)[0], **options)


@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.leaves_threads
def test_a_rank_without_rows_takes_them_over_in_their_dtype(saved: Path, replication: int) -> None:
    plan = {table.name: Placement("table-wise", (index % 2,)) for index, table in enumerate(TABLES)}

    def program(comm: Communicator) -> dict[str, Tensor]:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(
            TABLES, plan, SGD(lr=0.0), dtype=torch.float64, communicator=comm, recover_from=saved,
            replication=replication,
        ).cpu()  # fmt: skip
        files.load(saved, module)
        train(module, 1)
        if comm.rank == 1:
            comm.die()
        train(module, 2)
        assert {module.shards[index].weight.dtype for index in range(len(module.shards))} == {torch.float64}
        found = whole(module)
        module.close()
        return found

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    for name, weight in weights().items():
        assert ended[2] is not None
        torch.testing.assert_close(ended[2][f"{name}/weight"], weight.double(), rtol=0, atol=0)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_lost_parts_go_to_those_that_hold_least() -> None:
    before = Plan.of(TABLES, 3, {**PLAN, "items": Placement("table-wise", (0,))})
    after = before.handed_on([0, None, 1])
    assert after.world_size == 2
    assert after.inherited
    assert {shard.extent for shard in after.shards} == {shard.extent for shard in before.shards}
    for old, new in zip(before.shards, after.shards, strict=True):
        assert new.extent == old.extent
        assert old.rank == 1 or new.rank == {0: 0, 2: 1}[old.rank]
    taken = [new for old, new in zip(before.shards, after.shards, strict=True) if old.rank == 1]
    assert {shard.rank for shard in taken} == {1}, "rank 0 has all of the largest table"
    last = after.handed_on([None, 0])
    assert {shard.rank for shard in last.shards} == {0}


def test_a_user_may_not_place_two_parts_on_a_rank() -> None:
    with pytest.raises(ValueError, match="ranks have to be different"):
        Plan.of(TABLES, 3, {**PLAN, "days": Placement("row-wise", (0, 1, 0))})


# --- ranks that are a call apart --------------------------------------------------------------------------------------


def lose_late(module: ShardedEmbeddingBag, through: threading.Barrier) -> None:
    """Let the next lookup come to its end on all ranks but this one, which hears then that a rank is lost.

    The others say when they are `through` with it.
    """
    exchange = module._exchange
    assert isinstance(exchange, Exchange)
    look_up = exchange.lookup

    def lookup(*arguments: Any, **more: Any) -> Any:
        look_up(*arguments, **more)
        exchange.traffic.lookups -= 1
        through.wait(TIMEOUT_S)
        raise RankLostError("lost, on this rank alone")

    exchange.lookup = lookup  # type: ignore[method-assign]


@pytest.mark.leaves_threads
def test_a_rank_that_waits_in_one_module_is_not_waited_for_in_another(
    hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is through with the lookup of the first module when it hears of the loss, and rank 2 is not."""
    monkeypatch.setattr(local, "BLOCKING_TIMEOUT_S", 5.0)
    through = threading.Barrier(3)

    def program(comm: Communicator) -> int:
        assert isinstance(comm, local.LocalCommunicator)
        modules = [
            ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.1), communicator=comm, replication=2, output="dict")
            for _ in range(2)
        ]
        if comm.rank == 2:
            lose_late(modules[0], through)
        for step in range(3):
            found = [modules[0](batch(comm.rank, step))]
            if comm.rank == 1:
                comm.die()
            if step == 0 and comm.rank != 2:
                through.wait(TIMEOUT_S)
            found.append(modules[1](batch(comm.rank, step)))
            torch.stack([each.square().sum() for one in found for each in one.values()]).sum().backward()
        for module in modules:
            module.close()
            assert module.metrics()["lookups"] == 3
        return modules[0].size

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert [ended[0], ended[2]] == [2, 2]


@pytest.mark.leaves_threads
def test_another_rank_is_lost_while_a_lookup_is_made_once_more(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 makes it once more, with ranks 0 and 3, and rank 3 is lost in it."""
    through = threading.Barrier(4)
    serve_lookup = Exchange.serve_lookup

    def serve_or_die(self: Exchange, dtype: torch.dtype) -> None:
        comm = self._comm
        assert isinstance(comm, local.LocalCommunicator)
        if comm.members[comm.rank] == 3:
            comm.die()
        serve_lookup(self, dtype)

    monkeypatch.setattr(Exchange, "serve_lookup", serve_or_die)

    def program(comm: Communicator) -> dict[str, Tensor]:
        assert isinstance(comm, local.LocalCommunicator)
        module = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.0), communicator=comm, replication=2)
        if comm.rank == 2:
            lose_late(module, through)
        vectors = module(batch(comm.rank, 0))
        if comm.rank == 1:
            comm.die()
        if comm.rank != 2:
            through.wait(TIMEOUT_S)
        vectors.sum().backward()
        train(module, 2, first=1)
        found = whole(module)
        assert module.size == 2
        assert module.metrics()["lookups"] == 3
        module.close()
        return found

    ended = local.run(4, program, timeout_s=TIMEOUT_S, kill={})
    assert all(each is not None for each in (ended[0], ended[2]))


@pytest.mark.parametrize("ends", [Call.JOIN, Call.CLOSE], ids=["join", "close"])
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.leaves_threads
def test_no_rank_leaves_a_meeting_that_another_has_lost_a_rank_in(
    hosts: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], ends: Call, saved: Path
) -> None:
    """The last of `join()`, or of `close()`: rank 0 is through with it, and rank 2 is not."""
    monkeypatch.setattr(local, "BLOCKING_TIMEOUT_S", 5.0)
    is_lost = threading.Event()
    meet = Meetings.meet

    def meet_or_lose(self: Meetings, call: Call, *arguments: Any, **more: Any) -> Any:
        words = meet(self, call, *arguments, **more)
        comm = self._comm
        assert isinstance(comm, local.LocalCommunicator)
        if comm.size == 3 and all(word.call == ends for word in words):
            if comm.rank == 1:
                comm.die()
                is_lost.set()
            elif comm.rank == 2:
                assert is_lost.wait(TIMEOUT_S)
                raise RankLostError("lost, on this rank alone")
        return words

    monkeypatch.setattr(Meetings, "meet", meet_or_lose)

    def program(comm: Communicator) -> int:
        module = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.1), communicator=comm, recover_from=saved, **options)
        for epoch in range(3):
            train(module, 2 + module.rank, first=epoch)
            module.join()
        module.wait()
        whole(module)
        module.close()
        return int(module.metrics()["lookups"])

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert ended[0] == ended[2] or options["mode"] == "served"


@pytest.mark.parametrize("ends", ["save(): complete", "load(): loaded"], ids=["save", "load"])
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.leaves_threads
def test_a_call_that_is_cut_short_on_one_rank_is_so_on_all(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], ends: str, saved: Path, tmp_path: Path
) -> None:
    """Rank 0 has come to its end, and rank 2 not quite."""
    through = threading.Barrier(3)
    agree = files.agree

    def agree_or_lose(module: Any, group: Group, call: str, *arguments: Any) -> Any:
        found = agree(module, group, call, *arguments)
        comm = group.comm
        assert isinstance(comm, local.LocalCommunicator)
        if call == ends and comm.size == 3:
            if comm.rank == 1:
                comm.die()
            through.wait(TIMEOUT_S)
            if comm.rank == 2:
                with cut_short(comm):
                    raise RankLostError("lost, on this rank alone")
        return found

    monkeypatch.setattr(files, "agree", agree_or_lose)

    def program(comm: Communicator) -> int:
        module = ShardedEmbeddingBag(TABLES, PLAN, SGD(lr=0.1), communicator=comm, recover_from=saved, **options)
        train(module, 2)
        again(lambda: files.save(tmp_path / "tables", module))
        again(lambda: files.load(tmp_path / "tables", module))
        train(module, 2)
        whole(module)
        module.close()
        return module.size

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert [ended[0], ended[2]] == [2, 2]
