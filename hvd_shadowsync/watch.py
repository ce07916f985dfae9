"""Who checks whether the ranks of a handle are there: their attendance, called anew where some have joined."""

from __future__ import annotations

import platform
from collections.abc import Callable

from hvd_shadowsync.comm.attendance import Attendance, Person, StallRules
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.errors import StallError
from hvd_shadowsync.metrics import RoundMetrics


class Watch:
    """Looks for ranks that others wait for, as far as `rules` ask for it.

    Args:
        rules: what is done about those that are missing.
        metrics: which steps this rank has come to.
        fail: called in a thread of the attendance with what the training thread is to raise.
    """

    def __init__(self, rules: StallRules, metrics: RoundMetrics, fail: Callable[[StallError], None]) -> None:
        self._rules, self._metrics, self._fail = rules, metrics, fail
        self.attendance: Attendance | None = None
        self._unused: Communicator | None = None

    def begin(self, ranks: Survivors) -> None:
        """Begin to look who is missing (collective, whatever the rules: nobody knows yet that all have the same)."""
        comm, people = ranks.together(_roll)
        if self._rules.active:
            self._attend(ranks, comm, people)
        else:
            self._unused = comm

    def greet(self, ranks: Survivors, comm: Communicator) -> None:
        """Take note of ranks that have joined (collective over `comm`, on the thread that makes rounds)."""
        ranks.hosts.update(host_names(comm))
        if self._rules.active:
            comm, people = _roll(comm)
            self.stop()
            self._attend(ranks, comm, people)

    def stop(self) -> None:
        """Look no longer; the communicator is left to itself."""
        if self.attendance is not None:
            self.attendance.stop()

    def close(self) -> None:
        """Look no longer, and give the communicator back (collective)."""
        if self.attendance is not None:
            self.attendance.close()
        elif self._unused is not None:
            self._unused.free()

    def _attend(self, ranks: Survivors, comm: Communicator, people: list[Person]) -> None:
        metrics = self._metrics
        ranks.whereabouts.steps = lambda: metrics.steps
        self.attendance = Attendance(
            comm, people, ranks.whereabouts, self._rules, lost=lambda: ranks.lost, fail=self._fail
        )  # fmt: skip
        self.attendance.start()


def host_names(comm: Communicator) -> dict[int, str]:
    """Return each rank's host by its number (collective)."""
    return dict(comm.allgather_object((comm.members[comm.rank], platform.node())))


def _roll(comm: Communicator) -> tuple[Communicator, list[Person]]:
    """Return a communicator that outlasts lost ranks, and who its ranks are (collective)."""
    return comm.dup(linked=False), comm.allgather_object(Person.here(comm.members[comm.rank]))
