"""FBGEMM's table-batched embedding operators for the CPU, called as they are: on rows that this package holds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.embedding.kernels.base import (
    Bags,
    Division,
    Gradient,
    Kernel,
    Part,
    Pooling,
    Scattering,
    Update,
)
from hvd_shadowsync.embedding.kernels.plain import PlainKernel
from hvd_shadowsync.embedding.optimizers import SGD, Adagrad, RowWiseAdagrad, SparseOptimizer

SUM = 0  # FBGEMM's PoolingMode.SUM
FLOAT32 = 0  # FBGEMM's SparseType.FP32


def load(inner: Kernel) -> FbgemmKernel:
    """Return the engine, with `inner` for what FBGEMM has no operator for.

    Raises:
        ImportError: FBGEMM is not here, or is not one for the torch that is here; says why, and the remedy.
    """
    if reason := _why_not():
        raise ImportError(
            f"kernel='fbgemm' needs a fbgemm_gpu that goes with torch {torch.__version__} ({reason}); "
            "pip install 'hvd_shadowsync[fbgemm]' brings the one for torch 2.13 (first pip uninstall fbgemm-gpu, "
            "the CUDA build, if it is here: the two share their files); or give 'auto'"
        )
    return FbgemmKernel(inner)


class FbgemmKernel(Kernel):
    """See `Kernel`; `pool` and `update` are FBGEMM's, one call a shard: its operators take one block of memory.

    `update` calls an optimizer's backward operator itself, so that rows are not looked up again. FBGEMM's CPU operators
    are for float32, and SGD, Adagrad and row-wise Adagrad; `inner` has float64, Adam and all else.
    """

    name = "fbgemm"

    def __init__(self, inner: Kernel) -> None:
        self._inner = inner

    def first_outside(self, ids: Tensor, num_rows: int) -> int:
        """See `Kernel.first_outside`."""
        return self._inner.first_outside(ids, num_rows)

    def unique(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernel.unique`."""
        return self._inner.unique(ids)

    def split(self, bags: Bags, division: Division) -> list[Part]:
        """See `Kernel.split`."""
        return self._inner.split(bags, division)

    def scatter(self, scatterings: Sequence[Scattering]) -> None:
        """See `Kernel.scatter`."""
        self._inner.scatter(scatterings)

    def pool(self, poolings: Sequence[Pooling]) -> None:
        """See `Kernel.pool`."""
        for pooling in poolings:
            if pooling.rows.dtype is not torch.float32:
                self._inner.pool([pooling])
                continue
            rows, bags, out, add = pooling
            pooled = torch.ops.fbgemm.split_embedding_codegen_forward_cpu(
                rows.view(-1), _first(), _columns(rows), rows.shape[1], _num_rows(rows), bags.ids, _offsets(bags), SUM,
                bags.weights, FLOAT32,
            )  # fmt: skip
            if add:
                out += pooled
            else:
                out.copy_(pooled)

    def update(self, rule: SparseOptimizer, step: int, updates: Sequence[Update]) -> None:
        """See `Kernel.update`."""
        for update in updates:
            if update.rows.dtype is not torch.float32 or type(rule) not in (SGD, Adagrad, RowWiseAdagrad):
                self._inner.update(rule, step, [update])
            elif gradients := [each for each in update.gradients if len(each.bags.ids)]:
                _update(rule, update.rows, update.state, *_in_one(gradients))


def _update(rule: SparseOptimizer, rows: Tensor, state: tuple[Tensor, ...], bags: Bags, vectors: Tensor) -> None:
    nowhere = torch.zeros(1, dtype=torch.int32)  # placements, which the CPU has no use for
    common = (
        vectors, rows.view(-1), nowhere, _first(), _columns(rows), rows.shape[1], _num_rows(rows),
        len(rows).bit_length(), bags.ids, _offsets(bags), SUM, bags.weights, False,
    )  # fmt: skip
    lr = torch.tensor(rule.lr)
    if isinstance(rule, RowWiseAdagrad):
        momentum = (state[0], nowhere, _first())
        torch.ops.fbgemm.split_embedding_backward_codegen_rowwise_adagrad_cpu(*common, *momentum, lr, rule.eps)
    elif isinstance(rule, Adagrad):
        momentum = (state[0].view(-1), nowhere, _first())
        torch.ops.fbgemm.split_embedding_backward_codegen_adagrad_cpu(*common, *momentum, lr, rule.eps)
    else:
        torch.ops.fbgemm.split_embedding_backward_codegen_sgd_cpu(*common, lr)


def _in_one(gradients: list[Gradient]) -> tuple[Bags, Tensor]:
    """Return the bags of all gradients as one, with their vectors, scaled: an operator updates a row once a call."""
    vectors = [each.vectors if each.scale == 1 else each.vectors * each.scale for each in gradients]
    if len(gradients) == 1:
        return gradients[0].bags, vectors[0]
    all_bags = [each.bags for each in gradients]
    lengths = weights = None
    if any(bags.lengths is not None for bags in all_bags):
        one_each = [torch.ones(bags.num_bags, dtype=torch.int32) for bags in all_bags]
        lengths = torch.cat([o if b.lengths is None else b.lengths for b, o in zip(all_bags, one_each, strict=True)])
    if any(bags.weights is not None for bags in all_bags):
        weights = torch.cat([torch.ones(len(b.ids)) if b.weights is None else b.weights for b in all_bags])
    return Bags(torch.cat([bags.ids for bags in all_bags]), lengths, weights), torch.cat(vectors)


def _offsets(bags: Bags) -> Tensor:
    """Return where each bag begins, and the end, of the ids' dtype: the operators want both alike."""
    dtype = bags.ids.dtype
    if bags.lengths is None:
        return torch.arange(len(bags.ids) + 1, dtype=dtype)
    offsets = torch.zeros(len(bags.lengths) + 1, dtype=dtype)
    torch.cumsum(bags.lengths, 0, dtype=dtype, out=offsets[1:])
    return offsets


def _first() -> Tensor:
    """Return where the one table begins, in elements."""
    return torch.zeros(1, dtype=torch.int64)


def _columns(rows: Tensor) -> Tensor:
    """Return the first column and the last of the one table."""
    return torch.tensor([0, rows.shape[1]], dtype=torch.int32)


def _num_rows(rows: Tensor) -> Tensor:
    """Return the sum of rows before and after the one table."""
    return torch.tensor([0, len(rows)])


@functools.cache
def _why_not() -> str:
    """Import FBGEMM and try it out; return why it cannot be used, or nothing."""
    quiet = logging.NullHandler()  # without a handler the warnings of its import would set up logging for the program
    logging.getLogger().addHandler(quiet)
    try:
        import fbgemm_gpu  # noqa: F401

        _try_out()
    except Exception as error:  # a library for another torch raises what it likes
        cause: Any = error.__cause__ or error
        return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
    finally:
        logging.getLogger().removeHandler(quiet)
    return ""


def _try_out() -> None:
    """Raise unless every operator is there, takes these arguments, and does what the plain engine does."""
    bags = Bags(torch.tensor([0, 1]))
    for rule, shape in ((SGD(0.5), (0,)), (Adagrad(0.5), (2, 4)), (RowWiseAdagrad(0.5), (2,))):
        rows, expected, out = torch.ones(2, 4), torch.ones(2, 4), torch.empty(2, 4)
        for kernel, weight in ((FbgemmKernel(PlainKernel()), rows), (PlainKernel(), expected)):
            kernel.update(rule, 1, [Update(weight, (torch.zeros(shape),), [Gradient(bags, torch.ones(2, 4), 1.0)])])
        FbgemmKernel(PlainKernel()).pool([Pooling(rows, bags, out)])
        if not torch.allclose(out, expected):
            raise RuntimeError(f"its {type(rule).__name__} is another")
