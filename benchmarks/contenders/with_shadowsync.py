"""This project: in the background, or in the foreground every k steps.

A variant is the algorithm's name, and what is to differ from the defaults (cpu_budget=0.02, no wire_dtype): "ma
cpu_budget=0.1 wire_dtype=float16".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contender import Asked, Contender
from tables import sharded as tables

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync

__all__ = ["make", "tables"]
ALGORITHMS = {"ma": ModelAveraging, "easgd": ElasticAveraging, "bmuf": BMUF}
READ: dict[str, Callable[[str], Any]] = {"cpu_budget": float, "wire_dtype": partial(getattr, torch)}


def make(asked: Asked) -> Contender:
    """Return the handle's optimizer; everything but the algorithm and what the variant names is a default."""
    name, *options = asked.variant.split()
    optimizer, algorithm = asked.task.optimizer(), ALGORITHMS[name]()
    given: dict[str, Any] = {"foreground": True, "sync_every": asked.every} if asked.every else {}
    given |= {key: READ[key](value) for key, value in (option.split("=") for option in options)}
    handle = ShadowSync(optimizer, algorithm=algorithm, model=asked.task.model, **given)
    return Contender(
        asked.task.model,
        optimizer,
        period_steps=asked.every or None,
        sync_gap_steps=None,
        metrics=handle.metrics,
        pause=None if asked.every else handle.pause,
        resume=handle.resume,
        close=handle.close,
    )
