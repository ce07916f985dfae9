"""Inside a rank of a test job: says what the rank is doing, and lets pytest run the same tests on all ranks.

`launching` starts the job and reads what is written here. Each rank appends one JSON object a line to `rank<r>.jsonl`
in the folder that SHADOWSYNC_JOB_FOLDER names; on SIGUSR1 it dumps the stacks of all its threads to `rank<r>.stacks`.

As a pytest plugin (`-p ranks`): a test that fails on some ranks only would leave the others waiting for ever in what
they do together. A rank whose test failed therefore waits a little for the others to end the same test, and ends the
whole job if they do not.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SHADOWSYNC_JOB_FOLDER", "."))
RANK = next((int(os.environ[name]) for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "HOROVOD_RANK") if name in os.environ), 0)  # fmt: skip  # noqa: E501
SIZE = next((int(os.environ[name]) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE") if name in os.environ), 1)  # fmt: skip  # noqa: E501
GRACE_S = 5.0
OUTCOMES = ("passed", "failed", "skipped")


def say(event: str, what: str, text: str = "") -> None:
    """Append to what this rank is known to be doing."""
    record = {"rank": RANK, "pid": os.getpid(), "time": time.time(), "event": event, "what": what, "text": text}
    with open(FOLDER / f"rank{RANK}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def begin() -> None:
    """Say that this rank is there, and be ready to dump the stacks of its threads."""
    stacks = open(FOLDER / f"rank{RANK}.stacks", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    say("begin", "start-up")


def pytest_configure(config: pytest.Config) -> None:
    begin()


def pytest_runtest_logstart(nodeid: str) -> None:
    say("start", nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed or report.when == "call" or report.skipped:
        say(report.outcome, item.nodeid, report.longreprtext if report.failed else str(report.longrepr or ""))
        if report.failed and not _all_are_through(item.nodeid):
            end_job(f"{item.nodeid} failed here, and other ranks are still in it")
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    say("finished", "pytest", str(int(exitstatus)))
    if session.testsfailed:
        end_job(f"{session.testsfailed} tests failed")


def end_job(why: str) -> None:
    """End all ranks at once: those that are left over from a failed test cannot end by themselves."""
    say("aborts", why)
    sys.stdout.flush()
    sys.stderr.flush()
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)


def _all_are_through(nodeid: str) -> bool:
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        if all(_is_through(rank, nodeid) for rank in range(SIZE)):
            return True
        time.sleep(0.05)
    return False


def _is_through(rank: int, nodeid: str) -> bool:
    try:
        lines = (FOLDER / f"rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return any(record["event"] in OUTCOMES and record["what"] == nodeid for record in records)
