"""The fused optimizer's face towards torch: an optimizer object whose learning rate schedulers may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from hvd_shadowsync.embedding.optimizers import SparseOptimizer


class FusedOptimizer(torch.optim.Optimizer):
    """Holds the settings of the rows' optimizer in `param_groups`; rows themselves are updated during backward.

    Give it to a learning-rate scheduler, with the same schedule on every rank. `step()` and `zero_grad()` do nothing,
    so it may stand in a list of optimizers.
    """

    def __init__(self, rule: SparseOptimizer) -> None:
        self._rule = rule
        super().__init__([torch.nn.Parameter(torch.empty(0))], asdict(rule))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do nothing: rows were updated during backward."""
        return closure() if closure is not None else None

    @property
    def rule(self) -> SparseOptimizer:
        """The rule with the settings as they are now."""
        group = self.param_groups[0]
        return replace(self._rule, **{name: group[name] for name in asdict(self._rule)})
