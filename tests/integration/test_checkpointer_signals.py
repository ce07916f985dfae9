"""Real jobs that are told to end: a last checkpoint, exit code 0, and a job that goes on from it."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from launching import ONE_HOST, Job, Outcome, find_mpi, launch, mpirun, shadowrun

from hvd_shadowsync import Checkpointer, checkpoint

PROGRAM = Path(__file__).parent / "programs" / "checkpoints.py"


def run_case(
    case: str, folder: Path, during: Callable[[Job], None], *, ranks: int = 2, start: list[str] | None = None
) -> Outcome:
    start = mpirun(ranks) if start is None else start
    command = [*start, sys.executable, str(PROGRAM), case, str(folder / "checkpoints")]
    job = folder / f"job-{len(list(folder.glob('job-*')))}"
    return launch(command, job, timeout_s=90.0, environ=ONE_HOST, during=during)


def tell(*which: int, ranks: int = 2) -> Callable[[Job], None]:
    """Return what sends SIGTERM to some ranks, once all train."""

    def during(job: Job) -> None:
        pids = job.await_event("trains", ranks=ranks)
        for rank in which:
            with suppress(ProcessLookupError):  # it was told by the first one, and has ended
                os.kill(pids[rank], signal.SIGTERM)

    return during


@pytest.mark.parametrize(
    ("case", "which"),
    [
        ("trains", (0, 1)),
        ("trains", (1,)),
        ("meets", (0, 1)),
        ("meets", (0,)),
        ("gathers_in_the_warmup", (0,)),
        ("in_the_foreground", (0, 1)),
        ("with_a_center", (0, 1)),
        ("with_a_center", (1,)),
        ("with_tables", (0, 1)),
        ("with_tables", (1,)),
    ],
)
def test_a_signal_makes_a_last_checkpoint_and_a_clean_exit(case: str, which: tuple[int, ...], tmp_path: Path) -> None:
    outcome = run_case(case, tmp_path, tell(*which)).require_success()
    require_last(tmp_path / "checkpoints", outcome)


def test_a_signal_ends_waits_in_the_calls_of_any_handle(tmp_path: Path) -> None:
    outcome = run_case("waits_in_one_of_two", tmp_path, tell(1)).require_success()
    require_last(tmp_path / "checkpoints" / "second", outcome)


def require_last(folder: Path, outcome: Outcome) -> None:
    """Fail unless the newest checkpoint is one of after the signal."""
    told = [int(step) for step in re.findall(r"was told to end at step (\d+)", outcome.errors)]
    latest = Checkpointer.latest(folder)
    assert latest is not None
    steps = checkpoint.read(latest / "model.pt")["optimizer"]["shadow_sync"]["counters"]["steps"]
    assert steps >= min(told) >= 20, outcome.errors


def test_a_signal_to_one_rank_of_a_job_that_outlives_its_ranks(tmp_path: Path) -> None:
    outcome = run_case(
        "with_tables", tmp_path, tell(1), start=shadowrun(2, "--fault-tolerant", "--strict")
    ).require_success()
    require_last(tmp_path / "checkpoints", outcome)


def children_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("case", "first"),
    [
        ("with_workers", "rank"),
        ("with_workers", "workers"),
        ("waits_for_workers", "rank"),
        ("waits_for_workers", "workers"),
        ("waits_in_a_block", "workers"),
        ("handles_the_loss_of_workers", "rank"),
    ],
)
def test_a_signal_to_all_processes_makes_a_last_checkpoint_as_well(case: str, first: str, tmp_path: Path) -> None:
    """Batch systems signal the workers of DataLoaders, too, which die of it."""

    def during(job: Job) -> None:
        everyone = []
        for pid in job.await_event("trains", ranks=2):
            workers = children_of(pid)
            assert len(workers) == 2
            everyone += [pid, *workers] if first == "rank" else [*workers, pid]
        for each in everyone:
            with suppress(ProcessLookupError):  # the other rank has ended it
                os.kill(each, signal.SIGTERM)

    outcome = run_case(case, tmp_path, during).require_success()
    require_last(tmp_path / "checkpoints", outcome)
    handled = outcome.events("handles")
    assert len(handled) == (2 if case == "handles_the_loss_of_workers" else 0)


@pytest.mark.usefixtures("_open_mpi")
def test_sigterm_of_shadowrun_leaves_workers_alone(tmp_path: Path) -> None:
    """Open MPI passes signals on to all processes of a rank's group; the children let that of `shadowrun` pass."""
    outcome = run_case("with_workers", tmp_path, tell_shadowrun(), start=shadowrun(2)).require_success()
    require_last(tmp_path / "checkpoints", outcome)
    assert "worker" not in outcome.errors


def test_a_job_of_another_size_goes_on(tmp_path: Path) -> None:
    run_case("with_tables", tmp_path, tell(0, 1)).require_success()
    first = Checkpointer.latest(tmp_path / "checkpoints")
    outcome = run_case("with_tables", tmp_path, tell(0, 1, 2, ranks=3), ranks=3).require_success()
    assert {each["text"] for each in outcome.events("trains")} == {str(first)}
    assert Checkpointer.latest(tmp_path / "checkpoints") != first


def test_a_signal_that_the_launcher_passes_on(tmp_path: Path) -> None:
    """mpirun kills a moment after SIGTERM; SIGUSR2 it only passes on."""

    def during(job: Job) -> None:
        job.await_event("trains", ranks=2)
        job.send(signal.SIGUSR2)

    run_case("trains", tmp_path, during).require_success()
    assert Checkpointer.latest(tmp_path / "checkpoints") is not None


@pytest.fixture
def _open_mpi() -> None:
    if (mpi := find_mpi()).kind != "openmpi":
        pytest.skip(f"needs Open MPI, {mpi.mpirun} is of {mpi.kind}")


def tell_shadowrun(ranks: int = 2) -> Callable[[Job], None]:
    def during(job: Job) -> None:
        job.await_event("trains", ranks=ranks)
        job.send(signal.SIGTERM)

    return during


@pytest.mark.usefixtures("_open_mpi")
@pytest.mark.parametrize("options", [[], ["--fault-tolerant", "--respawn", "1"], ["--restarts", "1"]], ids=str)
def test_sigterm_of_shadowrun_makes_a_last_checkpoint_and_a_clean_exit(options: list[str], tmp_path: Path) -> None:
    outcome = run_case(
        "with_default_signals", tmp_path, tell_shadowrun(), start=shadowrun(2, *options)
    ).require_success()
    require_last(tmp_path / "checkpoints", outcome)
    assert "a last checkpoint is made at a signal" not in outcome.errors
    assert "started again" not in outcome.errors


@pytest.mark.usefixtures("_open_mpi")
def test_a_rank_that_has_closed_its_checkpointer_and_waits_for_others_does_not_die_of_it(tmp_path: Path) -> None:
    def during(job: Job) -> None:
        job.await_event("trains", ranks=1)
        job.send(signal.SIGTERM)

    outcome = run_case("one_is_through", tmp_path, during, start=shadowrun(2)).require_success()
    assert Checkpointer.latest(tmp_path / "checkpoints") is not None
    assert "is the last checkpoint" in outcome.errors


def test_if_the_writer_of_the_last_checkpoint_is_killed_the_next_rank_writes_it(tmp_path: Path) -> None:
    start = shadowrun(3, "--fault-tolerant")
    outcome = run_case("writer_is_killed", tmp_path, tell_shadowrun(3), start=start).require_success()
    assert "lost ranks: 0" in outcome.errors
    require_last(tmp_path / "checkpoints", outcome)


@pytest.mark.usefixtures("_open_mpi")
@pytest.mark.parametrize("options", [[], ["--fault-tolerant"]], ids=str)
def test_a_last_checkpoint_that_cannot_be_written_is_the_jobs_exit_code(options: list[str], tmp_path: Path) -> None:
    outcome = run_case("nobody_can_write", tmp_path, tell_shadowrun(), start=shadowrun(2, *options))
    assert not outcome.verdict
    assert outcome.code == 1, outcome.text
    assert "No space left" in outcome.errors


def test_sigterm_of_the_launcher_ends_the_job_and_leaves_only_good_checkpoints(tmp_path: Path) -> None:
    """Whether the last checkpoint is done in the moment before the kill depends on its size and the machine."""

    def during(job: Job) -> None:
        job.await_event("trains", ranks=2)
        job.send(signal.SIGTERM)

    outcome = run_case("with_tables", tmp_path, during)
    assert not outcome.verdict
    assert outcome.left_over == []
    assert Checkpointer.latest(tmp_path / "checkpoints") is not None
