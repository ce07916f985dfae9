"""Requests of a communicator that is revoked: each thread's own are waited for, with the memory of all kept."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from hvd_shadowsync.comm import mpi

TIMEOUT_S = 10.0


@dataclass
class Revoked:
    """What is asked of mpi4py's communicator."""

    revoked: bool = False

    def Revoke(self) -> None:
        self.revoked = True


@dataclass
class Pending:
    """A request that is complete at the third look."""

    looks: list[str] = field(default_factory=list)

    def Test(self) -> bool:
        self.looks.append(threading.current_thread().name)
        return len(self.looks) == 3


def communicator() -> mpi.MpiCommunicator:
    comm = mpi.MpiCommunicator.__new__(mpi.MpiCommunicator)
    made: Any = comm
    made._mpi, made._comm, made._parts, made._pending = mpi.load_mpi(), Revoked(), [], set()
    return comm


def test_a_thread_waits_for_its_own_requests_and_leaves_the_others_to_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(mpi, "_ABANDONED", kept)
    comm = communicator()
    own, other = Pending(), Pending()

    def begin_one() -> None:
        comm._begun(lambda: other, ())

    thread = threading.Thread(target=begin_one, name="other")
    thread.start()
    thread.join(TIMEOUT_S)
    comm._begun(lambda: own, ())
    comm.revoke()
    assert own.looks == [threading.current_thread().name] * 3
    assert other.looks == []
    assert [each._request for each in kept] == [other]
    assert comm._pending == set()
    assert kept[0].test() is False, "its own thread goes on asking for it"
