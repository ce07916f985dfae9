"""A rank that is lost in the middle of a call that moves whole tables, which nobody can go on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.errors import EmbeddingError, RankLostError


@contextmanager
def cut_short(comm: Communicator) -> Iterator[None]:
    """Inside, make the loss of a rank an `EmbeddingError`, on every rank of `comm`."""
    try:
        yield
    except RankLostError as error:
        comm.revoke()  # wakes the others
        raise EmbeddingError(
            f"a rank was lost while whole tables were saved or loaded ({error}); make the call again"
        ) from error
