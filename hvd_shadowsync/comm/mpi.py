"""The MPI transport: one communicator of our own, non-blocking calls only, through mpi4py (but for `waiting`)."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.comm import agreement, memory, runtime, spares, waiting
from hvd_shadowsync.comm.agreement import GATE
from hvd_shadowsync.comm.base import Communicator, Message, Request, Reserve, SharedMemory
from hvd_shadowsync.comm.echo import EchoCommunicator
from hvd_shadowsync.comm.job import check_launch, load_mpi, outlives_ranks
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.ending import note_lost
from hvd_shadowsync.errors import RankLostError, TransportError

logger = logging.getLogger(__name__)

LAST_CALLS_S = 10.0
DRAIN_S = 1.0
PROMPT = Poller(spin_s=0.05)
"""For what all ranks do at the same time, and rarely: while a communicator is made, another loss is not survived."""
MPI_TYPES = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.int64: "INT64_T"}


def world(ranks: Sequence[int] | None = None) -> Communicator:
    """Return a communicator of our own over all ranks of the job, or over `ranks` of it (collective over those).

    Raises:
        TransportError: no usable MPI, thread level below MPI_THREAD_MULTIPLE, or a launcher that is not this MPI's.
        ValueError: `ranks` has a rank that the job does not have, or lacks the calling one.
    """
    mpi = load_mpi()
    check_launch(mpi)
    everyone = mpi.COMM_WORLD
    if (known := spares.here()) is not None:
        if ranks is not None or known.has_changed:
            raise TransportError(
                "in a job with --respawn communicators are over all ranks, and there are no new ones once a rank was "
                "replaced; make handles and broadcasts at the start, without a process_set"
            )
        if known.is_spare:
            return EchoCommunicator(range(known.size), partial(MpiReserve, known))
    if ranks is None:
        if not outlives_ranks():
            return MpiCommunicator(everyone.Dup())
        with _noticing():
            # a copy of the world, but for spares and for ranks that are lost already
            left = agreement.shrink(mpi, everyone if known is None else known.work, _wait)
        members = _members(mpi, left, everyone, range(everyone.size))
        size = everyone.size if known is None else known.size
        if gone := note_lost(set(range(size)) - set(members)):
            logger.log(
                logging.WARNING if left.rank == 0 else logging.INFO,
                "lost rank %s before there was a handle; the other %d go on", ", ".join(map(str, gone)), left.size,
            )  # fmt: skip
        return MpiCommunicator(left, members, outlives_ranks=True, has_reserve=known is not None)
    if not set(ranks) <= set(range(everyone.size)) or everyone.rank not in ranks:
        raise ValueError(
            f"process_set has ranks {sorted(ranks)}, called on rank {everyone.rank} of {everyone.size}; "
            "only its members may call, and each must be a rank of the job"
        )
    group = everyone.group.Incl(list(ranks))
    with _noticing():
        return MpiCommunicator(everyone.Create_group(group), ranks, outlives_ranks=outlives_ranks())


class MpiReserve(Reserve):
    """The spares of an MPI job, for the handle with the number `handle`."""

    def __init__(self, known: spares.Spares, handle: int) -> None:
        self._spares, self._handle = known, handle
        assert known.number is not None, "it is a rank, or has been called"
        self.is_new, self.shard = known.is_spare, (known.number, known.size)
        self.name = hashlib.sha256(f"{known.job} {handle}".encode()).hexdigest()

    def summon(self, numbers: Sequence[int]) -> None:
        """See `Reserve.summon`."""
        self._spares.summon(numbers)

    def candidate(self, numbers: Sequence[int]) -> tuple[int, int] | None:
        """See `Reserve.candidate`."""
        return self._spares.candidate(self._handle, numbers)

    def answers(self, spare: int) -> bool:
        """See `Reserve.answers`."""
        return self._spares.answers(self._handle, spare)

    def meet(self, comm: Communicator, spare: int) -> Any:
        """See `Reserve.meet`."""
        assert isinstance(comm, MpiCommunicator), "a job has one transport"
        with _noticing():
            return self._spares.meet(comm._comm, self._handle, spare, comm.members)

    def merge(self, meeting: Any, comm: Communicator, number: int) -> Communicator:
        """See `Reserve.merge`."""
        try:
            with _noticing():
                merged = meeting.Merge(False)
        except RankLostError:
            with GATE:
                meeting.Revoke()
            raise
        return MpiCommunicator(merged, [*comm.members, number], outlives_ranks=True, has_reserve=True)

    def settle(self, spare: int, *, joined: bool) -> None:
        """See `Reserve.settle`."""
        self._spares.has_changed |= joined
        self._spares.tell(self._handle, spare, joined=joined)

    def join(self) -> Communicator:
        """See `Reserve.join`."""
        merged, members = self._spares.join(self._handle)
        self._spares.has_changed = True
        return MpiCommunicator(merged, members, outlives_ranks=True, has_reserve=True)


def _members(mpi: Any, part: Any, whole: Any, members: Sequence[int]) -> list[int]:
    """Return the numbers of the ranks of `part`, where those of `whole` have the numbers `members`."""
    places = mpi.Group.Translate_ranks(part.group, list(range(part.size)), whole.group)
    return [members[place] for place in places]


class _InUse:
    """The communicators that are not freed yet; MPI_Finalize, on whichever thread, waits a while until there are none.

    Horovod finalises the MPI that it has initialised, from its own thread and as soon as any rank has asked for it:
    this rank may still be making the last calls of its `close()`. What hangs on MPI_COMM_SELF is let go first of all.
    A rank that is alone in a communicator has nobody to make last calls with: those do not count.
    """

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()
        self._awaited = False

    def add(self, mpi: Any, size: int) -> None:
        """Count one more, of `size` ranks."""
        if size == 1:
            return
        with self._changed:
            self._count += 1
            if not self._awaited:
                self._awaited = True
                mpi.COMM_SELF.Set_attr(mpi.Comm.Create_keyval(delete_fn=self._await_none), None)

    def remove(self, size: int) -> None:
        """Count one less."""
        if size == 1:
            return
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def _await_none(self, *_: object) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._count == 0, LAST_CALLS_S):
                logger.warning("MPI is finalised while %d communicators are in use: close() comes first", self._count)


_IN_USE = _InUse()
_ABANDONED: list[_MpiRequest] = []
"""Requests that a lost rank has left under way, with the memory that MPI may still write to."""


@contextmanager
def _noticing() -> Iterator[None]:
    """Raise `RankLostError` for MPI's errors that say so, or say nothing: over TCP a lost rank may be one of those."""
    mpi = load_mpi()
    try:
        yield
    except mpi.Exception as error:
        lost = (mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED)
        unclear = (mpi.ERR_OTHER, mpi.ERR_INTERN, mpi.ERR_UNKNOWN)
        if error.Get_error_class() in (*lost, *(unclear if outlives_ranks() else ())):
            raise RankLostError(f"a rank is lost ({error})") from error
        raise


def _wait(request: Any) -> None:
    """Wait for a request of a job that outlives its ranks; raise what MPI raises."""
    mpi, polls, complete = load_mpi(), 0, False
    if (test := _compiled_test(mpi)) is not None:
        return waiting.wait(test, mpi._addressof(request), PROMPT, mpi.Exception, GATE)
    while not complete:
        PROMPT.pause(polls)
        polls += 1
        with GATE:
            complete = request.Test()
    return None


def _compiled_test(mpi: Any) -> int | None:
    return waiting.mpi_test(mpi) if waiting.load() is not None else None


class _MpiRequest:
    """A request together with the buffers that MPI works on; `pending` are those of its communicator under way.

    They are None in a job that ends with its first rank: then nothing is agreed on, and there is no gate.
    """

    def __init__(self, pending: set[_MpiRequest] | None, request: Any, *buffers: Any) -> None:
        self._request, self._buffers, self._pending = request, buffers, pending
        self.thread = threading.get_ident()
        if pending is not None:
            pending.add(self)

    def test(self) -> bool:
        if self._pending is None:
            return bool(self._request.Test())
        with _noticing(), GATE:
            complete = bool(self._request.Test())
        if complete:
            self._pending.discard(self)
        return complete

    def wait(self, poller: Poller) -> bool:
        mpi = load_mpi()
        if (test := _compiled_test(mpi)) is None:
            return False
        with _noticing():
            gate = None if self._pending is None else GATE
            waiting.wait(test, mpi._addressof(self._request), poller, mpi.Exception, gate)
        if self._pending is not None:
            self._pending.discard(self)
        return True


class _MpiMessage:
    def __init__(self, comm: MpiCommunicator, message: Any, source: int, tag: int, num_bytes: int) -> None:
        self._comm, self._message, self.source, self.tag, self.num_bytes = comm, message, source, tag, num_bytes

    def irecv(self, tensor: Tensor) -> Request:
        buffer = _bytes(tensor)
        return self._comm._begun(self._message.Irecv, (buffer,), buffer)


class _Segments:
    def __init__(self, segments: list[Tensor]) -> None:
        self.segments = segments

    def fence(self) -> None:
        memory.fence()


class MpiCommunicator(Communicator):
    """Owns the mpi4py communicator that it is given and frees it.

    Args:
        comm: the communicator.
        members: see `Communicator.members`; by default its ranks.
        outlives_ranks: see `Communicator.outlives_ranks`.
        has_reserve: whether spares of the job can take the place of its lost ranks.
    """

    def __init__(
        self,
        comm: Any,
        members: Sequence[int] | None = None,
        *,
        outlives_ranks: bool = False,
        has_reserve: bool = False,
    ) -> None:
        self._mpi = load_mpi()
        self._comm = comm
        _IN_USE.add(self._mpi, comm.size)
        self._status = self._mpi.Status()
        self.rank, self.size = comm.rank, comm.size
        self.members = tuple(range(comm.size) if members is None else members)
        self.outlives_ranks, self._has_reserve = outlives_ranks, has_reserve
        self._pending: set[_MpiRequest] | None = set() if outlives_ranks else None
        self._hosts: list[int] | None = None
        self._parts: list[MpiCommunicator] = []

    def iallreduce(self, send: Tensor, recv: Tensor | None = None) -> Request:
        """See `Communicator.iallreduce`."""
        kind = getattr(self._mpi, MPI_TYPES[send.dtype])
        into = [(send if recv is None else recv).detach().numpy(), kind]
        out = self._mpi.IN_PLACE if recv is None else [send.detach().numpy(), kind]
        return self._begun(self._comm.Iallreduce, (out, into, self._mpi.SUM), out, into)

    def iallgather(self, send: Tensor, recv: Tensor) -> Request:
        """See `Communicator.iallgather`."""
        out, into = _bytes(send), _bytes(recv)
        return self._begun(self._comm.Iallgather, (out, into), out, into)

    def ialltoall(self, send: Tensor, recv: Tensor) -> Request:
        """See `Communicator.ialltoall`."""
        out, into = _bytes(send), _bytes(recv)
        return self._begun(self._comm.Ialltoall, (out, into), out, into)

    def ibcast(self, tensor: Tensor, root: int = 0) -> Request:
        """See `Communicator.ibcast`."""
        buffer = _bytes(tensor)
        return self._begun(self._comm.Ibcast, (buffer, root), buffer)

    def isend(self, tensor: Tensor, dest: int, tag: int) -> Request:
        """See `Communicator.isend`."""
        buffer = _bytes(tensor)
        return self._begun(self._comm.Isend, (buffer, dest, tag), buffer)

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Request:
        """See `Communicator.irecv`."""
        buffer = _bytes(tensor)
        return self._begun(self._comm.Irecv, (buffer, source, tag), buffer)

    def probe(self) -> Message | None:
        """See `Communicator.probe`."""
        with _noticing(), GATE if self.outlives_ranks else nullcontext():
            message = self._comm.Improbe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, self._status)
        if message is None:
            return None
        num_bytes = self._status.Get_count(self._mpi.BYTE)
        return _MpiMessage(self, message, self._status.source, self._status.tag, num_bytes)

    def allgather_object(self, value: Any) -> list[Any]:
        """See `Communicator.allgather_object`."""
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.empty(self.size, dtype=torch.int64)
        Poller().wait([self.iallgather(torch.tensor([own.numel()]), sizes)])
        most = int(sizes.max())
        everyone = torch.empty(self.size, most, dtype=torch.uint8)
        Poller().wait([self.iallgather(torch.cat([own, own.new_zeros(most - own.numel())]), everyone)])
        pairs = zip(everyone, sizes.tolist(), strict=True)
        return [pickle.loads(each[:length].numpy().tobytes()) for each, length in pairs]

    def check(self) -> None:
        """See `Communicator.check`."""
        if self.outlives_ranks and self._comm != self._mpi.COMM_NULL:
            with _noticing(), GATE:
                self._comm.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG)

    def revoke(self) -> None:
        """See `Communicator.revoke`; returns once nothing that is under way can write into memory of this rank.

        What another thread has begun it finds out about by itself: a request that was tested here would be complete
        there. Its memory is kept.
        """
        if self._pending is None or self._comm == self._mpi.COMM_NULL:
            return
        for part in self._parts:
            part.revoke()
        with GATE:
            self._comm.Revoke()
        deadline = time.monotonic() + DRAIN_S
        own = [each for each in list(self._pending) if each.thread == threading.get_ident()]
        while self._pending.intersection(own) and time.monotonic() < deadline:
            for request in self._pending.intersection(own):
                try:
                    request.test()
                except (RankLostError, self._mpi.Exception):
                    self._pending.discard(request)
            os.sched_yield()
        _ABANDONED.extend(self._pending)
        self._pending.clear()

    def agree(self, done: bool) -> bool:
        """See `Communicator.agree`."""
        if not self.outlives_ranks:
            return done
        try:
            with _noticing():
                return agreement.agree(self._comm, done, _wait)
        except RankLostError:
            return False

    def survivors(self) -> Communicator:
        """See `Communicator.survivors`."""
        with _noticing():
            left = agreement.shrink(self._mpi, self._comm, _wait)
        _IN_USE.remove(self.size)
        return MpiCommunicator(left, self._members_of(left), outlives_ranks=True, has_reserve=self._has_reserve)

    def share(self, num_bytes: int) -> SharedMemory | None:
        """See `Communicator.share`."""
        return self._attach_all(num_bytes) if len(set(self.hosts())) == 1 else None

    def hosts(self) -> list[int]:
        """See `Communicator.hosts`."""
        if self._hosts is None and self.outlives_ranks:
            machines = self.allgather_object(memory.machine())  # not by a communicator, which others could not wait for
            self._hosts = [machines.index(each) for each in machines]
        if self._hosts is None:
            with _noticing():
                host = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
                self._hosts = self.allgather_object(host.bcast(self.rank, 0))
                host.Free()
        return self._hosts

    def split(self, color: int | None) -> Communicator | None:
        """See `Communicator.split`."""
        self._meet()
        with _noticing():
            part = self._comm.Split(self._mpi.UNDEFINED if color is None else color, self.rank)
        if color is None:
            return None
        return self._part(part, self._members_of(part))

    def _meet(self) -> None:
        """Return when all ranks are here, where they outlive each other.

        A rank that is lost is noticed here then; in what makes a communicator MPI may come to harm, which is short so.
        """
        if self.outlives_ranks:
            PROMPT.wait([self._begun(self._comm.Ibarrier, ())])

    def _part(self, comm: Any, members: Sequence[int], *, linked: bool = True) -> MpiCommunicator:
        part = MpiCommunicator(comm, members, outlives_ranks=self.outlives_ranks)
        if linked:
            self._parts.append(part)
        return part

    def _members_of(self, part: Any) -> list[int]:
        return _members(self._mpi, part, self._comm, self.members)

    def _begun(self, call: Callable[..., Any], arguments: tuple[Any, ...], *buffers: Any) -> Request:
        if self._pending is None:
            return _MpiRequest(None, call(*arguments), *buffers)
        with _noticing(), GATE:
            return _MpiRequest(self._pending, call(*arguments), *buffers)

    def _attach_all(self, num_bytes: int) -> SharedMemory | None:
        file, segments, failure = None, [], ""
        try:
            file = memory.AnonymousFile(num_bytes)
        except OSError as error:
            failure = str(error)
        addresses = self.allgather_object(file and file.address)
        try:
            if not failure:
                segments = [memory.attach(each) for each in addresses if each]
        except OSError as error:
            failure = str(error)
        failures = [each for each in self.allgather_object(failure) if each]
        if file is not None:
            file.close()
        if failures:
            logger.warning("the ranks of this host share no memory (%s): they send messages instead", failures[0])
        return None if failures else _Segments(segments)

    def reserve(self, handle: int) -> Reserve | None:
        """See `Communicator.reserve`."""
        known = spares.here() if self._has_reserve else None
        return None if known is None else MpiReserve(known, handle)

    def overlook_lost(self) -> None:
        """See `Communicator.overlook_lost`."""
        if self.outlives_ranks:
            with GATE:
                self._comm.Ack_failed()

    def declare_lost(self, rank: int) -> bool:
        """See `Communicator.declare_lost`."""
        world = self._mpi.COMM_WORLD
        process = _members(self._mpi, self._comm, world, range(world.size))[rank]  # its number may be a lost one's
        return self.outlives_ranks and runtime.declare_lost(self._mpi, process)

    def dup(self, *, linked: bool = True) -> Communicator:
        """See `Communicator.dup`."""
        if not self.outlives_ranks:
            return self._part(self._comm.Dup(), self.members, linked=linked)
        self._meet()
        with _noticing():
            with GATE:
                copy, request = self._comm.Idup()
            _wait(request)
        return self._part(copy, self.members, linked=linked)

    def free(self) -> None:
        """See `Communicator.free`; where ranks may be lost MPI keeps what it has, as others may not come to free it."""
        if not self.outlives_ranks:
            self._comm.Free()
        _IN_USE.remove(self.size)


def _bytes(tensor: Tensor) -> Any:
    """Return the memory of `tensor` as bytes, for calls that only move it."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()
