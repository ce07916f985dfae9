"""No synchronisation: each rank trains its own replica. The limit of what the others can reach."""

from __future__ import annotations

from contender import Asked, Contender
from torch import nn


def tables() -> nn.Module:
    """Return the tables, which are divided over the ranks here, too: the limit is that of the dense part."""
    from tables import sharded

    return sharded()


def make(asked: Asked) -> Contender:
    """Return the model and its own optimizer."""
    return Contender(asked.task.model, asked.task.optimizer(), period_steps=None, sync_gap_steps=None)
