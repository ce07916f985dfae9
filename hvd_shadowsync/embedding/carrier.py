"""What brings ids to the owners of rows, vectors to the ranks that ask, and gradients back to the owners."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.embedding.inputs import Batch
from hvd_shadowsync.embedding.meeting import Word
from hvd_shadowsync.embedding.routing import Ask, Lookup


class Way(enum.IntEnum):
    """How a rank's batch goes to the owners."""

    MESSAGES = 0
    SHARED = 1
    """Through memory that all ranks share."""
    MORE = 2
    """Through memory of which there has to be more first."""


@dataclass(frozen=True)
class Offer:
    """A batch that is ready for its owners.

    Attributes:
        way: how it goes.
        sizes: what each owner is told in the meeting; the way says what of.
        asked: see `Lookup.asked`.
        content: the carrier's own.
    """

    way: Way
    sizes: Sequence[int]
    asked: list[list[Ask]]
    content: Any = None


class Carrier(ABC):
    """One way between the ranks; for one thread at a time, `stage` excepted."""

    @abstractmethod
    def offer(self, batch: Batch, dtype: torch.dtype) -> Offer | None:
        """Get a batch ready, before the meeting of its lookup; None where it has to go another way."""

    @abstractmethod
    def look_up(self, lookup: Lookup, offer: Offer | None, words: Sequence[Word], dtype: torch.dtype) -> None:
        """Fill `lookup.out`, and answer the others (collective); without an offer, answer alone."""

    @abstractmethod
    def stage(self, lookup: Lookup, gradient: Tensor, *, keep: bool) -> Tensor:
        """Get the gradient of `lookup.out` ready, before the meeting of its update; may be called by another thread.

        Returns:
            what `update` takes: gradients of sums, rows contiguous; with `keep` no memory of the caller.
        """

    @abstractmethod
    def update(self, lookup: Lookup, gradient: Tensor, exponent: int, words: Sequence[Word]) -> None:
        """Update the rows that `lookup` touched (collective)."""
