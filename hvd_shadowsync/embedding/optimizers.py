"""Fused sparse optimizers: how the owner of a row changes it, given its total gradient of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, ClassVar

from hvd_shadowsync.checks import check_interval

INFINITY = float("inf")


@dataclass(frozen=True)
class SparseOptimizer:
    """The rule for rows that a step touched, each once with its total gradient; other rows and their state stay.

    Attributes:
        lr: learning rate, at least 0; a scheduler of `ShardedEmbeddingBag.fused_optimizer` changes it while training.
        slots: names of the row state, each with whether it has one value per weight (or one per row).
    """

    lr: float
    slots: ClassVar[dict[str, bool]] = {}

    def __post_init__(self) -> None:
        check_interval("lr", self.lr, low=0.0, high=INFINITY, high_included=False)

    @property
    def state_per_row(self) -> tuple[int, int]:
        """State values of a row: (so many per weight, so many per row)."""
        per_weight = sum(self.slots.values())
        return per_weight, len(self.slots) - per_weight

    @property
    def settings(self) -> list[float]:
        """All settings as numbers, equally many for all of a kind."""
        return [value for each in astuple(self) for value in (each if isinstance(each, tuple) else (each,))]

    def with_settings(self, settings: Sequence[float]) -> SparseOptimizer:
        """Return the same kind with other `settings`."""
        rest = iter(settings)
        found: dict[str, Any] = {}
        for field in fields(self):
            own = getattr(self, field.name)
            found[field.name] = tuple(next(rest) for _ in own) if isinstance(own, tuple) else next(rest)
        return replace(self, **found)


@dataclass(frozen=True)
class SGD(SparseOptimizer):
    """w -= lr g; as `torch.optim.SGD` without momentum."""


@dataclass(frozen=True)
class Adagrad(SparseOptimizer):
    """s += g²; w -= lr g / (sqrt(s) + eps); as `torch.optim.Adagrad` (Duchi, Hazan, Singer 2011, JMLR 12)."""

    eps: float = 1e-10
    initial_accumulator: float = 0.0
    slots: ClassVar[dict[str, bool]] = {"sum": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("eps", self.eps, low=0.0, high=1.0)
        check_interval("initial_accumulator", self.initial_accumulator, low=0.0, high=INFINITY, high_included=False)


@dataclass(frozen=True)
class RowWiseAdagrad(SparseOptimizer):
    """s += mean(g²) over the row; w -= lr g / (sqrt(s) + eps): Adagrad with one value of state a row.

    Source: Naumov et al. 2019, "DLRM", arXiv 1906.00091; FBGEMM's `EXACT_ROWWISE_ADAGRAD`. With column-wise placement
    each shard has a sum of its own, over its columns.
    """

    eps: float = 1e-10
    initial_accumulator: float = 0.0
    slots: ClassVar[dict[str, bool]] = {"sum": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("eps", self.eps, low=0.0, high=1.0)
        check_interval("initial_accumulator", self.initial_accumulator, low=0.0, high=INFINITY, high_included=False)


@dataclass(frozen=True)
class Adam(SparseOptimizer):
    """m, v move for touched rows alone; t counts the table's updates; as `torch.optim.SparseAdam` (arXiv 1412.6980).

    m += (1-beta1)(g - m); v += (1-beta2)(g² - v); w -= lr sqrt(1-beta2^t)/(1-beta1^t) m / (sqrt(v) + eps).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    slots: ClassVar[dict[str, bool]] = {"exp_avg": True, "exp_avg_sq": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        for beta in self.betas:
            check_interval("betas", beta, low=0.0, high=1.0, high_included=False)
        check_interval("eps", self.eps, low=0.0, high=1.0)

    def correction(self, step: int) -> float:
        """Return sqrt(1-beta2^t) / (1-beta1^t) for t = `step`, from 1."""
        return math.sqrt(1 - self.betas[1] ** step) / (1 - self.betas[0] ** step)
