"""Drop-in for `import horovod.torch as hvd`: all of it, with the background optimizer and safe broadcasts in place."""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import horovod.torch as _horovod
    from horovod.torch import *  # noqa: F403
except ImportError as error:
    raise ImportError(
        f"hvd_shadowsync.torch needs Horovod ({error}); install it (with torch 2.1 or later 0.28.1 has to be "
        "compiled as C++17, see the README), or use hvd_shadowsync.ShadowSync, which needs mpi4py alone"
    ) from error

from hvd_shadowsync import broadcast
from hvd_shadowsync.comm.tuning import tune_environment
from hvd_shadowsync.distributed import DistributedOptimizer as DistributedOptimizer
from hvd_shadowsync.distributed import communicator_of
from hvd_shadowsync.optimizer import close_all

CYCLE_TIME_MS = "20"

__all__ = sorted({name for name in dir(_horovod) if not name.startswith("_")} | {"DistributedOptimizer"})


def init(*args: Any, **kwargs: Any) -> Any:
    """Initialise Horovod, after tuning MPI (what the user has set stays).

    Horovod's own thread wakes every HOROVOD_CYCLE_TIME milliseconds, by default 1, whether there is something to reduce
    or not, and takes the core from training. Without an allreduce a step it has little to do, so that 20 is set
    unless the user set another value; an allreduce of the user's own then waits for up to so long.

    Arguments and result are those of `horovod.torch.init`.
    """
    tune_environment()
    os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_TIME_MS)
    return _horovod.init(*args, **kwargs)


def shutdown() -> Any:
    """Close what is still synchronised (collective), then `horovod.torch.shutdown`, which may finalise MPI."""
    close_all()
    return _horovod.shutdown()


def broadcast_parameters(params: Any, root_rank: int = 0, process_set: Any = None) -> None:
    """`hvd_shadowsync.broadcast_parameters` with Horovod's signature."""
    members = communicator_of(process_set)
    broadcast.broadcast_parameters(params, root_rank, communicator=members)
    if members is not None:
        members.free()


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0, model: Any = None) -> None:
    """`hvd_shadowsync.broadcast_optimizer_state` with Horovod's signature; `model` is not needed."""
    broadcast.broadcast_optimizer_state(optimizer, root_rank)


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
