"""Which features need which shards: the pieces that a batch is taken apart into, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvd_shadowsync.embedding.inputs import features_of
from hvd_shadowsync.embedding.kernels.base import Division
from hvd_shadowsync.embedding.placement import Plan, RowHash, Shard


class Piece(NamedTuple):
    """What one feature needs of one shard.

    Attributes:
        feature: index of the feature.
        shard: index of the shard among those of its owner.
        part: which part of the table's rows the shard has.
        column: where its vectors begin in the output.
        dim: their length.
        add: whether the vectors are parts of a sum, of a table that is divided by rows.
    """

    feature: int
    shard: int
    part: int
    column: int
    dim: int
    add: bool


class Layout:
    """The pieces of a plan.

    Attributes:
        columns: (start, stop) in the output of each feature, in order.
        pieces: by owner, in the order of its shards.
        divisions: of each feature whose table is divided by rows; None for others.
        local: indices of the features whose tables are replicated.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.features = features_of(plan.tables)
        dims = [feature.table.embedding_dim for feature in self.features]
        ends = [sum(dims[: i + 1]) for i in range(len(dims))]
        self.columns = [(end - dim, end) for end, dim in zip(ends, dims, strict=True)]
        self.width = ends[-1]
        by_table: dict[int, list[Shard]] = {index: [] for index in range(len(plan.tables))}
        for shard in plan.shards:
            by_table[shard.table].append(shard)
        self.divisions = [self._division(by_table[plan.tables.index(f.table)]) for f in self.features]
        self.local = [i for i, f in enumerate(self.features) if plan.tables.index(f.table) in plan.replicated]
        self.pieces = [self._pieces(plan.of_rank(rank), by_table) for rank in range(plan.world_size)]

    def _pieces(self, owned: Sequence[Shard], by_table: dict[int, list[Shard]]) -> list[Piece]:
        found = []
        for number, shard in enumerate(owned):
            same_columns = [each for each in by_table[shard.table] if each.columns == shard.columns]
            part = same_columns.index(shard)
            for index, feature in enumerate(self.features):
                if feature.table is self.plan.tables[shard.table]:
                    column = self.columns[index][0] + shard.columns[0]
                    found.append(Piece(index, number, part, column, shard.dim, len(same_columns) > 1))
        return found

    @staticmethod
    def _division(shards: list[Shard]) -> Division | None:
        parts = [shard for shard in shards if shard.columns == shards[0].columns]
        rows = parts[0].rows if parts else None
        if rows is None or (len(parts) == 1 and not isinstance(rows, RowHash)):
            return None
        total = rows.num_embeddings if isinstance(rows, RowHash) else sum(each.rows.num_rows for each in parts)
        return Division(total, len(parts), rows.multiplier if isinstance(rows, RowHash) else None)
