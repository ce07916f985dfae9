"""Real jobs with `shadowrun --restarts`: what is started again, from where it goes on, and what is not."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ONE_HOST, Job, Outcome, find_mpi, launch

from hvd_shadowsync.restarts import VARIABLE

PROGRAM = Path(__file__).parent / "programs" / "restarts.py"
TIMEOUT_S = 120.0


def run(
    how: str, folder: Path, *options: str, restarts: int = 2, during: Callable[[Job], None] | None = None
) -> Outcome:
    command = [sys.executable, "-m", "hvd_shadowsync.run", "-np", "2", "--restarts", str(restarts), *options]
    command += ["python", str(PROGRAM), how, str(folder / "checkpoints")]
    outcome = launch(command, folder / "job", timeout_s=TIMEOUT_S, environ=ONE_HOST, during=during)
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.left_over == [], outcome.text
    assert "training has begun" not in outcome.errors, "that is for shadowrun"
    return outcome


def began(outcome: Outcome) -> list[tuple[int, int]]:
    """Return each attempt, by the number that the script is told, and the step at which its ranks began."""
    return sorted({(int(each["what"]), int(each["text"])) for each in outcome.events("begins")})


def test_a_job_that_is_killed_once_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    outcome = run("killed", tmp_path)
    assert outcome.code == 0, outcome.text
    [(_, first), (number, second)] = began(outcome)
    [ends] = outcome.events("ends")
    newest, killed = map(int, ends["text"].split())
    assert (first, number) == (0, 1)
    assert 0 < newest <= second <= killed, "nothing that was complete is lost"
    assert [each["rank"] for each in outcome.events("ended")] == [0, 1]
    assert re.search(r"shadowrun: the job ended with code \d+; it is started again \(1 of 2\)", outcome.errors)


@pytest.mark.parametrize("how", ["exception", "always killed"])
def test_restarts_that_are_used_up(how: str, tmp_path: Path) -> None:
    """Each attempt begins where the one before had its last checkpoint."""
    outcome = run(how, tmp_path)
    steps = [step for _, step in began(outcome)]
    assert [number for number, _ in began(outcome)] == [0, 1, 2]
    assert steps == sorted(set(steps)), outcome.text
    assert outcome.code not in (0, None)
    if how == "exception":
        assert outcome.code == 1
    assert f"the job ended with code {outcome.code}, and was started again 2 of 2 times: it ends" in outcome.errors


def test_what_would_end_the_same_way_again_is_not_started_again(tmp_path: Path) -> None:
    outcome = run("fails at once", tmp_path)
    assert outcome.code == 5, outcome.text
    assert [number for number, _ in began(outcome)] == [0]
    assert "code 5 and is not started again: no rank had come to its first training step" in outcome.errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_told_to_end_is_not_started_again(number: signal.Signals, tmp_path: Path) -> None:
    def tell(job: Job) -> None:
        job.await_event("trains", ranks=2)
        job.send(number)

    outcome = run("told", tmp_path, during=tell)
    assert [each for each, _ in began(outcome)] == [0]
    assert "started again" not in outcome.errors
    assert outcome.code not in (0, None) or number is signal.SIGTERM, "the last checkpoint may come in time"


def test_a_job_that_outlives_its_ranks_is_started_again_where_it_does_not(tmp_path: Path) -> None:
    """Both ranks are lost, one after the other: the new rank 0 kills itself as well."""
    if (mpi := find_mpi()).kind != "openmpi" or mpi.version < (5,):
        pytest.skip("needs Open MPI 5")
    outcome = run("always killed", tmp_path, "--fault-tolerant", restarts=1)
    assert outcome.code not in (0, None)
    assert [number for number, _ in began(outcome)] == [0, 1]
    assert len(outcome.events("ends")) == 4
    assert "no rank came to its end" in outcome.errors


def test_the_script_is_told_under_the_name_that_the_package_has_for_it() -> None:
    assert VARIABLE == "SHADOWRUN_RESTARTS"
