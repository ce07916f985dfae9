"""What a rank says to Open MPI's runtime, without one; tests/integration/test_bad_links.py has it in real jobs."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from hvd_shadowsync.comm import runtime


@pytest.fixture(autouse=True)
def _no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*runtime.SERVER_VARIABLES, runtime.NAMESPACE_VARIABLE, runtime.RANK_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("server", "beside"),
    [
        ("prterun-10.77.0.1-21@0.0;tcp4://127.0.0.1:37703", True),
        ("prterun-10.77.0.1-21@0.1;tcp4://127.0.0.1:41323", False),
        ("prterun-h.0-21@0.10;tcp4://127.0.0.1:41323", False),
        ("", False),
    ],
)
def test_who_is_beside_the_launcher(server: str, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not runtime.is_beside_launcher()
    monkeypatch.setenv("PMIX_SERVER_URI4", server)
    assert runtime.is_beside_launcher() is beside


def test_a_lost_rank_is_an_event_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.NAMESPACE_VARIABLE, "prterun-h-21@1")
    monkeypatch.setenv(runtime.RANK_VARIABLE, "3")
    told: list[tuple[Any, ...]] = []
    answer = 0

    class Notify:
        restype: Any = None
        argtypes: Any = None

        def __call__(self, status: int, source: Any, reach: int, info: Any, number: int, *rest: Any) -> int:
            memory = ctypes.string_at(ctypes.addressof(info._obj), 540)
            place = int.from_bytes(memory[528:536], "little")
            lost = ctypes.string_at(place, 260)
            own = ctypes.string_at(ctypes.addressof(source._obj), 260)
            key, kind = memory[:512].rstrip(b"\0"), int.from_bytes(memory[520:522], "little")
            told.append((status, own[:14], own[256], reach, key, kind, lost[:14], lost[256], number, rest))
            return answer

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(PMIx_Notify_event=Notify()))
    assert runtime.declare_lost(SimpleNamespace(__file__="mpi.so"), 7)
    name = b"prterun-h-21@1"
    assert told == [(-200, name, 3, 7, b"pmix.evproc", 22, name, 7, 1, (None, None))]
    answer = -1
    assert not runtime.declare_lost(SimpleNamespace(__file__="mpi.so"), 7)


def test_without_such_a_runtime_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mpi = SimpleNamespace(__file__=__file__)
    assert not runtime.declare_lost(mpi, 1)
    monkeypatch.setenv(runtime.NAMESPACE_VARIABLE, "job")
    monkeypatch.setenv(runtime.RANK_VARIABLE, "0")
    assert not runtime.declare_lost(mpi, 1), "that is no library"
