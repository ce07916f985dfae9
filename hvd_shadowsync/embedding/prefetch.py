"""Lookups ahead of their batches: a data loader whose next batches are looked up while the present one is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from hvd_shadowsync.checks import check_count

T = TypeVar("T")
MOST = 8


class LooksAhead(Protocol):
    """What a prefetcher asks of a `ShardedEmbeddingBag`, in the training thread."""

    def look_up_ahead(self, inputs: Any) -> None:
        """Begin to look `inputs` up in another thread, for the forward that is given this very object (collective)."""

    def no_more_ahead(self) -> None:
        """Say that no lookup of this rank comes before the updates of those that were begun ahead."""

    def drop_ahead(self) -> None:
        """Forget lookups that were begun ahead and not used."""

    def join_all(self) -> None:
        """Serve the others from now on, in this module and all others of its thread."""


class Prefetcher(Iterable[T]):
    """Yields the batches of `loader`; the lookups of the next `depth` batches run meanwhile, in a thread.

    A lookup made ahead sees every update but those of the `depth` batches before its own: vectors are stale by exactly
    `depth` updates, on every rank, always; gradients are applied to the rows as they are when they arrive. `depth=0` is
    exact: nothing is looked up ahead.

    Each iteration is a pass over `loader`. When a rank has no more batches it joins (`ShardedEmbeddingBag.join`),
    in all modules of its thread. After
    an error in a lookup ahead, on any rank, the module is of no more use: every call raises the same.

    Args:
        embedding: the module.
        loader: batches, a `DataLoader` for instance.
        inputs: takes a batch and returns the very object that the model passes to `embedding`; default: the batch.
        depth: batches looked up ahead, 0 to 8; default 1.
    """

    def __init__(
        self,
        embedding: LooksAhead,
        loader: Iterable[T],
        inputs: Callable[[T], Any] | None = None,
        *,
        depth: int = 1,
    ) -> None:
        check_count("depth", depth, least=0)
        if depth > MOST:
            raise ValueError(f"depth={depth} makes vectors stale by as many updates; give at most {MOST}")
        if isinstance(loader, Prefetcher):
            raise ValueError(
                "loader is looked up ahead already; with several modules prefetch with one, and let the others look up "
                "inside its loop"
            )
        self.embedding, self.loader, self.depth = embedding, loader, depth
        self.inputs = inputs if inputs is not None else _itself

    def __iter__(self) -> Iterator[T]:
        batches = iter(self.loader)
        ahead: deque[T] = deque()
        try:
            exhausted = False
            while True:
                while not exhausted and len(ahead) <= self.depth:
                    try:
                        batch = next(batches)
                    except StopIteration:
                        exhausted = True
                        self.embedding.no_more_ahead()
                        break
                    if self.depth:
                        self.embedding.look_up_ahead(self.inputs(batch))
                    ahead.append(batch)
                if not ahead:
                    return
                yield ahead.popleft()
        finally:
            self.embedding.drop_ahead()
            self.embedding.join_all()

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def _itself(batch: T) -> T:
    return batch
