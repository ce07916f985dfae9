"""ShadowSync for PyTorch: Horovod/MPI data parallelism whose synchronisation runs in the background."""

from hvd_shadowsync import ending
from hvd_shadowsync.comm import spares
from hvd_shadowsync.comm.tuning import tune_environment

tune_environment()
ending.end_well()  # first, so that it comes after all else that is done at exit
spares.begin()  # a spare rank waits here, with nothing of its script done

from hvd_shadowsync import checkpoint, embedding  # noqa: E402
from hvd_shadowsync.algorithms import BMUF, ElasticAveraging, ModelAveraging  # noqa: E402
from hvd_shadowsync.broadcast import broadcast_optimizer_state, broadcast_parameters  # noqa: E402
from hvd_shadowsync.checkpointing import Checkpointer  # noqa: E402
from hvd_shadowsync.comm.mpi import end_job_on_exception  # noqa: E402
from hvd_shadowsync.distributed import DistributedOptimizer  # noqa: E402
from hvd_shadowsync.embedding import EmbeddingTable, ShardedEmbeddingBag  # noqa: E402
from hvd_shadowsync.errors import (  # noqa: E402
    CheckpointError,
    CutOffError,
    EmbeddingError,
    RankLostError,
    ReplicaMismatchError,
    ShadowSyncError,
    StallError,
    TransportError,
)
from hvd_shadowsync.metrics import JsonLinesWriter, TensorBoardWriter  # noqa: E402
from hvd_shadowsync.optimizer import ShadowSync  # noqa: E402

end_job_on_exception()

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
