"""Who is missing: ranks that have waited long ask the others where they are, and may give up those that are stopped."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvd_shadowsync.comm import job, runtime
from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.memory import machine
from hvd_shadowsync.comm.quorum import goes_on
from hvd_shadowsync.comm.whereabouts import Wait, Whereabouts, Word
from hvd_shadowsync.errors import CutOffError, RankLostError, StallError

logger = logging.getLogger(__name__)

TAG = 0
LONGEST_TICK_S = 1.0
LONGEST_GRACE_S = 4.0
TICKS_IN_GRACE = 4
SENDING_S = 0.5
SURE_S = 30.0
"""How long a rank has to owe an answer before it is given up, at most; or a quarter of the time that it has."""
LAST_WORDS_S = 5.0
"""How long the training thread has to raise the error of a stall, before its job is ended from here."""


@dataclass(frozen=True)
class StallRules:
    """What is done about ranks that others wait for.

    Attributes:
        warning_s: after how many seconds it is reported; None: never.
        timeout_s: after how many seconds they are given up; None: never.
        on_stall: "end": the job ends; "drop": they are ended, and the others go on.
    """

    warning_s: float | None = 60.0
    timeout_s: float | None = None
    on_stall: str = "end"

    @property
    def active(self) -> bool:
        """Whether anything is ever done."""
        return self.warning_s is not None or self.timeout_s is not None

    @property
    def first_s(self) -> float:
        """After how many seconds ranks are asked, at the latest."""
        half_s = math.inf if self.timeout_s is None else self.timeout_s / 2
        return min(half_s, math.inf if self.warning_s is None else self.warning_s)

    @property
    def grace_s(self) -> float:
        """How long a rank has for an answer."""
        return min(LONGEST_GRACE_S, self.first_s / 2)

    @property
    def tick_s(self) -> float:
        """How often a rank looks whether it was asked."""
        return min(LONGEST_TICK_S, self.grace_s / TICKS_IN_GRACE)


@dataclass(frozen=True)
class Person:
    """A rank as messages and the system know it.

    Attributes:
        number: of the rank, see `Communicator.members`.
        host, pid: for messages, and to end it.
        machine: the same for ranks that can end one another: of one host that see the same pids.
        born: when the process began, as the system counts it: another process may get its pid.
        beside_launcher: whether it is on mpirun's host, and mpirun has started it.
    """

    number: int
    host: str
    pid: int
    machine: str
    born: str
    beside_launcher: bool = False

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host} (pid {self.pid})"

    @classmethod
    def here(cls, number: int) -> Person:
        """Return what this process is."""
        pid = os.getpid()
        return cls(number, platform.node(), pid, machine(), _born(pid), runtime.is_beside_launcher())


def _born(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@dataclass
class _Peer:
    """Another rank: what it has said last, and since when it owes an answer."""

    person: Person
    word: Word = field(default_factory=Word)
    heard_at: float = -math.inf
    owes_since: float | None = None
    held_up: str = ""
    was_away: bool = False
    ended: bool = False
    ending_since: float | None = None
    enders: set[int] = field(default_factory=set)


@dataclass
class _Stall:
    """A long wait of this rank."""

    wait: Wait
    asks_at: float
    reports_at: float
    asked: bool = False


class Attendance:
    """Answers and asks, in a thread of its own: whatever a rank waits in, and however, it goes on looking.

    A rank that waits long asks all others where they are, and says who is missing. Of those that wait the first one
    does, for all; the next ones begin a little later, and not at all where one before them has. Messages only, over a
    communicator that is never replaced: nobody has to come for anything.

    Args:
        comm: used by this object alone, and freed by it; `Communicator.revoke` must not reach it.
        people: the ranks, by rank of `comm`.
        whereabouts: where this rank is.
        rules: what is done when.
        lost: the numbers of the ranks that are lost.
        fail: raises a `StallError` in the training thread, if it can; any thread may call it.
        clock: seconds; that of `whereabouts`.
    """

    def __init__(
        self,
        comm: Communicator,
        people: Sequence[Person],
        whereabouts: Whereabouts,
        rules: StallRules,
        *,
        lost: Callable[[], Collection[int]],
        fail: Callable[[StallError], None],
    ) -> None:
        self._comm, self._whereabouts, self._rules = comm, whereabouts, rules
        self._lost, self._fail, self._clock = lost, fail, whereabouts.clock
        self._peers = {rank: _Peer(each) for rank, each in enumerate(people) if rank != comm.rank}
        self._own = people[comm.rank]
        self._asks_after_s = rules.first_s - rules.grace_s + comm.rank.bit_length() * rules.tick_s
        self._asked_at = -math.inf
        self._stall: _Stall | None = None
        self._sending: list[tuple[Request, torch.Tensor]] = []
        self._error: tuple[StallError, float] | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look now and then from here on, until this rank waits for nobody any more."""
        self._thread = threading.Thread(target=self._main, name="shadow-attendance", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        """Look no more, and give the communicator back (collective)."""
        self.stop()
        self._comm.free()

    def _main(self) -> None:
        try:
            while not self._closing.wait(self._rules.tick_s):
                self.look()
                if self._whereabouts.is_over and self._error is None:
                    return
        except BaseException:
            logger.debug("nobody looks any more who is missing", exc_info=True)

    def look(self) -> None:
        """Answer who has asked; if this rank waits for long, ask, report and decide."""
        self._whereabouts.notice_steps()
        self._read()
        self._sending = [each for each in self._sending if not self._is_sent(each[0])]
        now = self._clock()
        if self._error is not None:
            self._end_in_time(now)
            return
        wait = self._whereabouts.longest
        if self._stall is not None and wait != self._stall.wait:
            self._note_the_end(self._stall, now)
            self._stall = None
        if self._stall is None:
            self._say_who_is_back()
        if wait is None or now - wait.since < self._asks_after_s or now - self._asked_at < 3 * self._rules.grace_s:
            return
        if self._stall is None:
            first_s = math.inf if self._rules.warning_s is None else self._rules.warning_s
            self._stall = _Stall(wait, now, wait.since + first_s)
        self._look_after(self._stall, now)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            try:
                if (message := self._comm.probe()) is None:
                    return
            except RankLostError:
                self._comm.overlook_lost()
                return
            buffer = torch.zeros(message.num_bytes, dtype=torch.uint8)
            received = message.irecv(buffer)
            while not self._is_sent(received):
                time.sleep(0.0001)
            try:
                said = json.loads(buffer.numpy().tobytes())
            except ValueError:  # of a rank that was lost meanwhile
                continue
            self._take(message.source, said)

    def _take(self, source: int, said: dict[str, Any]) -> None:
        peer, now = self._peers[source], self._clock()
        if peer.ended:  # what is left behind has no say any more
            return
        if "word" in said:
            peer.word, peer.heard_at, peer.owes_since = Word(*said["word"]), now, None
        if said["kind"] == "ask":
            if source < self._comm.rank:
                self._asked_at = now
            self._send(source, kind="answer", word=astuple(self._whereabouts.word()))
        elif said["kind"] == "drop":
            self._obey(source, said["rank"], said["why"])
        elif said["kind"] == "dropped":
            self._peers[said["rank"]].ended |= said["done"]
        elif said["kind"] == "end":
            self._end(said["why"])
        elif said["kind"] == "leave":
            self._end(said["why"], CutOffError)
        elif said["kind"] == "cut off":
            self._leave_behind(said["ranks"], said["why"])

    def _send(self, dest: int, /, **said: Any) -> Request | None:
        payload = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        try:
            request = self._comm.isend(payload, dest, TAG)
        except RankLostError:
            return None
        self._sending.append((request, payload))
        return request

    def _is_sent(self, request: Request) -> bool:
        try:
            return request.test()
        except RankLostError:
            return True

    def _present(self) -> dict[int, _Peer]:
        """Return the ranks that are not lost."""
        lost = self._lost()
        return {rank: each for rank, each in self._peers.items() if each.person.number not in lost and not each.ended}

    # --- who is missing -----------------------------------------------------------------------------------------------

    def _look_after(self, stall: _Stall, now: float) -> None:
        peers = self._present()
        if stall.asked and not any(self._is_thinking(each, now) for each in peers.values()):
            self._judge(stall, peers, now)
        if now >= stall.asks_at:
            stall.asked, stall.asks_at = True, now + self._rules.grace_s
            for rank, peer in peers.items():
                peer.owes_since = now if peer.owes_since is None else peer.owes_since
                self._send(rank, kind="ask", word=astuple(self._whereabouts.word()))

    def _judge(self, stall: _Stall, peers: dict[int, _Peer], now: float) -> None:
        """Report and decide, once every rank has answered or has had the time to."""
        missing = {rank: each for rank, each in peers.items() if self._is_missing(each, now)}
        if now >= stall.reports_at:
            stall.reports_at = now + (now - stall.wait.since)
            self._report(stall, missing, now)
        if self._rules.timeout_s is not None and now - stall.wait.since >= self._rules.timeout_s:
            stalled = {rank: each for rank, each in missing.items() if self._is_stalled(each, stall, now)}
            if stalled:
                self._give_up(stall, stalled, now)

    def _is_thinking(self, peer: _Peer, now: float) -> bool:
        return peer.owes_since is not None and not self._is_silent(peer, now)

    def _is_silent(self, peer: _Peer, now: float) -> bool:
        return peer.owes_since is not None and now - peer.owes_since >= self._rules.grace_s

    def _is_missing(self, peer: _Peer, now: float) -> bool:
        """Tell whether `peer` does not wait as this rank does: somebody who waits for long is not who is waited for."""
        if self._is_silent(peer, now):
            return True
        if peer.word.call:
            return False
        in_call = bool(self._whereabouts.word().call)
        return not peer.word.place or (in_call and peer.word.place_s < self._rules.first_s)

    def _is_stalled(self, peer: _Peer, stall: _Stall, now: float) -> bool:
        """Tell whether `peer` is to be given up: it does not answer, or takes no step while a round waits for it."""
        timeout_s = self._rules.timeout_s or math.inf
        if self._is_silent(peer, now):
            is_sure = now - (peer.owes_since or now) >= min(timeout_s / 4, SURE_S)
            return is_sure and now - max(peer.heard_at, stall.wait.since) >= timeout_s
        waits_for_rounds = self._whereabouts.word().place_s >= timeout_s
        return waits_for_rounds and not peer.word.paused and peer.word.idle_s >= timeout_s

    def _where(self, peer: _Peer, now: float) -> str:
        if self._is_silent(peer, now):
            away_s = now - (peer.owes_since or now)
            return f"{peer.person}, which has not answered for {away_s:.0f} s: stopped, or its host is away"
        return f"{peer.person}, {peer.word}"

    def _report(self, stall: _Stall, missing: dict[int, _Peer], now: float) -> None:
        waited = f"{self._own} has waited for {now - stall.wait.since:.0f} s in {stall.wait.place}"
        for each in missing.values():
            each.held_up = stall.wait.place
            each.was_away = each.was_away or self._is_silent(each, now)
        if missing:
            logger.warning("%s for %s", waited, "; for ".join(self._where(each, now) for each in missing.values()))
        elif not self._whereabouts.word().call:
            logger.warning("%s, though all ranks are there and wait as well: is the network down, or slow?", waited)

    def _note_the_end(self, stall: _Stall, now: float) -> None:
        for peer in self._peers.values():
            if peer.held_up:
                peer.held_up = f"{stall.wait.place} was held up for {now - stall.wait.since:.0f} s"

    def _say_who_is_back(self) -> None:
        for peer in self._present().values():
            if peer.held_up and peer.owes_since is None:
                logger.warning("%s %s; %s", peer.person, "is back" if peer.was_away else "has come", peer.held_up)
                peer.held_up, peer.was_away = "", False

    # --- giving ranks up ----------------------------------------------------------------------------------------------

    def _give_up(self, stall: _Stall, stalled: dict[int, _Peer], now: float) -> None:
        held_up = f"held up for {self._rules.timeout_s:g} s (stall_timeout_s) by"
        whole = f"{held_up} {'; by '.join(self._where(each, now) for each in stalled.values())}"
        if self._rules.on_stall == "end":
            self._end_everywhere(whole)
            return
        for rank, peer in stalled.items():
            if not self._drop(rank, peer, f"{held_up} {self._where(peer, now)}", now):
                self._take_sides(stall, whole, now)
                return

    def _drop(self, rank: int, peer: _Peer, why: str, now: float) -> bool:
        """Have a rank ended by one that can: itself, if it answers, or another of its host; False: there is none."""
        if peer.ending_since is not None and now - peer.ending_since < 2 * self._rules.grace_s:
            return True
        there = {each: other for each, other in self._present().items() if not self._is_silent(other, now)}
        able = [self._comm.rank] if self._own.machine == peer.person.machine else []
        able += [each for each, other in there.items() if other.person.machine == peer.person.machine]
        able = [each for each in ([rank] if rank in there else []) + able if each not in peer.enders]
        if not able:
            return False
        peer.ending_since = now
        peer.enders.add(able[0])
        if able[0] == self._comm.rank:
            peer.ended = self._end_process(rank, why)
        else:
            self._send(able[0], kind="drop", rank=rank, why=why)
        return True

    def _take_sides(self, stall: _Stall, why: str, now: float) -> None:
        """Where ranks can neither be reached nor ended: go on without them, leave them to go on, or end the job.

        The lowest rank of this side decides, for all of it; the next one where that does not.
        """
        present = self._present()
        away = {rank: each for rank, each in present.items() if self._is_silent(each, now)}
        here = [self._own] + [each.person for rank, each in present.items() if rank not in away]
        everyone = here + [each.person for each in away.values()]
        side, whole = {each.number for each in here}, {each.number for each in everyone}
        turn = 1 + sum(number < self._own.number for number in side)
        if now - stall.wait.since < turn * (self._rules.timeout_s or 0):
            return
        if not all(self._is_stalled(each, stall, now) for each in away.values()):
            return  # some may be back soon
        beside_launcher = {each.number for each in everyone if each.beside_launcher}
        if goes_on(side, whole, beside_launcher):
            for rank in present:  # those that are away hear it once they can be reached again
                self._send(rank, kind="cut off", ranks=list(away), why=why)
            self._leave_behind(list(away), why)
        elif goes_on(whole - side, whole, beside_launcher):
            why = f"{why}; {len(side)} of {len(whole)} ranks are on this side, and those of the other go on"
            for rank in present.keys() - away.keys():
                self._send(rank, kind="leave", why=why)
            self._end(why, CutOffError)
        else:
            reason = "mpirun's host is away" if goes_on(side, whole) else "most ranks are away"
            self._end_everywhere(
                f"{why}; no rank of its host is left that could end it, and {reason} (on_stall='drop')"
            )

    def _leave_behind(self, ranks: Sequence[int], why: str) -> None:
        """Go on without ranks that cannot be reached; leave, if this is one of them."""
        if self._comm.rank in ranks:
            self._end(f"{why}; the others have gone on", CutOffError)
            return
        for rank in ranks:
            if (peer := self._peers[rank]).ended:
                continue
            logger.warning("rank %d is cut off: %s", peer.person.number, why)
            peer.ended = True
            if not self._comm.declare_lost(rank):
                self._end_everywhere(f"{why}; this MPI cannot go on without ranks that it does not know to be lost")
                return

    def _obey(self, source: int, rank: int, why: str) -> None:
        """End `rank`, as another one has decided."""
        if rank != self._comm.rank:
            self._send(source, kind="dropped", rank=rank, done=self._end_process(rank, why))
            return
        request, deadline = self._send(source, kind="dropped", rank=rank, done=True), time.monotonic() + SENDING_S
        while request is not None and not self._is_sent(request) and time.monotonic() < deadline:
            time.sleep(0.001)
        self._end_process(rank, why)

    def _end_process(self, rank: int, why: str) -> bool:
        person = self._own if rank == self._comm.rank else self._peers[rank].person
        logger.warning("rank %d is dropped: %s", person.number, why)
        try:
            if _born(person.pid) == person.born:
                self._comm.kill(rank, person.pid)
        except OSError as error:
            logger.warning("%s cannot be ended from here: %s", person, error)
            return False
        return True

    def _end_everywhere(self, why: str) -> None:
        for rank in self._present():
            self._send(rank, kind="end", why=why)
        self._end(why)

    def _end(self, why: str, kind: type[StallError] = StallError) -> None:
        if self._error is None:
            leaves, ends = (
                f"this rank leaves the job: {why}",
                f"the job ends: {why}; start it again from its last checkpoint",
            )
            error = kind(leaves if kind is CutOffError else ends)
            logger.error("%s", error)
            self._error = error, self._clock() + LAST_WORDS_S
            self._fail(error)

    def _end_in_time(self, now: float) -> None:
        """End the job where the training thread has not seen the error: it waits in something that does not look."""
        assert self._error is not None, "there is an error"
        error, deadline = self._error
        if not error.raised and now >= deadline and self._comm.spans_processes:
            (job.leave_job if isinstance(error, CutOffError) else job.end_job)(str(error))
