"""Open MPI's runtime, PMIx, as a rank sees it: where its launcher is, and telling MPI that another rank is lost.

MPI learns of a rank's end from the daemon of its host. Where that host cannot be reached nothing is learnt, and MPI has
no call to say so; but it listens to events of PMIx, and an event may be of this process alone.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

SERVER_VARIABLES = ("PMIX_SERVER_URI41", "PMIX_SERVER_URI4", "PMIX_SERVER_URI3")
NAMESPACE_VARIABLE, RANK_VARIABLE = "PMIX_NAMESPACE", "PMIX_RANK"
LAUNCHER_DAEMON = 0
"""Of the daemons that start ranks, the one that is mpirun itself."""

# pmix_common.h, versions 3 to 5
SUCCESS, OPERATION_SUCCEEDED = 0, -157
ERR_PROC_TERM_WO_SYNC = -200
RANGE_PROC_LOCAL = 7
TYPE_PROC = 22
EVENT_AFFECTED_PROC = b"pmix.evproc"


class _Process(ctypes.Structure):
    _fields_ = [("namespace", ctypes.c_char * 256), ("rank", ctypes.c_uint32)]


class _Value(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint16), ("data", ctypes.c_void_p), ("rest", ctypes.c_uint64 * 3)]


class _Info(ctypes.Structure):
    _fields_ = [("key", ctypes.c_char * 512), ("flags", ctypes.c_uint32), ("value", _Value)]


def is_beside_launcher() -> bool:
    """Whether mpirun itself has started this rank: it is on this host then."""
    for name in SERVER_VARIABLES:
        if server := os.environ.get(name):  # such as prterun-host-21@0.1;tcp4://127.0.0.1:37703
            return server.partition(";")[0].rpartition(".")[2] == str(LAUNCHER_DAEMON)
    return False


def declare_lost(mpi: Any, number: int) -> bool:
    """Let the MPI of this process take rank `number` of the job for lost; return whether it has heard.

    `mpi` is mpi4py's module. Nobody else is told: each rank that is to know it says so itself.
    """
    namespace, own = os.environ.get(NAMESPACE_VARIABLE), os.environ.get(RANK_VARIABLE)
    if not namespace or not own:
        return False
    try:
        notify = ctypes.CDLL(mpi.__file__).PMIx_Notify_event  # of the library that mpi4py's MPI uses
    except (OSError, AttributeError):
        return False
    notify.restype = ctypes.c_int
    notify.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_uint8, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
        ctypes.c_void_p,
    ]  # fmt: skip
    source, lost = _Process(namespace.encode(), int(own)), _Process(namespace.encode(), number)
    info = _Info(EVENT_AFFECTED_PROC, 0, _Value(TYPE_PROC, ctypes.addressof(lost)))
    arguments = (ctypes.byref(source), RANGE_PROC_LOCAL, ctypes.byref(info), 1, None, None)
    return notify(ERR_PROC_TERM_WO_SYNC, *arguments) in (SUCCESS, OPERATION_SUCCEEDED)
