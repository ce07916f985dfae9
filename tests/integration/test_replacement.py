"""Lost ranks that are replaced in real jobs with `shadowrun --fault-tolerant --respawn N`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ONE_HOST, Outcome, find_mpi, launch

from hvd_shadowsync import emulated
from hvd_shadowsync.launcher.command import LaunchError
from hvd_shadowsync.launcher.supervision import LOST_CODE

PROGRAM = Path(__file__).parent / "programs" / "replacements.py"
TIMEOUT_S = 180.0
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(autouse=True)
def _possible() -> None:
    mpi = find_mpi()
    if mpi.kind != "openmpi" or mpi.version < (5,):
        pytest.skip(f"needs Open MPI 5; {mpi.mpirun} is of {mpi.kind} {'.'.join(map(str, mpi.version))}")


@pytest.fixture
def several_hosts() -> None:
    try:
        code = emulated.run(emulated.Network(2), [sys.executable, "-c", ""], os.environ)
    except LaunchError as error:
        pytest.skip(str(error))
    assert code == 0


def run(ranks: int, respawn: int, folder: Path, *words: str, hosts: int = 1, **options: Any) -> Outcome:
    """Run the job to its end; fail if it hung, or left processes behind."""
    command = [sys.executable, "-m", "hvd_shadowsync.run", "-np", str(ranks), "--fault-tolerant"]
    command += ["--respawn", str(respawn), *words, "python", str(PROGRAM), json.dumps(options)]
    environ = ONE_HOST if hosts == 1 else {}
    outcome = launch(command, folder / "job", timeout_s=TIMEOUT_S, environ=environ)
    assert not outcome.verdict, outcome.verdict + outcome.text
    assert outcome.left_over == [], outcome.text
    return outcome


def require_ends(outcome: Outcome, size: int, *, new: int, code: int = 0) -> list[dict[str, Any]]:
    """Fail unless `size` ranks came to their end together, `new` of them replacements; return what they said."""
    assert outcome.code == code, outcome.text
    ended: list[dict[str, Any]] = [json.loads(each["text"]) for each in outcome.events("ended")]
    assert len(ended) == size, outcome.text
    assert len({each["digest"] for each in ended}) == 1, "the replicas differ after synchronize()"
    assert sorted(each["rank"] for each in ended) == list(range(size))
    assert {each["size"] for each in ended} == {size}
    assert [each["new"] for each in ended].count(True) == new
    return ended


@pytest.mark.parametrize(
    ("ranks", "victim", "options"),
    [
        (3, 1, {}),
        (3, 0, {"algorithm": "S-BMUF", "drop_in": True}),
        (3, 2, {"algorithm": "S-EASGD"}),
        (2, 0, {"algorithm": "S-EASGD", "foreground": True}),
        (3, 1, {"deterministic": True}),
        (2, 1, {"warmup_steps": 25, "width": 100_000}),
    ],
)
def test_a_lost_rank_is_replaced(ranks: int, victim: int, options: dict[str, Any], tmp_path: Path) -> None:
    """The new one has the number, the weights, the optimizer's state and the steps; the others do not change theirs."""
    if options.get("drop_in") and importlib.util.find_spec("horovod") is None:
        options = {name: value for name, value in options.items() if name != "drop_in"}
    outcome = run(ranks, 1, tmp_path, faults={victim: 15}, replaced=1, **options)
    ended = require_ends(outcome, ranks, new=1)
    for each in ended:
        number = each["shards"][0]
        assert each["environ"] == each["shards"] == [number, ranks]
        assert each["drop_in"] in (None, [number, ranks, number, ranks])
        assert each["new"] == (number == victim)
        assert each["metrics"] == ({"ranks_lost": 0, "ranks_replaced": 0} if each["new"] else {"ranks_lost": 1, "ranks_replaced": 1})  # fmt: skip  # noqa: E501
        assert each["frozen"] == 0.0, "what is not averaged is that of the first rank"
    assert sorted(each["shards"][0] for each in ended) == list(range(ranks))
    [joined] = [each["joined"] for each in ended if each["new"]]
    assert joined["steps"] >= 15
    assert joined["adam_steps"] >= joined["steps"], "its optimizer goes on where that of the first rank is"
    assert re.search(rf"WARNING rank {victim} is back, in another process; there are {ranks} ranks", outcome.errors)
    assert f"shadowrun: lost ranks: {victim}; {ranks} came to their end" in outcome.errors


@pytest.mark.usefixtures("several_hosts")
def test_a_rank_of_one_of_several_hosts_is_replaced_on_another(tmp_path: Path) -> None:
    """Spares are on the last host."""
    words = ("--emulated", "2")
    outcome = run(4, 1, tmp_path, *words, hosts=2, faults={"0": 15}, replaced=1, width=50_000)
    ended = require_ends(outcome, 4, new=1)
    assert [each["shards"] for each in ended if each["new"]] == [[0, 4]]


def test_several_are_replaced_even_the_one_that_took_another_in(tmp_path: Path) -> None:
    """Rank 0 is lost first; rank 1, the first one then, is lost while its replacement starts, or later."""
    outcome = run(3, 2, tmp_path, "--strict", faults={"0": 10, "1": 30}, replaced=2)
    ended = require_ends(outcome, 3, new=2, code=LOST_CODE)
    assert sorted(each["shards"][0] for each in ended) == [0, 1, 2]


def test_all_but_one_are_lost_and_one_is_replaced(tmp_path: Path) -> None:
    outcome = run(3, 1, tmp_path, faults={"0": 10, "2": 12}, replaced=1)
    require_ends(outcome, 2, new=1)
    assert "shadowrun: lost ranks: 0, 2; 2 came to their end" in outcome.errors


@pytest.mark.parametrize("fault", ["before", "exception", 1, 7])
def test_a_replacement_that_dies_is_replaced(fault: object, tmp_path: Path) -> None:
    """Process 3 is the first spare, 4 the second."""
    joins = isinstance(fault, int)
    outcome = run(3, 2, tmp_path, faults={"1": 15}, new_faults={"3": fault}, lost=1 + joins, replaced=1 + joins)
    require_ends(outcome, 3, new=1)
    assert len(outcome.events("starts")) == 2
    if fault == "exception":
        assert "RuntimeError: a broken file on this host" in outcome.errors


def test_the_job_goes_on_where_no_spare_is_left(tmp_path: Path) -> None:
    outcome = run(3, 1, tmp_path, faults={"1": 15}, new_faults={"3": 5}, lost=2, replaced=1)
    require_ends(outcome, 2, new=0)


def test_a_job_that_ends_while_a_replacement_starts(tmp_path: Path) -> None:
    """It would start for ever."""
    outcome = run(3, 1, tmp_path, faults={"1": 15}, new_faults={"3": "starts"}, awaits="starts")
    require_ends(outcome, 2, new=0)
    assert "the spare process for rank 1 ends: the job was over before it had joined" in outcome.errors


def test_a_replacement_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """And the next one is called."""
    faults: dict[str, Any] = {"faults": {"1": 15}, "new_faults": {"3": "starts"}}
    outcome = run(3, 2, tmp_path, **faults, awaits="starts", gives_up=True, replaced=1)
    require_ends(outcome, 3, new=1)
    assert len(re.findall("the spare process for rank 1 on .* is given up", outcome.errors)) == 1
    assert "the spare process for rank 1 ends: the others have given it up" in outcome.errors


def test_the_others_train_on_where_a_replacement_is_stopped_that_was_ready(tmp_path: Path) -> None:
    """They do not wait for it, not even at the end."""
    outcome = run(3, 1, tmp_path, faults={"1": 15}, new_faults={"3": "ready"}, awaits="stops")
    require_ends(outcome, 2, new=0)
    assert "shadowrun: mpirun waits for a spare process that does not end" in outcome.errors


def test_a_replacement_that_is_stopped_while_it_is_taken_in_is_given_up(tmp_path: Path) -> None:
    outcome = run(3, 2, tmp_path, faults={"1": 15}, new_faults={"3": "answered"}, replaced=1)
    require_ends(outcome, 3, new=1)
    assert len(re.findall("the spare process for rank 1 on .* is given up", outcome.errors)) == 1


def test_spares_that_nobody_needs(tmp_path: Path) -> None:
    outcome = run(2, 2, tmp_path)
    require_ends(outcome, 2, new=0)
    assert "lost" not in outcome.errors


def test_all_ranks_are_lost(tmp_path: Path) -> None:
    """Spares alone are no job: nobody is left that has the weights."""
    outcome = run(2, 1, tmp_path, faults={"0": 15, "1": 15}, new_faults={"2": "starts"})
    assert outcome.code == 1, outcome.text
    assert outcome.events("ended") == []


def test_a_replacement_reads_where_the_job_is_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Its weights are the others'; the first of those that were there all along goes on writing checkpoints."""
    outcome = run(3, 1, tmp_path, faults={"0": 35}, replaced=1, checkpoints=str(tmp_path / "checkpoints"))
    ended = require_ends(outcome, 3, new=1)
    assert {each["loaded"] is not None for each in ended if each["new"]} == {True}
    assert {each["loaded"] for each in ended if not each["new"]} == {None}
    assert len({each["saved"] for each in ended}) == 1
    assert Path(ended[0]["saved"], "manifest.json").is_file()
