"""Jobs that fail, or end in an unusual way, as real processes: none hangs or leaves a process, codes tell the truth."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ONE_HOST, Job, Outcome, launch, mpirun, shadowrun

from hvd_shadowsync.checkpointing import Checkpointer

PROGRAMS = Path(__file__).parent / "programs"
PROMPT_S = 10.0
"""How soon the whole job is to end after one rank's exception."""


def run_case(
    case: str, folder: Path, *, ranks: int = 2, timeout_s: float = 60.0, start: list[str] | None = None, **more: Any
) -> Outcome:
    start = mpirun(ranks) if start is None else start
    command = [*start, sys.executable, str(PROGRAMS / "endings.py"), case]
    return launch(command, folder, timeout_s=timeout_s, environ=ONE_HOST, **more)


def require_end(outcome: Outcome, *, since: str | None = None) -> None:
    """Fail unless the job ended by itself, soon, with a code that is not 0, and with all its processes."""
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.code != 0, outcome.text
    assert outcome.left_over == []
    if since is not None:
        assert outcome.seconds_since(since) < PROMPT_S, outcome.text


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("raises_in_training", 3),
        ("raises_inside_with", 2),
        ("raises_in_the_warmup", 2),
        ("raises_while_others_close", 2),
        ("raises_while_others_merge_metrics", 2),
        ("raises_before_construction", 2),
        ("raises_before_construction_with_mpi", 2),
    ],
)
def test_an_exception_on_one_rank_ends_the_job(case: str, ranks: int, tmp_path: Path) -> None:
    outcome = run_case(case, tmp_path, ranks=ranks)
    require_end(outcome, since="raises")
    assert [each["rank"] for each in outcome.events("raises")] == [ranks - 1]
    assert outcome.errors.count("RuntimeError: the data of this rank are broken") == 1
    assert "in fail" in outcome.errors
    assert outcome.errors.count("Traceback") == 1


def test_a_keyboard_interrupt_on_one_rank_ends_the_job(tmp_path: Path) -> None:
    outcome = run_case("interrupted", tmp_path)
    require_end(outcome, since="raises")
    assert "KeyboardInterrupt" in outcome.errors


def test_the_exit_code_of_one_rank_is_the_jobs(tmp_path: Path) -> None:
    """sys.exit() is no exception: the rank takes part until the others are through, then the job ends with its code."""
    outcome = run_case("exits_with_3", tmp_path)
    require_end(outcome)
    assert outcome.code == 3
    assert [each["rank"] for each in outcome.events("trained")] == [0]


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("exits_early", 2),
        ("exits_early_with_its_share_of_a_center", 3),
        ("exits_without_a_step", 2),
        ("exits_in_the_warmup", 2),
        ("nobody_closes", 2),
        ("one_does_not_close", 2),
        ("nobody_closes_two", 2),
        ("one_closes_the_first_of_two", 2),
        ("pauses_for_ever", 2),
        ("closes_in_the_middle_of_rounds", 2),
        ("two_handles_and_no_data", 2),
    ],
)
def test_ranks_that_end_one_after_the_other(case: str, ranks: int, tmp_path: Path) -> None:
    outcome = run_case(case, tmp_path, ranks=ranks).require_success()
    through = [each["rank"] for each in outcome.events("trained")]
    assert through == list(range(ranks - case.startswith("exits")))


@pytest.mark.parametrize("case", ["shadow_thread_fails", "shadow_thread_fails_in_hogwild"])
def test_an_error_in_the_shadow_thread_is_raised_in_the_next_step(case: str, tmp_path: Path) -> None:
    outcome = run_case(case, tmp_path)
    require_end(outcome, since="breaks")
    raised = outcome.events("raised")
    assert [(each["rank"], each["what"]) for each in raised] == [(1, "ShadowSyncError from ArithmeticError")]
    assert "the shadow thread failed after " in raised[0]["text"]
    assert "ArithmeticError: the third update went wrong" in raised[0]["text"]
    first, _, second = outcome.errors.partition("The above exception was the direct cause of the following exception")
    assert "in update" in first
    assert "in on" in second


def test_an_error_in_the_shadow_thread_that_the_script_reports_by_itself(tmp_path: Path) -> None:
    outcome = run_case("shadow_thread_fails_and_the_script_exits", tmp_path)
    require_end(outcome, since="raised")
    assert outcome.errors.count("training failed: the shadow thread failed") == 1


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("case", "ranks", "fault_tolerant"),
    [
        ("all_replicas_get_bad", 2, True),
        ("all_replicas_get_bad", 4, False),
        ("all_replicas_of_a_center_get_bad", 2, False),
        ("all_replicas_of_a_center_get_bad", 4, True),
    ],
)
def test_replicas_that_are_all_bad_end_the_job_before_the_last_good_checkpoint_is_overwritten(
    case: str, ranks: int, fault_tolerant: bool, tmp_path: Path
) -> None:
    start = shadowrun(ranks, "--fault-tolerant") if fault_tolerant else mpirun(ranks)
    outcome = run_case(case, tmp_path, ranks=ranks, timeout_s=150.0, start=start)
    require_end(outcome)
    assert outcome.events("raised")
    for each in outcome.events("raised"):
        assert re.search(rf"all replicas hold NaN or infinity: here \(rank {each['rank']}\) \S+ has NaN", each["text"])
    latest = Checkpointer.latest(tmp_path / "checkpoints")
    assert latest is not None
    model = torch.load(latest / "model.pt", weights_only=True)["model"]
    assert all(bool(each.isfinite().all()) for each in model.values())


@pytest.mark.parametrize(
    ("case", "number"),
    [("trains_on", signal.SIGKILL), ("trains_on", signal.SIGSEGV), ("waits_in_close", signal.SIGKILL)],
)
def test_a_killed_rank_ends_the_job(case: str, number: int, tmp_path: Path) -> None:
    def kill(job: Job) -> None:
        os.kill(job.await_event("trains", ranks=2)[1], number)

    outcome = run_case(case, tmp_path, during=kill)
    require_end(outcome, since="trains")


def test_an_interrupt_of_the_launcher_ends_the_job(tmp_path: Path) -> None:
    def interrupt(job: Job) -> None:
        job.await_event("trains", ranks=2)
        job.send(signal.SIGINT)

    outcome = run_case("trains_on", tmp_path, during=interrupt)
    require_end(outcome, since="trains")
