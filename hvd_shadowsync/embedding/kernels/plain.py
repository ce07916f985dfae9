"""The engine that needs nothing but torch: sorts ids, sums by segments, updates with indexed copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hvd_shadowsync.embedding.kernels.base import Bags, Division, Kernel, Part, Pooling, Scattering, Update
from hvd_shadowsync.embedding.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad, SparseOptimizer


class PlainKernel(Kernel):
    """See `Kernel`."""

    name = "plain"

    def first_outside(self, ids: Tensor, num_rows: int) -> int:
        """See `Kernel.first_outside`."""
        if not len(ids):
            return -1
        least, most = torch.aminmax(ids)
        if least >= 0 and most < num_rows:
            return -1
        return int(((ids < 0) | (ids >= num_rows)).nonzero()[0])

    def unique(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernel.unique`."""
        found, inverse = torch.unique(ids.int(), return_inverse=True)
        return found, inverse.int()

    def split(self, bags: Bags, division: Division) -> list[Part]:
        """See `Kernel.split`."""
        ids = bags.ids.long()
        if division.multiplier is None:
            part = ((ids + 1) * division.parts - 1) // division.num_rows
            rows = ids - division.num_rows * part // division.parts
        else:
            hashes = ids * division.multiplier % division.num_rows
            part, rows = hashes % division.parts, hashes // division.parts
        bag_of = _bag_of(bags)
        found = []
        for each in range(division.parts):
            places = (part == each).nonzero().view(-1)
            lengths = torch.bincount(bag_of[places], minlength=bags.num_bags).int()
            weights = None if bags.weights is None else bags.weights[places]
            found.append(Part(Bags(rows[places].int(), lengths, weights), places))
        return found

    def pool(self, poolings: Sequence[Pooling]) -> None:
        """See `Kernel.pool`."""
        for rows, bags, out, add in poolings:
            if bags.lengths is None and bags.weights is None:
                pooled = rows.index_select(0, bags.ids)
            elif not len(bags.ids):
                pooled = rows.new_zeros(out.shape)
            else:
                ends = _ends(bags)
                pooled = embedding_bag(bags.ids.long(), rows, ends, mode="sum", per_sample_weights=bags.weights)
            if add:
                out += pooled
            else:
                out.copy_(pooled)

    def scatter(self, scatterings: Sequence[Scattering]) -> None:
        """See `Kernel.scatter`."""
        for bags, vectors, out in scatterings:
            out.zero_()
            each = vectors.index_select(0, _bag_of(bags))
            out.index_add_(0, bags.ids, each if bags.weights is None else each * bags.weights.unsqueeze(1))

    def update(self, rule: SparseOptimizer, step: int, updates: Sequence[Update]) -> None:
        """See `Kernel.update`."""
        for update in updates:
            rows, grad = _sums_by_row(update)
            if len(rows):
                _apply(rule, step, update, rows, grad)


def _ends(bags: Bags) -> Tensor:
    """Return where each bag begins."""
    if bags.lengths is None:
        return torch.arange(len(bags.ids))
    ends = bags.lengths.cumsum(0)
    return ends - bags.lengths


def _bag_of(bags: Bags) -> Tensor:
    """Return the bag of each id."""
    numbers = torch.arange(bags.num_bags)
    return numbers if bags.lengths is None else numbers.repeat_interleave(bags.lengths, output_size=len(bags.ids))


def _sums_by_row(update: Update) -> tuple[Tensor, Tensor]:
    """Return the rows that are touched, ascending, and the sum of the gradients of each."""
    gradients = [each for each in update.gradients if len(each.bags.ids)]
    if not gradients:
        return torch.empty(0, dtype=torch.int64), update.rows.new_empty((0, update.rows.shape[1]))
    ids = torch.cat([each.bags.ids.long() for each in gradients])
    ordered, order = torch.sort(ids, stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = counts.cumsum(0) - counts
    first_bags = [0]
    for each in gradients:
        first_bags.append(first_bags[-1] + each.bags.num_bags)
    bag_of = torch.cat([_bag_of(each.bags) + first for each, first in zip(gradients, first_bags[:-1], strict=True)])
    vectors = torch.cat([each.vectors * each.scale if each.scale != 1 else each.vectors for each in gradients])
    weights = None
    if any(each.bags.weights is not None for each in gradients):
        ones = update.rows.new_ones
        weights = torch.cat([ones(len(e.bags.ids)) if e.bags.weights is None else e.bags.weights for e in gradients])
        weights = weights[order]
    return rows, embedding_bag(bag_of[order], vectors, starts, mode="sum", per_sample_weights=weights)


def _apply(rule: SparseOptimizer, step: int, update: Update, rows: Tensor, grad: Tensor) -> None:
    weight, state = update.rows, update.state
    if isinstance(rule, RowWiseAdagrad):
        sums = state[0][rows] + grad.square().mean(1)
        state[0][rows] = sums
        weight.index_add_(0, rows, grad * (rule.lr / (sums.sqrt() + rule.eps)).unsqueeze(1), alpha=-1)
    elif isinstance(rule, Adagrad):
        sums = state[0][rows] + grad.square()
        state[0][rows] = sums
        weight.index_add_(0, rows, grad / (sums.sqrt() + rule.eps), alpha=-rule.lr)
    elif isinstance(rule, Adam):
        average = state[0][rows].lerp_(grad, 1 - rule.betas[0])
        squares = state[1][rows].lerp_(grad.square(), 1 - rule.betas[1])
        state[0][rows], state[1][rows] = average, squares
        weight.index_add_(0, rows, average / (squares.sqrt() + rule.eps), alpha=-rule.lr * rule.correction(step))
    elif isinstance(rule, SGD):
        weight.index_add_(0, rows, grad, alpha=-rule.lr)
    else:
        raise TypeError(f"{type(rule).__name__} is not known to the plain kernel")
