"""Waiting for requests by polling with adaptive back-off, instead of burning a core in MPI_Wait."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hvd_shadowsync.comm.base import Request

LARGEST_EXPONENT = 64
PR_SET_TIMERSLACK = 29
SLACK_NS = 1000


def sleep_on_time() -> None:
    """Let short sleeps of the calling thread end on time: Linux adds up to 50 us to each by default."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)


@runtime_checkable
class WaitingRequest(Request, Protocol):
    """A request that can wait by itself."""

    def wait(self, poller: Poller) -> bool:
        """Return True once the operation is complete, or False, at once, where it cannot wait by itself here."""


@dataclass(frozen=True)
class Poller:
    """Polls until requests are complete: eagerly at first, then with pauses that grow.

    MPI makes progress only inside MPI calls, so somebody has to poll; a pause between polls gives the core to the
    training thread. The pauses start anew whenever `meanwhile` did something.

    Attributes:
        spin_s: how long `wait` polls without a pause (only the interpreter lock is let go), seconds. The default is
            longer than the shortest pause lasts in practice (0.2 ms): were it shorter, two ranks of one host could go
            on sleeping past each other, each waiting for a message that the other has to wake up for.
        eager: polls without a pause after that.
        shortest_s: first pause, seconds.
        longest_s: longest pause, seconds.
        growth: factor from one pause to the next.
    """

    spin_s: float = 0.0003
    eager: int = 16
    shortest_s: float = 0.0001
    longest_s: float = 0.001
    growth: float = 1.3

    def wait(self, requests: Iterable[Request], meanwhile: Callable[[], bool] | None = None) -> None:
        """Return when all requests are complete; `meanwhile` runs between polls and returns whether it did work.

        Without `meanwhile`, requests that can wait by themselves do: without Python's lock.
        """
        pending = list(requests)
        if meanwhile is None:
            pending = [each for each in pending if not (isinstance(each, WaitingRequest) and each.wait(self))]
        patient = time.perf_counter() + self.spin_s
        polls = 0
        while pending := self._incomplete(pending):
            worked = meanwhile() if meanwhile is not None else False
            polls = 0 if worked or time.perf_counter() < patient else polls + 1
            self.pause(polls)

    def pause(self, polls: int) -> None:
        """Sleep as long as is right after `polls` polls in a row that found nothing."""
        if seconds := self.pause_s(polls):
            time.sleep(seconds)
        else:
            os.sched_yield()  # sleep(0) waits for a timer interrupt: some 90 us on virtual machines

    def pause_s(self, polls: int) -> float:
        """Return how long to sleep after `polls` polls in a row that found nothing, seconds."""
        exponent = min(polls - self.eager, LARGEST_EXPONENT)
        return 0.0 if exponent < 0 else min(self.longest_s, self.shortest_s * self.growth**exponent)

    @staticmethod
    def _incomplete(requests: list[Request]) -> list[Request]:
        return [request for request in requests if not request.test()]
