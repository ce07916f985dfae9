"""This project: in the background with its default pacing (cpu_budget=0.02) or another budget, or in the foreground
every k steps."""

from __future__ import annotations

from contender import Asked, Contender
from tables import sharded as tables

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync

__all__ = ["make", "tables"]
ALGORITHMS = {"ma": ModelAveraging, "easgd": ElasticAveraging, "bmuf": BMUF}


def make(asked: Asked) -> Contender:
    """Return the handle's optimizer; everything but the algorithm and its pace is a default."""
    name, *budget = asked.variant.split()
    optimizer, algorithm = asked.task.optimizer(), ALGORITHMS[name]()
    pace = {"cpu_budget": float(budget[0])} if budget else {}
    pace |= {"foreground": True, "sync_every": asked.every} if asked.every else {}
    handle = ShadowSync(optimizer, algorithm=algorithm, model=asked.task.model, **pace)
    return Contender(
        asked.task.model,
        optimizer,
        period_steps=asked.every or None,
        sync_gap_steps=None,
        metrics=handle.metrics,
        close=handle.close,
    )
