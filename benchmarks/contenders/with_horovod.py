"""Horovod's DistributedOptimizer over MPI, in float32 or with Compression.fp16.

Gradients are reduced while backward() goes on, fused up to the default threshold of 128 MB, in cycles of 1 ms: its
documentation has no better values but those that its autotuner finds, which needs minutes of a job. MPI carries it, the
library's own choice of algorithm; its documentation calls MPI the default, and Gloo what to take where there is no MPI.
"""

from __future__ import annotations

import horovod.torch as hvd
from contender import Asked, Contender
from tables import sharded as tables

__all__ = ["make", "tables"]


def make(asked: Asked) -> Contender:
    """Return the wrapped optimizer; the rows of sharded tables are no parameters, and left alone."""
    hvd.init()
    named = list(asked.task.model.named_parameters())
    optimizer = hvd.DistributedOptimizer(
        asked.task.optimizer(),
        named_parameters=named,
        compression=hvd.Compression.fp16 if asked.variant == "fp16" else hvd.Compression.none,
    )
    hvd.broadcast_parameters(dict(named), root_rank=0)
    return Contender(asked.task.model, optimizer, period_steps=1, sync_gap_steps=1.0, close=hvd.shutdown)
