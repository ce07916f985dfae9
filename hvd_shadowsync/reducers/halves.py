"""Half precision on the wire: its conversions, fused with the arithmetic beside them (`halves.cpp`), or in plain torch.

The compiled functions take contiguous CPU tensors: float32 ones, and halves (float16 or bfloat16). Whatever else is
given, and everything where no library was built, goes through torch. `narrow_distance` and `add_widened` give the same
bits either way, but for what a nan carries; `mean_of_rows` may differ in the last bit, as torch's sums do by processor.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hvd_shadowsync import libraries

_P, _I = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, libraries.Signature] = {
    "shadow_narrow_distance": (None, [_P, _P, _P, _I, _I]),
    "shadow_mean_of_rows": (None, [_P, _I, _P, ctypes.c_double, _P, _I, _I]),
    "shadow_add_widened": (None, [_P, _P, _I, _I]),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library for this machine's instruction set, or None where it was not built."""
    return libraries.load(Path(__file__).parent, "_halves", _FUNCTIONS)


def narrow_distance(snapshot: Tensor, reference: Tensor, out: Tensor) -> None:
    """Write `snapshot - reference` to `out`, rounded to nearest even, what is too large as the largest finite number.

    Equal values are 0 apart, infinite ones as well. Other infinity in the snapshot becomes nan: as a large finite
    distance it would move the mean, and nobody would know.

    Args:
        snapshot, reference: flat, of the same length and dtype; nan stays nan.
        out: flat, of that length; its dtype is what travels.
    """
    library = _library(wide=(snapshot, reference), halves=(out,))
    if library is not None and snapshot.numel() == reference.numel() == out.numel():
        library.shadow_narrow_distance(
            snapshot.data_ptr(), reference.data_ptr(), out.data_ptr(), out.numel(), _is_bfloat16(out)
        )
    else:
        largest = torch.finfo(out.dtype).max
        distance = torch.sub(snapshot, reference).clamp_(-largest, largest).add_(snapshot - snapshot)
        out.copy_(distance.masked_fill_(snapshot == reference, 0.0))


def mean_of_rows(rows: Tensor, weights: Sequence[float], out: Tensor, dtype: torch.dtype) -> None:
    """Write the weighted mean of `rows` to `out`: summed in their order, divided, then rounded to nearest even.

    Args:
        rows: [number of rows, length].
        weights: one a row; a row with 0 is not read, so it may hold anything.
        out: [length], of the rows' dtype.
        dtype: what the sums are formed in.

    Raises:
        ValueError: all weights are 0.
    """
    if not any(weights):
        raise ValueError("the weights are all 0; give at least one row another one")
    library = _library(wide=(), halves=(rows, out)) if dtype is torch.float32 else None
    if library is not None and rows.shape == (len(weights), out.numel()):
        each = array("d", weights)
        library.shadow_mean_of_rows(
            rows.data_ptr(), len(each), each.buffer_info()[0], sum(weights), out.data_ptr(), out.numel(),
            _is_bfloat16(out),
        )  # fmt: skip
    else:
        (first, weight), *others = [pair for pair in zip(rows, weights, strict=True) if pair[1]]
        mean = (out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)).copy_(first)
        if weight != 1:
            mean.mul_(weight)
        for row, weight in others:
            mean.add_(row.to(dtype), alpha=weight)
        mean.div_(sum(weights))
        if mean is not out:
            out.copy_(mean)


def add_widened(reference: Tensor, values: Tensor) -> None:
    """Add `values` (flat, of the dtype that travels) to `reference` (flat, of that length), in the latter's dtype."""
    library = _library(wide=(reference,), halves=(values,))
    if library is not None and reference.numel() == values.numel():
        library.shadow_add_widened(reference.data_ptr(), values.data_ptr(), values.numel(), _is_bfloat16(values))
    else:
        reference.add_(values.to(reference.dtype))


def _library(wide: tuple[Tensor, ...], halves: tuple[Tensor, ...]) -> ctypes.CDLL | None:
    """Return the library if it is there and takes these tensors."""
    half = halves[0].dtype
    suits = (
        half in (torch.float16, torch.bfloat16)
        and all(each.dtype is half for each in halves)
        and all(each.dtype is torch.float32 for each in wide)
        and all(each.is_cpu and each.is_contiguous() for each in (*wide, *halves))
    )
    return load() if suits else None


def _is_bfloat16(tensor: Tensor) -> int:
    return int(tensor.dtype is torch.bfloat16)
