"""An in-process transport: N ranks as N threads, for tests and documentation."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Message, Request, Reserve, SharedMemory
from hvd_shadowsync.comm.echo import EchoCommunicator
from hvd_shadowsync.errors import RankLostError, TransportError

T = TypeVar("T")
BLOCKING_TIMEOUT_S = 60.0
LOOK_S = 0.005


class Killed(BaseException):
    """Raised in the threads of a rank that was killed."""


def run(
    size: int,
    program: Callable[[Communicator], T],
    *,
    timeout_s: float = BLOCKING_TIMEOUT_S,
    hosts: Sequence[int] | None = None,
    kill: Mapping[int, int] | None = None,
    spares: int = 0,
) -> list[T]:
    """Run `program(communicator)` on `size` ranks, each a thread of this process; return the results by rank.

    `hosts` and `kill` as for `world`; the result of a rank that was killed is None, whatever became of it. So many
    `spares` are more ranks, which run it only in the place of a lost one, with an `EchoCommunicator` then; their
    results are the last ones, None where they did not.

    Raises:
        TransportError: a rank did not end within `timeout_s`; names it.
        Exception: the first error that a rank raised.
    """
    ranks = world(size, hosts, kill)
    fate = ranks[0]._shared.fate
    fate.spares = list(range(size, size + spares))
    results: list[Any] = [None] * (size + spares)
    failures: list[tuple[int, BaseException]] = []

    def body(rank: int) -> None:
        try:
            comm = ranks[rank] if rank < size else _called(fate, rank)
            results[rank] = None if comm is None else program(comm)
        except BaseException as error:
            if rank not in fate.dead:
                failures.append((rank, error))
        finally:
            fate.ended.add(rank)

    everyone = range(size + spares)
    threads = [threading.Thread(target=body, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s if not failures else 1.0)
    if failures:
        raise failures[0][1]
    hung = [thread.name for thread in threads if thread.is_alive()]
    if hung:
        raise TransportError(f"still running after {timeout_s} s: {', '.join(hung)}")
    return results


def _called(fate: _Fate, process: int) -> Communicator | None:
    """Return what a spare's program begins with, once it is called; None where it is not."""
    with fate.changed:
        while process not in fate.called:
            if fate.is_over:
                return None
            fate.changed.wait(LOOK_S)
        number = fate.called[process]
    reserve = LocalReserve(fate, process, number)
    return EchoCommunicator(range(fate.size), lambda _: reserve, spans_processes=False)


def world(
    size: int, hosts: Sequence[int] | None = None, kill: Mapping[int, int] | None = None
) -> list[LocalCommunicator]:
    """Return the communicators of a world of `size` ranks in this process, by rank.

    Args:
        size: number of ranks.
        hosts: the number of each rank's host, for programs that mind; by default all are on one.
        kill: a rank and the number of the call, of whichever communicator, in which it is lost, from 1 on; given (even
            empty) the others go on (`outlives_ranks`), and `LocalCommunicator.die` may be called as well.
    """
    shared = _Shared([0] * size if hosts is None else list(hosts), range(size), range(size), _Fate(kill, size))
    return [LocalCommunicator(shared, rank) for rank in range(size)]


class _Fate:
    """Which processes of a world are dead, and which are to die, in which of their calls; and who replaces them."""

    def __init__(self, kill: Mapping[int, int] | None, size: int) -> None:
        self.size, self.name = size, uuid.uuid4().hex
        self.changed = threading.Condition()
        self.spares: list[int] = []
        self.called: dict[int, int] = {}
        self.ready: dict[int, int] = {}
        self.merged: dict[int, _Shared] = {}
        self.outcomes: dict[int, bool] = {}
        self.ended: set[int] = set()
        self.outlives_ranks = kill is not None
        self.dead: set[int] = set()
        self._left = dict(kill or {})
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether nobody is left that could take a spare in."""
        joined = {process for process, done in self.outcomes.items() if done}
        return set(range(self.size)) | joined <= self.dead | self.ended

    def count(self, member: int) -> None:
        """Take note of a call of the process `member`: its last one?"""
        if not self.outlives_ranks:
            return
        with self._lock:
            if member in self._left:
                self._left[member] -= 1
                if self._left[member] <= 0:
                    self.dead.add(member)
            if member in self.dead:
                raise Killed(f"rank {member}")


@dataclass
class _Collective:
    kind: str
    shared: _Shared
    deposits: dict[int, Any] = field(default_factory=dict)
    done: bool = False


@dataclass
class _Joined:
    """One rank's part in a collective; what it had deposited is its own again once this has raised."""

    collective: _Collective
    rank: int

    def test(self) -> bool:
        collective = self.collective
        if collective.done:
            return True
        shared = collective.shared
        try:
            shared.require_whole(waiting_for=set(range(shared.size)) - set(collective.deposits))
        except RankLostError:
            with shared.changed:
                if collective.done:
                    return True
                collective.deposits.pop(self.rank, None)
            raise
        return False


@dataclass
class _Done:
    def test(self) -> bool:
        return True


class _Shared:
    """What the ranks of one communicator have in common."""

    def __init__(self, hosts: list[int], members: Sequence[int], processes: Sequence[int], fate: _Fate) -> None:
        self.hosts, self.size, self.members, self.fate = hosts, len(hosts), tuple(members), fate
        self.processes = tuple(processes)
        self.revoked = False
        self.agreements: dict[int, _Agreement] = {}
        self.changed = threading.Condition()
        self.collectives: dict[int, _Collective] = {}
        self.mailboxes: list[list[_Letter]] = [[] for _ in hosts]
        self.receives: list[list[_Receive]] = [[] for _ in hosts]
        self.parts: dict[tuple[int, int], _Shared] = {}

    def join(
        self, number: int, kind: str, rank: int, deposit: Any, combine: Callable[[dict[int, Any]], None]
    ) -> Request:
        with self.changed:
            self.require_whole()
            collective = self.collectives.setdefault(number, _Collective(kind, self))
            if collective.kind != kind:
                raise TransportError(f"rank {rank} calls {kind} where another rank calls {collective.kind}")
            collective.deposits[rank] = deposit
            if len(collective.deposits) == self.size:
                combine(collective.deposits)
                collective.done = True
                del self.collectives[number]
                self.changed.notify_all()
            return _Joined(collective, rank)

    def part(self, number: int, color: int, members: list[int]) -> _Shared:
        with self.changed:
            return self.parts.setdefault((number, color), self.of(members))

    def of(self, ranks: list[int]) -> _Shared:
        return _Shared(
            [self.hosts[rank] for rank in ranks],
            [self.members[rank] for rank in ranks],
            [self.processes[rank] for rank in ranks],
            self.fate,
        )

    def with_one_more(self, number: int, process: int) -> _Shared:
        members, processes = (*self.members, number), (*self.processes, process)
        return _Shared([*self.hosts, self.hosts[0]], members, processes, self.fate)

    def require_whole(self, waiting_for: set[int] | None = None) -> None:
        """Raise where the communicator is revoked, or one of the ranks that are waited for is dead."""
        if self.revoked:
            raise RankLostError("the communicator is revoked")
        if dead := [rank for rank in waiting_for or () if self.processes[rank] in self.fate.dead]:
            raise RankLostError(f"rank {dead[0]} is dead")

    def agree(self, number: int, rank: int, done: bool) -> _Agreement:
        """Return what the ranks that are left have agreed upon, all of them the same."""
        with self.changed:
            agreement = self.agreements.setdefault(number, _Agreement())
            agreement.said[rank] = done
            deadline = time.monotonic() + BLOCKING_TIMEOUT_S
            while agreement.alive is None:
                alive = [each for each in range(self.size) if self.processes[each] not in self.fate.dead]
                if set(alive) <= set(agreement.said):
                    agreement.alive = alive
                    agreement.done = len(alive) == self.size and all(agreement.said.values())
                    self.changed.notify_all()
                elif time.monotonic() > deadline:
                    raise TransportError(f"rank {rank} waited {BLOCKING_TIMEOUT_S} s for the others to agree")
                else:
                    self.changed.wait(LOOK_S)
            return agreement


@dataclass
class _Agreement:
    """What each rank has said, and once all that are left have: who they are, and whether all are and said `done`."""

    said: dict[int, bool] = field(default_factory=dict)
    alive: list[int] | None = None
    done: bool = False
    after: _Shared | None = None


class _Letter:
    def __init__(self, payload: Tensor, source: int, tag: int) -> None:
        self.payload, self.source, self.tag, self.num_bytes = payload, source, tag, payload.nbytes

    def irecv(self, tensor: Tensor) -> Request:
        tensor.detach().view(-1).view(torch.uint8)[: self.num_bytes].copy_(self.payload.view(torch.uint8))
        return _Done()


@dataclass
class _Segments:
    segments: list[Tensor] = field(default_factory=list)

    def fence(self) -> None:
        """Threads of one interpreter see each other's writes in order."""


@dataclass(eq=False)
class _Receive:
    """A receive; of several that fit, a message is for the one that was begun first."""

    shared: _Shared
    rank: int
    tensor: Tensor
    source: int
    tag: int
    done: bool = False

    def __post_init__(self) -> None:
        with self.shared.changed:
            self.shared.receives[self.rank].append(self)

    def test(self) -> bool:
        mailbox, receives = self.shared.mailboxes[self.rank], self.shared.receives[self.rank]
        with self.shared.changed:
            for letter in list(mailbox) if not self.done else []:
                first = next(
                    (each for each in receives if (each.source, each.tag) == (letter.source, letter.tag)), None
                )
                if first is not None:
                    mailbox.remove(letter)
                    receives.remove(first)
                    letter.irecv(first.tensor)
                    first.done = True
        if not self.done:
            self.shared.require_whole(waiting_for={self.source})
        return self.done


class LocalReserve(Reserve):
    """Threads that wait until they are a rank that replaces a lost one; one handle a world."""

    def __init__(self, fate: _Fate, process: int, number: int) -> None:
        self._fate, self._process = fate, process
        self.is_new, self.shard, self.name = process >= fate.size, (number, fate.size), fate.name

    def summon(self, numbers: Sequence[int]) -> None:
        """See `Reserve.summon`."""
        fate = self._fate
        with fate.changed:
            coming = {number for process, number in fate.called.items() if process not in fate.dead}
            free = [each for each in fate.spares if each not in fate.dead and each not in fate.called]
            fate.called |= dict(zip(free, [each for each in numbers if each not in coming], strict=False))
            fate.changed.notify_all()

    def candidate(self, numbers: Sequence[int]) -> tuple[int, int] | None:
        """See `Reserve.candidate`."""
        with self._fate.changed:
            ready = sorted(self._fate.ready.items())
        return next(((p, n) for p, n in ready if n in numbers and p not in self._fate.dead), None)

    def meet(self, comm: Communicator, spare: int) -> Any:
        """See `Reserve.meet`."""
        comm.allgather_object(None)
        self._fate.count(self._process)
        return spare

    def merge(self, meeting: Any, comm: Communicator, number: int) -> Communicator:
        """See `Reserve.merge`."""
        assert isinstance(comm, LocalCommunicator), "a world has one transport"
        comm.allgather_object(None)
        with self._fate.changed:
            merged = self._fate.merged.setdefault(meeting, comm._shared.with_one_more(number, meeting))
        return LocalCommunicator(merged, comm.rank)

    def settle(self, spare: int, *, joined: bool) -> None:
        """See `Reserve.settle`."""
        with self._fate.changed:
            self._fate.ready.pop(spare, None)
            self._fate.outcomes.setdefault(spare, joined)
            self._fate.changed.notify_all()

    def join(self) -> Communicator:
        """See `Reserve.join`; the thread ends, killed, where it cannot."""
        fate, me = self._fate, self._process
        with fate.changed:
            fate.ready[me] = self.shard[0]
            while me not in fate.outcomes and not fate.is_over:
                fate.count(me)
                fate.changed.wait(LOOK_S)
            if not fate.outcomes.get(me, False):
                fate.dead.add(me)
            fate.count(me)
            merged = fate.merged[me]
        return LocalCommunicator(merged, merged.size - 1)


class LocalCommunicator(Communicator):
    """One rank of an in-process world; collectives complete when the last rank has joined them."""

    spans_processes = False

    def __init__(self, shared: _Shared, rank: int) -> None:
        self.rank, self.size, self.members = rank, shared.size, shared.members
        self.outlives_ranks = shared.fate.outlives_ranks
        self._shared = shared
        self._numbers = itertools.count()
        self._parts = itertools.count()
        self._agreements = itertools.count()
        self._made: list[LocalCommunicator] = []
        self._overlooks = False

    @property
    def is_dead(self) -> bool:
        """Whether this rank was killed."""
        return self._process in self._shared.fate.dead

    def die(self) -> None:
        """Let this rank be lost, as if its process were killed: its threads get `Killed` at their next calls."""
        self._shared.fate.dead.add(self._process)

    def check(self) -> None:
        """See `Communicator.check`."""
        if self.outlives_ranks:
            self._count()
            self._shared.require_whole(waiting_for=set(range(self.size)))

    def revoke(self) -> None:
        """See `Communicator.revoke`."""
        if self.outlives_ranks:
            self._count()
            self._shared.revoked = True
            for part in self._made:
                part.revoke()

    def agree(self, done: bool) -> bool:
        """See `Communicator.agree`."""
        if not self.outlives_ranks:
            return done
        return self._agreed(done).done

    def survivors(self) -> Communicator:
        """See `Communicator.survivors`."""
        agreement = self._agreed(done=True)
        assert agreement.alive is not None, "it was agreed upon"
        with self._shared.changed:
            after = agreement.after = agreement.after or self._shared.of(agreement.alive)
        return LocalCommunicator(after, agreement.alive.index(self.rank))

    def iallreduce(self, send: Tensor, recv: Tensor | None = None) -> Request:
        """See `Communicator.iallreduce`."""

        def combine(buffers: dict[int, tuple[Tensor, Tensor]]) -> None:
            total = torch.stack([buffers[rank][0] for rank in range(self.size)]).sum(0)
            for _, target in buffers.values():
                target.copy_(total)

        return self._join("iallreduce", (send, send if recv is None else recv), combine)

    def iallgather(self, send: Tensor, recv: Tensor) -> Request:
        """See `Communicator.iallgather`."""

        def combine(buffers: dict[int, tuple[Tensor, Tensor]]) -> None:
            gathered = torch.cat([buffers[rank][0].reshape(-1) for rank in range(self.size)])
            for _, target in buffers.values():
                target.view(-1).copy_(gathered)

        return self._join("iallgather", (send, recv), combine)

    def ialltoall(self, send: Tensor, recv: Tensor) -> Request:
        """See `Communicator.ialltoall`."""

        def combine(buffers: dict[int, tuple[Tensor, Tensor]]) -> None:
            blocks = torch.stack([buffers[rank][0].reshape(self.size, -1) for rank in range(self.size)])
            for rank, (_, target) in buffers.items():
                target.view(self.size, -1).copy_(blocks[:, rank])

        return self._join("ialltoall", (send, recv), combine)

    def ibcast(self, tensor: Tensor, root: int = 0) -> Request:
        """See `Communicator.ibcast`."""

        def combine(tensors: dict[int, Tensor]) -> None:
            for each in tensors.values():
                each.copy_(tensors[root])

        return self._join("ibcast", tensor, combine)

    def isend(self, tensor: Tensor, dest: int, tag: int) -> Request:
        """See `Communicator.isend`."""
        self._count()
        with self._shared.changed:
            self._shared.require_whole()
            self._shared.mailboxes[dest].append(_Letter(tensor.detach().clone().view(-1), self.rank, tag))
        return _Done()

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Request:
        """See `Communicator.irecv`."""
        self._count()
        return _Receive(self._shared, self.rank, tensor, source, tag)

    def probe(self) -> Message | None:
        """See `Communicator.probe`."""
        if self._overlooks:
            self._count()
        else:
            self.check()
        with self._shared.changed:
            mailbox = self._shared.mailboxes[self.rank]
            return mailbox.pop(0) if mailbox else None

    def allgather_object(self, value: Any) -> list[Any]:
        """See `Communicator.allgather_object`."""
        return [pickle.loads(each) for each in self._gather("allgather_object", pickle.dumps(value))]

    def share(self, num_bytes: int) -> SharedMemory | None:
        """See `Communicator.share`."""
        own = torch.zeros(num_bytes, dtype=torch.uint8)
        return _Segments(self._gather("share", own)) if len(set(self.hosts())) == 1 else None

    def hosts(self) -> list[int]:
        """See `Communicator.hosts`."""
        return [self._shared.hosts.index(host) for host in self._shared.hosts]

    def split(self, color: int | None) -> Communicator | None:
        """See `Communicator.split`."""
        colors = self._gather("split", color)
        members = [rank for rank, each in enumerate(colors) if each == color]
        number = next(self._parts)
        if color is None:
            return None
        return self._part(self._shared.part(number, color, members), members.index(self.rank))

    def reserve(self, handle: int) -> Reserve | None:
        """See `Communicator.reserve`."""
        fate = self._shared.fate
        return LocalReserve(fate, self._process, self.members[self.rank]) if fate.spares else None

    def overlook_lost(self) -> None:
        """See `Communicator.overlook_lost`."""
        self._overlooks = True

    def kill(self, rank: int, pid: int) -> None:
        """See `Communicator.kill`; all ranks are of one process, which goes on."""
        self._shared.fate.dead.add(self._shared.processes[rank])

    def declare_lost(self, rank: int) -> bool:
        """See `Communicator.declare_lost`; one process, so all ranks take it for lost."""
        self._shared.fate.dead.add(self._shared.processes[rank])
        return True

    def dup(self, *, linked: bool = True) -> Communicator:
        """See `Communicator.dup`."""
        self._count()
        self._shared.require_whole()
        return self._part(self._shared.part(next(self._parts), 0, list(range(self.size))), self.rank, linked)

    def _part(self, shared: _Shared, rank: int, linked: bool = True) -> LocalCommunicator:
        part = LocalCommunicator(shared, rank)
        if linked:
            self._made.append(part)
        return part

    def free(self) -> None:
        """See `Communicator.free`."""

    @property
    def _process(self) -> int:
        return self._shared.processes[self.rank]

    def _count(self) -> None:
        self._shared.fate.count(self._process)

    def _agreed(self, done: bool) -> _Agreement:
        self._count()
        return self._shared.agree(next(self._agreements), self.rank, done)

    def _gather(self, kind: str, value: T) -> list[T]:
        """Return the ranks' own objects, by rank."""
        gathered: dict[int, T] = {}
        request = self._join(kind, (value, gathered), _share_all)
        deadline = time.monotonic() + BLOCKING_TIMEOUT_S
        with self._shared.changed:
            while not request.test():
                if time.monotonic() > deadline:
                    raise TransportError(f"rank {self.rank} waited {BLOCKING_TIMEOUT_S} s in {kind}")
                self._shared.changed.wait(LOOK_S if self.outlives_ranks else 1.0)
        return [gathered[rank] for rank in range(self.size)]

    def _join(self, kind: str, deposit: Any, combine: Callable[[dict[int, Any]], None]) -> Request:
        self._count()
        return self._shared.join(next(self._numbers), kind, self.rank, deposit, combine)


def _share_all(deposits: dict[int, tuple[Any, dict[int, Any]]]) -> None:
    values = {rank: value for rank, (value, _) in deposits.items()}
    for _, gathered in deposits.values():
        gathered.update(values)
