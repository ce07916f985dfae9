"""Which compiled library is loaded, and that none is an answer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from hvd_shadowsync import libraries


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of what is opened from now on; those that have "broken" in them do not load."""
    names: list[str] = []

    def fake(path: str) -> ctypes.CDLL:
        names.append(Path(path).name)
        if "broken" in path:
            raise OSError("not a library")
        return ctypes.PyDLL(None)

    monkeypatch.setattr(ctypes, "CDLL", fake)
    return names


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ("AVX512", ["default", "avx2", "avx512"], ["_it_avx512.so"]),
        ("AVX512", ["default", "avx2"], ["_it_avx2.so"]),
        (
            "AVX512",
            ["default", "avx2.cpython-312", "avx512.broken"],
            ["_it_avx512.broken.so", "_it_avx2.cpython-312.so"],
        ),
        ("AVX2", ["default", "avx2", "avx512"], ["_it_avx2.so"]),
        ("DEFAULT", ["default", "avx2", "avx512"], ["_it_default.so"]),
        ("what is new", ["default", "avx2", "avx512"], ["_it_default.so"]),
    ],
)
def test_the_best_that_the_machine_has_and_that_loads(
    capability: str,
    built: list[str],
    expected: list[str],
    tmp_path: Path,
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in built:
        (tmp_path / f"_it_{name}.so").touch()
    library = libraries.load(tmp_path, "_it", {"abs": (ctypes.c_int, [ctypes.c_int])})
    assert library is not None
    assert opened == expected
    assert library.abs.argtypes == [ctypes.c_int]


@pytest.mark.parametrize("built", [[], ["_it_default.broken.so"], ["_other_default.so"]], ids=str)
def test_none_where_it_was_not_built(built: list[str], tmp_path: Path, opened: list[str]) -> None:
    for name in built:
        (tmp_path / name).touch()
    assert libraries.load(tmp_path, "_it", {}) is None
