"""Engines for rows: the compiled one where it was built, FBGEMM's where that is installed, plain torch everywhere."""

from __future__ import annotations

import functools

from hvd_shadowsync.embedding.kernels import compiled, fbgemm
from hvd_shadowsync.embedding.kernels.base import Kernel
from hvd_shadowsync.embedding.kernels.plain import PlainKernel

NAMES = ("auto", "compiled", "fbgemm", "plain")


@functools.cache
def choose(name: str) -> Kernel:
    """Return the engine of this name; "auto" is the first that there is: compiled, fbgemm, plain.

    That is the order of their speed on CPUs; FBGEMM's operators took longer than the compiled ones for the same ids.

    Raises:
        ValueError: the name is unknown, or that engine is not here; says what to do.
    """
    if name not in NAMES:
        raise ValueError(f"kernel={name!r} is unknown; give one of {', '.join(map(repr, NAMES))}")
    library = None if name == "plain" else compiled.load()
    own = PlainKernel() if library is None else compiled.CompiledKernel(library)
    if name == "compiled" and library is None:
        raise ValueError(
            "kernel='compiled' was not built; install the package with a C++ compiler on the machine, or give 'auto'"
        )
    if name == "fbgemm" or (name == "auto" and library is None):
        try:
            return fbgemm.load(own)
        except ImportError as error:
            if name == "fbgemm":
                raise ValueError(str(error)) from error
    return own
