"""What a rank holds of the tables, for those that move whole tables: streams of blocks, and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding.meeting import Meetings
from hvd_shadowsync.embedding.optimizers import Adagrad, RowWiseAdagrad, SparseOptimizer
from hvd_shadowsync.embedding.placement import Plan, RowHash, RowRange, Shard
from hvd_shadowsync.embedding.shards import Shards
from hvd_shadowsync.embedding.tables import EmbeddingTable

T = TypeVar("T")

WEIGHT = "weight"
BLOCK_ROWS = 1 << 16


class Group(NamedTuple):
    """The ranks that are there from one loss of a rank to the next, and which of them holds what.

    Attributes:
        comm: all of them.
        plan: by their ranks in `comm`.
        shards: this rank's.
        meetings: where they say what they are about.
    """

    comm: Communicator
    plan: Plan
    shards: Shards
    meetings: Meetings


class Sharded(Protocol):
    """What is asked of a `ShardedEmbeddingBag`."""

    tables: tuple[EmbeddingTable, ...]
    replicated: nn.Module
    _dtype: torch.dtype

    @property
    def group(self) -> Group:
        """As it is now; where ranks are lost another one takes its place, perhaps in another thread."""

    def together(self, call: Callable[[], T]) -> T:
        """Do what all ranks do together; again where one is lost meanwhile."""

    def all_are_through(self, group: Group) -> bool:
        """Tell whether all ranks of `group` have come here."""

    def join(self) -> None:
        """Serve others."""

    def wait(self) -> None:
        """Wait until all that was begun is done."""

    def _require_open(self, call: str) -> None: ...


class Holding(NamedTuple):
    """What a rank has of one table.

    Attributes:
        shard: which rows and columns; a replicated table is one shard.
        slots: "weight" and the slots of the optimizer, [rows, dim] or [rows]; the live tensors.
        steps: [1] int64; None for a replicated table, whose state the dense optimizer has.
    """

    shard: Shard
    slots: dict[str, Tensor]
    steps: Tensor | None


def holdings(module: Sharded, group: Group) -> list[Holding]:
    """Return what this rank holds, replicated tables last."""
    found = of_shards(group.shards)
    for index in group.plan.replicated:
        weight = getattr(module.replicated, module.tables[index].name).detach()
        found.append(Holding(everything(module.tables[index], index, group.comm.rank), {WEIGHT: weight}, None))
    return found


def of_shards(shards: Shards) -> list[Holding]:
    """Return shards as what a rank holds."""
    return [
        Holding(shard, {WEIGHT: rows.weight, **rows.state}, rows.steps)
        for shard, rows in zip(shards.owned, map(shards.__getitem__, range(len(shards))), strict=True)
    ]


def everything(table: EmbeddingTable, index: int, rank: int) -> Shard:
    """Return the shard that is a whole table."""
    return Shard(index, rank, RowRange(0, table.num_embeddings), (0, table.embedding_dim))


def reset_state(holding: Holding, rule: SparseOptimizer) -> None:
    """Give the optimizer's state its initial value."""
    start = rule.initial_accumulator if isinstance(rule, (Adagrad, RowWiseAdagrad)) else 0.0
    for slot in rule.slots.keys() & holding.slots.keys():
        holding.slots[slot].fill_(start)
    if holding.steps is not None:
        holding.steps.zero_()


def shared_rows(theirs: RowRange | RowHash, first: int, last: int, ours: RowRange | RowHash) -> tuple[Tensor, Tensor]:
    """Return which rows [first, last) of the part `theirs` are in the part `ours` as well, and where there, int64."""
    if isinstance(theirs, RowRange):
        ids, places = ours.within(theirs.start + first, theirs.start + last)
        return ids - theirs.start, places
    rows = torch.arange(first, last)
    hashes = rows * theirs.parts + theirs.part
    if isinstance(ours, RowHash):
        mine = hashes % ours.parts == ours.part
        return rows[mine], hashes[mine] // ours.parts
    ids = hashes * pow(theirs.multiplier, -1, theirs.num_embeddings) % theirs.num_embeddings
    mine = (ids >= ours.start) & (ids < ours.stop)
    return rows[mine], ids[mine] - ours.start


def put(holding: Holding, slot: str, places: Tensor, values: Tensor, columns: tuple[int, int]) -> None:
    """Write `values` of the table's `columns`, [n, columns] or [n], into the rows `places` of `holding`.

    Values per row are weighted by their share of the shard's columns, and added up: they begin as zeros.
    """
    start, stop = holding.shard.columns
    low, high = max(start, columns[0]), min(stop, columns[1])
    if low >= high:
        return
    target, index = holding.slots[slot], compact(places)
    values = values.to(target.device, target.dtype)
    if target.dim() == 2:
        target[index, low - start : high - start] = values[:, low - columns[0] : high - columns[0]]
    elif (low, high) == (start, stop):
        target[index] = values
    else:
        target[index] += values * ((high - low) / (stop - start))


def compact(index: Tensor) -> Tensor | slice:
    """Return `index` as a slice where its rows are consecutive: then rows are moved without being looked up."""
    first, last = (int(index[0]), int(index[-1])) if len(index) else (0, -1)
    if last - first + 1 == len(index) and torch.equal(index, torch.arange(first, last + 1)):
        return slice(first, last + 1)
    return index
