"""Jobs between emulated hosts over links that lose packets, are slow or far, or are cut: training goes on, or all ends.

Nothing here depends on when something happens: links are cut, and mended, when the ranks have come so far.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import Job, Outcome, find_mpi, is_running, launch

from hvd_shadowsync.emulated import Network, cluster
from hvd_shadowsync.launcher.command import LaunchError

PROGRAM = Path(__file__).parent / "programs" / "links.py"
LONGEST_S = 110.0
PROMPT_S = 40.0
"""In which what has a time-out of three seconds, or begins anew by itself, has come about."""
CUT_S = 10.0
WARNED = {"stall_warning_s": 1.0}
GIVES_UP = {**WARNED, "stall_timeout_s": 3.0}
DROPS = {**GIVES_UP, "on_stall": "drop"}


@dataclass
class Hosts:
    """Emulated hosts that are up, and the jobs on them."""

    network: Network
    folder: Path

    def run(
        self, during: Callable[[Job], None], algorithm: str, options: dict[str, Any], *, fault_tolerant: bool = False
    ) -> Outcome:
        """Run a rank on each host to the end of the job."""
        how = ["--fault-tolerant"] if fault_tolerant else []
        start = [sys.executable, "-m", "hvd_shadowsync.emulated", "run", str(self.network.hosts), *how]
        command = [*start, sys.executable, str(PROGRAM), algorithm, json.dumps(options)]
        environ = {"TMPDIR": str(self.folder)}
        return launch(command, self.folder / "job", timeout_s=LONGEST_S, environ=environ, during=during)


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Have hosts up, which this test's own file tells of; the parameter describes their links."""
    mpi = find_mpi()
    if mpi.kind != "openmpi" or mpi.version < (5,):
        pytest.skip(f"needs Open MPI 5; {mpi.mpirun} is of {mpi.kind} {'.'.join(map(str, mpi.version))}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    network = request.param if isinstance(request.param, Network) else Network(request.param)
    try:
        cluster.up(network)
    except LaunchError as error:
        pytest.skip(str(error))
    yield Hosts(network, tmp_path)
    cluster.down()


def said(job: Job, rank: int) -> dict[str, int]:
    """Return the steps and rounds of `rank`, and how many ranks there are for it; all 0 where it has said nothing."""
    told = [each for each in job.records().get(rank, []) if each["event"] == "steps"]
    if not told:
        return {"steps": 0, "rounds": 0, "size": 0, "lost": 0}
    return {"steps": int(told[-1]["what"]), **json.loads(told[-1]["text"])}


def await_all(job: Job, ranks: list[int], done: Callable[[int], bool], what: str, timeout_s: float = PROMPT_S) -> None:
    """Wait until `done(rank)` holds for all of them at once."""
    deadline = time.monotonic() + timeout_s
    while not all(done(rank) for rank in ranks):
        told = {rank: said(job, rank) for rank in ranks}
        assert time.monotonic() < deadline, f"no {what}: {told} {(job.folder / 'stderr').read_text(errors='replace')}"
        time.sleep(0.05)


def await_training(job: Job, ranks: list[int], steps: int = 20) -> None:
    """Wait until `ranks` have taken more steps."""
    before = {rank: said(job, rank)["steps"] for rank in ranks}
    await_all(job, ranks, lambda rank: said(job, rank)["steps"] >= before[rank] + steps, f"{steps} steps")


def await_rounds(job: Job, ranks: list[int], rounds: int = 2, timeout_s: float = PROMPT_S) -> None:
    """Wait until `ranks` have made more rounds."""
    before = {rank: said(job, rank)["rounds"] for rank in ranks}
    done = lambda rank: said(job, rank)["rounds"] >= before[rank] + rounds  # noqa: E731
    await_all(job, ranks, done, f"{rounds} rounds", timeout_s)


def await_text(job: Job, text: str) -> None:
    """Wait until somebody has written `text`."""
    errors = job.folder / "stderr"
    await_all(job, [0], lambda _: text in errors.read_text(errors="replace"), f"text {text!r}")


def processes(job: Job, rank: int) -> list[int]:
    """Return the processes of one rank, with what has started it."""
    found = []
    for pid in job.processes():
        try:
            if f"OMPI_COMM_WORLD_RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def cut_off(job: Job, link: str, ranks: list[int]) -> None:
    """Cut a link for good, and wait until all `ranks`, those behind it, have ended, while the job is still there."""
    everyone = [pid for rank in ranks for pid in processes(job, rank)]
    assert len(everyone) >= len(ranks)
    cluster.cut(link)
    await_all(job, [0], lambda _: not any(is_running(pid) for pid in everyone), "end of those that are cut off")


def enough(job: Job) -> None:
    (job.folder / "enough").touch()


# --- links that are bad ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "algorithm", "fault_tolerant", "width"),
    [
        (Network(2, "3mbit", loss="1%"), "S-MA", True, 2000),
        (Network(2, "3mbit", loss="5%"), "S-EASGD", False, 2000),
        (Network(2, "100mbit", latency="100ms"), "S-MA", False, 12),
        (Network(2, "1mbit"), "S-EASGD", True, 1000),
    ],
    ids=["1 % loss", "5 % loss", "200 ms latency", "1 Mbit/s"],
    indirect=["hosts"],
)
def test_training_goes_on_over_bad_links(hosts: Hosts, algorithm: str, fault_tolerant: bool, width: int) -> None:
    def train(job: Job) -> None:
        await_rounds(job, [0, 1], 1, timeout_s=60.0)
        await_training(job, [0, 1])
        await_rounds(job, [0, 1], 2, timeout_s=60.0)
        enough(job)

    outcome = hosts.run(train, algorithm, {"width": width}, fault_tolerant=fault_tolerant).require_success()
    assert [each["what"] for each in outcome.events("trained")] == ["2", "2"]
    require_steps_during_rounds(outcome)


def require_steps_during_rounds(outcome: Outcome) -> None:
    """Fail unless there were many steps from one round to the next, which takes a second and more on each link.

    400 KB each way at 3 Mbit/s, 200 KB at 1 Mbit/s, some round trips of 200 ms.
    """
    for rank in (0, 1):
        steps: dict[int, list[int]] = {}
        for each in outcome.events("steps"):
            if each["rank"] == rank:
                steps.setdefault(json.loads(each["text"])["rounds"], []).append(int(each["what"]))
        assert max(found[-1] - found[0] for found in steps.values()) >= 20, steps


# --- a link that is cut and comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "algorithm", "fault_tolerant"),
    [(Network(3), "S-MA", False), (Network(3), "S-EASGD", True)],
    ids=["S-MA", "S-EASGD, outlives ranks"],
    indirect=["hosts"],
)
def test_rounds_go_on_after_a_link_was_cut_for_ten_seconds(hosts: Hosts, algorithm: str, fault_tolerant: bool) -> None:
    def cut_for_a_while(job: Job) -> None:
        await_rounds(job, [0, 1, 2], timeout_s=60.0)
        begun = time.monotonic()
        cluster.cut("host3")
        try:
            await_text(job, "for rank 2 on 10.77.0.3")
            await_training(job, [0, 1, 2])
            time.sleep(max(0.0, begun + CUT_S - time.monotonic()))
        finally:
            cluster.mend("host3")
        await_text(job, "rank 2 on 10.77.0.3")
        await_text(job, "is back; ")
        await_rounds(job, [0, 1, 2])
        enough(job)

    outcome = hosts.run(cut_for_a_while, algorithm, WARNED, fault_tolerant=fault_tolerant).require_success()
    assert [each["what"] for each in outcome.events("trained")] == ["3"] * 3


# --- a partition for good -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_the_smaller_side_ends_itself_and_the_others_go_on(hosts: Hosts) -> None:
    """And harms nobody when it can be reached again."""

    def part(job: Job) -> None:
        await_rounds(job, [0, 1, 2], timeout_s=60.0)
        cut_off(job, "host3", [2])
        await_all(job, [0, 1], lambda rank: said(job, rank)["size"] == 2, "loss of rank 2")
        await_rounds(job, [0, 1])
        cluster.mend("host3")
        await_text(job, "rank 2 leaves the job: ")
        await_rounds(job, [0, 1])
        enough(job)

    outcome = hosts.run(part, "S-MA", DROPS, fault_tolerant=True).require_success()
    assert [(each["rank"], each["what"]) for each in outcome.events("trained")] == [(0, "2"), (1, "2")]
    assert "rank 2 is cut off: held up for 3 s (stall_timeout_s) by rank 2 on 10.77.0.3" in outcome.errors
    assert "CutOffError: this rank leaves the job: held up for 3 s" in outcome.errors
    assert "1 of 3 ranks are on this side, and those of the other go on" in outcome.errors
    assert "shadowrun: lost ranks: 2; 2 came to their end" in outcome.errors


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_of_two_halves_that_with_the_lowest_rank_goes_on_and_the_job_ends_without_the_other(hosts: Hosts) -> None:
    def part(job: Job) -> None:
        await_rounds(job, [0, 1], timeout_s=60.0)
        cut_off(job, "host2", [1])
        await_all(job, [0], lambda rank: said(job, rank)["size"] == 1, "loss of rank 1")
        await_training(job, [0])
        enough(job)

    outcome = hosts.run(part, "S-EASGD", DROPS, fault_tolerant=True).require_success()
    assert [(each["rank"], each["what"]) for each in outcome.events("trained")] == [(0, "1")]
    assert "shadowrun: mpirun waits for a host that it cannot reach, and is ended" in outcome.errors


@pytest.mark.parametrize(
    ("hosts", "link", "behind", "fault_tolerant", "options", "reason"),
    [
        (2, "host2", [1], False, GIVES_UP, "rank 1 on 10.77.0.2"),
        (3, "host1", [1, 2], True, DROPS, "most ranks are away (on_stall='drop')"),
    ],
    ids=["on_stall='end'", "mpirun is on the smaller side"],
    indirect=["hosts"],
)
def test_where_no_side_can_go_on_all_ranks_end_and_the_code_is_not_0(
    hosts: Hosts, link: str, behind: list[int], fault_tolerant: bool, options: dict[str, Any], reason: str
) -> None:
    def part(job: Job) -> None:
        await_rounds(job, [0, *behind], timeout_s=60.0)
        cut_off(job, link, behind)

    outcome = hosts.run(part, "S-MA", options, fault_tolerant=fault_tolerant)
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.code not in (0, None)
    assert outcome.left_over == []
    assert outcome.events("trained") == []
    assert "StallError: the job ends: held up for 3 s (stall_timeout_s) by rank 1 on 10.77.0.2" in outcome.errors
    assert reason in outcome.errors
    assert (
        "shadowrun: mpirun outlives the job that a rank has ended (it may not reach a host), and is ended"
        in outcome.errors
    )
