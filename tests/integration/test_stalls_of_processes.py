"""Ranks that are stopped (SIGSTOP), as real processes: the others train on, say who it is, and end or go on."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import ONE_HOST, Job, Outcome, launch, mpirun, shadowrun

PROGRAM = Path(__file__).parent / "programs" / "stalls.py"
RANKS = 3
LONGEST_S = 110.0
PROMPT_S = 20.0
"""How long after the stop the job may take to end, where ranks are given up after three seconds."""


def run(
    folder: Path, during: Callable[[Job], None], case: str = "mean", *, fault_tolerant: bool = False, **options: object
) -> Outcome:
    command = shadowrun(RANKS, "--fault-tolerant") if fault_tolerant else mpirun(RANKS)
    words = [f"{name}={value!r}" for name, value in options.items()]
    command = [*command, sys.executable, str(PROGRAM), case, *words]
    return launch(command, folder, timeout_s=LONGEST_S, environ=ONE_HOST, during=during)


def steps(job: Job, rank: int) -> int:
    """Return how many steps `rank` has taken."""
    return max((int(each["what"]) for each in job.records().get(rank, []) if each["event"] == "steps"), default=0)


def await_text(job: Job, text: str, timeout_s: float = 30.0) -> str:
    """Wait until a rank has logged `text`; return the line."""
    deadline = time.monotonic() + timeout_s
    while True:
        for line in (job.folder / "stderr").read_text(errors="replace").splitlines():
            if text in line:
                return line
        assert time.monotonic() < deadline, f"nobody said {text!r}: {(job.folder / 'stderr').read_text()}"
        time.sleep(0.05)


def require_training(job: Job, ranks: list[int]) -> None:
    """Wait until `ranks` have taken more steps."""
    before, deadline = {rank: steps(job, rank) for rank in ranks}, time.monotonic() + 20.0
    while any(steps(job, rank) < before[rank] + 20 for rank in ranks):
        assert time.monotonic() < deadline, f"no more than {before} steps"
        time.sleep(0.05)


@pytest.mark.parametrize(("case", "stopped", "fault_tolerant"), [("mean", 1, True), ("easgd", 0, False)])
def test_the_others_train_on_say_who_is_stopped_and_meet_it_again(
    case: str, stopped: int, fault_tolerant: bool, tmp_path: Path
) -> None:
    others = [rank for rank in range(RANKS) if rank != stopped]
    named: list[str] = []

    def stop_for_a_while(job: Job) -> None:
        pid = job.await_event("trains", ranks=RANKS)[stopped]
        os.kill(pid, signal.SIGSTOP)
        try:
            line = await_text(job, f"for rank {stopped} on {platform.node()} (pid {pid}), which has not answered for")
            require_training(job, others)
        finally:
            os.kill(pid, signal.SIGCONT)
        named.extend([line, await_text(job, f"rank {stopped} on {platform.node()} (pid {pid}) is back")])
        require_training(job, list(range(RANKS)))
        (job.folder / "enough").touch()

    outcome = run(
        tmp_path, stop_for_a_while, case, fault_tolerant=fault_tolerant, stall_warning_s=1.0
    ).require_success()
    assert f"rank {others[0]} on" in named[0]
    assert [each["what"] for each in outcome.events("trained")] == [str(RANKS)] * RANKS


@pytest.mark.parametrize(
    "options",
    [{}, {"foreground": True}, {"end_job_on_exception": False}, {"fault_tolerant": True}],
    ids=["background", "foreground", "caught", "outlives ranks"],
)
def test_a_stopped_rank_ends_the_job_after_the_time_out(options: dict[str, Any], tmp_path: Path) -> None:
    began: list[float] = []

    def stop(job: Job) -> None:
        pid = job.await_event("trains", ranks=RANKS)[1]
        os.kill(pid, signal.SIGSTOP)
        began.append(time.time())

    outcome = run(tmp_path, stop, stall_warning_s=1.0, stall_timeout_s=3.0, **options)
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.code != 0
    assert outcome.left_over == []
    assert outcome.ended - began[0] < PROMPT_S, outcome.text
    assert "the job ends: held up for 3 s (stall_timeout_s) by rank 1 on" in outcome.errors


def test_a_rank_that_is_stopped_while_its_handle_is_made_ends_the_job_as_well(tmp_path: Path) -> None:
    outcome = run(tmp_path, lambda job: None, "constructing", stall_warning_s=1.0, stall_timeout_s=3.0)
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.code != 0
    assert outcome.left_over == []
    assert "in the start, before rounds for rank 1 on" in outcome.errors
    assert "the job ends: held up for 3 s (stall_timeout_s) by rank 1 on" in outcome.errors


@pytest.mark.parametrize(("case", "stopped"), [("mean", 0), ("easgd", 1)])
def test_a_stopped_rank_is_dropped_and_the_others_end_well(case: str, stopped: int, tmp_path: Path) -> None:
    others = [rank for rank in range(RANKS) if rank != stopped]

    def stop(job: Job) -> None:
        pid = job.await_event("trains", ranks=RANKS)[stopped]
        os.kill(pid, signal.SIGSTOP)
        await_text(job, f"rank {stopped} is dropped: held up for 3 s (stall_timeout_s) by rank {stopped} on")
        await_text(job, f"lost rank {stopped} on")
        require_training(job, others)
        (job.folder / "enough").touch()

    options = {"stall_warning_s": 1.0, "stall_timeout_s": 3.0, "on_stall": "drop"}
    outcome = run(tmp_path, stop, case, fault_tolerant=True, **options).require_success()
    assert [(each["rank"], each["what"]) for each in outcome.events("trained")] == [(rank, "2") for rank in others]
