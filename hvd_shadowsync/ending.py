"""How a job that outlives its ranks ended: what each rank says of it at its end, and `shadowrun` goes by.

Open MPI's launcher exits with 0 there, whichever ranks were lost, all of them included. And MPI_Finalize may wait for
lost ranks without end (once in twenty times, Open MPI 5.0.11).
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

VARIABLE = "SHADOWRUN_WANTS_ENDINGS"
"""Set for ranks that are to say how they ended."""
RANK_VARIABLE = "OMPI_COMM_WORLD_RANK"
SPEAKER_VARIABLE = "SHADOWRUN_RANK_PROCESS"
"""The process that is a rank: programs that it starts have its environment, and import this as well, but are none."""
LINE = re.compile(rb"hvd_shadowsync: rank (\d+) ended; lost: (none|[\d ]+)\n")

FINALIZE_S = 5
"""How long MPI_Finalize may take where ranks were lost: then this one ends by SIGALRM, which harms no other."""
UNNOTICED_S = 30
"""The same where no rank is known to be lost: one may be, since the others have ceased to look."""

_LOST: set[int] = set()


def note_lost(ranks: Iterable[int]) -> list[int]:
    """Take note that ranks of the job are lost; return those of which that was not known."""
    new = sorted(set(ranks) - _LOST)
    _LOST.update(new)
    return new


def end_well() -> None:
    """When the interpreter ends, let this rank say how it did, on stderr, if that is wanted; and end in time."""
    if os.environ.get(VARIABLE) and RANK_VARIABLE in os.environ:  # else between shadowrun and the ranks
        os.environ.setdefault(SPEAKER_VARIABLE, str(os.getpid()))
    atexit.register(_end, os.getpid())


def _end(pid: int) -> None:
    if pid != os.getpid():  # forked from a rank
        return
    is_speaker = os.environ.get(SPEAKER_VARIABLE) == str(pid)
    if is_speaker:
        lost = " ".join(map(str, sorted(_LOST))) or "none"
        sys.stderr.write(f"hvd_shadowsync: rank {os.environ[RANK_VARIABLE]} ended; lost: {lost}\n")
        sys.stderr.flush()
    if _LOST or is_speaker:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FINALIZE_S if _LOST else UNNOTICED_S)


@dataclass
class Endings:
    """What ranks have said of their ends."""

    ended: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)

    def without(self, line: bytes) -> bytes:
        """Take note of what `line` says, if it is of a rank's end; return what else is in it."""
        for rank, lost in LINE.findall(line):
            self.ended.add(int(rank))
            self.lost.update(map(int, lost.split() if lost != b"none" else ()))
        return LINE.sub(b"", line)
