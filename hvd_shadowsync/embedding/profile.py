"""What tables cost on this machine: traffic counted in real batches, look-up and update timed on stand-ins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_shadowsync.checks import check_count, check_flag
from hvd_shadowsync.embedding import kernels
from hvd_shadowsync.embedding.costs import TableCost
from hvd_shadowsync.embedding.inputs import Batch, Jagged, features_of, read_batch
from hvd_shadowsync.embedding.kernels.base import Bags, Gradient, Kernel, Pooling, Update
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.embedding.shards import ROW_DTYPES
from hvd_shadowsync.embedding.tables import EmbeddingTable, check_tables

MOST_BATCHES = 64
SAMPLE_ROWS = 1_000_003  # a prime: ids with a common divisor, or in steps, fold onto all rows alike
SHARED_BYTES = 256 << 20  # beyond which the stand-ins of several tables share memory; more than most caches have
LINE = 16  # weights between places where a stand-in may begin; a cache line or two
START, SLOPE = 0.5, 1e-3  # what rows, their state and gradients are filled with: values that no step makes denormal


def profile(
    tables: Sequence[EmbeddingTable],
    batches: Iterable[Any],
    *,
    optimizer: SparseOptimizer,
    kernel: str = "auto",
    repeats: int = 5,
    sample_rows: int = SAMPLE_ROWS,
    dtype: torch.dtype = torch.float32,
    include_last_offset: bool = False,
) -> dict[str, TableCost]:
    """Measure what each table costs, for `plan(tables, world_size, costs=profile(tables, batches, ...))`.

    Counted are the ids of a bag, and how many of a batch's ids differ; timed are look-up and update of one rank's
    batch, all tables in turn as in a step of training, with `torch.get_num_threads()` threads. No communication; any
    thread may call this. Times differ from rank to rank, but all need the same plan: measure on one rank, and send the
    costs to the others.

    A table of more than `sample_rows` rows is stood in for by one of that many rows, its ids taken modulo
    `sample_rows` after they were counted; with several tables, stand-ins share memory from `SHARED_BYTES` on. So memory
    is at most `SHARED_BYTES` or that of the largest stand-in, and as much for each state that has a value per weight.
    The times of such tables come out low: they have fewer misses of the address cache, fewer passes of sorting, and
    some different ids fall on one row. With 80,000 ids, 1e6 rows took about 0.6 times as long as 4e6 or 12e6.

    Args:
        tables: the tables.
        batches: inputs as `ShardedEmbeddingBag` takes them, of the size that one rank has in a step. The first
            `MOST_BATCHES` (64) are read, and their ids kept until the end. A dozen will do; with one alone, its rows
            stay in the caches from step to step and times come out low.
        optimizer: what rows are updated with.
        kernel: as for `ShardedEmbeddingBag`; default "auto".
        repeats: times that each batch is timed, after one round that is not; the fastest counts, since others may use
            the machine. Default 5.
        sample_rows: rows of the largest stand-in; default about a million, a prime. With a power of two, ids that are
            multiples of another would fall on few rows.
        dtype: of the rows, torch.float32 (default) or torch.float64.
        include_last_offset: as for `ShardedEmbeddingBag`; default False.

    Returns:
        By name of the table, all that a `TableCost` has.

    Raises:
        TypeError, ValueError: an argument is not what it should be; names it, the batch, and the remedy.
    """
    tables = check_tables(tables)
    if not isinstance(optimizer, SparseOptimizer) or type(optimizer) is SparseOptimizer:
        raise TypeError(f"optimizer={optimizer!r} is no optimizer of rows; give one such as RowWiseAdagrad(lr=0.01)")
    check_count("repeats", repeats, least=1)
    check_count("sample_rows", sample_rows, least=1)
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; give torch.float32 or torch.float64")
    check_flag("include_last_offset", include_last_offset)
    engine = kernels.choose(kernel)
    sizes, steps, traffic = [], [], [_Traffic() for _ in tables]
    for batch in _read(tables, batches, dtype, engine, include_last_offset=include_last_offset):
        by_table = _by_table(tables, batch)
        for counts, bags in zip(traffic, by_table, strict=True):
            counts.add(bags)
        steps.append(
            [_folded(bags, _num_rows(table, sample_rows)) for table, bags in zip(tables, by_table, strict=True)]
        )
        sizes.append(batch.num_samples)
    if not steps:
        raise ValueError("batches has no sample; give at least one batch that is not empty")
    work = _laid_out(tables, steps, optimizer, dtype, sample_rows)
    times = _timed(engine, optimizer, work, repeats)
    return {
        table.name: TableCost(counts.pooling_factor, counts.unique_fraction, compute_us, fmean(sizes))
        for table, counts, compute_us in zip(tables, traffic, times, strict=True)
    }


@dataclass
class _Traffic:
    """What was counted for one table: bags and ids, and ids that are distinct within their batch."""

    bags: int = 0
    ids: int = 0
    distinct: int = 0

    def add(self, features: Sequence[Bags]) -> None:
        """Count one batch."""
        ids = torch.cat([bags.ids.long() for bags in features])
        self.bags += sum(bags.num_bags for bags in features)
        self.ids += len(ids)
        self.distinct += len(torch.unique(ids))

    @property
    def pooling_factor(self) -> float:
        return self.ids / self.bags

    @property
    def unique_fraction(self) -> float:
        return self.distinct / self.ids if self.ids else 1.0


class _Work(NamedTuple):
    """What one table has to do in one step."""

    poolings: list[Pooling]
    update: Update


# --- batches ----------------------------------------------------------------------------------------------------------


def _read(
    tables: Sequence[EmbeddingTable], batches: Any, dtype: torch.dtype, kernel: Kernel, *, include_last_offset: bool
) -> Iterator[Batch]:
    """Yield the batches that have samples."""
    one = isinstance(batches, (Tensor, Mapping, Jagged))
    if one or not isinstance(batches, Iterable):
        what = ", which is one batch" if one else ""
        raise TypeError(f"batches is a {type(batches).__name__}{what}; give an iterable of batches, such as a list")
    features = features_of(tables)
    for number, inputs in enumerate(islice(batches, MOST_BATCHES)):
        try:
            batch = read_batch(inputs, features, dtype, kernel, include_last_offset=include_last_offset)
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number} of batches: {error}") from error
        if batch.num_samples:
            yield batch


def _by_table(tables: Sequence[EmbeddingTable], batch: Batch) -> list[list[Bags]]:
    features = iter(batch.features)
    return [list(islice(features, len(table.features))) for table in tables]


def _num_rows(table: EmbeddingTable, sample_rows: int) -> int:
    return min(table.num_embeddings, sample_rows)


def _folded(features: Sequence[Bags], num_rows: int) -> list[Bags]:
    """Return bags with ids below `num_rows`, as narrow as they travel."""
    return [bags._replace(ids=(bags.ids % num_rows).int()) for bags in features]


# --- stand-ins --------------------------------------------------------------------------------------------------------


def _laid_out(
    tables: Sequence[EmbeddingTable],
    steps: Sequence[Sequence[Sequence[Bags]]],
    rule: SparseOptimizer,
    dtype: torch.dtype,
    sample_rows: int,
) -> list[list[_Work]]:
    """Return the work of each table in each step; all on the same rows, vectors and gradients."""
    shapes = [(_num_rows(table, sample_rows), table.embedding_dim) for table in tables]
    weights = _stand_ins(shapes, dtype)
    slots = [
        _stand_ins([shape if per_weight else shape[:1] for shape in shapes], dtype)
        for per_weight in rule.slots.values()
    ]
    most = max(bags.num_bags for step in steps for features in step for bags in features)
    widths = [table.embedding_dim for table in tables for _ in table.features]
    vectors = torch.split(torch.zeros(most, sum(widths), dtype=dtype), widths, 1)
    slopes = torch.split(torch.full((most, sum(widths)), SLOPE, dtype=dtype), widths, 1)
    work = []
    for step in steps:
        columns = iter(zip(vectors, slopes, strict=True))
        work.append(
            [
                _work(features, rows, state, list(islice(columns, len(features))))
                for features, rows, *state in zip(step, weights, *slots, strict=True)
            ]
        )
    return work


def _work(features: Sequence[Bags], rows: Tensor, state: list[Tensor], columns: list[tuple[Tensor, Tensor]]) -> _Work:
    poolings, gradients = [], []
    for bags, (vectors, slopes) in zip(features, columns, strict=True):
        poolings.append(Pooling(rows, bags, vectors[: bags.num_bags]))
        gradients.append(Gradient(bags, slopes[: bags.num_bags], 1.0))
    return _Work(poolings, Update(rows, tuple(state), gradients))


def _stand_ins(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of these shapes out of one block of memory: end to end, and when it is full from its beginning."""
    sizes = [-(-torch.Size(shape).numel() // LINE) * LINE for shape in shapes]
    total = min(sum(sizes), max(*sizes, SHARED_BYTES // dtype.itemsize))
    block = torch.full((total,), START, dtype=dtype)
    found, end = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        start = end if end + size <= total else 0
        end = start + size
        found.append(block[start:end][: torch.Size(shape).numel()].view(torch.Size(shape)))
    return found


# --- times ------------------------------------------------------------------------------------------------------------


def _timed(kernel: Kernel, rule: SparseOptimizer, work: list[list[_Work]], repeats: int) -> list[float]:
    """Return microseconds of each table in a step: over repeats the fastest, over batches the mean."""
    rounds = [
        [_step_us(kernel, rule, number * len(work) + at + 1, step) for at, step in enumerate(work)]
        for number in range(1 + repeats)
    ]  # [rounds][steps][tables]
    by_step = [[min(times) for times in zip(*step, strict=True)] for step in zip(*rounds[1:], strict=True)]
    return [fmean(times) for times in zip(*by_step, strict=True)]


def _step_us(kernel: Kernel, rule: SparseOptimizer, number: int, step: Sequence[_Work]) -> list[float]:
    """Look all tables up, then update them all; return the microseconds of each."""
    ends = [perf_counter()]
    for work in step:
        kernel.pool(work.poolings)
        ends.append(perf_counter())
    for work in step:
        kernel.update(rule, number, [work.update])
        ends.append(perf_counter())
    spent = [1e6 * (end - start) for start, end in pairwise(ends)]
    return [pooling + update for pooling, update in zip(spent[: len(step)], spent[len(step) :], strict=True)]
