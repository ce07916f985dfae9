"""The ranks that are left: a communicator that gives way to one without those that were lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.whereabouts import CALL, RECOVERY, Whereabouts
from hvd_shadowsync.ending import note_lost
from hvd_shadowsync.errors import RankLostError, TransportError

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_IN_VAIN = 5


class Survivors:
    """Owns a communicator and, as ranks are lost, those that come after it; one thread at a time uses it.

    All ranks agree equally often on a communicator, whatever they were about: each time that they came through a call
    together, and at last, once, that they did not. Only then is there a new one.

    Args:
        comm: over all ranks; freed by `free`.
        on_loss: called after each loss, with the number of ranks lost so far and the seconds that it has taken, in all,
            to be without them; in the thread that uses the communicator.
    """

    def __init__(self, comm: Communicator, on_loss: Callable[[int, float], None] = lambda *_: None) -> None:
        self.comm = comm
        self._on_loss = on_loss
        self._everyone = comm.members
        self._failed = False
        self._in_vain = 0
        self.hosts: dict[int, str] = {}
        """The name of the host of each rank, by its number, for messages; whoever knows them sets it."""
        self.whereabouts = Whereabouts()
        """What this rank waits in for the others."""
        self.recovery_s = 0.0
        """How long it has taken to be without the lost ranks, seconds in all."""

    @property
    def lost(self) -> list[int]:
        """The numbers of the ranks that were lost so far."""
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
            return self.together(begin)

    def free(self) -> None:
        """Give the communicator back (collective)."""
        self.comm.free()

    def _shrink(self) -> None:
        begun, before = time.monotonic(), self.comm.members
        self.comm.revoke()
        if not self._failed:
            self.comm.agree(False)
        self.comm, self._failed = self.comm.survivors(), False
        self._in_vain = self._in_vain + 1 if self.comm.size == len(before) else 0
        if self._in_vain > MOST_IN_VAIN:
            raise TransportError(
                f"MPI has failed {self._in_vain} times though all {self.comm.size} ranks are there; see its messages "
                "above, and whether the network is up"
            )
        took_s = time.monotonic() - begun
        self.recovery_s += took_s
        note_lost(self.lost)
        self._on_loss(len(self.lost), self.recovery_s)
        if gone := [self._name(number) for number in before if number not in self.comm.members]:
            logger.log(
                logging.WARNING if self.comm.rank == 0 else logging.INFO,
                "lost %s; the other %d go on (%.0f ms)", ", ".join(gone), self.comm.size, 1000 * took_s,
            )  # fmt: skip

    def _name(self, number: int) -> str:
        return f"rank {number}" + (f" on {self.hosts[number]}" if number in self.hosts else "")
