"""The transport seam: what the layers above ask of MPI, and nothing more."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a spare rank waits without torch
    from torch import Tensor


class Request(Protocol):
    """A non-blocking operation under way."""

    def test(self) -> bool:
        """Progress the operation and tell whether it is complete; its buffers belong to it until then."""


class Message(Protocol):
    """A message that was matched by `Communicator.probe` and is not received yet."""

    source: int
    tag: int
    num_bytes: int

    def irecv(self, tensor: Tensor) -> Request:
        """Receive into `tensor`, which has at least as many elements as were sent."""


class SharedMemory(Protocol):
    """Bytes that all ranks of a communicator read and write; they live as long as the communicator."""

    segments: list[Tensor]
    """Each rank's part, by rank: uint8, zero at first; they begin at a multiple of 64."""

    def fence(self) -> None:
        """Order this rank's reads and writes: those before come before those after, for all ranks."""


class Reserve(ABC):
    """Processes that take the place of lost ranks; for the one thread that uses a handle's communicator."""

    is_new: bool
    """Whether this process is one of them, and has to `join`."""
    shard: tuple[int, int]
    """The number of the rank that this process is, or takes the place of, and how many ranks there were at first."""
    name: str
    """Of the handle alone, the same in all processes of the job, also in those that join later; hexadecimal digits."""

    @abstractmethod
    def summon(self, numbers: Sequence[int]) -> None:
        """Have processes begin in the place of the lost `numbers`, where none does yet; the first rank calls this."""

    @abstractmethod
    def candidate(self, numbers: Sequence[int]) -> tuple[int, int] | None:
        """Return a process that is ready to join, and in the place of which of `numbers`; None where there is none."""

    def answers(self, spare: int) -> bool:
        """Whether a candidate is there at this moment (blocking, some seconds at most); the first rank calls this."""
        return True

    @abstractmethod
    def meet(self, comm: Communicator, spare: int) -> Any:
        """Begin to take a process in, together with it (collective over `comm` and that process, blocking)."""

    @abstractmethod
    def merge(self, meeting: Any, comm: Communicator, number: int) -> Communicator:
        """Return a communicator of the ranks of `comm` and, as its last rank, the process that is met (likewise)."""

    @abstractmethod
    def settle(self, spare: int, *, joined: bool) -> None:
        """Let a process know whether it has joined: all ranks that were left say the same; if not, it ends."""

    @abstractmethod
    def join(self) -> Communicator:
        """Wait until the others take this process in, and return the communicator; it ends where the job does."""


class Communicator(ABC):
    """A group of ranks and the non-blocking operations between them.

    Tensors are contiguous, on the CPU, of the same dtype and number of elements on every rank. All ranks call the
    collectives of one communicator in the same order. One thread at a time uses a communicator; `dup` gives another
    thread its own. The `_object` calls, `dup` and `free` block and are for the training thread.
    """

    rank: int
    size: int
    members: tuple[int, ...]
    """By rank, what its number is in the communicator that this one was made from, over `dup` and `survivors`."""
    spans_processes = True
    """Whether each rank is a process, which has to take part until the end of the job."""
    outlives_ranks = False
    """Whether a rank that is lost makes calls raise `RankLostError`, instead of ending the job or never returning."""

    @abstractmethod
    def iallreduce(self, send: Tensor, recv: Tensor | None = None) -> Request:
        """Sum `send` over the ranks, element by element, into `recv`, or in place; float32, float64 or int64."""

    @abstractmethod
    def iallgather(self, send: Tensor, recv: Tensor) -> Request:
        """Gather `send` (n elements) of rank r into `recv[r * n : (r + 1) * n]` on every rank; any dtype."""

    @abstractmethod
    def ialltoall(self, send: Tensor, recv: Tensor) -> Request:
        """Send block r of `send` to rank r, receive block r of `recv` from rank r; equal blocks, any dtype."""

    @abstractmethod
    def ibcast(self, tensor: Tensor, root: int = 0) -> Request:
        """Replace `tensor` by the root's; any dtype."""

    @abstractmethod
    def isend(self, tensor: Tensor, dest: int, tag: int) -> Request:
        """Send `tensor` to rank `dest`; any dtype."""

    @abstractmethod
    def irecv(self, tensor: Tensor, source: int, tag: int) -> Request:
        """Receive into `tensor` from rank `source`; any dtype."""

    @abstractmethod
    def probe(self) -> Message | None:
        """Return the next waiting message from any rank with any tag, or None; does not block."""

    @abstractmethod
    def allgather_object(self, value: Any) -> list[Any]:
        """Return every rank's `value`, by rank (blocking; pickles)."""

    @abstractmethod
    def share(self, num_bytes: int) -> SharedMemory | None:
        """Return memory to which each rank contributes its own `num_bytes` (collective, blocking).

        None on every rank where they are not all on one host, or the host has no room.
        """

    @abstractmethod
    def hosts(self) -> list[int]:
        """Return for each rank the first rank of the host that it is on (collective, blocking)."""

    @abstractmethod
    def split(self, color: int | None) -> Communicator | None:
        """Return a communicator of the ranks that gave the same `color`, in their order (collective, blocking).

        None where `color` is None.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise `RankLostError` if a rank is lost, or the communicator revoked; does not block.

        For whoever waits for other ranks without a call of this communicator; any thread may call it.
        """

    @abstractmethod
    def revoke(self) -> None:
        """Make what is under way on this communicator raise `RankLostError`, on every rank, and all calls from now on.

        Likewise on those that were made from it. All calls but `agree` and `survivors`. Does not wait for other ranks;
        nothing where the job does not outlive its ranks.
        """

    @abstractmethod
    def agree(self, done: bool) -> bool:
        """Return on every rank that is left whether all ranks are, and said `done` (collective, blocking).

        The same answer everywhere, whoever is lost meanwhile. Where the job does not outlive its ranks, `done` at once.
        """

    @abstractmethod
    def survivors(self) -> Communicator:
        """Return a communicator of the ranks that are left, in their order (collective over those, blocking).

        This one must have been revoked; it is not to be used, nor freed, afterwards.
        """

    def reserve(self, handle: int) -> Reserve | None:
        """Return who can take the place of lost ranks in the handle with that number; None for nobody."""
        return None

    def overlook_lost(self) -> None:  # noqa: B027 (where ranks are not lost)
        """Let `probe` find messages of the ranks that are left, although it has raised `RankLostError`."""

    def kill(self, rank: int, pid: int) -> None:
        """End `rank` at once, which is the process `pid` of this host.

        Raises:
            OSError: the system does not let us.
        """
        os.kill(pid, signal.SIGKILL)

    def declare_lost(self, rank: int) -> bool:
        """Take `rank`, which cannot be reached, for lost on this rank, whose calls fail as if it was; any thread may.

        Each rank has to, for itself. Return False where that cannot be.
        """
        return False

    @abstractmethod
    def dup(self, *, linked: bool = True) -> Communicator:
        """Return a communicator of the same ranks whose traffic is apart from this one's (collective, blocking).

        `linked`: `revoke` reaches it as well.
        """

    @abstractmethod
    def free(self) -> None:
        """Give the communicator back; it must not be used afterwards (collective)."""
