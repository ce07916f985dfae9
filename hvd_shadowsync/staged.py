"""What a round leaves for the live tensors: made slice by slice in place of the snapshot, merged as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_shadowsync.ballot import Verdict
from hvd_shadowsync.finite import all_finite, has_nan
from hvd_shadowsync.gpus import Arriving
from hvd_shadowsync.replica import Merge, Replica

DISTANCE_SAMPLE = 1 << 12


@dataclass
class Staged:
    """The result of a round, ready for the live tensors of `replica`; `integers` where they come from another rank.

    With `heals` the live tensors had bad numbers, and become the others'; those numbered in `still` stay as they are.
    `members` are the numbers of the ranks that a consolidation is of, the first rank's first: the same on all of them.
    `counts`: whether this rank's replica is in it.
    """

    replica: Replica
    vector: Tensor
    integers: Tensor | None
    how: Merge
    alpha: float
    verdict: Verdict
    steps: int
    sample: Tensor | None = None
    heals: bool = False
    still: frozenset[int] = frozenset()
    members: tuple[int, ...] = ()
    counts: bool = True

    def merge(self, *, hogwild: bool = False) -> Progress | None:
        """Bring the result into the live tensors; return what of the progress in flight is left, where it is told."""
        count = 0 if self.sample is None else self.sample.numel()
        before = self.replica.head(count)
        self.replica.merge(self.vector, self.how, self.alpha, hogwild=hogwild, still=self.still)
        if self.integers is not None:
            self.replica.assign_integers(self.integers, hogwild=hogwild)
        if self.sample is None:
            return None
        staged = self.vector[:count]
        moved = staged if self.how is Merge.ADD else self.alpha * (staged - self.sample)
        return Progress(self.sample, self.sample + moved, before, self.replica.head(count))


@dataclass
class Progress:
    """Some weights at the snapshot, where a merge without progress in flight would take them, and around the merge."""

    sample: Tensor
    undisturbed: Tensor
    before: Arriving
    after: Arriving

    def surviving(self) -> float:
        """Return the share of the steps made in flight that is left after the merge; nan if there were none."""
        before, after = self.before.get(), self.after.get()
        count = before.numel()
        progress = (before - self.sample[:count]).double()
        kept = (after - self.undisturbed[:count]).double()
        norm = float(progress @ progress)
        return float(kept @ progress) / norm if norm > 0 else math.nan


class Stage:
    """Turns the snapshot into what is merged, as the anchor's slices come.

    Args:
        replica: what was copied.
        snapshot: its copy, which gives way to the result.
        how: it is merged; `Merge.ASSIGN` where the replica has bad numbers and becomes the anchor.
        alpha: the algorithm's.
        suspect: called with a part of the snapshot, before it gives way, in which a replica has bad numbers, perhaps
            this one.
    """

    def __init__(
        self, replica: Replica, snapshot: Tensor, how: Merge, alpha: float, suspect: Callable[[slice], None]
    ) -> None:
        self._replica, self._snapshot, self.how, self._alpha, self._suspect = replica, snapshot, how, alpha, suspect
        self.is_whole = True
        """Whether all slices of the weights had an anchor so far."""
        self.still: set[int] = set()
        """Numbers of tensors that stay as they are."""
        self._away = self._norm = 0.0

    def distance(self) -> float:
        """Return that of the replica from the anchor, over the anchor's norm, on a sample of each slice."""
        return math.sqrt(self._away / self._norm) if self._norm > 0 else math.nan

    def add(self, piece: slice, anchor: Tensor) -> None:
        """Stage a slice of weights, or of buffers."""
        staged = self._snapshot[piece]
        if piece.start >= self._replica.num_weights and not all_finite(moves := anchor - staged):
            self._add_irregular(piece, anchor, moves)
            return
        if self.how is Merge.ASSIGN:
            staged.copy_(anchor)
            return
        some = anchor[:DISTANCE_SAMPLE]
        away = some - staged[:DISTANCE_SAMPLE]
        self._away += float(torch.dot(away, away))
        self._norm += float(torch.dot(some, some))
        if self.how is Merge.PULL:
            staged.copy_(anchor)
            return
        torch.sub(anchor, staged, out=staged)
        if self._alpha != 1:
            staged.mul_(self._alpha)

    def leave_alone(self, piece: slice) -> None:
        """Stage no movement of weights, which have no anchor here."""
        self.is_whole = False
        self._suspect(piece)
        if self.how is Merge.ADD:
            self._snapshot[piece].zero_()

    def _add_irregular(self, piece: slice, anchor: Tensor, moves: Tensor) -> None:
        """Stage buffers that have infinity, which may be a mask's and stays, or NaN, which does not spread."""
        staged = self._snapshot[piece]
        if has_nan(staged):
            self._suspect(piece)
        if self.how is Merge.ASSIGN:
            torch.where(anchor.isnan(), staged, anchor, out=staged)
        elif self.how is Merge.ADD:
            torch.mul(moves.nan_to_num_(0.0, 0.0, 0.0), self._alpha, out=staged)
        else:
            staged.copy_(anchor)
            for number, segment in enumerate(self._replica.segments):
                if not all_finite(moves[max(segment.start - piece.start, 0) : max(segment.stop - piece.start, 0)]):
                    self.still.add(number)
