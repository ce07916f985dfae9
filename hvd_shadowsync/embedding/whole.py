"""Whole tables of sharded embeddings: put together block by block on one rank or all, and taken apart again."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from hvd_shadowsync.checks import check_count, check_flag
from hvd_shadowsync.comm.base import Request
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.embedding.holding import (
    BLOCK_ROWS,
    WEIGHT,
    Group,
    Holding,
    Sharded,
    compact,
    everything,
    holdings,
    put,
    reset_state,
    shared_rows,
)
from hvd_shadowsync.embedding.lost import cut_short
from hvd_shadowsync.embedding.meeting import NAMES, SERVING, Call
from hvd_shadowsync.embedding.placement import Plan, RowRange, Shard
from hvd_shadowsync.embedding.tables import EmbeddingTable
from hvd_shadowsync.errors import CheckpointError, EmbeddingError, RankLostError

logger = logging.getLogger(__name__)

STEPS = "steps"
BLOCK_BYTES = 1 << 28
WHOLE_TAG = 2
POLLER = Poller(spin_s=0.002)


class Block(NamedTuple):
    """Consecutive rows of one table.

    Attributes:
        table: its name.
        slot: "weight", a slot of the optimizer ("sum", "exp_avg", ...), or "steps".
        first_row: id of the first row; 0 for "steps".
        values: "weight", and slots with a value per weight: [rows, embedding_dim]. Slots with a value per row:
            [rows, parts], one column for each part that the table's columns are divided into (one where they are not).
            "steps": [1] int64, updates of the table so far.
    """

    table: str
    slot: str
    first_row: int
    values: Tensor


def global_state_dict(
    module: Sharded, *, block_rows: int = BLOCK_ROWS, state: bool = True, root: int | None = None
) -> Iterator[Block]:
    """Iterate over whole tables, put together in blocks of rows (collective; training thread).

    Tables come one after the other, in the order of `module.tables`: the weights, then each slot of the optimizer,
    then "steps"; the blocks of each in the order of rows. All ranks iterate to the end, side by side; with `root` only
    that rank is given blocks, and the others' iterators yield nothing but have to be exhausted all the same:
    `for block in ...: pass`. Of replicated tables there are the weights of rank 0, and no state.

    Args:
        module: the tables.
        block_rows: at most so many rows a block (wide rows: fewer, 256 MiB a block); default 65536. A rank needs memory
            for two blocks.
        state: the optimizer's state as well; default True.
        root: the rank that is given the blocks; default None: all.

    Yields:
        Blocks whose `values` are copies, in host memory.

    Raises:
        TypeError, ValueError: an argument is not what it should be; raised at once.
        EmbeddingError: ranks make different calls, or one of them left off iterating; raised on all that iterate.
        ShadowSyncError: `module` is closed.
    """
    check_count("block_rows", block_rows, least=1)
    check_flag("state", state)
    if root is not None:
        check_count("root", root, least=0)
        if root >= module.group.comm.size:
            raise ValueError(
                f"root={root} is no rank of {module.group.comm.size}; give one below that, or None for all"
            )
    return _stream(module, block_rows, state, root)


def load_global_state_dict(module: Sharded, blocks: Iterable[Block] | Mapping[str, Tensor]) -> None:
    """Give `module` the rows of whole tables, of which every rank takes its own (collective; training thread).

    State of another column division becomes the mean over the old parts that a shard's columns overlap, by their
    share: bit by bit what it was where the division is the same. A table whose blocks lack a slot of the optimizer,
    or "steps", begins with initial state; slots that the optimizer does not have are passed over.

    Args:
        module: takes the rows.
        blocks: the same on every rank. Either blocks as of `global_state_dict` (tables in any order; those of one slot
            of a table in the order of rows, without gaps), or whole weights [rows, dim] by table name, such as
            `{name: bag.weight}`. float32 and float64 are converted.

    Raises:
        CheckpointError: a table is unknown, missing or incomplete, or values have the wrong shape; raised on every
            rank. A mapping has changed nothing then; blocks before the wrong one have: load again.
        EmbeddingError: ranks make different calls.
        ShadowSyncError: `module` is closed.
    """
    group = enter(module, "load_global_state_dict()")
    failure = None
    loading = _Loading(module, group)
    stream: Iterable[Block] = ()
    try:
        stream = loading.blocks_of(blocks) if isinstance(blocks, Mapping) else blocks
    except CheckpointError as error:
        failure = str(error)
    agree(module, group, "load_global_state_dict(): checked", failure)
    try:
        for block in stream:
            loading.take(block)
        loading.finish()
    except Exception as error:  # of the caller's iterator: the other ranks wait for this one
        failure = str(error) if isinstance(error, CheckpointError) else f"blocks ended in {error!r}"
    group.shards.was_set = True
    agree(module, group, "load_global_state_dict(): loaded", failure)
    leave(module, group)


# --- meeting ----------------------------------------------------------------------------------------------------------


def enter(module: Sharded, call: str) -> Group:
    """Begin `call` together with all ranks, after whatever they still do in the background (collective).

    Return those that are in it; once one of them is lost, it comes to nothing.
    """

    def begin() -> tuple[Group, dict[int, Call]]:
        module.wait()  # which may bring another group
        group = module.group
        return group, _meet(module, group, call)

    module._require_open(call)
    group, serving = module.together(begin)
    while serving:
        if Call.CLOSE in serving.values():
            _raise_left(call, serving)
        module.join()
        group, serving = module.together(begin)
    return group


def agree(module: Sharded, group: Group, call: str, failure: str | None, value: Any = None) -> list[Any]:
    """Return every rank's `value`, or raise `CheckpointError` on every rank with the first failure (collective)."""
    _require_all(module, group, call)
    with cut_short(group.comm):
        everyone = group.comm.allgather_object((failure, value))
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            raise CheckpointError(f"rank {rank}: {message}" if len(everyone) > 1 else message)
    return [each for _, each in everyone]


def leave(module: Sharded, group: Group) -> None:
    """End a call on all ranks: what was cut short on one of them is so on all (collective)."""
    with cut_short(group.comm):
        if not module.all_are_through(group):
            raise RankLostError("lost in the last meeting, on another rank")


def _require_all(module: Sharded, group: Group, call: str) -> None:
    with cut_short(group.comm):
        serving = _meet(module, group, call)
    if serving:
        _raise_left(call, serving)


def _raise_left(call: str, serving: dict[int, Call]) -> NoReturn:
    rank, theirs = next(iter(serving.items()))
    raise EmbeddingError(
        f"rank {rank} is in {NAMES[theirs]} while this rank is in {call}; make the call on every rank, "
        "and iterate to its end where it gives blocks"
    )


def _meet(module: Sharded, group: Group, call: str) -> dict[int, Call]:
    """Return the ranks that do nothing of their own but serve the others; they do not take part in `call`."""
    module.wait()
    words = group.meetings.meet(Call.GLOBAL, about=zlib.crc32(call.encode()), what=call)
    group.meetings.raise_failure(words)
    return {rank: Call(word.call) for rank, word in enumerate(words) if word.call in SERVING}


# --- putting together -------------------------------------------------------------------------------------------------


def _stream(module: Sharded, block_rows: int, state: bool, root: int | None) -> Iterator[Block]:
    call = f"global_state_dict(block_rows={block_rows}, state={state}, root={root})"
    group = enter(module, call)
    receivers = range(group.comm.size) if root is None else (root,)
    for index, table in enumerate(module.tables):
        gathering = _Gathering(module, group, index, receivers)
        slots = gathering.slots if state else [WEIGHT]
        rows = min(block_rows, max(1, BLOCK_BYTES // (8 * table.embedding_dim)))
        for slot in slots:
            for first in range(0, table.num_embeddings, rows) if slot != STEPS else [0]:
                _require_all(module, group, call)
                last = min(first + rows, table.num_embeddings)
                with cut_short(group.comm):
                    values = gathering.steps() if slot == STEPS else gathering.rows(slot, first, last)
                if values is not None:
                    yield Block(table.name, slot, first, values)
    leave(module, group)


class _Gathering:
    """Sends parts of one table from their owners to `receivers`."""

    def __init__(self, module: Sharded, group: Group, index: int, receivers: Sequence[int]) -> None:
        self._comm, self._receivers, self._table = group.comm, receivers, module.tables[index]
        self._mine = {holding.shard: holding for holding in holdings(module, group)}
        self._parts = _parts(group.plan, index)
        self._columns = sorted({part.columns for part in self._parts})
        self._per_weight = {WEIGHT: True, **group.shards.rule.slots}
        replicated = index in group.plan.replicated
        self._dtype = getattr(module.replicated, self._table.name).dtype if replicated else module._dtype
        self.slots = [WEIGHT] if replicated else [*self._per_weight, STEPS]

    def rows(self, slot: str, first: int, last: int) -> Tensor | None:
        """Return rows [first, last) of `slot`, where this rank is a receiver (collective)."""
        per_weight = self._per_weight[slot]
        requests: list[Request] = []
        arriving = []
        for part in self._parts:
            ids, places = part.rows.within(first, last)
            if not len(ids):
                continue
            shape = (len(ids), part.dim) if per_weight else (len(ids),)
            ours = self._mine[part].slots[slot][compact(places)] if part in self._mine else None
            values = self._move(part.rank, ours, shape, self._dtype, requests)
            place = self._columns.index(part.columns)
            arriving.append((ids - first, part.columns if per_weight else (place, place + 1), values))
        POLLER.wait(requests)
        if self._comm.rank not in self._receivers:
            return None
        width = self._table.embedding_dim if per_weight else len(self._columns)
        out = torch.empty(last - first, width, dtype=self._dtype)
        for rows, (start, stop), values in arriving:
            out[compact(rows), start:stop] = values.view(len(rows), -1)
        return out

    def steps(self) -> Tensor | None:
        """Return the updates of the table, where this rank is a receiver (collective)."""
        requests: list[Request] = []
        owner = self._parts[0]
        ours = self._mine[owner].steps if owner in self._mine else None
        values = self._move(owner.rank, ours, (1,), torch.int64, requests)
        POLLER.wait(requests)
        return values.clone() if self._comm.rank in self._receivers else None

    def _move(
        self, owner: int, ours: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, requests: list[Request]
    ) -> Tensor:
        """Begin to move a tensor from its owner, who has it in `ours`, to the receivers; return it as it will be."""
        values = torch.empty(0, dtype=dtype)
        if ours is not None:
            values = ours.cpu().contiguous()
            requests += [self._comm.isend(values, r, WHOLE_TAG) for r in self._receivers if r != owner]
        elif self._comm.rank in self._receivers:
            values = torch.empty(shape, dtype=dtype)
            requests.append(self._comm.irecv(values, owner, WHOLE_TAG))
        return values


def _parts(plan: Plan, index: int) -> list[Shard]:
    """Return the shards of a table; a replicated one has the whole of it on rank 0."""
    if index in plan.replicated:
        return [everything(plan.tables[index], index, 0)]
    return [shard for shard in plan.shards if shard.table == index]


# --- taking apart -----------------------------------------------------------------------------------------------------


class _Loading:
    """Takes blocks of whole tables into what this rank holds; every rank sees the same blocks and finds the same."""

    def __init__(self, module: Sharded, group: Group) -> None:
        self._rule, self._rank = group.shards.rule, group.comm.rank
        self._tables = {table.name: table for table in module.tables}
        self._holdings: dict[str, list[Holding]] = {name: [] for name in self._tables}
        for holding in holdings(module, group):
            self._holdings[module.tables[holding.shard.table].name].append(holding)
        self._stateful = {shard.table for shard in group.plan.shards}
        self._taken: dict[tuple[str, str], int] = {}
        self._names = [table.name for table in module.tables]

    def blocks_of(self, weights: Mapping[str, Tensor]) -> Iterator[Block]:
        """Return the blocks of whole weights by table name, all of which fit."""
        for name, weight in weights.items():
            table = self._table(name)
            if not isinstance(weight, Tensor) or tuple(weight.shape) != (table.num_embeddings, table.embedding_dim):
                has = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                wanted = (table.num_embeddings, table.embedding_dim)
                raise CheckpointError(f"blocks[{name!r}] is {has}, the table is {wanted}; give its whole weight")
        if missing := [name for name in self._names if name not in weights]:
            raise CheckpointError(f"blocks lacks table {missing[0]!r}; give the weights of every table")
        return (
            Block(name, WEIGHT, first, weight.detach()[first : first + BLOCK_ROWS])
            for name, weight in weights.items()
            for first in range(0, len(weight), BLOCK_ROWS)
        )

    def take(self, block: Block) -> None:
        """Write the rows of `block` that are here."""
        table = self._table(block.table)
        if block.slot == STEPS:
            self._taken[block.table, STEPS] = 1
            for holding in self._holdings[block.table]:
                if holding.steps is not None:
                    holding.steps.fill_(int(block.values.max()))
        elif block.slot != WEIGHT and block.slot not in self._rule.slots:
            self._taken[block.table, block.slot] = 0
        else:
            self._check(table, block)
            for holding in self._holdings[block.table]:
                if block.slot in holding.slots:
                    self._put(holding, table, block)

    def _put(self, holding: Holding, table: EmbeddingTable, block: Block) -> None:
        rows, dim = RowRange(0, table.num_embeddings), table.embedding_dim
        last = block.first_row + len(block.values)
        ids, places = shared_rows(rows, block.first_row, last, holding.shard.rows)
        values = block.values.detach()[compact(ids - block.first_row)]
        if holding.slots[block.slot].dim() == 2:
            put(holding, block.slot, places, values, (0, dim))
            return
        if block.first_row == 0:
            holding.slots[block.slot].zero_()
        parts = values.shape[1]
        for part in range(parts):
            put(holding, block.slot, places, values[:, part], (dim * part // parts, dim * (part + 1) // parts))

    def _check(self, table: EmbeddingTable, block: Block) -> None:
        what, dim = f"the block of {block.slot!r} of table {table.name!r} at row {block.first_row}", table.embedding_dim
        per_row = not self._rule.slots.get(block.slot, True)
        width = f"{dim}" if not per_row else f"1 to {dim}"
        if not isinstance(block.values, Tensor) or not block.values.is_floating_point() or block.values.dim() != 2:
            raise CheckpointError(f"{what} is no float tensor [rows, {width}]; give one")
        columns = block.values.shape[1]
        if not (1 <= columns <= dim if per_row else columns == dim):
            remedy = "give the table's own" if block.slot == WEIGHT else "leave the state out: it begins anew then"
            raise CheckpointError(f"{what} has {columns} columns instead of {width}; {remedy}")
        expected = self._taken.get((table.name, block.slot), 0)
        if block.first_row != expected:
            raise CheckpointError(f"{what} comes where row {expected} is due; give blocks in order, without gaps")
        if (last := block.first_row + len(block.values)) > table.num_embeddings:
            raise CheckpointError(f"{what} ends at row {last} of {table.num_embeddings}; give a table of that size")
        self._taken[table.name, block.slot] = last

    def finish(self) -> None:
        """Raise unless all tables are complete; let state begin anew of which there is none."""
        for index, (name, table) in enumerate(self._tables.items()):
            for slot in (WEIGHT, *self._rule.slots):
                taken = self._taken.get((name, slot), 0)
                if taken < table.num_embeddings and (taken or slot == WEIGHT):
                    raise CheckpointError(
                        f"blocks have {taken} of {table.num_embeddings} rows of {slot!r} of table {name!r}; give all"
                    )
            missing = [slot for slot in (*self._rule.slots, STEPS) if (name, slot) not in self._taken]
            if not missing or index not in self._stateful:
                continue
            for holding in self._holdings[name]:
                reset_state(holding, self._rule)
            if self._rank == 0 and any(key[0] == name and key[1] != WEIGHT for key in self._taken):
                logger.warning("table %r begins with new state: blocks have no %r of it", name, missing[0])

    def _table(self, name: str) -> EmbeddingTable:
        if name not in self._tables:
            raise CheckpointError(f"blocks have table {name!r}, which is none; known are {', '.join(self._names)}")
        return self._tables[name]
