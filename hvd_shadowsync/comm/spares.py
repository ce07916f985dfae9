"""Spare ranks: processes of the job that wait at the package's import until they take the place of a lost rank.

`shadowrun --fault-tolerant --respawn N` starts N of them. Needs no torch, so that waiting costs little memory.

What a spare and the ranks say to one another goes over a communicator of all of them, in messages that nobody waits
for. Each spare has besides one of two with each rank that may have to take it in, made at the beginning: MPI makes a
larger communicator out of two only over one in which nobody is lost (Open MPI 5.0.11).
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import struct
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

from hvd_shadowsync import ending
from hvd_shadowsync.comm.agreement import GATE

logger = logging.getLogger(__name__)

VARIABLE = "SHADOWRUN_SPARES"
"""How many of the job's ranks, the last ones, are spare."""
SIZE_VARIABLE = "OMPI_COMM_WORLD_SIZE"
LOCAL_RANK_VARIABLE, LOCAL_SIZE_VARIABLE = "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
MOST_HOSTS = 16
"""So many ranks, the first ones, can take a spare in: one of those that are left has to be among them, or a spare."""
LOOK_S = 0.1
READY_S = 300.0
"""How long a process that is called may take until it is ready to be taken in, or to answer: then it is given up."""
ANSWER_S = 10.0
"""How long all ranks, which have come together to take in a process that has answered, wait for it to do so again."""
OUTCOME_S = 5.0
"""How long a spare that could not be taken in waits for word that the ranks have not come through either."""


class Tag(IntEnum):
    """What a message says."""

    CALL = 1  # to a spare: take the place of rank [number]
    HERE = 2  # of a spare: has taken the place of rank [number]
    READY = 3  # of a spare: its [handle] waits to be taken in, in the place of rank [number]
    GO = 4  # to a spare: its [handle] is taken in now, by those with the numbers [...]
    OUTCOME = 5  # to a spare: whether its [handle] was taken in [1 or 0]
    JOINED = 6  # of a spare: it was taken in
    DONE = 7  # of any: it comes to its end
    ASK = 8  # to a spare: is it there, waiting for its [handle] to be taken in? Question [number]
    ANSWER = 9  # of a spare: it is; question [number]
    GIVEN_UP = 10  # to a spare: nobody waits for it any more


class Spares:
    """What one process, a rank or a spare, knows of the others; any thread may call any method.

    Ranks of the job are called by their numbers in MPI_COMM_WORLD, in which the spares are the last ones.

    Args:
        mpi: mpi4py's MPI, initialised.
        num_spares: how many of the world's ranks are spare.
    """

    def __init__(self, mpi: Any, num_spares: int) -> None:
        self._mpi, self._lock = mpi, threading.RLock()
        self.me: int = mpi.COMM_WORLD.rank
        self.size: int = mpi.COMM_WORLD.size - num_spares
        """The number of ranks that the job began with."""
        self.number: int | None = None if self.is_spare else self.me
        """The number of the rank that this process is; None where it is none yet."""
        self.has_joined = False
        """Whether this spare was taken in by the others; for its first handle."""
        self.has_changed = False
        """Whether a spare has joined the ranks, as far as this process has taken part in it."""
        self._called: dict[int, int] = {}
        self._ready: dict[int, dict[int, int]] = defaultdict(dict)
        self._go: dict[int, tuple[int, list[int]]] = {}
        self._outcomes: dict[int, bool] = {}
        self._joined: set[int] = set()
        self._done: set[int] = set()
        self._questions: list[tuple[int, int, int]] = []
        self._num_asked = 0
        self._asked: dict[int, int] = {}
        self._answered: dict[int, int] = {}
        self._awaited: dict[int, float] = {}
        self._given_up: set[int] = set()
        self._sending: list[tuple[Any, bytes]] = []
        self._status = mpi.Status()
        self.work: Any = None
        """The communicator of the ranks, or of the spares."""
        self._pairs: dict[int, Any] = {}
        self.job: str
        """A name that no other job has, the same in all of this one's processes."""
        self._set_up()
        if self.number is not None:
            self._take_names(self.number)
        atexit.register(self.leave)
        mpi.COMM_SELF.Set_attr(mpi.Comm.Create_keyval(delete_fn=lambda *_: self.leave()), None)

    @property
    def is_spare(self) -> bool:
        """Whether this process was started as a spare, whatever has become of it."""
        return self.me >= self.size

    def _set_up(self) -> None:
        """Make the communicators (collective over all that are there)."""
        base = self._mpi.COMM_WORLD.Shrink()
        while True:
            try:
                self._make(base)
                done = True
            except self._mpi.Exception:
                done = False
                base.Revoke()
            try:
                done = bool(base.Agree(int(done)))
            except self._mpi.Exception:
                done = False
            if done:
                return
            base.Revoke()
            base = base.Shrink()

    def _make(self, base: Any) -> None:
        self.work, self._desk = base.Split(int(self.is_spare), self.me), base.Dup()
        self._group = self._desk.group
        world = self._mpi.COMM_WORLD.group
        self._seats: list[int] = self._mpi.Group.Translate_ranks(self._group, list(range(base.size)), world)
        own = os.environ.get(LOCAL_RANK_VARIABLE, "0"), self._mpi.Get_processor_name()
        people, names = zip(*base.allgather((own, uuid.uuid4().hex)), strict=True)
        self._people, self.job = dict(zip(self._seats, people, strict=True)), names[0]
        spares = [seat for seat in self._seats if seat >= self.size]
        hosts = [seat for seat in self._seats if seat < self.size][:MOST_HOSTS]
        for spare in spares:
            for host in [*hosts, *(other for other in spares if other < spare)]:
                if self.me in (host, spare):
                    pair = base.group.Incl([self._seats.index(host), self._seats.index(spare)])
                    self._pairs[spare if self.me == host else host] = base.Create_group(pair, spare)

    # --- messages -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Take note of what others have said."""
        with self._lock:
            while (message := self._probe()) is not None:
                source, tag = self._seats[self._status.source], Tag(self._status.tag)
                buffer = bytearray(self._status.Get_count(self._mpi.BYTE))
                with GATE:
                    message.Recv([buffer, self._mpi.BYTE])
                self._take(source, tag, list(struct.unpack(f"{len(buffer) // 8}q", buffer)))

    def _probe(self) -> Any:
        for _ in range(2):
            try:
                with GATE:
                    return self._desk.Improbe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, self._status)
            except self._mpi.Exception:  # somebody is lost: that is overlooked from here on
                with GATE:
                    self._desk.Ack_failed()
        return None

    def _take(self, source: int, tag: Tag, values: list[int]) -> None:
        if tag is Tag.CALL:
            self._called.setdefault(self.me, values[0])
        elif tag is Tag.HERE:
            self._called[source] = values[0]
        elif tag is Tag.READY:
            self._ready[values[0]][source] = values[1]
            self._awaited.pop(source, None)
        elif tag is Tag.ASK:
            self._questions.append((source, *values))  # type: ignore[arg-type]
        elif tag is Tag.ANSWER:
            self._answered[source] = values[0]
            self._awaited.pop(source, None)
        elif tag is Tag.GIVEN_UP:
            self._given_up.add(self.me)
        elif tag is Tag.GO:
            self._go[values[0]] = source, values[1:]
        elif tag is Tag.OUTCOME:
            self._outcomes[values[0]] = bool(values[1])
        elif tag is Tag.JOINED:
            self._joined.add(source)
        elif tag is Tag.DONE:
            self._done.add(source)

    def _say(self, seats: Sequence[int], tag: Tag, *values: int) -> None:
        payload = struct.pack(f"{len(values)}q", *values)
        with self._lock:
            self._sending = [each for each in self._sending if not self._is_sent(each[0])]
            for seat in seats:
                try:
                    with GATE:
                        request = self._desk.Isend([payload, self._mpi.BYTE], self._seats.index(seat), int(tag))
                except self._mpi.Exception:  # it is lost
                    continue
                self._sending.append((request, payload))

    def _is_sent(self, request: Any) -> bool:
        try:
            with GATE:
                return bool(request.Test())
        except self._mpi.Exception:
            return True

    def _others(self) -> list[int]:
        return [seat for seat in self._seats if seat != self.me]

    def _lost(self) -> set[int]:
        with self._lock:
            gone = self._desk.Get_failed()
            places = self._mpi.Group.Translate_ranks(gone, list(range(gone.size)), self._group)
            if gone != self._mpi.GROUP_EMPTY:
                gone.Free()
            return {self._seats[each] for each in places}

    # --- for ranks ----------------------------------------------------------------------------------------------------

    def summon(self, numbers: Sequence[int]) -> None:
        """Have spares begin in the places of those of the lost `numbers` for which none does."""
        with self._lock:
            self.look()
            self._give_up_overdue()
            gone = self._lost() | self._given_up
            coming = {number for spare, number in self._called.items() if spare not in gone}
            free = [s for s in self._seats if s >= self.size and s not in gone and s not in self._called]
            for number, spare in zip([each for each in numbers if each not in coming], free, strict=False):
                self._called[spare] = number
                self._say([spare], Tag.CALL, number)
                logger.warning("a spare process takes the place of rank %d; it joins once it is ready", number)

    def candidate(self, handle: int, numbers: Sequence[int]) -> tuple[int, int] | None:
        """Return a spare whose `handle` waits to be taken in, and in the place of which of `numbers`; None for none.

        It has answered this rank: the others would wait for one that is stopped.
        """
        with self._lock:
            self.look()
            gone = self._lost() | self._given_up
            for spare, number in sorted(self._ready[handle].items()):
                if number in numbers and spare not in gone and spare in self._pairs:
                    if spare not in self._asked:
                        self._ask(handle, spare)
                    if spare in self._answered:
                        return spare, number
        return None

    def answers(self, handle: int, spare: int) -> bool:
        """Whether a spare, which has answered before, does so within `ANSWER_S`; else it is given up."""
        deadline, question = time.monotonic() + ANSWER_S, self._ask(handle, spare)
        while self._answered.get(spare, 0) < question:
            if spare in self._lost():
                return False
            if time.monotonic() > deadline:
                with self._lock:
                    self._answered.pop(spare, None)
                    self._give_up(spare, ANSWER_S)
                return False
            time.sleep(0.001)
            self.look()
        return True

    def _ask(self, handle: int, spare: int) -> int:
        with self._lock:
            question = self._num_asked = self._num_asked + 1
            self._asked[spare] = question
            self._awaited.setdefault(spare, time.monotonic())
            self._say([spare], Tag.ASK, handle, question)
        return question

    def _give_up_overdue(self) -> None:
        now, ready = time.monotonic(), set[int]().union(*self._ready.values())
        for spare in self._called.keys() - ready - self._joined - self._given_up - {self.me}:
            self._awaited.setdefault(spare, now)
        for spare in [each for each, since in self._awaited.items() if now - since > READY_S]:
            self._give_up(spare, READY_S)

    def _give_up(self, spare: int, after_s: float) -> None:
        """Count on a spare no more, if it is one yet: of one that has joined a handle others take care."""
        self._awaited.pop(spare, None)
        if spare in self._joined | self._lost():
            return
        self._given_up.add(spare)
        self._say([spare], Tag.GIVEN_UP)
        what = f"the spare process for rank {self._called.get(spare)} on {self._people[spare][1]}"
        logger.warning("%s is given up: not a word of it in %.0f s", what, after_s)

    def meet(self, comm: Any, handle: int, spare: int, members: Sequence[int]) -> Any:
        """Return an intercommunicator of `comm` and a spare (collective over both; the first rank knows the spare)."""
        first = comm.rank == 0
        if first:
            self._say([spare], Tag.GO, handle, *members)
        return comm.Create_intercomm(0, self._pairs[spare] if first else self._mpi.COMM_SELF, 1, handle)

    def tell(self, handle: int, spare: int, *, joined: bool) -> None:
        """Let a spare know, on each rank, whether it was taken in; if not, it ends."""
        with self._lock:
            self._ready[handle].pop(spare, None)
            for notes in (self._asked, self._answered, self._awaited):
                notes.pop(spare, None)
            if not joined:
                self._given_up.add(spare)
        self._say([spare], Tag.OUTCOME, handle, int(joined))
        if not joined and spare in self._pairs:
            with GATE:
                self._pairs[spare].Revoke()

    # --- for a spare --------------------------------------------------------------------------------------------------

    def park(self) -> None:
        """Return once this process is to take the place of a lost rank; exit where the job ends before."""
        with ending.heedless():
            self._await_call()
        assert self.number is not None, "it was called"
        self._say(self._others(), Tag.HERE, self.number)
        self._take_names(self.number)
        threading.Thread(target=self._watch, name="shadow-spare", daemon=True).start()

    def _await_call(self) -> None:
        while self.me not in self._called:
            if self._is_over():
                ending.end_unheard(self._lost())
                sys.exit(0)
            time.sleep(LOOK_S)
            self.look()
        self.number = self._called[self.me]

    def _take_names(self, number: int) -> None:
        """Have the environment of rank `number` in a job without spares, for scripts and for messages."""
        own_rank, own_host = self._people[self.me]
        local_rank, host = self._people.get(number, ("0", ""))
        local_size = max(1, [name for seat, (_, name) in self._people.items() if seat < self.size].count(own_host))
        if host != own_host:
            local_rank = str(int(own_rank) % local_size)
        names = {ending.RANK_VARIABLE: str(number), SIZE_VARIABLE: str(self.size)}
        os.environ.update(names | {LOCAL_RANK_VARIABLE: local_rank, LOCAL_SIZE_VARIABLE: str(local_size)})

    def _is_over(self) -> bool:
        """Whether nobody is left that trains, and could take this process in."""
        gone = self._done | self._lost()
        return {seat for seat in self._seats if seat < self.size} | self._joined <= gone

    def _watch(self) -> None:
        """End this process where it can join nobody any more, whatever its training thread is in."""
        while not self.has_joined:
            self.look()
            if self._is_over():
                self._end("the job was over before it had joined")
            if not all(self._outcomes.values()):
                self._end("another rank was lost while it was taken in")
            if self._given_up:
                self._end("the others have given it up")
            time.sleep(LOOK_S)

    def _end(self, why: str) -> NoReturn:
        """End at once, such that others notice, and shadowrun knows that it is well."""
        sys.stderr.write(f"hvd_shadowsync: the spare process for rank {self.number} ends: {why}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")

    def join(self, handle: int) -> tuple[Any, list[int]]:
        """Wait to be taken in; return the communicator, and the numbers of its ranks, of which this is the last."""
        assert self.number is not None, "it was called"
        self._say(self._others(), Tag.READY, handle, self.number)
        while handle not in self._go:
            time.sleep(LOOK_S / 10)
            self.look()
            self._answer(handle)
            if self._is_over():
                self._end("the job was over before it had joined")
        first, members = self._go.pop(handle)
        with self._or_end(handle):
            between = self._mpi.COMM_SELF.Create_intercomm(0, self._pairs[first], 0, handle)
            merged = between.Merge(True)
        self._await_outcome(handle, math.inf)
        if not self.has_joined:
            self.has_joined = True
            self._say(self._others(), Tag.JOINED)
        return merged, [*members, self.number]

    def _answer(self, handle: int) -> None:
        with self._lock:
            questions, self._questions = self._questions, []
        for source, asked, number in questions:
            if asked == handle:
                self._say([source], Tag.ANSWER, number)

    @contextmanager
    def _or_end(self, handle: int) -> Iterator[None]:
        try:
            yield
        except self._mpi.Exception:
            self._await_outcome(handle, OUTCOME_S)
            self._end("it could not be taken in")

    def _await_outcome(self, handle: int, longest_s: float) -> None:
        deadline = time.monotonic() + longest_s
        while handle not in self._outcomes and time.monotonic() < deadline:
            self.look()
            if self._is_over():
                self._end("the job was over before it had joined")
            time.sleep(0.001)
        if not self._outcomes.get(handle, True):
            self._end("another rank was lost while it was taken in")

    # --- the end ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Let spares know that this rank comes to its end (idempotent); nothing in a process that it has forked."""
        if self.number is not None and self.me not in self._done and ending.is_speaker():
            self._done.add(self.me)
            self._say(self._others(), Tag.DONE)
            for request, _ in self._sending:
                deadline = time.monotonic() + LOOK_S
                while not self._is_sent(request) and time.monotonic() < deadline:
                    time.sleep(0.001)


_SPARES: Spares | None = None


def here() -> Spares | None:
    """Return what this process knows of spares; None where the job has none."""
    return _SPARES


def begin() -> None:
    """Where the job has spares, meet all its processes; return in those that train (collective).

    A spare returns as soon as it is to take a lost rank's place.
    """
    global _SPARES
    number = int(os.environ.get(VARIABLE) or 0)
    if not number or not ending.is_speaker() or _SPARES is not None:
        return
    from mpi4py import MPI

    ending.note_started()
    _SPARES = Spares(MPI, number)
    if _SPARES.is_spare:
        _SPARES.park()
