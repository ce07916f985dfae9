"""Engines for rows: the compiled one where it was built, plain torch everywhere."""

from __future__ import annotations

import functools

from hvd_shadowsync.embedding.kernels import compiled
from hvd_shadowsync.embedding.kernels.base import Kernel
from hvd_shadowsync.embedding.kernels.plain import PlainKernel

NAMES = ("auto", "compiled", "plain")


@functools.cache
def choose(name: str) -> Kernel:
    """Return the engine of this name; "auto" is the fastest that there is.

    Raises:
        ValueError: the name is unknown, or that engine is not here; says what to do.
    """
    if name not in NAMES:
        raise ValueError(f"kernel={name!r} is unknown; give one of {', '.join(map(repr, NAMES))}")
    library = None if name == "plain" else compiled.load()
    if library is not None:
        return compiled.CompiledKernel(library)
    if name == "compiled":
        raise ValueError(
            "kernel='compiled' was not built; install the package with a C++ compiler on the machine, or give 'auto'"
        )
    return PlainKernel()
