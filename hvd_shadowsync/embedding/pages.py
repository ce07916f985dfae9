"""Memory for rows in large pages, where the system has them.

Rows are read all over, and each small page costs the processor a look-up of its own in its tables of pages.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

LARGE = 2 << 20
LEAST = 2 * LARGE
"""Bytes from which large pages are asked for."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory without values, contiguous."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    start = -found.data_ptr() % LARGE
    return found[start : start + num_bytes].view(dtype).view(shape)


def converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` if they are of `dtype` and contiguous already, else a copy that is."""
    if values.dtype is dtype and values.is_contiguous() and values.device.type == "cpu":
        return values
    return empty(tuple(values.shape), dtype).copy_(values)
