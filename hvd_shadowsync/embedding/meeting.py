"""Before each exchange all ranks say what they are about: calls that do not go together are an error on every rank."""

from __future__ import annotations

import enum
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, NoReturn

import torch

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.whereabouts import in_lockstep
from hvd_shadowsync.errors import EmbeddingError

TEXT_BYTES = 2048


class Call(enum.IntEnum):
    """What a rank is about."""

    LOOKUP = 1
    UPDATE = 2
    JOIN = 3
    """Nothing of its own any more: it serves the others until all are here."""
    FAIL = 4
    """Its input was wrong; the text follows."""
    GLOBAL = 5
    """Reading or writing whole tables."""
    CLOSE = 6
    """As JOIN, for good."""


NAMES = {
    Call.LOOKUP: "a lookup (forward)",
    Call.UPDATE: "an update (backward)",
    Call.JOIN: "join()",
    Call.FAIL: "an error",
    Call.GLOBAL: "saving or loading",
    Call.CLOSE: "close()",
}
SERVING = (Call.JOIN, Call.CLOSE)


class Word(NamedTuple):
    """What one rank says to another; int64 each.

    Attributes:
        call: see `Call`.
        number: of the meeting, on this rank.
        about: LOOKUP: whether gradients will follow; UPDATE: number of the lookup that it belongs to; GLOBAL: which
            call it is; JOIN, CLOSE: lookups of the rank whose updates may follow yet.
        samples: LOOKUP: in the rank's batch.
        trails: UPDATE: whether the rank has no more lookups, so that lookups of others may come first.
        way: LOOKUP: a `carrier.Way`.
        stale: whether copies of this rank's rows are to be renewed; see `Replicas`.
        size: LOOKUP: for this destination, as `way` says.
        exponent: UPDATE: the gradients were multiplied by 2 to this.
        fingerprint: of the dtype and the optimizer's settings; in debug mode, of the call.
    """

    call: int
    number: int = 0
    about: int = 0
    samples: int = 0
    size: int = 0
    exponent: int = 0
    fingerprint: int = 0
    trails: int = 0
    way: int = 0
    stale: int = 0


class Meetings:
    """Meets all ranks of `comm`, for one thread at a time.

    Attributes:
        owner: the training thread.
        held: meetings so far.
        debug: whether calls carry a fingerprint.
    """

    def __init__(
        self, comm: Communicator, poller: Poller, *, debug: bool, owner: threading.Thread | None = None
    ) -> None:
        self._comm, self._poller, self.debug = comm, poller, debug
        self.held = 0
        self.owner = threading.current_thread() if owner is None else owner
        self._out = torch.zeros(comm.size, len(Word._fields), dtype=torch.int64)
        self._in = torch.zeros_like(self._out)

    def meet(
        self,
        call: Call,
        sizes: Sequence[int] = (),
        *,
        about: int = 0,
        samples: int = 0,
        exponent: int = 0,
        always: str = "",
        what: str = "",
        trails: bool = False,
        way: int = 0,
        stale: bool = False,
        meanwhile: Callable[[], bool] | None = None,
    ) -> list[Word]:
        """Say this to all, a size to each, and return what each says to this rank, by rank (collective).

        Raises:
            EmbeddingError: ranks are in different calls, or one of them fails; raised on every rank.
        """
        self.held += 1
        described = f"{always} {what if self.debug else ''}".strip()
        fingerprint = zlib.crc32(described.encode())
        word = [int(call), self.held, about, samples, 0, exponent, fingerprint, int(trails), way, int(stale)]
        self._out[:] = torch.tensor(word)
        if sizes:
            self._out[:, 4] = torch.tensor(sizes)
        place = nullcontext() if call in SERVING else in_lockstep(self.owner, NAMES[call])
        with place:
            self._poller.wait([self._comm.ialltoall(self._out, self._in)], meanwhile)
        words = [Word(*each) for each in self._in.tolist()]
        if any(each.call == Call.FAIL for each in words):
            return words
        self._require_one_call(words, described)
        return words

    def fail(self, message: str) -> NoReturn:
        """Make this call, and that of every other rank, end in an error with `message` (collective)."""
        self.raise_failure(self.meet(Call.FAIL), message)
        raise AssertionError("a failed meeting raises")

    def raise_failure(self, words: Sequence[Word], message: str = "") -> None:
        """Raise on every rank what the ranks that fail say, if any does (collective then)."""
        failed = [rank for rank, word in enumerate(words) if word.call == Call.FAIL]
        if not failed:
            return
        said = self._said_by_all(message)
        where = f"rank {failed[0]}: " if self._comm.size > 1 else ""
        more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise EmbeddingError(f"{where}{said[failed[0]]}{more}")

    def _said_by_all(self, message: str) -> list[str]:
        """Return every rank's message (collective)."""
        text = message.encode()[:TEXT_BYTES]
        out = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        out[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        everyone = torch.empty(self._comm.size, TEXT_BYTES, dtype=torch.uint8)
        self._poller.wait([self._comm.iallgather(out, everyone)])
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in everyone]

    def _require_one_call(self, words: Sequence[Word], described: str) -> None:
        taking_part = [(rank, word) for rank, word in enumerate(words) if takes_part(word, words)]
        if not taking_part:
            return
        first_rank, first = taking_part[0]
        for rank, word in taking_part:
            if word.call != first.call:
                raise EmbeddingError(
                    f"rank {first_rank} is in {NAMES[Call(first.call)]} while rank {rank} is in "
                    f"{NAMES[Call(word.call)]}; all ranks have to make the same calls in the "
                    "same order (a rank without data calls join())"
                )
            if word.about != first.about:
                raise EmbeddingError(self._about(first_rank, first, rank, word))
            if word.fingerprint != first.fingerprint:
                said = self._said_by_all(described)
                raise EmbeddingError(
                    f"rank {first_rank} and rank {rank} make different calls: meeting {word.number}, "
                    f"{NAMES[Call(word.call)]}, of {said[first_rank]!r} and of {said[rank]!r}; make them alike"
                )
        if self.debug and len({word.number for word in words}) > 1:
            raise EmbeddingError(f"the ranks are in different meetings: {[word.number for word in words]}")

    @staticmethod
    def _about(first_rank: int, first: Word, rank: int, word: Word) -> str:
        if first.call == Call.UPDATE:
            return (
                f"rank {first_rank} runs backward of lookup {first.about}, rank {rank} of lookup {word.about}; "
                "run backward in the same order on every rank"
            )
        if first.call == Call.LOOKUP:
            with_grad = first_rank if first.about else rank
            without = rank if first.about else first_rank
            return (
                f"rank {with_grad} looks up for training while rank {without} looks up without gradients; "
                "use torch.no_grad() on every rank or on none"
            )
        return f"rank {first_rank} and rank {rank} save or load different things; do the same on every rank"


def takes_part(word: Word, words: Sequence[Word]) -> bool:
    """Tell whether a rank that says `word` does something of its own in this meeting, or serves the others."""
    if word.call in SERVING:
        return False
    return not (word.trails and any(each.call == Call.LOOKUP for each in words))
