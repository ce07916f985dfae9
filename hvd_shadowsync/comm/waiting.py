"""Waiting for an MPI request without Python's lock (`waiting.cpp`).

A thread that polls from Python takes the interpreter's lock away from the training thread at every look, and needs
some 50 us of CPU time for it. Compiled, a look takes a few, and training goes on beside it.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hvd_shadowsync import libraries
from hvd_shadowsync.comm.agreement import Gate
from hvd_shadowsync.comm.poll import Poller

SLICE_S = 0.02  # between two of them signals are handled, and a daemon thread ends with the interpreter
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_FUNCTIONS: dict[str, libraries.Signature] = {
    "shadow_wait": (ctypes.c_int, [_P, _P, _P, _D, _I, _D, _D, _D, _D, _P, _P]),
}


class _Wait(ctypes.Structure):
    _fields_ = (("spin_until_ns", _I), ("polls", _I), ("pause_s", _D))


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built."""
    return libraries.load(Path(__file__).parent, "_waiting", _FUNCTIONS)


@functools.cache
def mpi_test(mpi: Any) -> int | None:
    """Return the address of the `MPI_Test` that the module `mpi` of mpi4py calls; None where it is not to be found."""
    for library in (None, mpi.__file__):  # as the dynamic linker binds mpi4py's own calls: what is global comes first
        try:
            return ctypes.cast(ctypes.CDLL(library).MPI_Test, _P).value
        except (OSError, AttributeError):
            continue
    return None


def wait(
    test: int, request: int, poller: Poller, failed: Callable[[int], BaseException], gate: Gate | None = None
) -> None:
    """Return when the request is complete, polling as `poller` does; `load` has to have found the library.

    Args:
        test: address of a function as `MPI_Test`.
        request: address of the request.
        poller: how to wait.
        failed: makes an exception of a code that `test` returns.
        gate: what to be inside of while it looks; where that is narrow it is left after each look.
    """
    library = load()
    assert library is not None, "load() says whether it is there"
    state, complete, looks = _Wait(), ctypes.c_int(0), 0
    while not complete.value:
        with nullcontext() if gate is None else gate:
            code = library.shadow_wait(
                test, request, ctypes.byref(state), poller.spin_s, poller.eager, poller.shortest_s, poller.longest_s,
                poller.growth, SLICE_S, ctypes.byref(complete), None if gate is None else gate.address,
            )  # fmt: skip
        if code:
            raise failed(code)
        if gate is not None and gate.is_narrow and not complete.value:
            looks = 0 if time.monotonic_ns() < state.spin_until_ns else looks + 1
            poller.pause(poller.eager + looks if looks else 0)
