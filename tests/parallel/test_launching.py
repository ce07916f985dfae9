"""The launcher of the tests itself: it sees failures, names who hangs, and leaves no process behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from launching import ONE_HOST, is_running, launch, launch_suite, mpirun

HANGS = """
import ranks
from mpi4py import MPI
def wait_for_what_never_comes():
    MPI.COMM_WORLD.recv(source=0)
ranks.begin()
ranks.say("reached", "the trap")
if ranks.RANK == 1:
    wait_for_what_never_comes()
"""

FAILS_ON_ONE_RANK = """
from mpi4py import MPI
def test_first():
    MPI.COMM_WORLD.Barrier()
def test_second():
    assert MPI.COMM_WORLD.rank == 0, "rank 1 is out"
    MPI.COMM_WORLD.recv(source=1)
"""

FAILS_EVERYWHERE = """
import pytest
from mpi4py import MPI
def test_first():
    raise ValueError("broken everywhere")
def test_second():
    MPI.COMM_WORLD.Barrier()
@pytest.mark.skip(reason="not today")
def test_third():
    raise AssertionError
"""


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    command = [*mpirun(2), sys.executable, str(tmp_path / "hangs.py")]
    outcome = launch(command, tmp_path, timeout_s=8, environ=ONE_HOST)
    assert outcome.code is None
    assert "rank 1, " in outcome.verdict
    assert "reached the trap" in outcome.verdict
    assert "wait_for_what_never_comes" in outcome.verdict
    pids = [each["pid"] for each in outcome.events("reached")]
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)
    with pytest.raises(pytest.fail.Exception, match="rank 1, "):
        outcome.require_success()


def test_a_test_that_fails_on_one_rank_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(FAILS_ON_ONE_RANK)
    outcome = launch_suite(mpirun(2), tmp_path, [tmp_path / "test_one.py"], timeout_s=40, environ=ONE_HOST)
    assert outcome.code not in (None, 0)
    first, second = outcome.results().items()
    assert first[1] == {0: "passed", 1: "passed"}
    assert second[1] == {1: "failed"}
    with pytest.raises(pytest.fail.Exception, match=r"\[rank 1\][\s\S]*rank 1 is out"):
        outcome.require_success()


def test_a_test_that_fails_everywhere_lets_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "test_all.py").write_text(FAILS_EVERYWHERE)
    outcome = launch_suite(mpirun(2), tmp_path, [tmp_path / "test_all.py"], timeout_s=40, environ=ONE_HOST)
    assert outcome.code not in (None, 0)
    assert [set(found.values()) for found in outcome.results().values()] == [{"passed"}, {"failed"}, {"skipped"}]


def test_a_job_sees_no_outer_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "7")
    monkeypatch.setenv("HOROVOD_SIZE", "7")
    program = "import os; print([n for n in os.environ if n.startswith(('OMPI_COMM', 'HOROVOD'))])"
    outcome = launch([sys.executable, "-c", program], tmp_path).require_success()
    assert outcome.output == "[]\n"
    assert "OMPI_COMM_WORLD_SIZE" in os.environ
