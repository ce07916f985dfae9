"""A communicator that answers for all ranks with what its own says: for one that has not joined the others yet."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Message, Request, Reserve, SharedMemory


class _Complete:
    def test(self) -> bool:
        return True


class EchoCommunicator(Communicator):
    """The last of as many ranks as `members` has, all of which do what this one does.

    So what a script does at its start, where all ranks do the same, has its usual result; nothing is sent.

    Args:
        members: see `Communicator.members`.
        reserve, spans_processes: see `Communicator`.
    """

    outlives_ranks = True

    def __init__(
        self, members: Sequence[int], reserve: Callable[[int], Reserve], *, spans_processes: bool = True
    ) -> None:
        self.rank, self.size, self.members = len(members) - 1, len(members), tuple(members)
        self._reserve, self.spans_processes = reserve, spans_processes

    def reserve(self, handle: int) -> Reserve:
        """See `Communicator.reserve`."""
        return self._reserve(handle)

    def iallreduce(self, send: Tensor, recv: Tensor | None = None) -> Request:
        """See `Communicator.iallreduce`."""
        (send if recv is None else recv).copy_(send * self.size)
        return _Complete()

    def iallgather(self, send: Tensor, recv: Tensor) -> Request:
        """See `Communicator.iallgather`."""
        recv.view(self.size, -1).copy_(send.reshape(1, -1))
        return _Complete()

    def ialltoall(self, send: Tensor, recv: Tensor) -> Request:
        """See `Communicator.ialltoall`."""
        recv.view(self.size, -1).copy_(send.reshape(self.size, -1)[self.rank].clone())
        return _Complete()

    def ibcast(self, tensor: Tensor, root: int = 0) -> Request:
        """See `Communicator.ibcast`."""
        return _Complete()

    def isend(self, tensor: Tensor, dest: int, tag: int) -> Request:
        """See `Communicator.isend`; goes nowhere."""
        return _Complete()

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Request:
        """See `Communicator.irecv`."""
        raise AssertionError("nobody sends anything")

    def probe(self) -> Message | None:
        """See `Communicator.probe`."""
        return None

    def allgather_object(self, value: Any) -> list[Any]:
        """See `Communicator.allgather_object`."""
        return [pickle.loads(pickle.dumps(value)) for _ in range(self.size)]

    def share(self, num_bytes: int) -> SharedMemory | None:
        """See `Communicator.share`."""
        return None

    def hosts(self) -> list[int]:
        """See `Communicator.hosts`."""
        return list(range(self.size))

    def split(self, color: int | None) -> Communicator | None:
        """See `Communicator.split`."""
        return None if color is None else self.dup()

    def check(self) -> None:
        """See `Communicator.check`."""

    def revoke(self) -> None:
        """See `Communicator.revoke`."""

    def agree(self, done: bool) -> bool:
        """See `Communicator.agree`."""
        return done

    def survivors(self) -> Communicator:
        """See `Communicator.survivors`."""
        return self

    def dup(self, *, linked: bool = True) -> Communicator:
        """See `Communicator.dup`."""
        return EchoCommunicator(self.members, self._reserve, spans_processes=self.spans_processes)

    def free(self) -> None:
        """See `Communicator.free`."""
