"""Damaged and hostile checkpoints: always a CheckpointError, never code, and what was there stays as it was."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks_as_threads import content, make_model, on_ranks, same, sgd, train
from safetensors.torch import save_file
from test_embedding_files import TABLES, on_modules, saved
from torch import Tensor

from hvd_shadowsync import CheckpointError, ShadowSync, checkpoint
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import files

LONG_S = 20.0
"""No damaged file of some KB may take so long."""
pytestmark = pytest.mark.timeout(120)
calm = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Return files that are cut off, have bits flipped, a part overwritten, doubled, or that are something else."""
    places = st.integers(0, len(whole) - 1)

    def flipped(bits: list[tuple[int, int]]) -> bytes:
        found = bytearray(whole)
        for place, bit in bits:
            found[place] ^= 1 << bit
        return bytes(found)

    return st.one_of(
        places.map(lambda place: whole[:place]),
        st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=8).map(flipped),
        st.tuples(places, st.binary(max_size=40)).map(lambda x: whole[: x[0]] + x[1] + whole[x[0] + len(x[1]) :]),
        st.tuples(places, places, places).map(lambda x: whole[: x[0]] + whole[min(x[1:]) : max(x[1:])] + whole[x[0] :]),
        st.binary(max_size=200),
    )


def everything(value: Any) -> Any:
    """Return nested dicts and lists with tensors as lists, which can be compared."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: everything(each) for key, each in value.items()}
    return [everything(each) for each in value] if isinstance(value, (list, tuple)) else value


# --- the file of the dense part ---------------------------------------------------------------------------------------


def trained() -> tuple[torch.nn.Sequential, torch.optim.SGD]:
    model = make_model()
    optimizer = sgd(model, momentum=0.9)
    train(model, optimizer, 2)
    return model, optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of two ranks, with rounds in it."""
    path = tmp_path_factory.mktemp("whole") / "file.pt"

    def program(comm: Communicator) -> None:
        model, optimizer = trained()
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, foreground=True) as sync:
            train(model, optimizer, 2, first=2)
            checkpoint.save(path, model, sync, extra={"epoch": 3, "seen": [torch.ones(3), "x"]})

    on_ranks(2, program)
    return path.read_bytes()


def loaded(path: Path, size: int = 1) -> str:
    """Load a file that cannot be; return the error. Model and optimizer stay as they were."""

    def program(comm: Communicator) -> str:
        model, optimizer = trained()
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=10**9, foreground=True) as sync:
            before = content(model), copy.deepcopy(everything(optimizer.state_dict()))
            with pytest.raises(CheckpointError) as caught:
                checkpoint.load(path, model, sync)
            assert same(content(model), before[0])
            assert everything(optimizer.state_dict()) == before[1]
            return str(caught.value)

    messages = on_ranks(size, program)
    assert len(set(messages)) == 1
    return messages[0]


@calm
@given(data=st.data())
def test_a_damaged_file_is_refused_or_has_all_that_was_saved(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(whole)
    expected = everything(checkpoint.read(path))
    path.write_bytes(data.draw(damaged(whole)))
    begun = time.monotonic()
    try:
        found = everything(checkpoint.read(path))
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "weights_only" not in str(error), "no advice to load code"
        loaded(path)
    else:
        assert found == expected  # what was hit is padding
    assert time.monotonic() - begun < LONG_S


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from([torch.zeros(()), torch.ones(2, 3), torch.zeros(5, 3).to_sparse(), torch.tensor([1 << 40])]),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), each),
    max_leaves=6,
)  # fmt: skip


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Iterate over the paths of all that is in `tree`."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(tree)
    changed[path[0]] = replaced(tree[path[0]], path[1:], value)
    return changed


@calm
@given(data=st.data())
def test_a_file_with_other_things_in_it_is_refused_or_fits(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    """Any value in any place of what a checkpoint holds."""
    original = torch.load(io.BytesIO(whole), weights_only=True)
    place = data.draw(st.sampled_from(list(nodes(original))))
    torch.save(replaced(original, place, data.draw(PLAIN)), tmp_path / "file.pt")

    def program(comm: Communicator) -> None:
        model, optimizer = trained()
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=10**9, foreground=True) as sync:
            before = content(model)
            try:
                checkpoint.load(tmp_path / "file.pt", model, sync)
            except CheckpointError:
                assert same(content(model), before)

    on_ranks(2, program)


class Command:
    """Pickled, it would run a command where it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_in_a_file_is_never_run(form: str, tmp_path: Path) -> None:
    path, touched = tmp_path / "file.pt", tmp_path / "touched"
    evil = {"model": {}, "optimizer": Command(touched)}
    if form == "bare":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    message = loaded(path)
    assert not touched.exists()
    assert f"{path} cannot be read" in message
    assert "weights_only" not in message
    if form == "zip":
        assert "(it asks for posix.system); only tensors" in message


def test_a_file_that_unpacks_to_much_more_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) + b"\0" * ((64 << 20) if name.endswith("data.pkl") else 0))
    assert path.stat().st_size < 1 << 20
    assert f"{path} is compressed, which torch.save does not do" in loaded(path)


def test_a_flipped_bit_in_a_tensor_is_found(whole: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        values = max((archive.read(name) for name in archive.namelist() if "/data/" in name), key=len)
    place = whole.index(values) + 5
    (tmp_path / "file.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "is damaged" in loaded(tmp_path / "file.pt")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {}, "optimizer": {}}, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.read(tmp_path / "file.pt") == {"model": {}, "optimizer": {}}


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is no regular file" in loaded(tmp_path / "pipe")
    assert "is no regular file" in loaded(tmp_path)


@pytest.mark.parametrize(
    "rounds",
    [
        {"algorithm": {}, "state": {}, "counters": {}},
        {"algorithm": {"name": "BMUF"}, "state": {}, "counters": {"steps": 1}},
        {"algorithm": {"name": "BMUF"}, "state": {}, "counters": {"steps": "1", "rounds": 1, "steps_at_last_round": 1}},
        {"algorithm": {"name": "BMUF"}, "state": [], "counters": {"steps": 1, "rounds": 1, "steps_at_last_round": 1}},
        {
            "algorithm": {"name": "BMUF"},
            "state": {"global_model": {"0.bias": torch.ones(99)}},
            "counters": {"steps": 1, "rounds": 1, "steps_at_last_round": 1},
        },
    ],
    ids=["name", "counter", "text", "list", "shape"],
)
def test_rounds_that_do_not_fit_change_nothing(rounds: Any, whole: bytes, tmp_path: Path) -> None:
    """They used to be found out after the model was loaded, and on each rank by itself."""
    original = torch.load(io.BytesIO(whole), weights_only=True)
    original["optimizer"]["shadow_sync"] = rounds
    torch.save(original, tmp_path / "file.pt")
    assert "the state of rounds" in loaded(tmp_path / "file.pt", size=2)


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_a_file_that_fits_in_part_changes_nothing(what: str, whole: bytes, tmp_path: Path) -> None:
    """torch copies what fits before it says what does not."""
    original = torch.load(io.BytesIO(whole), weights_only=True)
    if what == "model":
        original["model"]["3.weight"] = torch.ones(7, 7)
    else:
        original["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(original, tmp_path / "file.pt")
    assert "does not fit the model" in loaded(tmp_path / "file.pt", size=2)


def test_a_file_that_one_rank_cannot_read_changes_nothing_on_the_others(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "whole.pt").write_bytes(whole)
    (tmp_path / "cut.pt").write_bytes(whole[:-100])

    def program(comm: Communicator) -> None:
        model, optimizer = trained()
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=10**9, foreground=True) as sync:
            before = content(model), everything(optimizer.state_dict())
            with pytest.raises(CheckpointError, match="rank 1: "):
                checkpoint.load(tmp_path / ("cut.pt" if comm.rank else "whole.pt"), model, sync)
            assert same(content(model), before[0])
            assert everything(optimizer.state_dict()) == before[1]

    on_ranks(2, program)


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may write where many do, and guess the name."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    guessed = uuid.UUID(int=5)
    (tmp_path / f".file.pt.{guessed.hex}.tmp").symlink_to(victim)
    monkeypatch.setattr(uuid, "uuid4", lambda: guessed)

    def program(comm: Communicator) -> None:
        model, optimizer = trained()
        with ShadowSync(optimizer, model=model, communicator=comm) as sync:
            with pytest.raises(CheckpointError, match="File exists"):
                checkpoint.save(tmp_path / "file.pt", model, sync)
            monkeypatch.undo()
            checkpoint.save(tmp_path / "file.pt", model, sync)

    on_ranks(1, program)
    assert victim.read_text() == "precious"
    assert checkpoint.read(tmp_path / "file.pt")["extra"] is None


# --- the folder of tables ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "tables", 2)
    return tmp_path / "tables"


def all_read(folder: Path) -> dict[str, Tensor]:
    return {table.name: torch.cat([rows for _, rows in files.read(folder, table.name)]) for table in TABLES}


def attempt(folder: Path) -> bool:
    """Read in all ways; return whether that went well, and as long as it does not, all stays as it was."""
    begun, whole = time.monotonic(), True
    targets = {table.name: torch.full((table.num_embeddings, table.embedding_dim), 7.0) for table in TABLES}
    try:
        all_read(folder)
        files.load_into(folder, targets)
    except CheckpointError:
        whole = False

    def use(module: Any) -> bool:
        before = {name: value.clone() for name, value in module.state_dict().items()}
        try:
            files.load(folder, module)
        except CheckpointError:
            assert same(module.state_dict(), before)
            return False
        return True

    done = on_modules(1, use)[0]
    assert time.monotonic() - begun < LONG_S
    if not whole and not done:
        assert all(bool((target == 7.0).all()) for target in targets.values())
    return whole and done


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=4)
    | st.sampled_from([0, 1, 2, 3, 1 << 31, 1 << 62, 10**300, "weight", "float32", "../../x", "\0", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@calm
@given(data=st.data())
def test_an_index_with_other_things_in_it(data: st.DataObject, folder: Path) -> None:
    path = folder / "index.json"
    kept = path.read_bytes()
    index = json.loads(kept)
    for _ in range(data.draw(st.integers(1, 3))):
        index = replaced(index, data.draw(st.sampled_from(list(nodes(index)))), data.draw(JSON))
    path.write_text(json.dumps(index))
    attempt(folder)
    path.write_bytes(kept)


@calm
@given(data=st.data())
def test_damaged_bytes_of_a_folder(data: st.DataObject, folder: Path) -> None:
    path = data.draw(st.sampled_from(sorted(folder.iterdir(), key=lambda path: path.name.rpartition("-")[2])))
    kept = path.read_bytes()
    path.write_bytes(data.draw(damaged(kept)))
    attempt(folder)
    path.write_bytes(kept)


def changed_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def first_shard(index: dict[str, Any]) -> Any:
    return index["tables"][0]["shards"][0]


def first_piece(index: dict[str, Any]) -> Any:
    return first_shard(index)["tensors"]["weight"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["tables"][0].update(num_embeddings=23.0), r"num_embeddings=23.0 is no count"),
        (lambda index: index["tables"][0].update(embedding_dim=0), r"embedding_dim=0 is no count"),
        (lambda index: index["tables"][0].update(name=[1]), r"name=\[1\] is no text"),
        (lambda index: first_piece(index).update(first_row=False), "first_row=False is no count"),
        (lambda index: first_piece(index).update(num_rows=23.0), "num_rows=23.0 is no count"),
        (lambda index: first_piece(index).update(key=5), "key=5 is no text"),
        (lambda index: first_shard(index).update(dtype="nn"), "'table' is of torch.nn"),
        (lambda index: first_shard(index).update(rows={"num_embeddings": 23, "part": 0, "parts": 0}), "parts=0"),
        (lambda index: index["optimizer"].update(slots={"sum": 1}), "slot 'sum' is 1, neither true nor false"),
        (lambda index: index.update(generation=10**300), "generation=1000+.*0 is no text"),
    ],
    ids=["rows", "dim", "name", "first", "count", "key", "dtype", "parts", "slots", "generation"],
)  # fmt: skip
def test_types_of_an_index_are_checked(change: Callable[[dict[str, Any]], None], message: str, folder: Path) -> None:
    """Each used to be another exception later on, or to be taken for a number."""
    changed_index(folder, change)
    with pytest.raises(CheckpointError, match=f"index.json is damaged .*{message}"):
        files.read(folder, "table")
    assert not attempt(folder)


def test_an_index_that_is_nested_too_deeply(folder: Path) -> None:
    (folder / "index.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="RecursionError"):
        files.read(folder, "table")
    assert not attempt(folder)


def test_a_size_that_no_file_bears_out_takes_no_memory(folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["tables"][0]["embedding_dim"] = 10**15
        for shard in index["tables"][0]["shards"]:
            shard["columns"] = [0, 10**15]

    changed_index(folder, change)
    with pytest.raises(CheckpointError, match="is not the file that was saved under this name"):
        files.read(folder, "table")


def test_a_file_with_values_of_another_type(folder: Path) -> None:
    """It used to be read as numbers of the table's type."""
    piece = first_piece(json.loads((folder / "index.json").read_text()))
    path = folder / piece["file"]
    metadata = {"generation": piece["file"].split("-")[1], "file": piece["file"]}
    save_file({piece["key"]: torch.ones(23, 4, dtype=torch.int64)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="is not the file that was saved under this name"):
        files.read(folder, "table")
    assert not attempt(folder)


def test_names_that_lead_out_of_the_folder_are_refused(folder: Path) -> None:
    outside = folder.parent / first_piece(json.loads((folder / "index.json").read_text()))["file"]
    outside.write_bytes((folder / outside.name).read_bytes())
    for name in (f"../{outside.name}", str(outside), f"./{outside.name}", f"{outside.name}\0"):
        changed_index(folder, lambda index, name=name: first_piece(index).update(file=name))
        with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
            files.read(folder, "table")


@pytest.mark.parametrize("which", ["index.json", "rows"])
def test_a_pipe_in_the_folder_is_refused_at_once(which: str, folder: Path) -> None:
    path = min(path for path in folder.iterdir() if path.name.startswith(which))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="it is no regular file"):
        all_read(folder)
    assert not attempt(folder)


def test_a_link_under_the_temporary_name_of_an_index_is_not_followed(folder: Path) -> None:
    victim = folder.parent / "victim"
    victim.write_text("precious")
    (folder / ".index.json.tmp").symlink_to(victim)
    saved(folder, 1)
    assert victim.read_text() == "precious"
    assert attempt(folder)
