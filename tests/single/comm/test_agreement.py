"""Turns of threads in MPI beside an agreement, and how ranks that are left agree on who that is."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hvd_shadowsync.comm import agreement
from hvd_shadowsync.comm.agreement import Gate
from hvd_shadowsync.comm.job import load_mpi

TIMEOUT_S = 20.0
NOT_S = 0.05
"""How long is waited for what must not happen."""


def test_all_are_let_in_at_once() -> None:
    gate, inside = Gate(), threading.Barrier(3, timeout=TIMEOUT_S)

    def enter() -> int:
        with gate:
            return inside.wait()

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(lambda _: enter(), range(3))) == [0, 1, 2]
    assert not gate.is_narrow


def test_one_is_let_in_at_a_time_beside_an_agreement() -> None:
    gate, inside, most = Gate(), 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(300):
            with gate:
                inside += 1
                most = max(most, inside)
                threading.Event().wait(0.00001)
                inside -= 1

    with gate.agreeing(), gate.agreeing(), ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(enter) for _ in range(4)]:
            each.result(TIMEOUT_S)
    assert most == 1
    assert not gate.is_narrow


def test_an_agreement_is_begun_when_others_have_left() -> None:
    gate, came, go, begun = Gate(), threading.Event(), threading.Event(), threading.Event()

    def look() -> None:
        with gate:
            came.set()
            assert go.wait(TIMEOUT_S)

    def begin() -> None:
        with gate.agreeing(), gate:
            begun.set()

    with ThreadPoolExecutor(2) as pool:
        looking = pool.submit(look)
        assert came.wait(TIMEOUT_S)
        beginning = pool.submit(begin)
        try:
            while not gate.is_narrow:  # who is inside is asked to leave
                time.sleep(0.001)
            assert not begun.wait(NOT_S)
        finally:
            go.set()
        looking.result(TIMEOUT_S)
        beginning.result(TIMEOUT_S)
    assert begun.is_set()


def test_a_thread_that_stays_inside_holds_the_others_up_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "LONGEST_TURN_S", NOT_S)
    gate = Gate()

    def begin() -> bool:
        with gate.agreeing(), gate:
            return True

    with ThreadPoolExecutor(1) as pool, gate:
        assert pool.submit(begin).result(TIMEOUT_S)


def test_a_thread_that_was_thrown_out_of_it_is_let_in_again() -> None:
    gate = Gate()
    gate.__enter__()  # and an error of a signal's handler comes before it has left
    with gate.agreeing(), gate:
        assert gate.inside == {threading.get_ident()}
    assert gate.inside == set()


def test_the_gate_is_open_again_after_an_error() -> None:
    gate = Gate()
    with pytest.raises(ValueError), gate.agreeing(), gate:
        raise ValueError
    with gate.agreeing(), gate:
        assert gate.is_narrow


class Ranks:
    """In the place of mpi4py's communicator: agreements fail with `codes`, one after the other, then succeed."""

    def __init__(self, codes: list[int]) -> None:
        self.codes, self.called = codes, list[str]()

    def Ack_failed(self) -> None:
        self.called.append("acknowledged")

    def Iagree(self, flag: array[int]) -> Callable[[], None]:
        self.called.append(f"agreed on {flag[0]}")
        assert agreement.GATE.is_narrow
        assert agreement.GATE.inside == {threading.get_ident()}
        code = self.codes.pop(0) if self.codes else 0

        def end() -> None:
            assert agreement.GATE.is_narrow
            assert agreement.GATE.inside == set()
            if code:
                raise load_mpi().Exception(code)
            flag[0] &= 2

        return end

    def Shrink(self) -> str:
        self.called.append("shrunk")
        return "those that are left"


def wait(request: Callable[[], None]) -> None:
    request()


def test_what_all_ranks_agree_on_is_returned() -> None:
    assert agreement.agree(Ranks([]), True, wait) is False, "another rank's word"
    assert not agreement.GATE.is_narrow


@pytest.fixture
def _public_shrink_only(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = lambda _: None  # noqa: E731
    monkeypatch.setattr(agreement, "_shrink_of", nothing)


@pytest.mark.usefixtures("_public_shrink_only")
def test_a_communicator_is_made_once_all_know_the_same_ranks_as_lost() -> None:
    mpi = load_mpi()
    ranks = Ranks([mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED])
    assert agreement.shrink(mpi, ranks, wait) == "those that are left"
    assert ranks.called == ["acknowledged", "agreed on 1"] * 3 + ["shrunk"]


@pytest.mark.usefixtures("_public_shrink_only")
def test_other_errors_of_an_agreement_are_raised() -> None:
    mpi = load_mpi()
    ranks = Ranks([mpi.ERR_INTERN])
    with pytest.raises(mpi.Exception):
        agreement.shrink(mpi, ranks, wait)
    assert "shrunk" not in ranks.called
    assert not agreement.GATE.is_narrow
