"""Waiting without Python's lock: the compiled loop with a function in the place of MPI_Test."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hvd_shadowsync.comm import waiting
from hvd_shadowsync.comm.agreement import Gate
from hvd_shadowsync.comm.poll import Poller

TEST = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p)
QUICK = Poller(spin_s=0.0, eager=2, shortest_s=0.00001, longest_s=0.0001)
REQUEST = 4096

pytestmark = pytest.mark.skipif(waiting.load() is None, reason="the library was not built")


class Failed(Exception):
    pass


class Test:
    """In the place of MPI_Test: complete at the `last` look, or with a code from then on.

    Its address is good for as long as it is there.
    """

    __test__ = False

    def __init__(self, last: int, code: int = 0) -> None:
        self.looks: list[tuple[int, int]] = []
        self._last, self._code = last, code
        self._function = TEST(self._look)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _look(self, request: int, complete: Any, status: int) -> int:
        self.looks.append((request, status % 16))
        ended = len(self.looks) >= self._last
        complete[0] = int(ended and not self._code)
        return self._code if ended else 0


@pytest.mark.parametrize("last", [1, 2, 3, 40])
@pytest.mark.parametrize("poller", [QUICK, Poller()], ids=["quick", "as it is"])
def test_it_looks_until_the_request_is_complete(last: int, poller: Poller) -> None:
    test = Test(last)
    waiting.wait(test.address, REQUEST, poller, Failed)
    assert test.looks == [(REQUEST, 0)] * last


def test_a_code_is_raised_as_an_error() -> None:
    test = Test(3, code=15)
    with pytest.raises(Failed, match="15"):
        waiting.wait(test.address, REQUEST, QUICK, Failed)


def test_python_has_its_turn_in_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slice ends in Python, where signals are handled; the pauses go on growing from slice to slice."""
    monkeypatch.setattr(waiting, "SLICE_S", 0.0002)
    library, pauses = waiting.load(), []

    class Seen:
        def shadow_wait(self, *arguments: Any) -> int:
            code: int = library.shadow_wait(*arguments)
            pauses.append(ctypes.cast(arguments[2], ctypes.POINTER(waiting._Wait)).contents.pause_s)
            return code

    monkeypatch.setattr(waiting, "load", Seen)
    test = Test(200)
    waiting.wait(test.address, REQUEST, Poller(spin_s=0.0, eager=0, shortest_s=1e-6, growth=1.1), Failed)
    assert len(pauses) > 1
    assert pauses == sorted(pauses)
    assert pauses[-1] > pauses[0]


@pytest.mark.parametrize("longest_s", [0.00002, 0.001])
def test_pauses_grow_as_the_pollers(longest_s: float) -> None:
    """The time of so many looks is at least that of their pauses."""
    poller = Poller(spin_s=0.0, eager=3, shortest_s=0.00001, longest_s=longest_s, growth=2.0)
    test = Test(12)
    begun = time.perf_counter()
    waiting.wait(test.address, REQUEST, poller, Failed)
    assert time.perf_counter() - begun >= sum(poller.pause_s(polls) for polls in range(1, 12))


def test_spinning_is_looking_without_a_pause() -> None:
    poller = Poller(spin_s=60.0, eager=0, shortest_s=30.0, longest_s=30.0)
    test = Test(1000)
    waiting.wait(test.address, REQUEST, poller, Failed)


# --- what uses it -----------------------------------------------------------------------------------------------------


class Patient:
    """A request that waits by itself, or says that it cannot."""

    def __init__(self, *, can: bool) -> None:
        self.can, self.waits, self.tests = can, 0, itertools.count(1)

    def wait(self, poller: Poller) -> bool:
        self.waits += 1
        return self.can

    def test(self) -> bool:
        return next(self.tests) >= 3


def test_the_poller_leaves_it_to_requests_that_can() -> None:
    able, unable = Patient(can=True), Patient(can=False)
    QUICK.wait([able, unable])
    assert (able.waits, next(able.tests)) == (1, 1)
    assert (unable.waits, next(unable.tests)) == (1, 4)


def test_with_something_to_do_meanwhile_the_poller_looks_itself() -> None:
    request = Patient(can=True)
    QUICK.wait([request], meanwhile=lambda: False)
    assert (request.waits, next(request.tests)) == (0, 4)


class Counted(Gate):
    """A gate that counts how often one thread has entered it."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: Counter[int] = Counter()

    def __enter__(self) -> None:
        self.entries[threading.get_ident()] += 1
        super().__enter__()


def test_between_two_looks_beside_an_agreement_others_are_let_in() -> None:
    gate, inside, others = Counted(), list[int](), 0

    class Watched(Test):
        def _look(self, request: int, complete: Any, status: int) -> int:
            inside.extend(gate.inside)
            self._last = len(self.looks) + (1 if others > 2 else 2)
            return super()._look(request, complete, status)

    test = Watched(2)
    with gate.agreeing(), ThreadPoolExecutor(1) as pool:
        waited = pool.submit(waiting.wait, test.address, REQUEST, Poller(spin_s=0.0, eager=0), Failed, gate)
        while not waited.done():
            with gate:
                others += 1
            time.sleep(0.0001)
        waited.result()
    assert others > 2
    assert len(inside) == len(test.looks), "one thread at each look"
    assert gate.entries[inside[0]] == len(test.looks), "and it leaves after each"


def test_without_an_agreement_one_entry_does_for_many_looks() -> None:
    gate, test = Counted(), Test(20)
    waiting.wait(test.address, REQUEST, Poller(spin_s=0.0, eager=64), Failed, gate)
    assert gate.entries.total() < 20
