"""Agreements of Open MPI's fault tolerance as requests, beside which the threads of a process take turns in MPI.

An agreement of Open MPI 5 that one thread begins while another makes progress may be completed twice or never: ranks
crash or hang, some time in a hundred losses where three communicators recover at once. So nothing here waits inside
MPI (where it has a shrink that does not), and while an agreement of this process is under way one thread at a time is
in it. Needs no torch.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

LONGEST_TURN_S = 10.0
"""After which the others go on: a thread that has not come back from MPI by then does not, and a risk beats a hang."""
_SHRINKS = ("MPIX_Comm_ishrink", "ompi_comm_ishrink_internal")
"""Of Open MPI, the second one where it has no public one yet, as 5.0."""


class Gate:
    """What a thread is inside of for as long as a call of MPI lasts.

    Any number of threads are let in at once; one at a time, while an agreement is under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # taken by itself: a signal's handler may raise in the methods of a Condition
        self._changed = threading.Condition(self._lock)
        self._inside: set[int] = set()
        self._agreements = 0
        self._narrow = ctypes.c_int(0)

    @property
    def address(self) -> int:
        """Where there is an int that is not 0 while only one thread is let in: whoever is inside leaves soon then."""
        return ctypes.addressof(self._narrow)

    @property
    def is_narrow(self) -> bool:
        """Whether only one thread is let in."""
        return bool(self._narrow.value)

    @property
    def inside(self) -> frozenset[int]:
        """The threads that are inside."""
        return frozenset(self._inside)

    def __enter__(self) -> None:
        own = threading.get_ident()
        with self._lock:
            self._changed.wait_for(lambda: not (self._agreements and self._inside - {own}), LONGEST_TURN_S)
            self._inside.add(own)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._inside.discard(threading.get_ident())
            if self._agreements:
                self._changed.notify()

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Let one thread in at a time meanwhile; the caller is not inside."""
        with self._lock:
            self._agreements += 1
            self._narrow.value = 1
        try:
            yield
        finally:
            with self._lock:
                self._agreements -= 1
                self._narrow.value = int(self._agreements > 0)
                self._changed.notify_all()


GATE = Gate()
"""Of this process, where the job outlives its ranks."""

Waits = Callable[[Any], None]
"""Waits for a request of mpi4py, inside the gate whenever it looks; raises what MPI raises."""


_LEFT: list[Any] = []
"""What MPI may still write to, where a wait was given up, as by Ctrl-C."""


def agree(comm: Any, done: bool, wait: Waits) -> bool:
    """Return what all ranks of `comm`, of mpi4py, agree on; raise mpi4py's error where one is lost."""
    flag = array("i", [int(done)])
    with GATE.agreeing(), _kept(flag):
        with GATE:
            request = comm.Iagree(flag)
        wait(request)
    return bool(flag[0])


def shrink(mpi: Any, comm: Any, wait: Waits) -> Any:
    """Return a communicator of those ranks of `comm` that are left (collective over them).

    All of them know the same ranks as lost before it is made: Open MPI forgets a group where it has to ask again.
    """
    begin, left, request = _shrink_of(mpi), mpi.Intracomm(), mpi.Request()
    with GATE.agreeing(), _kept(left):
        _agree_on_lost(mpi, comm, wait)
        if begin is None:
            return comm.Shrink()
        with GATE:
            handle = ctypes.c_void_p.from_address(mpi._addressof(comm))
            code = begin(handle, mpi._addressof(left), mpi._addressof(request))
        if code:
            raise mpi.Exception(mpi.ERR_OTHER)
        wait(request)
    return left


def _agree_on_lost(mpi: Any, comm: Any, wait: Waits) -> None:
    while True:
        with GATE:
            comm.Ack_failed()
        try:
            agree(comm, True, wait)
            return
        except mpi.Exception as error:
            if error.Get_error_class() != mpi.ERR_PROC_FAILED:
                raise


@contextmanager
def _kept(memory: Any) -> Iterator[None]:
    _LEFT.append(memory)
    yield
    _LEFT[:] = [each for each in _LEFT if each is not memory]


@functools.cache
def _shrink_of(mpi: Any) -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(mpi.__file__)
    except OSError:
        return None
    for name in _SHRINKS:
        if (found := getattr(library, name, None)) is not None:
            found.restype, found.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
            return found  # type: ignore[no-any-return]
    return None
