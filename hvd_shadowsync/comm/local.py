"""An in-process transport: N ranks as N threads, for tests and documentation."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Message, Request, SharedMemory
from hvd_shadowsync.errors import TransportError

T = TypeVar("T")
BLOCKING_TIMEOUT_S = 60.0


def run(
    size: int,
    program: Callable[[Communicator], T],
    *,
    timeout_s: float = BLOCKING_TIMEOUT_S,
    hosts: Sequence[int] | None = None,
) -> list[T]:
    """Run `program(communicator)` on `size` ranks, each a thread of this process; return the results by rank.

    `hosts` as for `world`.

    Raises:
        TransportError: a rank did not end within `timeout_s`; names it.
        Exception: the first error that a rank raised.
    """
    ranks = world(size, hosts)
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []

    def body(rank: int) -> None:
        try:
            results[rank] = program(ranks[rank])
        except BaseException as error:
            failures.append((rank, error))

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
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


def world(size: int, hosts: Sequence[int] | None = None) -> list[Communicator]:
    """Return the communicators of a world of `size` ranks in this process, by rank.

    `hosts` has the number of each rank's host, for programs that mind; by default all are on one.
    """
    shared = _Shared([0] * size if hosts is None else list(hosts))
    return [LocalCommunicator(shared, rank) for rank in range(size)]


@dataclass
class _Collective:
    kind: str
    deposits: dict[int, Any] = field(default_factory=dict)
    done: bool = False

    def test(self) -> bool:
        return self.done


@dataclass
class _Done:
    def test(self) -> bool:
        return True


class _Shared:
    """What the ranks of one communicator have in common."""

    def __init__(self, hosts: list[int]) -> None:
        self.hosts, self.size = hosts, len(hosts)
        self.changed = threading.Condition()
        self.collectives: dict[int, _Collective] = {}
        self.mailboxes: list[list[_Letter]] = [[] for _ in hosts]
        self.parts: dict[tuple[int, int], _Shared] = {}

    def join(
        self, number: int, kind: str, rank: int, deposit: Any, combine: Callable[[dict[int, Any]], None]
    ) -> Request:
        with self.changed:
            collective = self.collectives.setdefault(number, _Collective(kind))
            if collective.kind != kind:
                raise TransportError(f"rank {rank} calls {kind} where another rank calls {collective.kind}")
            collective.deposits[rank] = deposit
            if len(collective.deposits) == self.size:
                combine(collective.deposits)
                collective.done = True
                del self.collectives[number]
                self.changed.notify_all()
            return collective

    def part(self, number: int, color: int, members: list[int]) -> _Shared:
        with self.changed:
            return self.parts.setdefault((number, color), _Shared([self.hosts[rank] for rank in members]))


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


@dataclass
class _Receive:
    mailbox: list[_Letter]
    changed: threading.Condition
    tensor: Tensor
    source: int
    tag: int
    done: bool = False

    def test(self) -> bool:
        with self.changed:
            for letter in self.mailbox if not self.done else []:
                if (letter.source, letter.tag) == (self.source, self.tag):
                    self.mailbox.remove(letter)
                    letter.irecv(self.tensor)
                    self.done = True
                    break
        return self.done


class LocalCommunicator(Communicator):
    """One rank of an in-process world; collectives complete when the last rank has joined them."""

    spans_processes = False

    def __init__(self, shared: _Shared, rank: int) -> None:
        self.rank, self.size = rank, shared.size
        self._shared = shared
        self._numbers = itertools.count()
        self._parts = itertools.count()

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
        with self._shared.changed:
            self._shared.mailboxes[dest].append(_Letter(tensor.detach().clone().view(-1), self.rank, tag))
        return _Done()

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Request:
        """See `Communicator.irecv`."""
        return _Receive(self._shared.mailboxes[self.rank], self._shared.changed, tensor, source, tag)

    def probe(self) -> Message | None:
        """See `Communicator.probe`."""
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
        return LocalCommunicator(self._shared.part(number, color, members), members.index(self.rank))

    def dup(self) -> Communicator:
        """See `Communicator.dup`."""
        return LocalCommunicator(self._shared.part(next(self._parts), 0, list(range(self.size))), self.rank)

    def free(self) -> None:
        """See `Communicator.free`."""

    def _gather(self, kind: str, value: T) -> list[T]:
        """Return the ranks' own objects, by rank."""
        gathered: dict[int, T] = {}
        request = self._join(kind, (value, gathered), _share_all)
        with self._shared.changed:
            if not self._shared.changed.wait_for(request.test, BLOCKING_TIMEOUT_S):
                raise TransportError(f"rank {self.rank} waited {BLOCKING_TIMEOUT_S} s in {kind}")
        return [gathered[rank] for rank in range(self.size)]

    def _join(self, kind: str, deposit: Any, combine: Callable[[dict[int, Any]], None]) -> Request:
        return self._shared.join(next(self._numbers), kind, self.rank, deposit, combine)


def _share_all(deposits: dict[int, tuple[Any, dict[int, Any]]]) -> None:
    values = {rank: value for rank, (value, _) in deposits.items()}
    for _, gathered in deposits.values():
        gathered.update(values)
