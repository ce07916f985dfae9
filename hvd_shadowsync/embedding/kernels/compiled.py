"""Our compiled engine: `kernels.cpp`, called through ctypes, with Python's lock released."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hvd_shadowsync import libraries
from hvd_shadowsync.embedding.kernels.base import Bags, Division, Kernel, Part, Pooling, Scattering, Update
from hvd_shadowsync.embedding.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad, SparseOptimizer

RULES = {SGD: 0, RowWiseAdagrad: 1, Adagrad: 2, Adam: 3}
NO_MEMORY = -2
ONE = struct.unpack("q", struct.pack("d", 1.0))[0]
_P, _I = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, libraries.Signature] = {
    "shadow_pool": (_I, [_P, _I, _I, _I]),
    "shadow_scatter": (_I, [_P, _I, _I, _I]),
    "shadow_update": (_I, [_P, _I, _P, _P, _I, _I]),
    "shadow_unique": (_I, [_P, _I, _I, _P, _P]),
    "shadow_first_outside": (_I, [_P, _I, _I, _I]),
    "shadow_count_parts": (None, [_P, _I, _I, _P, _P]),
    "shadow_split": (_I, [_P, _I, _P, _I, _P, _P, _P, _P, _P]),
}


def load() -> ctypes.CDLL | None:
    """Return the library for this machine's instruction set, or None where it was not built."""
    return libraries.load(Path(__file__).parent, "_kernels", _FUNCTIONS)


class CompiledKernel(Kernel):
    """See `Kernel`."""

    name = "compiled"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def first_outside(self, ids: Tensor, num_rows: int) -> int:
        """See `Kernel.first_outside`."""
        return int(self._library.shadow_first_outside(ids.data_ptr(), _wide(ids), ids.numel(), num_rows))

    def unique(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernel.unique`."""
        both = torch.empty(2, ids.numel(), dtype=torch.int32)
        inverse = both[1]
        unique = self._library.shadow_unique
        count = _done(unique(ids.data_ptr(), _wide(ids), ids.numel(), both.data_ptr(), inverse.data_ptr()))
        return both[0, :count], inverse

    def split(self, bags: Bags, division: Division) -> list[Part]:
        """See `Kernel.split`."""
        multiplier = division.multiplier
        described = array("q", [multiplier is not None, division.num_rows, division.parts, multiplier or 0])
        counts = array("q", [0] * division.parts)
        num_ids = len(bags.ids)
        self._library.shadow_count_parts(
            bags.ids.data_ptr(), _wide(bags.ids), num_ids, _address(described), _address(counts)
        )
        rows, places = torch.empty(num_ids, dtype=torch.int32), torch.empty(num_ids, dtype=torch.int64)
        lengths = torch.empty(division.parts, bags.num_bags, dtype=torch.int32)
        _done(self._library.shadow_split(
            bags.ids.data_ptr(), _wide(bags.ids), _pointer(bags.lengths), bags.num_bags, _address(described),
            _address(counts), rows.data_ptr(), lengths.data_ptr(), places.data_ptr(),
        ))  # fmt: skip
        sizes = counts.tolist()
        return [
            Part(Bags(part, lengths[index], None if bags.weights is None else bags.weights[place]), place)
            for index, (part, place) in enumerate(
                zip(torch.split(rows, sizes), torch.split(places, sizes), strict=True)
            )
        ]

    def pool(self, poolings: Sequence[Pooling]) -> None:
        """See `Kernel.pool`."""
        if poolings:
            described = _flat(_described(bags, rows, out, add, ONE) for rows, bags, out, add in poolings)
            is_double = _is_double(poolings[0].rows)
            _done(self._library.shadow_pool(_address(described), len(poolings), is_double, torch.get_num_threads()))

    def scatter(self, scatterings: Sequence[Scattering]) -> None:
        """See `Kernel.scatter`."""
        for each in scatterings:
            each.out.zero_()
        if scatterings:
            described = _flat(_described(bags, out, vectors, 0, ONE) for bags, vectors, out in scatterings)
            is_double = _is_double(scatterings[0].out)
            _done(
                self._library.shadow_scatter(_address(described), len(scatterings), is_double, torch.get_num_threads())
            )

    def update(self, rule: SparseOptimizer, step: int, updates: Sequence[Update]) -> None:
        """See `Kernel.update`."""
        if not updates:
            return
        touches = array("q")
        shards = array("q")
        for update in updates:
            first = len(touches) // 12
            for bags, vectors, scale in update.gradients:
                bits = ONE if scale == 1.0 else struct.unpack("q", struct.pack("d", scale))[0]
                touches.extend(_described(bags, update.rows, vectors, 0, bits))
            state = [each.data_ptr() for each in update.state] + [0, 0]
            num_rows, dim = update.rows.shape
            shards.extend([update.rows.data_ptr(), dim, num_rows, *state[:2], first, len(touches) // 12])
        _done(self._library.shadow_update(
            _address(shards), len(updates), _address(touches), _rule(rule, step), _is_double(updates[0].rows),
            torch.get_num_threads(),
        ))  # fmt: skip


def _done(result: int) -> int:
    """Return what a function of the library returned, if it had the memory that it needed."""
    if result == NO_MEMORY:
        raise MemoryError("no memory for the lookup or update of rows; give smaller batches")
    return result


def _rule(rule: SparseOptimizer, step: int) -> ctypes.Array[ctypes.c_char]:
    if type(rule) not in RULES:
        raise TypeError(f"{type(rule).__name__} is not known to the compiled kernel")
    eps, betas, correction = 0.0, (0.0, 0.0), 1.0
    if isinstance(rule, (Adagrad, RowWiseAdagrad)):
        eps = rule.eps
    elif isinstance(rule, Adam):
        eps, betas, correction = rule.eps, rule.betas, rule.correction(step)
    return ctypes.create_string_buffer(struct.pack("q5d", RULES[type(rule)], rule.lr, eps, *betas, correction))


def _described(bags: Bags, rows: Tensor, vectors: Tensor, add: int, scale_bits: int) -> tuple[int, ...]:
    ids = bags.ids
    if vectors.dtype is not rows.dtype or (bags.weights is not None and bags.weights.dtype is not rows.dtype):
        raise TypeError(f"vectors of {vectors.dtype} for rows of {rows.dtype}")
    return (
        rows.data_ptr(), rows.shape[1], ids.data_ptr(), _wide(ids), _pointer(bags.lengths), _pointer(bags.weights),
        bags.num_bags, ids.numel(), vectors.data_ptr(), vectors.stride(0), add, scale_bits,
    )  # fmt: skip


def _flat(described: Iterable[tuple[int, ...]]) -> array[int]:
    return array("q", [value for each in described for value in each])


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _wide(ids: Tensor) -> int:
    return int(ids.dtype is torch.int64)


def _is_double(rows: Tensor) -> int:
    return int(rows.dtype is torch.float64)
