"""The comparison, faults and the soak in their smallest settings, as real jobs on this host."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ONE_HOST, Outcome, find_horovodrun, find_mpi, launch, mpirun

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = ["--networks", "loopback", "--repeats", "1", "--seconds", "0.3", "--warmup", "0.1"]
CONTENDERS = ["none", "none (peers)", "horovod", "S-MA"]


def compare(folder: Path, *arguments: str) -> Outcome:
    places = ["--json", folder / "compare.json", "--table", folder / "tables.md", "--plots", folder / "plots"]
    places += ["--peers", folder / "no-such-python"]
    line = [sys.executable, str(BENCHMARKS / "compare.py"), *map(str, places), *arguments]
    return launch(line, folder / "job", timeout_s=150.0)


@pytest.mark.timeout(400)
def test_a_comparison_and_its_report(tmp_path: Path) -> None:
    find_horovodrun(find_mpi())
    compare(tmp_path, *SHORT, "--contenders", *CONTENDERS).require_success()
    records = json.loads((tmp_path / "compare.json").read_text())
    assert [each["contender"] for each in records] == CONTENDERS
    for record in records:
        assert (record["workload"], record["hosts"], record["rate_mbit"]) == ("mlp-5mb", 2, None)
        assert (record["latency_ms"], record["batch"]) == (0, 256)
    none, missing, horovod, shadow = records
    assert missing["not_run"] == "not installed; install it with launch/peers"
    assert (missing["runs"], "examples_per_s" in missing) == ([], False)
    for record in (none, horovod, shadow):
        [run] = record["runs"]
        assert "failed" not in run, run
        assert record["dense_bytes"] == 5_318_148
        assert record["examples_per_s"]["median"] == run["examples_per_s"] > 0
        assert record["step_ms"] > 0
        assert run["steps"] >= 2  # one of each rank
        assert len(run["curve"]) >= 1
        assert all(loss > 0 and examples > 0 for _, examples, loss in run["curve"])
    assert (none["sync_gap_steps"], horovod["sync_gap_steps"]) == (None, 1.0)

    tables = (tmp_path / "tables.md").read_text()
    rows = [line.split("|")[1].strip() for line in tables.splitlines() if line.startswith("|")]
    assert rows == ["contender", "---", *CONTENDERS]
    assert "none (peers): not run: not installed; install it with launch/peers" in tables
    assert (tmp_path / "plots" / "loss-time-mlp-5mb-loopback-2.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "tables.md").unlink()
    compare(tmp_path, *SHORT, "--contenders", *CONTENDERS, "--resume").require_success()
    assert json.loads((tmp_path / "compare.json").read_text()) == records, "nothing was left to run"
    assert (tmp_path / "tables.md").read_text() == tables
    compare(tmp_path, "--report-only").require_success()
    assert (tmp_path / "tables.md").read_text() == tables


@pytest.mark.timeout(200)
def test_a_run_that_fails_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    broken = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from comparison.cases import NETWORKS, WORKLOADS, Case
from comparison.catalogue import Contender
from comparison.running import Settings, run_once
settings = Settings(0.3, 0.1, 60.0, Path("flights.pt"), Path("peers"))
case = Case(WORKLOADS["mlp-5mb"], NETWORKS["loopback"], 2)
print(run_once(case, Contender("broken", "no_such_framework"), settings)["failed"])
"""
    outcome = launch([sys.executable, "-c", broken], tmp_path, timeout_s=100.0).require_success()
    lines = outcome.output.splitlines()
    assert lines[0] == "exit code 1"
    assert "ModuleNotFoundError: No module named 'no_such_framework'" in lines


@pytest.mark.timeout(200)
def test_a_comparison_that_is_ended_takes_its_ranks_along(tmp_path: Path) -> None:
    find_mpi()
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # MPI's sockets lie in it: no long path
    line = [sys.executable, str(BENCHMARKS / "compare.py"), *SHORT[:4], "--seconds", "100", "--contenders", "none"]
    line += ["--json", str(tmp_path / "compare.json"), "--plots", str(tmp_path / "plots")]
    job = subprocess.Popen(line, env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(ranks_of(folder)) == 2)
        job.terminate()
        assert job.wait(60) == 128 + signal.SIGTERM
        assert ranks_of(folder) == []
    finally:
        job.kill()
        shutil.rmtree(folder, ignore_errors=True)


def ranks_of(folder: Path) -> list[str]:
    """Return the processes that train in a folder under this one."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_text().split("\0")
            found += (
                [file.parent.name]
                if any(word.startswith(f"--folder={folder}") for word in words) and words[1:2] == ["-W"]
                else []
            )
    return found


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.1)


def test_contenders_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    outcome = compare(tmp_path, "--contenders", "nobody")
    assert outcome.code == 2
    assert outcome.errors.startswith("compare.py: --contenders 'nobody' names none; there are 'none', ")
    assert "Traceback" not in outcome.errors


@pytest.mark.timeout(150)
def test_a_short_campaign_of_faults(tmp_path: Path) -> None:
    _require_ulfm()
    results = tmp_path / "faults.json"
    line = [sys.executable, str(BENCHMARKS / "faults.py"), "--jobs", "2", "--seed", "3", "--kinds", "kill two"]
    outcome = launch([*line, "--json", str(results)], tmp_path / "job", timeout_s=115.0).require_success()
    assert [each["seed"] for each in json.loads(results.read_text())["jobs"]] == [3, 4]
    assert outcome.output.splitlines()[-1] == "| **all** | 2 | 0 | 0 | 0 | 0 |"


@pytest.mark.timeout(200)
def test_a_short_soak(tmp_path: Path) -> None:
    results = tmp_path / "soak.json"
    line = [*mpirun(2), sys.executable, str(BENCHMARKS / "soak.py"), "--minutes", "0.1", "--json", str(results)]
    launch(line, tmp_path / "job", timeout_s=150.0, environ=ONE_HOST).require_success()
    cases = json.loads(results.read_text())["cases"]
    assert [each["case"] for each in cases] == ["S-MA", "S-MA fp16", "S-BMUF", "S-EASGD", "FR-MA"]
    for rank in [rank for each in cases for rank in each["ranks"]]:
        assert rank["rounds"] > 0
        assert rank["warm"]["threads"] == rank["end"]["threads"]


def _require_ulfm() -> None:
    mpi = find_mpi()
    if mpi.kind != "openmpi" or mpi.version < (5,):
        pytest.skip(f"needs Open MPI 5; {mpi.mpirun} is of {mpi.kind} {'.'.join(map(str, mpi.version))}")
