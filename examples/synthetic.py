"""Synthetic rows in the shape of Criteo's click logs: made up by a generator, no data that anybody recorded.

A row has 13 dense features, 26 categorical ones and a label. The 26 tables' sizes follow a power law, and so do the ids
of each table: few of them make up most of the rows, and a permutation scatters the popular ones over the table. Labels
are drawn from a hidden logistic model on all of the features, with an effect of every id that is a hash of the id, so
that tables of any size need no table of hidden weights. What a model reaches here says nothing about real clicks.

Batch i of the stream is a function of the arguments, the batch size and i alone. Of each `size` batches in a row rank r
takes the r-th, as with `criteo.Criteo`: the job sees the same stream however many ranks it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from dlrm import Batch
from numpy.typing import NDArray

NUM_DENSE, NUM_TABLES = 13, 26
SIZE_EXPONENT = 1.2  # of 26 sizes the first is then 0.334 of the sum
ID_EXPONENTS = (1.05, 1.2)  # of the first and the last table; between them evenly spaced
MIN_ROWS = 3  # of a table
TRAIN, TEST, PILOT = range(3)  # streams of one seed
PILOT_ROWS = 16_384
ID_DEVIATION, DENSE_DEVIATION, NOISE_DEVIATION = 1.0, 0.8, 0.5  # what ids, dense features and noise add to the logit


class Columns(NamedTuple):
    """What the generator needs to know of each table, as columns [tables, 1] to compute with a table at a time."""

    sizes: NDArray[np.float64]
    tail: NDArray[np.float64]  # 1 - (size + 1)^(1 - exponent): the power law is cut off at the table's size
    power: NDArray[np.float64]  # 1 / (1 - exponent)
    modulus: NDArray[np.uint64]  # the size again
    factor: NDArray[np.uint64]  # has no divisor in common with the size: id = (rank * factor + shift) mod size
    shift: NDArray[np.uint64]
    salt: NDArray[np.uint64]  # of the hash that is an id's effect


def table_sizes(total_rows: int, num_tables: int = NUM_TABLES) -> list[int]:
    """Sizes that fall with their place to the power -1.2 and sum to `total_rows` exactly; none is below 3.

    Raises:
        ValueError: too few rows for so many tables.
    """
    if num_tables < 1 or total_rows < MIN_ROWS * num_tables:
        raise ValueError(
            f"total_rows={total_rows}, num_tables={num_tables}: expected a table or more, {MIN_ROWS} rows for each"
        )
    shares = np.arange(1, num_tables + 1) ** -SIZE_EXPONENT
    spread = total_rows - MIN_ROWS * num_tables
    sizes = [MIN_ROWS + int(spread * share) for share in shares / shares.sum()]
    sizes[0] += total_rows - sum(sizes)
    return sizes


@dataclass(frozen=True)
class Synthetic:
    """A training stream and a test stream of synthetic rows.

    Args:
        num_rows_total: rows of the 26 embedding tables together.
        ids_per_feature: ids of a bag; `train_batches` and `test_batches` have one, `bags` yields any number.
        seed: another seed is another data set, with another hidden model.
        num_train_rows: where the training stream ends; None: never.
        num_test_rows: where the test stream ends.
        base_rate: share of ones among the labels, about.
    """

    num_rows_total: int
    ids_per_feature: int = 1
    seed: int = 1
    num_train_rows: int | None = 4_000_000
    num_test_rows: int = 100_000
    base_rate: float = 0.25

    num_dense = NUM_DENSE

    def __post_init__(self) -> None:
        for name in ("num_rows_total", "ids_per_feature", "num_test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if self.num_train_rows is not None and self.num_train_rows < 1:
            raise ValueError(
                f"num_train_rows={self.num_train_rows} must be at least 1, or None for a stream without end"
            )
        if not 0 < self.base_rate < 1:
            raise ValueError(f"base_rate={self.base_rate} must lie between 0 and 1, for instance 0.25")
        table_sizes(self.num_rows_total)

    @cached_property
    def table_sizes(self) -> list[int]:
        return table_sizes(self.num_rows_total)

    def train_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """This rank's training batches, all of them full; equally many on every rank."""
        step = 0
        while self.num_train_rows is None or (step + 1) * batch_size * size <= self.num_train_rows:
            yield self._batch(TRAIN, step * size + rank, batch_size)
            step += 1

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """All test rows; the last batch may be smaller."""
        for index, start in enumerate(range(0, self.num_test_rows, batch_size)):
            yield self._batch(TEST, index, min(batch_size, self.num_test_rows - start))

    def bags(self, batch_size: int, step: int, *, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Ids alone, for benchmarks: [batch_size, 26, ids_per_feature] int64, of one step of one rank."""
        rng = self._rng(TRAIN, step * size + rank)
        ids = self._ids(rng, batch_size * self.ids_per_feature).reshape(NUM_TABLES, batch_size, -1)
        return torch.from_numpy(np.ascontiguousarray(ids.transpose(1, 0, 2)))

    def _batch(self, stream: int, index: int, rows: int) -> Batch:
        if self.ids_per_feature != 1:
            raise ValueError(
                f"ids_per_feature={self.ids_per_feature}: a dlrm.Batch has one id; take the ids from bags()"
            )
        rng = self._rng(stream, index)
        ids = self._ids(rng, rows)  # [tables, rows]
        dense = rng.standard_normal((rows, NUM_DENSE), dtype=np.float32)
        logits = self._bias + self._logits(rng, ids, dense)
        labels = rng.random(rows) * (1 + np.exp(-logits)) < 1
        dense[:, ::2] = np.log1p(np.exp(dense[:, ::2]))  # half of them are positive and skewed, as logs of counts are
        return Batch(
            torch.from_numpy(dense),
            torch.from_numpy(np.ascontiguousarray(ids.T)),
            torch.from_numpy(labels.astype(np.float32)),
        )

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.seed, stream, index]))

    def _ids(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """[tables, count]: by the inverse distribution function of a power law on [1, size + 1), and scattered."""
        of = self._columns
        values = rng.random((NUM_TABLES, count))
        values *= -of.tail
        np.log1p(values, out=values)
        values *= of.power
        np.exp(values, out=values)  # in [1, size + 1), but for the last bit
        ranks = np.minimum(values, of.sizes, out=values).astype(np.uint64) - np.uint64(1)  # 0 is the most popular
        ranks *= of.factor
        ranks += of.shift
        ranks %= of.modulus
        return ranks.view(np.int64)

    def _logits(
        self, rng: np.random.Generator, ids: NDArray[np.int64], dense: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """[rows], up to the bias that makes the base rate; the dense features as they are before the skew."""
        effects = hashed(ids.view(np.uint64) + self._columns.salt).sum(axis=0)
        effects *= ID_DEVIATION * math.sqrt(3 / NUM_TABLES)  # a uniform value in [-1, 1) has the variance 1/3
        effects += dense @ self._dense_effects
        effects += NOISE_DEVIATION * rng.standard_normal(len(dense))
        return effects

    @cached_property
    def _columns(self) -> Columns:
        sizes = self.table_sizes
        exponents = np.linspace(*ID_EXPONENTS, NUM_TABLES)
        salts = hashed_words(np.arange(NUM_TABLES, dtype=np.uint64) + np.uint64(self.seed * NUM_TABLES % 2**63))
        columns = (
            np.array(sizes, np.float64),
            1 - (np.array(sizes) + 1.0) ** (1 - exponents),
            1 / (1 - exponents),
            np.array(sizes, np.uint64),
            np.array([coprime(size) for size in sizes], np.uint64),
            np.array([int(salt) % size for salt, size in zip(salts, sizes, strict=True)], np.uint64),
            salts,
        )
        return Columns(*(column[:, None] for column in columns))

    @cached_property
    def _dense_effects(self) -> NDArray[np.float32]:
        effects = hashed(np.arange(NUM_DENSE, dtype=np.uint64) + np.uint64(self.seed * NUM_DENSE % 2**63))
        return (effects * (DENSE_DEVIATION / math.sqrt((effects**2).sum()))).astype(np.float32)

    @cached_property
    def _bias(self) -> float:
        """Found by bisection on rows of a stream of their own; a few popular ids shift the mean of all logits."""
        rng = self._rng(PILOT, 0)
        ids = self._ids(rng, PILOT_ROWS)
        logits = self._logits(rng, ids, rng.standard_normal((PILOT_ROWS, NUM_DENSE), dtype=np.float32))
        low, high = -30.0, 30.0
        while high - low > 1e-6:
            bias = (low + high) / 2
            too_many = (1 / (1 + np.exp(-logits - bias))).mean() > self.base_rate
            low, high = (low, bias) if too_many else (bias, high)
        return low


def coprime(size: int) -> int:
    """Return a factor near the golden section of `size` that has no divisor in common with it."""
    factor = max(round(size * (math.sqrt(5) - 1) / 2), 1)
    while math.gcd(factor, size) != 1:
        factor += 1
    return factor


def hashed_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits, the finaliser of splitmix64 (Steele et al. 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def hashed(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return values in [-1, 1) that are functions of the words and look random."""
    return hashed_words(words).view(np.int64) * 2.0**-63
