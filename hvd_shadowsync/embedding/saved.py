"""A checkpoint of sharded embeddings as it lies on disk: its index, and its files as far as they are needed."""

from __future__ import annotations

import itertools
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hvd_shadowsync.embedding.holding import (
    BLOCK_ROWS,
    WEIGHT,
    Group,
    Holding,
    Sharded,
    compact,
    holdings,
    put,
    reset_state,
    shared_rows,
)
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.embedding.placement import Plan, RowHash, RowRange
from hvd_shadowsync.embedding.shards import ROW_DTYPES
from hvd_shadowsync.embedding.tables import EmbeddingTable
from hvd_shadowsync.errors import CheckpointError

INDEX = "index.json"
FORMAT, VERSION = "hvd_shadowsync.embedding", 1
SAFETENSORS_DTYPES = dict(zip(ROW_DTYPES, ("F32", "F64"), strict=True))
MOST = (1 << 63) - 1
OURS = re.compile(r"\.?rows-([0-9a-f]{12})-\d+-\d+\.safetensors(\.tmp)?")


class SavedPiece(NamedTuple):
    """Consecutive rows of a shard, in one tensor of a file."""

    file: str
    key: str
    first_row: int
    num_rows: int


class SavedShard(NamedTuple):
    """What one rank had of a table; `steps` is None where that has no optimizer state."""

    rows: RowRange | RowHash
    columns: tuple[int, int]
    steps: int | None
    dtype: torch.dtype
    tensors: dict[str, list[SavedPiece]]


class SavedTable(NamedTuple):
    """What the index says of a table."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    shards: list[SavedShard]


class Saved:
    """One checkpoint.

    Raises:
        CheckpointError: its index is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        content = _read_index(folder / INDEX)
        try:
            self.generation = _text(content, "generation")
            self._optimizer = _text(content["optimizer"], "name")
            self._per_weight = {**_slots_of(content["optimizer"]["slots"]), WEIGHT: True}
            tables = [_table_of(each, self._per_weight) for each in content["tables"]]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{folder / INDEX} is damaged ({what}); use another checkpoint") from error
        self._tables = {table.name: table for table in tables}

    def table(self, name: str) -> SavedTable:
        """Return a table by name."""
        if name not in self._tables:
            raise CheckpointError(f"{self._folder} has no table {name!r}; it has {', '.join(self._tables)}")
        return self._tables[name]

    def examined(self, module: Sharded, group: Group) -> Saved:
        """Return this reader if it has all that `module` needs."""
        self.require_sizes(module.tables)
        if unknown := self._tables.keys() - {each.name for each in module.tables}:
            raise CheckpointError(f"{self._folder} has table {min(unknown)!r}, which is none here; make it as well")
        for table, holding, slots in self._wanted(module.tables, group.shards.rule, holdings(module, group)):
            for slot in slots:
                self.examine(table, holding, slot)
        return self

    def require_sizes(self, tables: Sequence[EmbeddingTable]) -> None:
        """Raise unless these tables are there, in these sizes."""
        for each in tables:
            found, wanted = self.table(each.name).shape, (each.num_embeddings, each.embedding_dim)
            if found != wanted:
                raise CheckpointError(
                    f"table {each.name!r} is {wanted}, {found} in {self._folder}; make it of that size"
                )

    def fill_all(self, module: Sharded, group: Group) -> None:
        """Read all that this rank holds."""
        self.fill_some(module.tables, group.shards.rule, holdings(module, group))

    def fill_some(self, tables: Sequence[EmbeddingTable], rule: SparseOptimizer, some: Sequence[Holding]) -> None:
        """Read what is in `some`, parts of `tables` with state as of `rule`."""
        for table, holding, slots in self._wanted(tables, rule, some):
            for slot in slots:
                self.fill(table, holding, slot)
            if not self._fits(table, rule):
                reset_state(holding, rule)
            elif holding.steps is not None:
                holding.steps.fill_(max(shard.steps or 0 for shard in table.shards))

    def without_state(self, plan: Plan, rule: SparseOptimizer) -> list[str]:
        """Return the names of the tables of `plan` that need state of `rule` which is not there."""
        divided = {shard.table for shard in plan.shards}
        names = [plan.tables[index].name for index in sorted(divided) if rule.slots]
        return [name for name in names if not self._fits(self.table(name), rule)]

    def examine(self, table: SavedTable, holding: Holding, slot: str) -> None:
        """Look at the heads of the files that `fill` reads."""
        for shard, piece in _needed(table, holding, slot):
            self._tensor(shard, piece, slot)

    def examine_weights(self, table: SavedTable) -> None:
        """Look at the heads of the files that `rows` reads."""
        for shard in table.shards:
            for piece in shard.tensors[WEIGHT]:
                self._tensor(shard, piece, WEIGHT)

    def fill(self, table: SavedTable, holding: Holding, slot: str) -> None:
        """Read one slot of `holding`, block by block."""
        if holding.slots[slot].dim() == 1:
            holding.slots[slot].zero_()
        for shard, piece in _needed(table, holding, slot):
            tensor, end = self._tensor(shard, piece, slot), piece.first_row + piece.num_rows
            for first in range(piece.first_row, end, BLOCK_ROWS):
                theirs, ours = shared_rows(shard.rows, first, min(first + BLOCK_ROWS, end), holding.shard.rows)
                if len(theirs):
                    low, high = int(theirs[0]), int(theirs[-1]) + 1
                    values = tensor[low - piece.first_row : high - piece.first_row]
                    put(holding, slot, ours, values[compact(theirs - low)], shard.columns)

    def rows(self, table: SavedTable, first: int, last: int) -> Tensor:
        """Return the weights of rows [first, last)."""
        out = torch.empty(last - first, table.shape[1], dtype=table.dtype)
        for shard in table.shards:
            ids, places = shard.rows.within(first, last)
            for piece in shard.tensors[WEIGHT]:
                within = places - piece.first_row
                here = (within >= 0) & (within < piece.num_rows)
                if here.any():
                    self._tensor(shard, piece, WEIGHT)
                    tensor = self._files[piece.file].get_tensor(piece.key)  # mapped: what is not indexed is not read
                    out[compact(ids[here] - first), slice(*shard.columns)] = tensor[compact(within[here])]
        return out

    def _wanted(
        self, tables: Sequence[EmbeddingTable], rule: SparseOptimizer, some: Sequence[Holding]
    ) -> Iterator[tuple[SavedTable, Holding, list[str]]]:
        for holding in some:
            table = self.table(tables[holding.shard.table].name)
            yield table, holding, list(holding.slots) if self._fits(table, rule) else [WEIGHT]

    def _fits(self, table: SavedTable, rule: SparseOptimizer) -> bool:
        """Tell whether the table's state is that of `rule`."""
        same = self._optimizer == type(rule).__name__ and self._per_weight == {WEIGHT: True, **rule.slots}
        return same and all(shard.steps is not None for shard in table.shards)

    def _tensor(self, shard: SavedShard, piece: SavedPiece, slot: str) -> Any:
        """Return a tensor of a file, of which nothing is read before it is sliced."""
        path = self._folder / piece.file
        try:
            if piece.file not in self._files:
                if path.exists() and not path.is_file():
                    raise OSError("it is no regular file")
                self._files[piece.file] = safe_open(path, framework="pt")
            metadata = self._files[piece.file].metadata() or {}
            tensor = self._files[piece.file].get_slice(piece.key)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} is missing; give the whole folder, on a file system that all hosts see"
            ) from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); is it whole?") from error
        width = [shard.columns[1] - shard.columns[0]] if self._per_weight[slot] else []
        same = metadata.get("generation") == self.generation and metadata.get("file") == piece.file
        shape, dtype = [piece.num_rows, *width], SAFETENSORS_DTYPES[shard.dtype]
        if not same or tensor.get_shape() != shape or tensor.get_dtype() != dtype:
            raise CheckpointError(f"{path} is not the file that was saved under this name; use another checkpoint")
        return tensor


def _needed(table: SavedTable, holding: Holding, slot: str) -> Iterator[tuple[SavedShard, SavedPiece]]:
    """Iterate over the pieces that may have rows and columns of `holding`."""
    ours, columns = holding.shard.rows, holding.shard.columns
    for shard in table.shards:
        if max(columns[0], shard.columns[0]) >= min(columns[1], shard.columns[1]):
            continue
        for piece in shard.tensors[slot]:
            if isinstance(ours, RowRange) and isinstance(shard.rows, RowRange):
                start = shard.rows.start + piece.first_row
                if max(start, ours.start) >= min(start + piece.num_rows, ours.stop):
                    continue
            yield shard, piece


def _read_index(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no checkpoint {path}; check the folder, on every host") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); is it whole?") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{path} is no index of {FORMAT}, version {VERSION}; save with embedding.files.save")
    return content


def _text(entry: dict[str, Any], name: str) -> str:
    if not isinstance(value := entry[name], str):
        raise ValueError(f"{name}={reprlib.repr(value)} is no text")
    return value


def _count(entry: dict[str, Any], name: str, *, least: int = 0) -> int:
    value = entry[name]
    if type(value) is not int or not least <= value <= MOST:  # neither True nor 3.0, which are equal to a count
        raise ValueError(f"{name}={reprlib.repr(value)} is no count")
    return value


def _slots_of(slots: dict[str, Any]) -> dict[str, bool]:
    for name, per_weight in slots.items():
        if not isinstance(per_weight, bool):
            raise ValueError(f"slot {name!r} is {reprlib.repr(per_weight)}, neither true nor false")
    return slots


def _dtype_of(entry: dict[str, Any], table: str) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in ROW_DTYPES}
    if (name := _text(entry, "dtype")) not in known:
        raise ValueError(f"{table!r} is of torch.{name}")
    return known[name]


def _table_of(entry: dict[str, Any], slots: Mapping[str, bool]) -> SavedTable:
    name = _text(entry, "name")
    rows, dim = _count(entry, "num_embeddings", least=1), _count(entry, "embedding_dim", least=1)
    shards = [_saved_of(each, slots, name) for each in entry["shards"]]
    if not _are_whole(shards, rows, dim):
        raise ValueError(f"shards of {name!r} are not the whole table, or overlap")
    return SavedTable(name, (rows, dim), shards[0].dtype, shards)


def _are_whole(shards: Sequence[SavedShard], rows: int, dim: int) -> bool:
    """Tell whether shards have each row and column of a table once."""
    by_columns: dict[tuple[int, int], list[RowRange | RowHash]] = {}
    for shard in shards:
        by_columns.setdefault(shard.columns, []).append(shard.rows)
    ends = [0, *(stop for _, stop in sorted(by_columns))]
    if [*(start for start, _ in sorted(by_columns)), dim] != ends:
        return False
    return all(_are_all_rows(parts, rows) for parts in by_columns.values())


def _are_all_rows(parts: Sequence[RowRange | RowHash], rows: int) -> bool:
    ranges = sorted((part.start, part.stop) for part in parts if isinstance(part, RowRange))
    if len(ranges) == len(parts):
        return [*(start for start, _ in ranges), rows] == [0, *(stop for _, stop in ranges)]
    hashes = sorted((part.num_embeddings, part.parts, part.part) for part in parts if isinstance(part, RowHash))
    return hashes == [(rows, len(parts), number) for number in range(len(parts))]


def _saved_of(entry: dict[str, Any], slots: Mapping[str, bool], table: str) -> SavedShard:
    rows = _rows_of(entry["rows"])
    start, stop = (_count({"columns": each}, "columns") for each in entry["columns"])
    steps = None if entry["steps"] is None else _count(entry, "steps")
    saved = SavedShard(rows, (start, stop), steps, _dtype_of(entry, table), {})
    for slot in slots if saved.steps is not None else [WEIGHT]:
        pieces = saved.tensors[slot] = [_piece_of(each) for each in entry["tensors"][slot]]
        ends = [0, *itertools.accumulate(piece.num_rows for piece in pieces)]
        if [*(piece.first_row for piece in pieces), rows.num_rows] != ends:
            raise ValueError(f"rows of {slot!r} are missing")
        if foreign := [piece.file for piece in pieces if not OURS.fullmatch(piece.file)]:
            raise ValueError(f"{foreign[0]!r} is no file of a checkpoint")
    return saved


def _rows_of(entry: dict[str, Any]) -> RowRange | RowHash:
    if "parts" not in entry:
        return RowRange(_count(entry, "start"), _count(entry, "stop"))
    return RowHash(_count(entry, "num_embeddings", least=1), _count(entry, "part"), _count(entry, "parts", least=1))


def _piece_of(entry: dict[str, Any]) -> SavedPiece:
    return SavedPiece(_text(entry, "file"), _text(entry, "key"), _count(entry, "first_row"), _count(entry, "num_rows"))
