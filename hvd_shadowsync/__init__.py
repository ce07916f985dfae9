"""ShadowSync for PyTorch: Horovod/MPI data parallelism whose synchronisation runs in the background.

What is offered here is imported when it is asked for: launchers and spare ranks do without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hvd_shadowsync import ending
from hvd_shadowsync.comm import job, spares
from hvd_shadowsync.comm.tuning import tune_environment

if TYPE_CHECKING:
    from hvd_shadowsync import checkpoint, embedding
    from hvd_shadowsync.algorithms import BMUF, ElasticAveraging, ModelAveraging
    from hvd_shadowsync.broadcast import broadcast_optimizer_state, broadcast_parameters
    from hvd_shadowsync.checkpointing import Checkpointer
    from hvd_shadowsync.distributed import DistributedOptimizer
    from hvd_shadowsync.embedding import EmbeddingTable, ShardedEmbeddingBag
    from hvd_shadowsync.errors import (
        CheckpointError,
        CutOffError,
        EmbeddingError,
        RankLostError,
        ReplicaMismatchError,
        ShadowSyncError,
        StallError,
        TransportError,
    )
    from hvd_shadowsync.metrics import JsonLinesWriter, TensorBoardWriter
    from hvd_shadowsync.optimizer import ShadowSync

tune_environment()
ending.end_well()  # first, so that it comes after all else that is done at exit
spares.begin()  # a spare rank waits here, with nothing of its script done
job.end_job_on_exception()

__all__ = [
    "BMUF",
    "CheckpointError",
    "Checkpointer",
    "CutOffError",
    "DistributedOptimizer",
    "ElasticAveraging",
    "EmbeddingError",
    "EmbeddingTable",
    "JsonLinesWriter",
    "ModelAveraging",
    "RankLostError",
    "ReplicaMismatchError",
    "ShadowSync",
    "ShadowSyncError",
    "ShardedEmbeddingBag",
    "StallError",
    "TensorBoardWriter",
    "TransportError",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "checkpoint",
    "embedding",
]
_HOMES = {
    "algorithms": ("BMUF", "ElasticAveraging", "ModelAveraging"),
    "broadcast": ("broadcast_optimizer_state", "broadcast_parameters"),
    "checkpointing": ("Checkpointer",),
    "distributed": ("DistributedOptimizer",),
    "embedding": ("EmbeddingTable", "ShardedEmbeddingBag"),
    "metrics": ("JsonLinesWriter", "TensorBoardWriter"),
    "optimizer": ("ShadowSync",),
}
"""The modules of what is no error and no module."""


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "embedding"):
        return importlib.import_module(f"{__name__}.{name}")
    home = next((module for module, names in _HOMES.items() if name in names), "errors")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
