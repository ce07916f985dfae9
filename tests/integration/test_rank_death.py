"""Ranks that die in real jobs with `shadowrun --fault-tolerant`, each at a named place: the others go on, or all end.

The places are those of `programs/deaths.py`; nothing here depends on when something happens.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ONE_HOST, Outcome, find_mpi, launch

from hvd_shadowsync import Checkpointer, checkpoint, emulated
from hvd_shadowsync.embedding import files
from hvd_shadowsync.launcher import supervision
from hvd_shadowsync.launcher.command import LaunchError
from hvd_shadowsync.launcher.supervision import LOST_CODE

PROGRAM = Path(__file__).parent / "programs" / "deaths.py"
TIMEOUT_S = 100.0
Fault = dict[str, Any]


@pytest.fixture(autouse=True)
def _possible() -> None:
    mpi = find_mpi()
    if mpi.kind != "openmpi" or mpi.version < (5,):
        pytest.skip(f"needs Open MPI 5; {mpi.mpirun} is of {mpi.kind} {'.'.join(map(str, mpi.version))}")


def fault(rank: int, place: str, at: int = 1, how: str = "SIGKILL") -> Fault:
    return {"rank": rank, "place": place, "at": at, "how": how}


def run(
    ranks: int, faults: list[Fault], folder: Path, *, strict: bool = False, hosts: int = 1, **options: Any
) -> Outcome:
    """Run the job to its end; fail if it hung, where the ranks were, or if it left processes behind."""
    start = [sys.executable, "-m", "hvd_shadowsync.run", "-np", str(ranks), "--fault-tolerant"]
    more = ["--emulated", str(hosts)] if hosts > 1 else []
    command = [*start, *more, *(["--strict"] if strict else []), "python", str(PROGRAM)]
    told = json.dumps({"faults": faults, **options})
    environ = ONE_HOST if hosts == 1 else {}
    outcome = launch([*command, told], folder / "job", timeout_s=TIMEOUT_S, environ=environ)
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.left_over == [], outcome.text
    died = {(each["rank"], each["what"]) for each in outcome.events("dies")}
    assert died == {(each["rank"], each["place"]) for each in faults}, outcome.text
    return outcome


def require_survival(
    outcome: Outcome, ranks: int, faults: list[Fault], *, lost: int | None = None, code: int = 0
) -> list[dict[str, Any]]:
    """Fail unless all but the dead came to their end with the same weights; return what they said of it."""
    assert outcome.code == code, outcome.text
    dead = {each["rank"] for each in faults}
    ended = {each["rank"]: json.loads(each["text"]) for each in outcome.events("ended") if each["rank"] not in dead}
    assert set(ended) == set(range(ranks)) - dead, outcome.text
    left = list(ended.values())
    assert len({each["digest"] for each in left}) == 1, "the replicas differ after synchronize()"
    if lost is None:
        assert [each["rank"] for each in left] == list(range(len(left)))
    assert {each["lost"] for each in left} == {len(dead) if lost is None else lost}
    print("longest step of each survivor, ms:", [each["longest_step_ms"] for each in left])
    return left


def require_named(outcome: Outcome, dead: set[int], host: str | None = None) -> None:
    """Fail unless the log names the dead ranks and their host."""
    named = re.findall(r"WARNING lost (.*); the other \d go on", outcome.errors)
    lost = {int(rank) for each in named for rank in re.findall(r"rank (\d+)", each)}
    assert lost == dead, outcome.errors
    assert all(f"on {host or platform.node()}" in each for each in named)


# --- one rank, killed somewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "at", "ranks", "options"),
    [
        ("step", 15, 2, {"foreground": True}),
        ("between rounds", 4, 3, {"algorithm": "S-BMUF"}),
        ("between rounds", 4, 3, {"algorithm": "S-EASGD"}),
        ("snapshot", 3, 3, {"foreground": True, "algorithm": "S-BMUF"}),
        ("update", 3, 4, {}),
        ("update", 3, 3, {"half": True, "algorithm": "S-BMUF"}),
        ("update", 4, 3, {"algorithm": "S-EASGD"}),
        ("update", 3, 2, {"width": 300_000}),
        ("merge", 3, 2, {"apply": "hogwild"}),
        ("synchronize", 1, 3, {}),
        ("synchronize", 1, 3, {"algorithm": "S-EASGD", "foreground": True}),
        ("gather", 1, 3, {"algorithm": "S-EASGD"}),
        ("gather", 1, 2, {"half": True}),
        ("warm-up", 3, 3, {"warmup_steps": 8}),
    ],
)
def test_a_rank_is_killed(place: str, at: int, ranks: int, options: dict[str, Any], tmp_path: Path) -> None:
    faults = [fault(ranks - 1, place, at)]
    outcome = run(ranks, faults, tmp_path, **options)
    require_survival(outcome, ranks, faults)
    require_named(outcome, {ranks - 1})


def test_a_rank_is_killed_before_there_is_a_handle(tmp_path: Path) -> None:
    faults = [fault(1, "before")]
    outcome = run(3, faults, tmp_path, strict=True, lost=0)
    require_survival(outcome, 3, faults, lost=0, code=LOST_CODE)
    assert "lost rank 1 before there was a handle; the other 2 go on" in outcome.errors
    assert "shadowrun: lost ranks: 1; 2 came to their end" in outcome.errors


@pytest.mark.parametrize(("way", "code"), [("os._exit(5)", 5), ("os.kill(os.getpid(), 9)", 137)])
def test_a_rank_ends_before_mpi_is_initialised(way: str, code: int, tmp_path: Path) -> None:
    """The others wait for it in MPI_Init, where nothing tells them."""
    ends = f"if os.environ['OMPI_COMM_WORLD_RANK'] == '1': {way}"
    program = f"import os\n{ends}\nimport hvd_shadowsync.torch as hvd\nhvd.init()"
    start = "import sys; from hvd_shadowsync import run; from hvd_shadowsync.launcher import supervision; "
    start += "supervision.BEGINNING_S = 1.0; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "-np", "3", "--fault-tolerant", "python", "-c", program]
    outcome = launch(command, tmp_path / "job", timeout_s=TIMEOUT_S, environ=ONE_HOST)
    assert supervision.BEGINNING_S == 60, "what the README says"
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.code == code, outcome.text
    assert "shadowrun: rank 1 ended with code" in outcome.errors, outcome.text
    assert "before MPI was initialised: the job ends" in outcome.errors, outcome.text


def test_a_rank_is_killed_in_the_construction_of_its_handle(tmp_path: Path) -> None:
    faults = [fault(1, "construction")]
    outcome = run(3, faults, tmp_path)
    require_survival(outcome, 3, faults)
    require_named(outcome, {1})


def test_a_rank_is_killed_in_close(tmp_path: Path) -> None:
    faults = [fault(2, "close")]
    outcome = run(3, faults, tmp_path, strict=True, lost=0)
    require_survival(outcome, 3, faults, lost=1, code=LOST_CODE)
    require_named(outcome, {2})


def test_a_rank_is_killed_in_mpi_finalize(tmp_path: Path) -> None:
    """The others are through and do not notice; shadowrun does."""
    faults = [fault(1, "finalize")]
    outcome = run(3, faults, tmp_path, strict=True, lost=0)
    require_survival(outcome, 3, faults, lost=0, code=LOST_CODE)
    assert "shadowrun: lost ranks: 1; 2 came to their end" in outcome.errors


# --- rank 0 ---------------------------------------------------------------------------------------------------------


def test_rank_0_is_killed_while_it_writes_a_checkpoint(tmp_path: Path) -> None:
    """The one before stays the newest good one until the new rank 0 has written its own."""
    faults = [fault(0, "write", 2)]
    folder = tmp_path / "checkpoints"
    outcome = run(3, faults, tmp_path, checkpoints=str(folder))
    left = require_survival(outcome, 3, faults)
    require_named(outcome, {0})
    assert {each["saved"] for each in left} == {str(Checkpointer.latest(folder))}
    numbers = sorted(int(path.name.split("-")[1].split(".")[0]) for path in folder.glob("step-*"))
    assert len(numbers) >= 3, "one of the old rank 0, and of the new one one beside training and the last one"
    newest = checkpoint.read(Path(left[0]["saved"]) / "model.pt")
    assert newest["optimizer"]["shadow_sync"]["counters"]["steps"] == numbers[-1]


# --- several --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "options"),
    [
        ([fault(0, "update", 3), fault(3, "snapshot", 8), fault(1, "between rounds", 15)], {"algorithm": "S-BMUF"}),
        ([fault(0, "snapshot", 3), fault(1, "snapshot", 3), fault(2, "snapshot", 3)], {}),
        ([fault(1, "update", 3), fault(0, "update", 9)], {"algorithm": "S-EASGD"}),
    ],
    ids=["one after the other", "at once", "S-EASGD"],
)
def test_several_are_killed(faults: list[Fault], options: dict[str, Any], tmp_path: Path) -> None:
    ranks = max(each["rank"] for each in faults) + 1 + ("algorithm" not in options or len(faults) == 2)
    outcome = run(ranks, faults, tmp_path, strict=True, **options)
    require_survival(outcome, ranks, faults, code=LOST_CODE)
    dead = ", ".join(str(each) for each in sorted(each["rank"] for each in faults))
    assert f"shadowrun: lost ranks: {dead}; {ranks - len(faults)} came to their end" in outcome.errors


def test_all_are_killed(tmp_path: Path) -> None:
    outcome = run(2, [fault(0, "snapshot", 3), fault(1, "snapshot", 3)], tmp_path)
    assert outcome.code == 1
    assert "started again" not in outcome.errors, "nobody asked for that"
    assert "no rank came to its end" in outcome.errors


# --- other ends than a kill -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["exception", "segmentation fault"])
def test_a_rank_dies_of_an_error_in_training(how: str, tmp_path: Path) -> None:
    faults = [fault(0, "step", 15, how)]
    outcome = run(3, faults, tmp_path)
    require_survival(outcome, 3, faults)
    require_named(outcome, {0})
    if how == "exception":
        assert "RuntimeError: the data of this rank are broken" in outcome.errors
        assert "rank 0 leaves the job: uncaught RuntimeError" in outcome.errors


def test_an_exception_before_training_ends_the_job(tmp_path: Path) -> None:
    outcome = run(2, [fault(1, "before", how="exception")], tmp_path)
    assert outcome.code not in (0, None)
    assert "rank 1 ends the job: uncaught RuntimeError" in outcome.errors
    assert outcome.events("ended") == []


@pytest.mark.parametrize(
    ("place", "at", "victims", "mode"),
    [
        ("step of a saved job", 7, [1], "alltoall"),
        ("lookup of a saved job", 20, [2], "served"),
        ("row update of a saved job", 20, [0], "alltoall"),
        ("row update of a saved job", 20, [0], "served"),
        ("lookup of a saved job", 15, [1, 2], "alltoall"),
    ],
)
def test_rows_of_a_lost_rank_come_from_the_last_checkpoint(
    place: str, at: int, victims: list[int], mode: str, tmp_path: Path
) -> None:
    faults = [fault(rank, place, at + 9 * number) for number, rank in enumerate(victims)]
    folder = tmp_path / "checkpoints"
    outcome = run(3, faults, tmp_path, tables=True, mode=mode, checkpoints=str(folder))
    left = require_survival(outcome, 3, faults)
    assert {each["size"] for each in left} == {3 - len(victims)}
    assert len({each["rows"] for each in left}) == 1
    assert "are now those of" in outcome.errors
    newest = Checkpointer.latest(folder)
    assert {each["saved"] for each in left} == {str(newest)}
    assert newest is not None
    for table, rows in (("a", 50), ("b", 30)):
        assert sum(len(each) for _, each in files.read(newest / "model.pt.0", table)) == rows


@pytest.mark.parametrize("victims", [[1], [0, 2]])
def test_rows_of_a_lost_rank_come_from_its_copy(victims: list[int], tmp_path: Path) -> None:
    faults = [fault(rank, "row update", 15 + 20 * number) for number, rank in enumerate(victims)]
    outcome = run(3, faults, tmp_path, tables=True, replication=2)
    left = require_survival(outcome, 3, faults)
    assert {each["size"] for each in left} == {3 - len(victims)}
    assert len({each["rows"] for each in left}) == 1
    assert "are now those of the copies" in outcome.errors


def test_rows_of_sharded_tables_that_are_lost_end_the_job(tmp_path: Path) -> None:
    outcome = run(3, [fault(1, "step", 15)], tmp_path, tables=True)
    assert outcome.code not in (0, None)
    assert re.search("EmbeddingError: a rank was lost .* start the job again from its last checkpoint", outcome.errors)
    assert "ends the job: uncaught EmbeddingError" in outcome.errors
    assert "leaves the job" not in outcome.errors, "an error of ours is everybody's"


# --- several hosts --------------------------------------------------------------------------------------------------


@pytest.fixture
def _several_hosts() -> None:
    try:
        code = emulated.run(emulated.Network(2), [sys.executable, "-c", ""], os.environ)
    except LaunchError as error:
        pytest.skip(str(error))
    assert code == 0


@pytest.mark.usefixtures("_several_hosts")
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_of_one_of_several_hosts_is_killed(victim: int, tmp_path: Path) -> None:
    """The first of its host, which goes on the network for it; rounds between two hosts, then between three ranks."""
    faults = [fault(victim, "update", 3)]
    outcome = run(4, faults, tmp_path, hosts=2, width=200_000)
    require_survival(outcome, 4, faults)
    require_named(outcome, {victim}, emulated.Network(2).address(victim // 2))


@pytest.mark.usefixtures("_several_hosts")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_lost_with_its_daemon_ends_the_job(victim: int, tmp_path: Path) -> None:
    """Open MPI 5.0's launcher does not go on without one of its daemons, nor ranks without it; the code is not 0."""
    outcome = run(3, [fault(victim, "step", 15, "host")], tmp_path, hosts=3)
    assert outcome.code not in (0, None), outcome.text
    assert outcome.events("ended") == []
    assert "no rank came to its end" in outcome.errors


def test_communicators_of_several_threads_recover_at_once(tmp_path: Path) -> None:
    """Four of five ranks die, one after the other, while three threads of each use a communicator of their own."""
    program = PROGRAM.parent / "recoveries.py"
    command = [sys.executable, "-m", "hvd_shadowsync.run", "-np", "5", "--fault-tolerant", "python", str(program)]
    outcome = launch(command, tmp_path / "job", timeout_s=TIMEOUT_S, environ=ONE_HOST)
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.left_over == [], outcome.text
    assert outcome.code == 0, outcome.text
    assert sorted(each["rank"] for each in outcome.events("dies")) == [0, 1, 2, 3], outcome.text
    (ended,) = outcome.events("ended")
    assert json.loads(ended["text"])["lost"] == [[0, 1, 2, 3]] * 3, outcome.text
