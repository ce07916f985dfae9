"""Sharded embeddings on disk: each rank writes what it holds; any world size, any plan and plain scripts read it.

A folder holds `index.json` and safetensors files. The index says where the rows of each table are; the files of one
save have an identifier of their own in their names, so those that an older index speaks of stay as they are until the
new index takes its place.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hvd_shadowsync.checks import check_count
from hvd_shadowsync.durable import flush
from hvd_shadowsync.embedding.holding import BLOCK_ROWS, WEIGHT, Group, Holding, holdings
from hvd_shadowsync.embedding.placement import RowRange, Shard
from hvd_shadowsync.embedding.saved import FORMAT, INDEX, OURS, VERSION, Saved
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag
from hvd_shadowsync.embedding.tables import EmbeddingTable
from hvd_shadowsync.embedding.whole import agree, enter, leave
from hvd_shadowsync.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE_BYTES = 1 << 30
Folder = str | os.PathLike[str]
_Described = dict[str, Any]


def save(folder: Folder, module: ShardedEmbeddingBag, *, generation: str | None = None) -> None:
    """Write the tables and their optimizer state; each rank what it holds (collective; training thread).

    What an earlier save wrote into `folder` stays valid until all of this one is on disk, and is then removed; a save
    that fails or is killed changes nothing that could be read. Of replicated tables there are the weights of rank 0
    (`ShadowSync.synchronize()` makes them the same everywhere); their state is the dense optimizer's.

    Args:
        folder: on a file system that all ranks see; for these tables alone. It is made where its parent exists.
        module: the tables.
        generation: 12 hexadecimal digits that no other save has, as rank 0 gives them; default None, random ones.

    Raises:
        CheckpointError: a rank could not write, or rank 0 does not see its files; raised on every rank, names it.
        EmbeddingError: ranks make different calls.
        ShadowSyncError: `module` is closed.
        TypeError, ValueError: `module` or `generation` is something else.
    """
    _require_module(module)
    if generation is not None and not re.fullmatch("[0-9a-f]{12}", generation):
        raise ValueError(f"generation={generation!r} is no name of a save; give 12 hexadecimal digits, or None")
    group = enter(module, "save()")
    folder = Path(folder)
    name = agree(module, group, "save(): begun", None, generation or uuid.uuid4().hex[:12])[0]
    try:
        failure, written = _trying(folder, lambda: write_shards(folder, name, module, group))
        everyone = agree(module, group, "save(): written", failure, written)
    except CheckpointError:  # no rank has replaced the index
        _remove(folder, lambda found: found == name)
        raise
    unused = False
    if group.comm.rank == 0:
        failure, _ = _trying(folder, lambda: write_index(folder, name, module, everyone))
        unused = failure is not None and _is_of_another(folder, name)
    if agree(module, group, "save(): with its index", None, unused)[0]:
        _remove(folder, lambda found: found == name)
    agree(module, group, "save(): complete", failure)
    leave(module, group)
    if group.comm.rank == 0:
        _remove(folder, lambda found: found != name)


def load(folder: Folder, module: ShardedEmbeddingBag, *, generation: str | None = None) -> None:
    """Read what `save` wrote, at any world size and with any plan; each rank its rows (collective; training thread).

    float32 and float64 are converted. State is taken where the optimizer is of the same kind, and begins anew
    otherwise (rank 0 logs a warning); where columns are divided in another way, `RowWiseAdagrad`'s sums become means as
    in `load_global_state_dict`. Learning rate and other settings stay those of `module`. Replicated tables are ordinary
    parameters: after the first step a `ShadowSync` has to be told of new values (`load_state_dict(None)`).

    Args:
        folder: of `save`.
        module: the tables.
        generation: that of the save that is wanted; default None, whichever is there.

    Raises:
        CheckpointError: a rank finds no checkpoint, or it is damaged, or other than that of the other ranks, or not the
            wanted one, or has not just these tables in these sizes; raised on every rank. Index and heads of files are
            looked at before anything is changed.
        EmbeddingError: ranks make different calls.
        ShadowSyncError: `module` is closed.
    """
    _require_module(module)
    group = enter(module, "load()")
    folder = Path(folder)
    failure, reader = _trying(folder, lambda: Saved(folder).examined(module, group))
    if reader is not None and generation not in (None, reader.generation):
        failure = f"{folder} has the tables of another save; it was cut short before the rest was written, or after it"
    generations = agree(module, group, "load(): looked at", failure, reader and reader.generation)
    if others := [rank for rank, each in enumerate(generations) if each != generations[0]]:
        raise CheckpointError(
            f"rank 0 and rank {others[0]} find different checkpoints in {folder}; give a folder that all hosts see, "
            "and do not save into it meanwhile"
        )
    assert reader is not None
    failure, _ = _trying(folder, lambda: reader.fill_all(module, group))
    group.shards.was_set = True
    agree(module, group, "load(): loaded", failure)
    leave(module, group)
    if group.comm.rank == 0 and (anew := reader.without_state(group.plan, group.shards.rule)):
        logger.warning("the optimizer's state begins anew for %s: %s has none that fits", ", ".join(anew), folder)


def _require_module(module: ShardedEmbeddingBag) -> None:
    if not isinstance(module, ShardedEmbeddingBag):
        raise TypeError(
            f"module is a {type(module).__name__}; give the ShardedEmbeddingBag itself, such as model.tables"
        )


def read(folder: Folder, table: str, *, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the rows of one table in a checkpoint: (id of the first row, weights [rows, dim]); needs no MPI.

    Rows of "row-wise hashed" tables lie scattered in their files: `load_into` reads them faster from a disk.

    Args:
        folder: of `save`.
        table: its name.
        block_rows: at most so many rows a block; default 65536.

    Raises:
        CheckpointError: there is no such table, or the checkpoint is missing or damaged.
        TypeError, ValueError: `block_rows` is no count.
    """
    check_count("block_rows", block_rows, least=1)
    reader = Saved(Path(folder))
    found = reader.table(table)
    reader.examine_weights(found)
    starts = range(0, found.shape[0], block_rows)
    return ((first, reader.rows(found, first, min(first + block_rows, found.shape[0]))) for first in starts)


def load_into(folder: Folder, targets: Mapping[str, nn.EmbeddingBag | nn.Embedding | Tensor]) -> None:
    """Copy whole tables of a checkpoint into plain modules or parameters, by table name; needs no MPI.

    Args:
        folder: of `save`.
        targets: `nn.EmbeddingBag`, `nn.Embedding` or a tensor [rows, dim] for some or all tables, on any device.

    Raises:
        CheckpointError: a table is unknown, a shape differs, or the checkpoint is missing or damaged. Index and heads
            of files are looked at before anything is changed.
        TypeError: a target is none of these.
    """
    reader, found = Saved(Path(folder)), []
    for name, target in targets.items():
        weight = target.weight if isinstance(target, (nn.EmbeddingBag, nn.Embedding)) else target
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"targets[{name!r}] is a {type(target).__name__}; give an nn.EmbeddingBag, nn.Embedding or nn.Parameter"
            )
        table = reader.table(name)
        if tuple(weight.shape) != table.shape:
            raise CheckpointError(
                f"targets[{name!r}] has shape {tuple(weight.shape)}, table {name!r} in {folder} has {table.shape}; "
                "make it of that size"
            )
        shard = Shard(0, 0, RowRange(0, table.shape[0]), (0, table.shape[1]))
        found.append((table, Holding(shard, {WEIGHT: weight.detach()}, None)))
        reader.examine(table, found[-1][1], WEIGHT)
    for table, holding in found:
        reader.fill(table, holding, WEIGHT)


def write_shards(
    folder: Path,
    generation: str,
    module: ShardedEmbeddingBag,
    group: Group,
    *,
    file_bytes: int | None = None,
    look_at: Callable[[str, Tensor], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Write what this rank holds; return what the index says of it (local; any thread).

    The parts of a checkpoint for those who bring them together by themselves, without the module's communicator:
    every rank's shards, then one rank's `write_index`. While training goes on, rows are of the moment when they are
    written.

    Args:
        folder: of the tables alone; it is made where its parent exists.
        generation: 12 hexadecimal digits, the same on every rank and in no other save.
        module: the tables.
        group: their ranks, `module.group`.
        file_bytes: at most about so many bytes a file, and in memory at a time; default 1 GiB.
        look_at: is given a name and rows, and returns what is written in their place; default None, the rows.

    Raises:
        OSError, SafetensorError: the file system refuses.
    """
    with suppress(FileExistsError):
        folder.mkdir()
    file_bytes = FILE_BYTES if file_bytes is None else file_bytes
    number = group.comm.members[group.comm.rank]  # of no other rank, even while some know of a lost one already
    described, writer = [], _Writer(folder, generation, number, file_bytes)
    for place, holding in enumerate(holdings(module, group)):
        if holding.steps is None and group.comm.rank:
            continue
        tensors: dict[str, list[_Described]] = {slot: [] for slot in holding.slots}
        for slot, tensor in holding.slots.items():
            rows = max(1, file_bytes // tensor[:1].nbytes)
            for first in range(0, len(tensor), rows):
                key = f"{module.tables[holding.shard.table].name}/{slot}/{place}/{first}"
                part = tensor[first : first + rows].cpu().contiguous()
                tensors[slot].append(writer.add(key, first, part if look_at is None else look_at(key, part)))
        described.append({
            "table": holding.shard.table,
            "rank": number,
            "rows": asdict(holding.shard.rows),
            "columns": holding.shard.columns,
            "steps": None if holding.steps is None else int(holding.steps),
            "dtype": str(holding.slots[WEIGHT].dtype).removeprefix("torch."),
            "tensors": tensors,
        })  # fmt: skip
    writer.flush()
    flush(folder)
    return described


class _Writer:
    """Fills files up to `most_bytes`, one after the other, each under a temporary name until it is on disk."""

    def __init__(self, folder: Path, generation: str, rank: int, most_bytes: int) -> None:
        self._folder, self._generation, self._rank, self._number = folder, generation, rank, 0
        self._most_bytes = most_bytes
        self._tensors: dict[str, Tensor] = {}

    def add(self, key: str, first: int, tensor: Tensor) -> _Described:
        """Have `tensor` written; return where it will be."""
        if self._tensors and sum(each.nbytes for each in self._tensors.values()) + tensor.nbytes > self._most_bytes:
            self.flush()
        self._tensors[key] = tensor
        return {"file": self._name(), "key": key, "first_row": first, "num_rows": len(tensor)}

    def flush(self) -> None:
        """Write what is waiting."""
        if self._tensors:
            with _whole(self._folder / self._name()) as temporary:
                metadata = {"generation": self._generation, "file": self._name()}
                save_file(self._tensors, temporary, metadata=metadata)
            self._tensors, self._number = {}, self._number + 1

    def _name(self) -> str:
        return f"rows-{self._generation}-{self._rank:05d}-{self._number:05d}.safetensors"


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give the name to write under; what was written is on disk as `path` at the end of a block that did not fail."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)  # a link that somebody put there is not followed
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that nobody else can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it is not there, or does no harm
            temporary.unlink()


def files_of(written: list[dict[str, Any]]) -> set[str]:
    """Return the names of the files that `write_shards` described."""
    return {piece["file"] for each in written for pieces in each["tensors"].values() for piece in pieces}


def write_index(
    folder: Path, generation: str, module: ShardedEmbeddingBag, everyone: list[list[dict[str, Any]]]
) -> None:
    """Write the index of what `write_shards` returned on every rank, by rank (local; any thread).

    Raises:
        CheckpointError: a rank's file is not there.
        OSError: the file system refuses.
    """
    for rank, written in enumerate(everyone):
        for file in files_of(written):
            if not (folder / file).exists():
                raise CheckpointError(f"{folder} has no {file} of rank {rank}; give a folder that all hosts see")
    rule = module.fused_optimizer.rule
    content = {
        "format": FORMAT,
        "version": VERSION,
        "generation": generation,
        "world_size": len(everyone),
        "optimizer": {"name": type(rule).__name__, "settings": asdict(rule), "slots": rule.slots},
        "tables": [_table_described(index, table, everyone) for index, table in enumerate(module.tables)],
    }
    with _whole(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    flush(folder)


def _is_of_another(folder: Path, generation: str) -> bool:
    """Tell whether the index is known not to be that of `generation`; a rename that fails may have been, over NFS."""
    try:
        return bool(json.loads((folder / INDEX).read_bytes())["generation"] != generation)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _table_described(index: int, table: EmbeddingTable, everyone: list[list[_Described]]) -> _Described:
    return {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "pooling": table.pooling,
        "features": table.features,
        "shards": [each for written in everyone for each in written if each["table"] == index],
    }


def _remove(folder: Path, which: Callable[[str], bool]) -> None:
    """Remove files of the generations that `which` wants; those that cannot be removed stay."""
    if not folder.is_dir():
        return
    try:
        for path in folder.iterdir():
            if (found := OURS.fullmatch(path.name)) and which(found[1]):
                path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("files that are not needed stay in %s: %s", folder, error)


def _trying(folder: Path, task: Callable[[], Any]) -> tuple[str | None, Any]:
    """Return what went wrong in `task`, or None, and what it returned."""
    try:
        return None, task()
    except CheckpointError as error:
        return str(error), None
    except (OSError, SafetensorError) as error:
        return f"{folder} cannot be used ({error}); give a folder whose parent exists, with room and access", None
