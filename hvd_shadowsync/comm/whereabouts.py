"""Where a rank is: what it waits in for the others and since when, and what its training thread is about."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

VOTE = "the vote before a round"
ROUND = "a round"
CALL = "a collective call"
START = "the start, before rounds"
WARMUP = "the warm-up, which averages gradients"
RECOVERY = "going on without lost ranks"
NEWCOMER = "taking in the process that takes the place of rank {}"


class Wait(NamedTuple):
    """What is waited in, and since when (by the clock of its `Whereabouts`)."""

    place: str
    since: float


@dataclass(frozen=True)
class Word:
    """What a rank says of itself; seconds are as of then.

    Attributes:
        place, place_s: what the thread that makes rounds waits in for other ranks, and for how long; "" where it waits
            for none.
        call, call_s: the collective call, or the lookup, that its training thread waits in; "" where it trains.
        steps, idle_s: training steps, and how long ago the last one was noticed.
        paused: whether it begins no rounds, as its program has asked for.
        held: whether its training waits for a round, at `max_sync_gap`.
    """

    place: str = ""
    place_s: float = 0.0
    call: str = ""
    call_s: float = 0.0
    steps: int = 0
    idle_s: float = 0.0
    paused: bool = False
    held: bool = False

    def __str__(self) -> str:
        at = f"at step {self.steps} since {self.idle_s:.0f} s" if self.steps else f"no step in {self.idle_s:.0f} s"
        if self.call:
            return f"in {self.call} since {self.call_s:.0f} s"
        if self.place:
            return f"waiting in {self.place} since {self.place_s:.0f} s, {at}"
        if self.paused:
            return f"paused, {at}"
        return f"training, {at}"


_LOCKSTEP: weakref.WeakKeyDictionary[threading.Thread, Wait] = weakref.WeakKeyDictionary()


@contextmanager
def in_lockstep(owner: threading.Thread, place: str) -> Iterator[None]:
    """Inside, the training of the thread `owner` waits in `place` for other ranks, between its steps."""
    _LOCKSTEP[owner] = Wait(place, time.monotonic())
    try:
        yield
    finally:
        _LOCKSTEP.pop(owner, None)


class Whereabouts:
    """Notes of where a rank is: each is written by the thread that it is about, and any thread reads them.

    Made by the training thread.

    Args:
        clock: seconds; those of all notes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.steps: Callable[[], int] = int
        """Training steps so far; whoever counts them sets it."""
        self.paused = self.held = self.failed = False
        self._wait: Wait | None = None
        self._call: Wait | None = None
        self._owner = threading.current_thread()
        self._noticed = (0, clock())

    @contextmanager
    def waiting(self, place: str) -> Iterator[None]:
        """Inside, this rank waits in `place` for others; what it waits in already stays its place."""
        before = self._wait
        if before is None:
            self._wait = Wait(place, self.clock())
        try:
            yield
        finally:
            self._wait = before

    def get_on(self) -> None:
        """Take note that others have done their part: what is waited for now is the next thing."""
        if (wait := self._wait) is not None:
            self._wait = Wait(wait.place, self.clock())

    @contextmanager
    def calling(self, call: str) -> Iterator[None]:
        """Inside, the training thread waits in the collective `call`, while rounds may go on."""
        self._call = Wait(call, self.clock())
        try:
            yield
        finally:
            self._call = None

    def notice_steps(self) -> None:
        """See whether there were training steps since the last look: steps themselves read no clock."""
        if (steps := self.steps()) != self._noticed[0]:
            self._noticed = (steps, self.clock())

    @property
    def longest(self) -> Wait | None:
        """The wait that has lasted longest, of the thread that makes rounds and of the training thread."""
        waits = (self._wait, self._called())
        return min((each for each in waits if each is not None), key=_since, default=None)

    @property
    def is_over(self) -> bool:
        """Whether this rank waits for nobody any more: its rounds have failed, or its training thread is gone.

        The main thread is never gone: handles are closed at exit, when it counts as ended.
        """
        owner = self._owner
        return self.failed or not (owner.is_alive() or owner is threading.main_thread())

    def _called(self) -> Wait | None:
        return self._call or _LOCKSTEP.get(self._owner)

    def word(self) -> Word:
        """Return what this rank says of itself now."""
        now, wait, call, (steps, noticed) = self.clock(), self._wait, self._called(), self._noticed
        return Word(
            *("", 0.0) if wait is None else (wait.place, now - wait.since),
            *("", 0.0) if call is None else (call.place, now - call.since),
            steps, now - noticed, self.paused, self.held,
        )  # fmt: skip


def _since(wait: Wait) -> float:
    return wait.since
