"""Drop-in for `import horovod.torch as hvd`: all of it, with the background optimizer and safe broadcasts in place."""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from typing import Any, NoReturn

import torch

try:
    import horovod.torch as _horovod
    from horovod.torch import *  # noqa: F403
except ImportError as error:
    raise ImportError(
        f"hvd_shadowsync.torch needs Horovod ({error}); install it (with torch 2.1 or later 0.28.1 has to be "
        "compiled as C++17, see the README), or use hvd_shadowsync.ShadowSync, which needs mpi4py alone"
    ) from error

from hvd_shadowsync import broadcast as broadcasts
from hvd_shadowsync.comm import job, spares
from hvd_shadowsync.comm.tuning import tune_environment
from hvd_shadowsync.distributed import DistributedOptimizer as DistributedOptimizer
from hvd_shadowsync.distributed import communicator_of
from hvd_shadowsync.errors import ShadowSyncError
from hvd_shadowsync.optimizer import close_all

logger = logging.getLogger(__name__)

CYCLE_TIME_MS = "20"
LOCAL_RANK, LOCAL_SIZE = "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"

COLLECTIVE = [
    name for name in dir(_horovod)
    if re.match("allgather|allreduce|alltoall|barrier|broadcast|grouped|join|reducescatter|sparse", name)
]  # fmt: skip
"""Horovod's calls that communicate."""
__all__ = sorted({name for name in dir(_horovod) if not name.startswith("_")} | {"DistributedOptimizer"})


def init(*args: Any, **kwargs: Any) -> Any:
    """Initialise Horovod, after tuning MPI (what the user has set stays).

    Horovod's own thread wakes every HOROVOD_CYCLE_TIME milliseconds, by default 1, whether there is something to reduce
    or not, and takes the core from training. Without an allreduce a step it has little to do, so that 20 is set
    unless the user set another value; an allreduce of the user's own then waits for up to so long.

    In a job that outlives its ranks (`shadowrun --fault-tolerant`) Horovod itself is not initialised, since it ends the
    job when a rank is lost: `rank`, `size`, `local_rank` and `local_size` are those that the job began with, the
    optimizer and the two broadcasts below are ours anyway, and Horovod's other collective calls raise
    `ShadowSyncError`.

    Arguments and result are those of `horovod.torch.init`.
    """
    tune_environment()
    if job.outlives_ranks():
        logger.info("this job outlives its ranks: Horovod itself, which would not, is not initialised")
        return None
    os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_TIME_MS)
    return _horovod.init(*args, **kwargs)


def shutdown() -> Any:
    """Close what is still synchronised (collective), then `horovod.torch.shutdown`, which may finalise MPI."""
    close_all()
    return None if job.outlives_ranks() else _horovod.shutdown()


def is_initialized() -> bool:
    """Return whether `rank` and its like can be asked for."""
    return job.outlives_ranks() or bool(_horovod.is_initialized())


def rank() -> int:
    """Return the number of this process in the job; see `init`."""
    if not job.outlives_ranks():
        return int(_horovod.rank())
    known = spares.here()
    return int(job.load_mpi().COMM_WORLD.rank if known is None or known.number is None else known.number)


def size() -> int:
    """Return the number of processes that the job began with; see `init`."""
    if not job.outlives_ranks():
        return int(_horovod.size())
    known = spares.here()
    return int(job.load_mpi().COMM_WORLD.size if known is None else known.size)


def local_rank() -> int:
    """Return the number of this process on its host; see `init`."""
    return int(os.environ[LOCAL_RANK]) if job.outlives_ranks() else int(_horovod.local_rank())


def local_size() -> int:
    """Return the number of processes that the job began with on this host; see `init`."""
    return int(os.environ[LOCAL_SIZE]) if job.outlives_ranks() else int(_horovod.local_size())


def broadcast_parameters(params: Any, root_rank: int = 0, process_set: Any = None) -> None:
    """`hvd_shadowsync.broadcast_parameters` with Horovod's signature."""
    members = communicator_of(process_set)
    broadcasts.broadcast_parameters(params, root_rank, communicator=members)
    if members is not None:
        members.free()


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0, model: Any = None) -> None:
    """`hvd_shadowsync.broadcast_optimizer_state` with Horovod's signature; `model` is not needed."""
    broadcasts.broadcast_optimizer_state(optimizer, root_rank)


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise ShadowSyncError(
        f"hvd.{name}() is Horovod's, which a lost rank would end, and this job outlives its ranks; use "
        "optimizer.shadow.gather(value), which returns every rank's value, or start without --fault-tolerant"
    )


if job.is_started_to_outlive_ranks():
    _OURS = {"broadcast_parameters", "broadcast_optimizer_state"}
    globals().update({each: partial(_refuse, each) for each in COLLECTIVE if each not in _OURS})
