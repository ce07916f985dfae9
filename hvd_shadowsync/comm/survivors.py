"""The ranks that are left: a communicator that gives way to one without those that were lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from hvd_shadowsync.comm.base import Communicator, Reserve
from hvd_shadowsync.comm.whereabouts import CALL, NEWCOMER, RECOVERY, Whereabouts
from hvd_shadowsync.ending import note_lost, note_replaced
from hvd_shadowsync.errors import RankLostError, TransportError

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_IN_VAIN = 5
IN_A_ROW_S = 60.0
"""Failures that are farther apart than this are no sign of an MPI that is of no more use."""


class Survivors:
    """Owns a communicator and, as ranks are lost, those that come after it; one thread at a time uses it.

    All ranks agree equally often on a communicator, whatever they were about: each time that they came through a call
    together, and at last, once, that they did not. Only then is there a new one.

    Args:
        comm: over all ranks; freed by `free`.
        on_change: called after each loss, and each time that a lost rank was replaced, with the number of ranks lost so
            far, of those replaced and the seconds that the former has taken, in all; in the thread that uses the
            communicator.
        reserve: who can take the place of lost ranks; None for nobody.
        everyone: the numbers of all ranks of the job; default those of `comm`.
    """

    def __init__(
        self,
        comm: Communicator,
        on_change: Callable[[int, int, float], None] = lambda *_: None,
        reserve: Reserve | None = None,
        everyone: Sequence[int] | None = None,
    ) -> None:
        self.comm = comm
        self.reserve = reserve
        self.admits = False
        """Whether this rank, if it is the first one, lets lost ranks be replaced now."""
        self.greet: Callable[[Communicator], None] | None = None
        """Called where ranks have joined, on all ranks together, a second time where one is lost meanwhile."""
        self.new: set[int] = set()
        """The numbers of the ranks that have joined and not begun yet, this one as well."""
        self._on_change = on_change
        self._everyone = tuple(comm.members if everyone is None else everyone)
        self._num_lost = self._num_replaced = 0
        self._failed = False
        self._in_vain, self._shrunk_at_s = 0, -math.inf
        self.hosts: dict[int, str] = {}
        """The name of the host of each rank, by its number, for messages; whoever knows them sets it."""
        self.whereabouts = Whereabouts()
        """What this rank waits in for the others."""
        self.recovery_s = 0.0
        """How long it has taken to be without the lost ranks, seconds in all."""

    @property
    def lost(self) -> list[int]:
        """The numbers of the ranks that were lost so far, and not replaced."""
        return [number for number in self._everyone if number not in self.comm.members]

    def agreed(self, call: Callable[[Communicator], T]) -> T:
        """Return what `call(comm)` returns if all ranks have come through it (collective).

        Raises:
            RankLostError: on every rank that is left, if one was lost meanwhile, even where `call` had succeeded.
        """
        failure: RankLostError | None = None
        with self.whereabouts.waiting(CALL):
            try:
                result = call(self.comm)
            except RankLostError as error:
                failure = error
                self.comm.revoke()
            if not self.comm.agree(failure is None):
                self._failed = True
                raise failure or RankLostError("a rank was lost in a collective call that had succeeded here")
            return result

    def together(self, call: Callable[[Communicator], T]) -> T:
        """Return what `call(comm)` returns once all ranks that are left have come through it (collective).

        Where one is lost meanwhile, they call again without it: `call` has to stand that.
        """
        while True:
            try:
                return self.agreed(call)
            except RankLostError:
                if not self.comm.outlives_ranks:
                    raise
                self._shrink()

    def go_on(self, begin: Callable[[Communicator], T]) -> T:
        """Leave the lost ranks behind, then `begin(comm)` together on those that are left (collective over them)."""
        with self.whereabouts.waiting(RECOVERY):
            self._shrink()
        return self._with_the_new(begin)

    def join(self, begin: Callable[[Communicator], T]) -> T:
        """Begin as a rank that the others have just taken in (collective over all that are there)."""
        own = self.comm.members[self.comm.rank]
        note_lost([*self.lost, own])
        note_replaced(own)
        self.new = {own}
        return self._with_the_new(begin)

    def call_back(self) -> None:
        """On the first rank, see to it that lost ranks are replaced.

        Raises:
            RankLostError: one is ready to join, so all ranks have to `go_on`, with it.
        """
        if self.reserve is None or self.comm.rank or not self.admits or not self.lost:
            return
        self.reserve.summon(self.lost)
        if self.reserve.candidate(self.lost) is not None:
            self.comm.revoke()
            raise RankLostError("a lost rank is replaced")

    def _with_the_new(self, begin: Callable[[Communicator], T]) -> T:
        with self.whereabouts.waiting(RECOVERY):
            found = self._to_take_in()
        while found is not None:
            with self.whereabouts.waiting(NEWCOMER.format(found[1])):
                self._take_in(*found)
                found = self._to_take_in()
        with self.whereabouts.waiting(RECOVERY):
            begun = self.together(partial(self._begin, begin))
        self.new = set()
        return begun

    def _begin(self, begin: Callable[[Communicator], T], comm: Communicator) -> T:
        if self.new and self.greet is not None:
            self.greet(comm)  # first, so that one that is stopped from here on is missed
        return begin(comm)

    def _to_take_in(self) -> tuple[int, int] | None:
        """Return what the first rank says of who joins next: the process, and the number that it takes over."""
        if (reserve := self.reserve) is None:
            return None

        def find(comm: Communicator) -> tuple[int, int] | None:
            found = reserve.candidate(self.lost) if self.admits and comm.rank == 0 else None
            while found is not None and not reserve.answers(found[0]):
                found = reserve.candidate(self.lost)
            first: tuple[int, int] | None = comm.allgather_object(found)[0]
            return first

        return self.together(find)

    def _take_in(self, spare: int, number: int) -> None:
        reserve = self.reserve
        assert reserve is not None, "it has found the process"
        self._in_vain = 0
        try:
            meeting = self.agreed(lambda comm: reserve.meet(comm, spare))
            grown = self.agreed(lambda comm: reserve.merge(meeting, comm, number))
        except RankLostError:
            reserve.settle(spare, joined=False)
            self._shrink()
            return
        reserve.settle(spare, joined=True)
        self.comm = grown
        self.new.add(number)
        note_replaced(number)
        self._num_replaced += 1
        self._on_change(self._num_lost, self._num_replaced, self.recovery_s)
        logger.log(
            logging.WARNING if grown.rank == 0 else logging.INFO,
            "rank %d is back, in another process; there are %d ranks", number, grown.size,
        )  # fmt: skip

    def free(self) -> None:
        """Give the communicator back (collective)."""
        self.comm.free()

    def _shrink(self) -> None:
        begun, before = time.monotonic(), self.comm.members
        self.comm.revoke()
        if not self._failed:
            self.comm.agree(False)
        self.comm, self._failed = self.comm.survivors(), False
        in_a_row = begun - self._shrunk_at_s < IN_A_ROW_S
        self._in_vain = (self._in_vain if in_a_row else 0) + 1 if self.comm.size == len(before) else 0
        self._shrunk_at_s = begun
        if self._in_vain > MOST_IN_VAIN:
            raise TransportError(
                f"MPI has failed {self._in_vain} times though all {self.comm.size} ranks are there; see its messages "
                "above, and whether the network is up"
            )
        took_s = time.monotonic() - begun
        self.recovery_s += took_s
        now_lost = [number for number in before if number not in self.comm.members]
        note_lost(now_lost)
        gone = [self._name(number) for number in now_lost]
        self._num_lost += len(gone)
        self._on_change(self._num_lost, self._num_replaced, self.recovery_s)
        if gone:
            logger.log(
                logging.WARNING if self.comm.rank == 0 else logging.INFO,
                "lost %s; the other %d go on (%.0f ms)", ", ".join(gone), self.comm.size, 1000 * took_s,
            )  # fmt: skip

    def _name(self, number: int) -> str:
        return f"rank {number}" + (f" on {self.hosts[number]}" if number in self.hosts else "")
