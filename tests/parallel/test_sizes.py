"""The same suite, `programs/`, under mpirun on 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch_suite, mpirun

PROGRAMS = Path(__file__).parent / "programs"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_suite(size: int, tmp_path: Path) -> None:
    outcome = launch_suite(mpirun(size), tmp_path, [PROGRAMS], timeout_s=540.0).require_success()
    results = outcome.results()
    assert results, outcome.text
    everywhere = dict.fromkeys(range(size))
    assert all(found.keys() == everywhere.keys() for found in results.values())
    assert sum("passed" in found.values() for found in results.values()) > 100
