"""A communicator that takes note of what it is asked for and of how much is under way at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Message, Request, SharedMemory


@dataclass
class Record:
    """What one rank asked for, in order."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    messages: list[tuple[int, int]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    def begin(self, kind: str, tensor: Tensor) -> None:
        self.calls.append((kind, tensor.nbytes))
        self.under_way += 1
        self.most = max(self.most, self.under_way)


class _Watched:
    def __init__(self, request: Request, record: Record) -> None:
        self._request, self._record, self._done = request, record, False

    def test(self) -> bool:
        if not self._done and self._request.test():
            self._done = True
            self._record.under_way -= 1
        return self._done


class Recorded(Communicator):
    """Passes everything on to `comm`; `record.calls` has (operation, bytes), `record.messages` (destination, tag)."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.record = comm, Record()
        self.rank, self.size, self.members = comm.rank, comm.size, comm.members
        self.spans_processes, self.outlives_ranks = comm.spans_processes, comm.outlives_ranks

    def iallreduce(self, send: Tensor, recv: Tensor | None = None) -> Request:
        return self._watch("iallreduce", send, self._comm.iallreduce(send, recv))

    def iallgather(self, send: Tensor, recv: Tensor) -> Request:
        return self._watch("iallgather", send, self._comm.iallgather(send, recv))

    def ialltoall(self, send: Tensor, recv: Tensor) -> Request:
        return self._watch("ialltoall", send, self._comm.ialltoall(send, recv))

    def ibcast(self, tensor: Tensor, root: int = 0) -> Request:
        return self._watch("ibcast", tensor, self._comm.ibcast(tensor, root))

    def isend(self, tensor: Tensor, dest: int, tag: int) -> Request:
        self.record.messages.append((dest, tag))
        return self._watch("isend", tensor, self._comm.isend(tensor, dest, tag))

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Request:
        return self._watch("irecv", tensor, self._comm.irecv(tensor, source, tag))

    def probe(self) -> Message | None:
        return self._comm.probe()

    def allgather_object(self, value: Any) -> list[Any]:
        return self._comm.allgather_object(value)

    def share(self, num_bytes: int) -> SharedMemory | None:
        return self._comm.share(num_bytes)

    def hosts(self) -> list[int]:
        return self._comm.hosts()

    def split(self, color: int | None) -> Communicator | None:
        return self._comm.split(color)

    def dup(self, *, linked: bool = True) -> Communicator:
        return self._comm.dup(linked=linked)

    def check(self) -> None:
        self._comm.check()

    def revoke(self) -> None:
        self._comm.revoke()

    def agree(self, done: bool) -> bool:
        return self._comm.agree(done)

    def survivors(self) -> Communicator:
        return self._comm.survivors()

    def free(self) -> None:
        self._comm.free()

    def _watch(self, kind: str, tensor: Tensor, request: Request) -> Request:
        self.record.begin(kind, tensor)
        return _Watched(request, self.record)


class Apart(Recorded):
    """Ranks that are on different hosts."""

    def share(self, num_bytes: int) -> SharedMemory | None:
        return None

    def dup(self, *, linked: bool = True) -> Communicator:
        return Apart(self._comm.dup(linked=linked))
