"""Where each table lies: which rank holds which rows and columns of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from hvd_shadowsync.checks import check_count, choice
from hvd_shadowsync.embedding.tables import EmbeddingTable, check_tables

TABLE_WISE = "table-wise"
ROW_WISE = "row-wise"
ROW_HASHED = "row-wise hashed"
COLUMN_WISE = "column-wise"
REPLICATED = "replicated"
STRATEGIES = (TABLE_WISE, ROW_WISE, ROW_HASHED, COLUMN_WISE, REPLICATED)
ROW_LIMIT = 2**31 - 1
"""Rows of a part: they are numbered by int32."""
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Placement:
    """How one table is divided, and over which ranks.

    Attributes:
        strategy: "table-wise" (all of it on one rank), "row-wise" (contiguous blocks of rows), "row-wise hashed" (rows
            dealt out by a hash of their id, so that runs of popular ids spread), "column-wise" (blocks of columns) or
            "replicated" (on every rank, an ordinary parameter that the dense wrapper keeps together).
        ranks: those that hold a part, in the order of the parts; empty for "replicated".
    """

    strategy: str
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        choice("strategy", self.strategy, STRATEGIES)
        for rank in self.ranks:
            check_count("ranks", rank, least=0)
        object.__setattr__(self, "ranks", tuple(self.ranks))


@dataclass(frozen=True)
class RowRange:
    """The rows [start, stop) of a table; row i of the part is row start + i of the table."""

    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return self.stop - self.start

    def within(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return which of the table's rows [first, last) are in the part, and where: (ids, rows of the part), int64."""
        start = max(first, self.start)
        ids = torch.arange(start, max(start, min(last, self.stop)))
        return ids, ids - self.start


@dataclass(frozen=True)
class RowHash:
    """The rows whose hash falls to one of `parts` parts: hash = id * multiplier mod num_rows, part = hash mod parts.

    The multiplier has no divisor in common with the number of rows, so the hash is a permutation: parts differ by at
    most one row, and row hash // parts of a part is where the row lies.
    """

    num_embeddings: int
    part: int
    parts: int

    @property
    def multiplier(self) -> int:
        """The multiplier of the hash."""
        return hash_multiplier(self.num_embeddings)

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return (self.num_embeddings - self.part + self.parts - 1) // self.parts

    def within(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return which of the table's rows [first, last) are in the part, and where: (ids, rows of the part), int64."""
        ids = torch.arange(first, last)
        hashes = ids * self.multiplier % self.num_embeddings
        mine = hashes % self.parts == self.part
        return ids[mine], hashes[mine] // self.parts


def hash_multiplier(num_embeddings: int) -> int:
    """Return a multiplier near the golden section of `num_embeddings`, without a common divisor; products fit int64."""
    candidate = max(int(num_embeddings * GOLDEN), 1)
    while math.gcd(candidate, num_embeddings) != 1:
        candidate += 1
    return candidate


Extent = tuple[int, RowRange | RowHash, tuple[int, int]]
"""Index of a table, rows, columns."""


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one table.

    Attributes:
        table: index of the table.
        rank: the owner.
        rows: which rows of the table.
        columns: (start, stop) of its columns.
    """

    table: int
    rank: int
    rows: RowRange | RowHash
    columns: tuple[int, int]

    @property
    def dim(self) -> int:
        """Columns of the shard."""
        return self.columns[1] - self.columns[0]

    @property
    def extent(self) -> Extent:
        """What it is of which table, whoever holds it."""
        return self.table, self.rows, self.columns

    @property
    def numel(self) -> int:
        """Weights of the shard."""
        return self.rows.num_rows * self.dim


@dataclass(frozen=True)
class Plan:
    """Where all tables lie, in a world of `world_size` ranks; the same on every rank.

    Attributes:
        tables: the tables.
        world_size: ranks.
        placements: one for each table.
        costs: what the planner reckoned for each table, for the printed form; empty where it was not asked.
        inherited: whether a rank may hold several parts of a table, as it took over those of ranks that were lost.

    Raises:
        ValueError: a placement does not fit its table or the world; names the table and the remedy.
    """

    tables: tuple[EmbeddingTable, ...]
    world_size: int
    placements: tuple[Placement, ...]
    costs: tuple[float, ...] = field(default=(), compare=False)
    inherited: bool = False

    def __post_init__(self) -> None:
        check_count("world_size", self.world_size, least=1)
        object.__setattr__(self, "tables", check_tables(self.tables))
        if len(self.placements) != len(self.tables):
            raise ValueError(f"placements has {len(self.placements)} entries for {len(self.tables)} tables")
        for table, placement in zip(self.tables, self.placements, strict=True):
            check_placement(table, placement, self.world_size, inherited=self.inherited)

    @classmethod
    def of(cls, tables: Sequence[EmbeddingTable], world_size: int, placements: Mapping[str, Placement | str]) -> Plan:
        """Return a plan from placements by table name; a strategy alone stands for all ranks.

        A table that is placed "table-wise" without a rank is dealt out by its place among the tables.

        Raises:
            ValueError: a table has no placement, or a placement has no table.
        """
        tables = check_tables(tables)
        names = [table.name for table in tables]
        if unknown := sorted(set(placements) - set(names)):
            raise ValueError(f"placements has {unknown[0]!r}, which is no table; known are {', '.join(names)}")
        if missing := sorted(set(names) - set(placements)):
            raise ValueError(f"placements lacks table {missing[0]!r}; give one for every table")
        return cls(
            tables,
            world_size,
            tuple(_placement(placements[name], index, tables[index], world_size) for index, name in enumerate(names)),
        )

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, by table, then by part; the same order on every rank."""
        return tuple(
            shard
            for index, (table, placement) in enumerate(zip(self.tables, self.placements, strict=True))
            for shard in _divide(index, table, placement)
        )

    def of_rank(self, rank: int) -> tuple[Shard, ...]:
        """Return the shards that `rank` holds, in the order of `shards`."""
        return tuple(shard for shard in self.shards if shard.rank == rank)

    def handed_on(self, ranks: Sequence[int | None], heirs: Mapping[Extent, int] = MappingProxyType({})) -> Plan:
        """Return where the same parts lie once some ranks are lost.

        Args:
            ranks: by rank of this plan, what its number is from now on; None where it is lost.
            heirs: of parts that were a lost rank's, their new rank; others go, in order, to whoever holds least.
        """
        world = sum(rank is not None for rank in ranks)
        holds = [0] * world
        for shard in self.shards:
            if (rank := ranks[shard.rank]) is not None:
                holds[rank] += shard.numel
        placed: list[list[int]] = [[] for _ in self.tables]
        for shard in self.shards:
            if (new := ranks[shard.rank]) is None:
                new = heirs.get(shard.extent, holds.index(min(holds)))
                holds[new] += shard.numel
            placed[shard.table].append(new)
        placements = [replace(each, ranks=tuple(ranks)) for each, ranks in zip(self.placements, placed, strict=True)]
        return Plan(self.tables, world, tuple(placements), self.costs, inherited=True)

    @property
    def replicated(self) -> tuple[int, ...]:
        """Indices of the tables that every rank holds."""
        return tuple(i for i, placement in enumerate(self.placements) if placement.strategy == REPLICATED)

    @property
    def rank_costs(self) -> tuple[float, ...]:
        """What each rank has of `costs`: the parts of a table cost the same; zeros where the planner was not asked."""
        busy = [0.0] * self.world_size
        for placement, cost in zip(self.placements, self.costs, strict=bool(self.costs)):
            for rank in placement.ranks or range(self.world_size):
                busy[rank] += cost / (len(placement.ranks) or self.world_size)
        return tuple(busy)

    def __str__(self) -> str:
        """Return a table of the tables, and a line for each rank; MB are 10^6 bytes of float32 weights."""
        costs = self.costs or (0.0,) * len(self.tables)
        lines = [("table", "rows x dim", "MB", "strategy", "ranks", "cost")] + [
            (
                table.name,
                f"{table.num_embeddings} x {table.embedding_dim}",
                _megabytes(table.numel),
                placement.strategy,
                _runs(placement.ranks) or "all",
                _percent(cost, sum(costs)),
            )
            for table, placement, cost in zip(self.tables, self.placements, costs, strict=True)
        ]
        numel = [sum(self.tables[index].numel for index in self.replicated)] * self.world_size
        for shard in self.shards:
            numel[shard.rank] += shard.numel
        ranks = [("rank", "MB", "load")] + [
            (str(rank), _megabytes(numel[rank]), _percent(cost, sum(costs)))
            for rank, cost in enumerate(self.rank_costs)
        ]
        return f"{_aligned(lines, '<>><<>')}\n\n{_aligned(ranks, '>>>')}"


def check_placement(table: EmbeddingTable, placement: Placement, world_size: int, *, inherited: bool = False) -> None:
    """Raise unless `placement` is possible for `table` in a world of `world_size` ranks."""
    if not isinstance(placement, Placement):
        raise TypeError(f"the placement of table {table.name!r} is {placement!r}; give a Placement")
    what = f"table {table.name!r} is placed {placement.strategy} on ranks {list(placement.ranks)}"
    repeated = len(set(placement.ranks)) < len(placement.ranks) and not inherited
    if any(rank >= world_size for rank in placement.ranks) or repeated:
        raise ValueError(f"{what}; ranks have to be different and below the world size, {world_size}")
    if placement.strategy == REPLICATED:
        if placement.ranks:
            raise ValueError(f"{what}; a replicated table is on every rank: leave ranks out")
        return
    rows = table.num_embeddings
    if placement.strategy in (ROW_WISE, ROW_HASHED):
        rows = -(-rows // max(len(placement.ranks), 1))
    if rows > ROW_LIMIT:
        raise ValueError(f"{what}: a part would have {rows} rows, more than {ROW_LIMIT}; divide it row-wise over more")
    most = {TABLE_WISE: 1, ROW_WISE: table.num_embeddings, ROW_HASHED: table.num_embeddings}
    limit = most.get(placement.strategy, table.embedding_dim)
    if not 1 <= len(placement.ranks) <= limit:
        raise ValueError(f"{what}; give between 1 and {limit} of them")


def _placement(given: Placement | str, index: int, table: EmbeddingTable, world_size: int) -> Placement:
    if not isinstance(given, str):
        return given
    choice(f"strategy of table {table.name!r}", given, STRATEGIES)
    if given == REPLICATED:
        return Placement(REPLICATED)
    if given == TABLE_WISE:
        return Placement(TABLE_WISE, (index % world_size,))
    parts = table.embedding_dim if given == COLUMN_WISE else table.num_embeddings
    return Placement(given, tuple(range(min(world_size, parts))))


def _divide(index: int, table: EmbeddingTable, placement: Placement) -> list[Shard]:
    rows, dim, parts = table.num_embeddings, table.embedding_dim, len(placement.ranks)
    everything = (RowRange(0, rows), (0, dim))
    divided: list[tuple[RowRange | RowHash, tuple[int, int]]]
    if placement.strategy == ROW_WISE:
        divided = [(RowRange(rows * k // parts, rows * (k + 1) // parts), (0, dim)) for k in range(parts)]
    elif placement.strategy == ROW_HASHED:
        divided = [(RowHash(rows, k, parts), (0, dim)) for k in range(parts)]
    elif placement.strategy == COLUMN_WISE:
        divided = [(RowRange(0, rows), (dim * k // parts, dim * (k + 1) // parts)) for k in range(parts)]
    else:
        divided = [everything] * parts
    return [Shard(index, rank, part, columns) for rank, (part, columns) in zip(placement.ranks, divided, strict=True)]


def _megabytes(numel: int) -> str:
    return f"{4e-6 * numel:.2f}"


def _percent(cost: float, total: float) -> str:
    return f"{100 * cost / total:.1f} %" if total else "-"


def _runs(ranks: Sequence[int]) -> str:
    """Return "0-2, 5" for the ranks 0, 1, 2, 5 in any order."""
    ends: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        ends[-1:] = [(ends[-1][0], rank)] if ends and ends[-1][1] == rank - 1 else [*ends[-1:], (rank, rank)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _aligned(lines: Sequence[tuple[str, ...]], sides: str) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )
