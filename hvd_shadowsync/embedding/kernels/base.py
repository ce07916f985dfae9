"""What is done with rows: found out about ids, pooled into vectors, given gradients, updated; one class an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hvd_shadowsync.embedding.optimizers import SparseOptimizer


class Bags(NamedTuple):
    """Some bags of ids.

    Attributes:
        ids: [ids] int32 or int64, contiguous; bag after bag.
        lengths: [bags] int32, ids of each bag; None: one id a bag.
        weights: [ids], of the rows' dtype; None: 1.
    """

    ids: Tensor
    lengths: Tensor | None = None
    weights: Tensor | None = None

    @property
    def num_bags(self) -> int:
        """Bags."""
        return (self.ids if self.lengths is None else self.lengths).numel()


class Pooling(NamedTuple):
    """To be pooled: `out[bag] = sum of weights * rows[ids of the bag]`, or `+=` where `add`."""

    rows: Tensor  # [rows, dim]
    bags: Bags
    out: Tensor  # [bags, dim], columns contiguous
    add: bool = False


class Scattering(NamedTuple):
    """The reverse of pooling: `out[id] += weight * vectors[bag]`, from zero."""

    bags: Bags
    vectors: Tensor  # [bags, dim], columns contiguous
    out: Tensor  # [rows, dim]


class Gradient(NamedTuple):
    """What one source has for the rows of a shard: a vector for each of its bags, to be scaled."""

    bags: Bags
    vectors: Tensor  # [bags, dim], columns contiguous
    scale: float


class Update(NamedTuple):
    """Rows with their state, and all gradients of one step that touch them."""

    rows: Tensor  # [rows, dim]
    state: tuple[Tensor, ...]  # one per slot of the optimizer: [rows, dim] or [rows]
    gradients: list[Gradient]


@dataclass(frozen=True)
class Division:
    """How the rows of a table are divided into `parts`; see `placement.RowRange` and `placement.RowHash`."""

    num_rows: int
    parts: int
    multiplier: int | None
    """Of the hash; None: contiguous parts."""


class Part(NamedTuple):
    """The ids of some bags that lie in one part of a table."""

    bags: Bags  # rows of the part, as many bags as before
    places: Tensor  # [ids] int64: where they were among all ids


class Kernel(ABC):
    """An engine; stateless. Tensors are on the CPU, float32 or float64."""

    name: str

    @abstractmethod
    def first_outside(self, ids: Tensor, num_rows: int) -> int:
        """Return the place of the first id outside [0, num_rows), or -1."""

    @abstractmethod
    def unique(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the different ids (int32) and, for each id, its place among them (int32)."""

    @abstractmethod
    def split(self, bags: Bags, division: Division) -> list[Part]:
        """Divide ids among the parts of a table."""

    @abstractmethod
    def pool(self, poolings: Sequence[Pooling]) -> None:
        """Pool."""

    @abstractmethod
    def scatter(self, scatterings: Sequence[Scattering]) -> None:
        """Sum vectors by row."""

    @abstractmethod
    def update(self, rule: SparseOptimizer, step: int, updates: Sequence[Update]) -> None:
        """Update each row that is touched once, with the sum of its gradients, as step number `step` (from 1) says."""
