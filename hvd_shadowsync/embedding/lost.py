"""A lost rank has taken its rows with it: an error on every rank, from which nothing goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from hvd_shadowsync.errors import EmbeddingError, RankLostError

F = TypeVar("F", bound=Callable[..., Any])


def telling_lost_rows(call: F) -> F:
    """Make a method, or a function of a module, whose `_comm` it uses, raise `EmbeddingError` where a rank is lost."""

    @functools.wraps(call)
    def wrapped(self: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return call(self, *arguments, **more)
        except RankLostError as error:
            self._comm.revoke()  # wakes the others
            raise EmbeddingError(
                f"a rank was lost ({error}), and with it the rows of the sharded tables that were its own; start the "
                "job again from its last checkpoint"
            ) from error

    return cast(F, wrapped)
