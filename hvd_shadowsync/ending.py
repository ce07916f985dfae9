"""How a job that outlives its ranks ended: what each rank says of it at its end, and `shadowrun` goes by.

Open MPI's launcher exits with 0 there, whichever ranks were lost, all of them included. And MPI_Finalize may wait for
lost ranks without end (once in twenty times, Open MPI 5.0.11).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from hvd_shadowsync import rank

VARIABLE = "SHADOWRUN_WANTS_ENDINGS"
"""Set for ranks that are to say how they ended."""
TRAINING_VARIABLE = "SHADOWRUN_WANTS_TRAINING"
"""Set for ranks that are to say when they have come to their first training step."""
END_SIGNAL_VARIABLE = "SHADOWRUN_PASSES_SIGTERM_ON"
"""Set where `shadowrun` passes SIGTERM on as `END_SIGNAL`, if ranks make a last checkpoint then."""
END_SIGNAL = signal.SIGUSR2
"""Open MPI's launcher passes it on, while it kills the ranks a quarter of a second after SIGTERM."""
RANK_VARIABLE = "OMPI_COMM_WORLD_RANK"
SPEAKER_VARIABLE = "SHADOWRUN_RANK_PROCESS"
"""The process that is a rank: programs that it starts have its environment, and import this as well, but are none."""
ENDED = re.compile(rb"hvd_shadowsync: rank (\d+) ended; lost: (none|[\d ]+)(?:; replaced: ([\d ]+))?\n")
BEGUN = re.compile(rb"hvd_shadowsync: rank (\d+) has begun\n")
TRAINS = re.compile(rb"hvd_shadowsync: training has begun\n")
SAVES = re.compile(rb"hvd_shadowsync: a last checkpoint is made (at a signal|no more)\n")
NEVER_BEGAN = re.compile(rb"hvd_shadowsync: rank (\d+) ended before it had begun; code: (-?\d+)\n")
ABORTS = re.compile(
    rb"^(?:hvd_shadowsync: rank \d+ ends the job: |prterun has exited due to process rank)", re.MULTILINE
)
"""A rank has ended the job, with our words or with Open MPI's."""
STRAY = re.compile(rb"^\0", re.MULTILINE)
"""A byte at the end of Open MPI's boxes that makes a log no text for grep."""
HOST_AWAY = b"PRTE has lost communication with a remote daemon"
"""Open MPI ends the job for it, and exits with 0."""
MARKS = (
    b"hvd_shadowsync: rank ", b"hvd_shadowsync: training", b"hvd_shadowsync: a last", b"prterun has exited", HOST_AWAY
)  # fmt: skip
"""How what is looked for begins."""

FINALIZE_S = 5
"""How long MPI_Finalize may take where ranks were lost: then this one ends by SIGALRM, which harms no other."""
UNNOTICED_S = 30
"""The same where no rank is known to be lost: one may be, since the others have ceased to look."""

_LOST: set[int] = set()
_REPLACED: set[int] = set()
_HEARD = True


def tell(line: str) -> None:
    """Write a line to this process's stderr, whatever the program has made of `sys.stderr`; never fails."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def note_lost(ranks: Iterable[int]) -> list[int]:
    """Take note that ranks of the job are lost; return those of which that was not known."""
    lost = set(ranks)
    new = sorted(lost - _LOST)
    _LOST.update(lost)
    _REPLACED.difference_update(lost)
    return new


def note_replaced(rank: int) -> None:
    """Take note that another process has taken the place of a lost rank: it is to come to its end as well."""
    _REPLACED.add(rank)


def is_speaker() -> bool:
    """Whether this process is a rank that says how it ends."""
    return os.environ.get(SPEAKER_VARIABLE) == str(os.getpid())


def end_unheard(lost: Iterable[int]) -> None:
    """Let this process, which has taken no part, end without a word to `shadowrun`; `lost` are ranks of the job."""
    global _HEARD
    _HEARD = False
    note_lost(lost)


def note_started() -> None:
    """Let the process that has started this one know that MPI is initialised, on all ranks, and `shadowrun` as well."""
    if is_speaker():
        _say(rank.STARTED)
        tell(f"hvd_shadowsync: rank {os.environ[RANK_VARIABLE]} has begun")


@functools.cache
def note_training() -> None:
    """Let `shadowrun` know, if it wants to, that a rank has come to its first training step."""
    if os.environ.get(TRAINING_VARIABLE):
        tell("hvd_shadowsync: training has begun")


def end_signal() -> signal.Signals | None:
    """Return what `shadowrun` makes of SIGTERM, where it does and nobody else here listens to it."""
    if not os.environ.get(END_SIGNAL_VARIABLE) or threading.current_thread() is not threading.main_thread():
        return None
    return END_SIGNAL if signal.getsignal(END_SIGNAL) in (signal.SIG_DFL, let_pass) else None


def let_pass(number: int, frame: FrameType | None) -> None:
    """Do nothing at a signal: unlike SIG_IGN this ends where the process becomes another program."""


@contextlib.contextmanager
def heedless() -> Iterator[None]:
    """Inside, let `END_SIGNAL` pass, with which nothing can be done yet (main thread)."""
    before = None
    if (number := end_signal()) is not None:
        before = signal.signal(number, signal.SIG_IGN)
    yield
    if number is not None:
        signal.signal(number, before)


def note_last_checkpoint(made: bool = True) -> None:
    """Let `shadowrun` know that this job makes a last checkpoint at `END_SIGNAL`, or no more."""
    tell(f"hvd_shadowsync: a last checkpoint is made {'at a signal' if made else 'no more'}")


def end_well() -> None:
    """When the interpreter ends, let this rank say how it did, on stderr, if that is wanted; and end in time."""
    if os.environ.get(VARIABLE) and RANK_VARIABLE in os.environ:  # else between shadowrun and the ranks
        os.environ.setdefault(SPEAKER_VARIABLE, str(os.getpid()))
    atexit.register(_end, os.getpid())


def _end(pid: int) -> None:
    if pid != os.getpid():  # forked from a rank
        return
    speaks = is_speaker()
    if speaks:
        _say(rank.ENDED)
    if speaks and _HEARD:
        lost = " ".join(map(str, sorted(_LOST))) or "none"
        lost += "; replaced: " + " ".join(map(str, sorted(_REPLACED))) if _REPLACED else ""
        tell(f"hvd_shadowsync: rank {os.environ[RANK_VARIABLE]} ended; lost: {lost}")
    if _LOST or speaks:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FINALIZE_S if _LOST else UNNOTICED_S)


def _say(what: bytes) -> None:
    """Tell what has started this process, unless something between the two has closed the pipe."""
    number, _, inode = os.environ.get(rank.DESCRIPTOR, "").partition(":")
    with contextlib.suppress(OSError, ValueError):
        if os.fstat(int(number)).st_ino == int(inode):  # else it is something else's by now
            os.write(int(number), what)


@dataclass
class Endings:
    """What ranks have said of their beginnings and ends.

    Attributes:
        ended, lost, replaced, begun: by rank of the job; `lost` has those that were replaced as well.
        never_began: a rank that had not begun, and its code.
        trains: whether one has come to its first training step.
        saves: whether the job makes a last checkpoint at `END_SIGNAL`.
        aborts: whether one has ended the job.
        host_away: whether the launcher has ended the job as it cannot reach a host.
        overdue: whether the launcher had to be ended, when it had nothing left to wait for.
        size: how many ranks there are, without spare ones.
        spares: how many spare ones there are.
        begun_file: is made once a rank has begun; "": none.
    """

    ended: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    replaced: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)
    never_began: tuple[int, int] | None = None
    trains: bool = False
    saves: bool = False
    aborts: bool = False
    host_away: bool = False
    overdue: bool = False
    size: int = 0
    spares: int = 0
    begun_file: str = ""

    @property
    def are_all(self) -> bool:
        """Whether the launcher has nothing left to wait for: of ranks that are lost it may never hear.

        Nor of the end of a spare that is stopped, or hangs.
        """
        may_wait, away = bool(self.lost) or self.spares > 0, self.lost - self.replaced
        return self.aborts or (may_wait and self.ended | away >= set(range(self.size)))

    def without(self, text: bytes) -> bytes:
        """Take note of what `text` says, where it is of a rank's end; return what else is in it."""
        for number, lost, replaced in ENDED.findall(text):
            self.ended.add(int(number))
            self.lost.update(map(int, lost.split() if lost != b"none" else ()))
            self.replaced.update(map(int, replaced.split()))
        self.begun.update(map(int, BEGUN.findall(text)))
        self.host_away = self.host_away or HOST_AWAY in text
        self.aborts = self.aborts or ABORTS.search(text) is not None
        for number, code in NEVER_BEGAN.findall(text):
            self.never_began = self.never_began or (int(number), int(code))
        self.trains = self.trains or TRAINS.search(text) is not None
        for said in SAVES.findall(text):  # the last word counts
            self.saves = said == b"at a signal"
        for pattern in (ENDED, BEGUN, NEVER_BEGAN, TRAINS, SAVES, STRAY):
            text = pattern.sub(b"", text)
        return text
