"""Scripts in Horovod's style with the drop-in module, as real jobs under horovodrun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launching import ONE_HOST, Outcome, find_horovodrun, find_mpi, horovodrun, launch

PROGRAM = Path(__file__).parent / "programs" / "horovod_style.py"


def run_case(launcher: list[str], folder: Path, case: str) -> Outcome:
    return launch([*launcher, sys.executable, str(PROGRAM), case], folder, timeout_s=90.0, environ=ONE_HOST)


@pytest.mark.parametrize(("ranks", "first"), [(1, "ours"), (2, "horovod"), (2, "mpi4py"), (4, "ours")])
def test_a_training_script(ranks: int, first: str, tmp_path: Path) -> None:
    """Whoever initialises MPI first: broadcasts take no step, replicas end bit-identical, shutdown is clean."""
    outcome = run_case(horovodrun(ranks), tmp_path, f"script:{first}").require_success()
    through = outcome.events("through")
    assert [each["rank"] for each in through] == list(range(ranks))
    assert len({each["text"] for each in through}) == 1
    assert "FutureWarning" not in outcome.text


def test_what_horovod_offers(tmp_path: Path) -> None:
    """Compression, process sets, the recipe for clipping, and a shutdown that finds wrappers open."""
    outcome = run_case(horovodrun(3), tmp_path, "offers").require_success()
    through = [[each["what"] for each in outcome.events("through") if each["rank"] == rank] for rank in range(3)]
    assert through == [["compression", "process_set", "clipping", "shutdown"]] * 3


def test_horovod_finalises_mpi_after_the_last_call_of_ours(tmp_path: Path) -> None:
    outcome = run_case(horovodrun(2), tmp_path, "hasty").require_success()
    assert [each["rank"] for each in outcome.events("through")] == [0, 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_nobody_closes_is_closed_before_mpi_is_finalised(ranks: int, tmp_path: Path) -> None:
    outcome = run_case(horovodrun(ranks), tmp_path, "forgotten").require_success()
    assert len(outcome.events("through")) == ranks
    assert "MPI is finalised" not in outcome.text


def test_a_gloo_launch_is_refused_on_every_rank(tmp_path: Path) -> None:
    outcome = run_case([find_horovodrun(find_mpi()), "-np", "2", "--gloo"], tmp_path, "gloo")
    assert not outcome.verdict, outcome.verdict
    assert outcome.code != 0
    assert outcome.left_over == []
    refused = outcome.events("refused")
    assert [(each["rank"], each["what"]) for each in refused] == [(0, "of 2"), (1, "of 2")], outcome.text
    assert len({each["text"] for each in refused}) == 1
    assert "horovodrun started 2 processes over Gloo" in refused[0]["text"]
    assert "launch with `horovodrun --mpi`" in refused[0]["text"]
    assert "TransportError: horovodrun started 2 processes over Gloo" in outcome.text
    assert "Error in sys.excepthook" not in outcome.text
