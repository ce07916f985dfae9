"""What a table's traffic costs the rank that owns it, or a part of it: what is known of a table, and the model."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_shadowsync.checks import check_count, check_interval
from hvd_shadowsync.embedding.optimizers import INFINITY
from hvd_shadowsync.embedding.placement import (
    COLUMN_WISE,
    REPLICATED,
    ROW_HASHED,
    ROW_WISE,
    TABLE_WISE,
    Placement,
    Plan,
)
from hvd_shadowsync.embedding.tables import EmbeddingTable

# Measured with the compiled kernel on one core of an AMD EPYC (AVX-512; L2 1 MiB, L3 32 MiB), pooling 8 tables and
# then updating them: 1e3, 3e4 and 1e6 rows of 8 to 128 floats; 4096 bags of 1, 5 and 20 ids, even and skewed; row-wise
# Adagrad and Adam. Of these 108 times half are between 0.82 and 1.22 of the model's, 80 % between 0.68 and 1.42. 13
# tables of 1e6 x 32 took 5 to 7 ms with 1 id a bag (model: 5.1) and 62 to 91 ms with 20 (67), others using the machine.
SHARD_US = 30.0  # a part of a table, whatever its size; in a world of one, 101 tables of one id took 37 us each
ID_US = 0.005  # an id: sorted, pooled and given its gradient in the caches
ROW_US = 0.015  # a row that a step touches, out of reach of the caches but prefetched
CACHE_BYTES_PER_US = 30_000.0
MEMORY_BYTES_PER_US = 10_000.0  # one core's share of the memory bandwidth: 10 GB/s
WIRE_BYTES_PER_US = 1_250.0  # 10 Gbit/s: of a network, not measured; through the memory of one host it is far more
ID_BYTES = 4  # ids and lengths of bags on the wire


@dataclass(frozen=True)
class TableCost:
    """What is known of the traffic of one table.

    Attributes:
        pooling_factor: ids in a bag, on average over all features of the table; default 1.
        unique_fraction: distinct ids among those of one step, in [0, 1]; default 1.
        compute_us: measured microseconds that look-up and update of the whole table take for one rank's batch; default
            None: reckoned by the `CostModel`.
        batch_size: samples of the batch that `compute_us` was measured with; default None: as many as the plan is for.
    """

    pooling_factor: float = 1.0
    unique_fraction: float = 1.0
    compute_us: float | None = None
    batch_size: float | None = None

    def __post_init__(self) -> None:
        check_interval("pooling_factor", self.pooling_factor, low=0.0, high=INFINITY, high_included=False)
        check_interval("unique_fraction", self.unique_fraction, low=0.0, high=1.0)
        if self.compute_us is not None:
            check_interval("compute_us", self.compute_us, low=0.0, high=INFINITY, high_included=False)
        if self.batch_size is not None:
            check_interval("batch_size", self.batch_size, low=1.0, high=INFINITY, high_included=False)


@dataclass(frozen=True)
class CostModel:
    """What one part of a table costs the rank that holds it, per step of all ranks.

        ids     = batch_size world_size features pooling_factor,  unique = ids unique_fraction
        compute = SHARD_US + ids (ID_US + row) + unique (ROW_US + 3 row + 2 state) + 2 vectors
        wire    = (ids + bags) ID_BYTES + 2 vectors,  of which 1/world_size stays where it is

    with bytes over their bandwidth: for the row of an id that of the caches; for the rest that of memory, where each
    distinct row is read twice and written once, its state read and written. A vector is sent forth and its gradient
    back, for each bag, or for each distinct row where those are fewer. Row-wise parts have a share of the ids, but a
    vector for (nearly) every bag, which is summed up where it arrives. Column-wise parts have all ids, and a share of
    each row. A replica has the ids of its own rank, and its weights averaged.

    Attributes:
        world_size: ranks.
        batch_size: samples in a step of one rank.
        element_bytes: bytes of a weight.
        state: `SparseOptimizer.state_per_row`.
    """

    world_size: int
    batch_size: int
    element_bytes: int
    state: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_count("world_size", self.world_size, least=1)
        check_count("batch_size", self.batch_size, least=1)
        check_count("element_bytes", self.element_bytes, least=1)

    def part_us(self, table: EmbeddingTable, cost: TableCost, strategy: str, parts: int) -> float:
        """Return the microseconds that the largest of `parts` costs its owner, computing and sending."""
        compute_us = self.compute_us(table, cost, strategy, parts)
        if cost.compute_us is not None:
            steps = self.world_size * self.batch_size / (cost.batch_size or self.batch_size)
            compute_us *= cost.compute_us * steps / self.compute_us(table, cost, TABLE_WISE, 1)
        return compute_us + self.wire_bytes(table, cost, strategy, parts) / WIRE_BYTES_PER_US

    def compute_us(self, table: EmbeddingTable, cost: TableCost, strategy: str, parts: int) -> float:
        """Return the microseconds that the owner of the largest of `parts` computes, `cost.compute_us` left aside."""
        ids, _, vectors, row = self._traffic(table, cost, strategy, parts)
        row_us = row / MEMORY_BYTES_PER_US
        state_us = (self.state[0] * row + self.state[1] * self.element_bytes) / MEMORY_BYTES_PER_US
        touched = ids * cost.unique_fraction * (ROW_US + 3 * row_us + 2 * state_us)
        summed = 2 * vectors * row_us * (2 if strategy in (ROW_WISE, ROW_HASHED) and parts > 1 else 1)
        dense = 3 * table.numel * self.element_bytes / MEMORY_BYTES_PER_US if strategy == REPLICATED else 0.0
        return SHARD_US + ids * (ID_US + row / CACHE_BYTES_PER_US) + touched + summed + dense

    def wire_bytes(self, table: EmbeddingTable, cost: TableCost, strategy: str, parts: int) -> float:
        """Return the bytes that the owner of the largest of `parts` receives and sends."""
        ids, bags, vectors, row = self._traffic(table, cost, strategy, parts)
        exchanged = (ids + bags) * ID_BYTES + 2 * vectors * row
        averaged = 2 * table.numel * self.element_bytes
        return (averaged if strategy == REPLICATED else exchanged) * (1 - 1 / self.world_size)

    def part_bytes(self, table: EmbeddingTable, strategy: str, parts: int) -> list[int]:
        """Return the bytes of weights and optimizer state of each part."""
        if strategy == REPLICATED:
            return self.part_bytes(table, TABLE_WISE, 1) * parts
        shards = Plan((table,), parts, (Placement(strategy, tuple(range(parts))),)).shards
        per_weight, per_row = 1 + self.state[0], self.state[1]
        return [self.element_bytes * (per_weight * each.numel + per_row * each.rows.num_rows) for each in shards]

    def _traffic(
        self, table: EmbeddingTable, cost: TableCost, strategy: str, parts: int
    ) -> tuple[float, float, float, float]:
        """Return a part's (ids, bags, vectors, bytes of a row)."""
        bags = float(self.batch_size * self.world_size * len(table.features))
        ids = bags * cost.pooling_factor
        columns, rows = table.embedding_dim, table.num_embeddings
        if strategy == REPLICATED:
            bags, ids = bags / parts, ids / parts
        elif strategy == COLUMN_WISE:
            columns = -(-columns // parts)
        else:
            ids *= -(-rows // parts) / rows
        return ids, bags, min(bags, ids * cost.unique_fraction), float(columns * self.element_bytes)
