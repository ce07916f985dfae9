"""Compiled libraries of this package: one per instruction set, called through ctypes with Python's lock released."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

VARIANTS = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}

Signature = tuple[Any, Sequence[Any]]
"""The ctypes types of what a function returns, and of its arguments."""


def load(folder: Path, name: str, functions: Mapping[str, Signature]) -> ctypes.CDLL | None:
    """Return the library `name` of `folder` for this machine's instruction set, or None where it was not built.

    Args:
        folder: where setup.py puts it, as `{name}_{variant}` with a suffix of the platform.
        name: the file's name before the variant.
        functions: what it has, by name.
    """
    for variant in VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ("default",)):
        for file in sorted(folder.glob(f"{name}_{variant}.*so")):
            try:
                library = ctypes.CDLL(str(file))
                typed = {name: getattr(library, name) for name in functions}
            except (OSError, AttributeError):  # of another machine, or built from older sources
                continue
            for function, (result, arguments) in functions.items():
                typed[function].restype, typed[function].argtypes = result, arguments
            return library
    return None
