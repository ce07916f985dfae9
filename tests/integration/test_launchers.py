"""Real jobs: the same script under every launcher, exit codes, signals, and the doctor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvd_shadowsync.launcher import finding
from hvd_shadowsync.launcher.command import LaunchError, Mpi

FOLDER = Path(sys.executable).parent
TIMEOUT_S = 90
SCRIPT = """
import os, sys, threading, time
from pathlib import Path
from mpi4py import MPI
comm = MPI.COMM_WORLD
total = comm.allreduce(comm.rank + 1)
Path(sys.argv[1], f"rank{comm.rank}").write_text(
    f"{comm.size} {total} {len(os.sched_getaffinity(0))} {os.environ.get('OMP_NUM_THREADS')} {os.getpid()}")
comm.Barrier()
mode = sys.argv[2]
if mode == "sleep":
    time.sleep(600)
sys.exit(int(mode) if comm.rank == comm.size - 1 else 0)
"""


@pytest.fixture(scope="module")
def mpi() -> Mpi:
    try:
        return finding.detect_mpi()
    except LaunchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def environ(mpi: Mpi) -> dict[str, str]:
    """An environment in which the launchers are found, whoever the user is."""
    path = os.pathsep.join([str(Path(mpi.mpirun).parent), str(FOLDER), os.environ.get("PATH", os.defpath)])
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "PRTE_", "OMP_"))}
    return {**kept, "PATH": path, **root}


def needs_horovod(mpi: Mpi) -> None:
    if not mpi.known_to_horovod:
        pytest.skip(f"horovodrun does not recognise {mpi.mpirun}")
    try:
        finding.find_horovodrun()
    except LaunchError as error:
        pytest.skip(str(error))


UNBOUND = ["--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]


def launcher(name: str, mpi: Mpi, ranks: int) -> list[str]:
    if "horovod" in name:
        needs_horovod(mpi)
    shadowrun = [sys.executable, "-m", "hvd_shadowsync.run"]
    open_mpi = mpi.kind == "openmpi"
    return {
        "mpirun": [mpi.mpirun, "-np", str(ranks), *(UNBOUND if open_mpi else [])],
        "shadowrun": [*shadowrun, "-np", str(ranks)],
        "shadowrun hosts": [*shadowrun, "-np", str(ranks), "--hosts", f"localhost:{ranks}"],
        "horovodrun": ["horovodrun", "-np", str(ranks), "--mpi", f"--binding-args={' '.join(UNBOUND)}"],
        "shadowrun horovod": [*shadowrun, "-np", str(ranks), "--horovod"],
    }[name]


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(environ: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a session of its own; whatever is left of it is killed afterwards."""
    environ = {**environ, "TMPDIR": str(tmp_path)}  # an mpirun that is killed leaves files under its pid
    started: list[subprocess.Popen[str]] = []

    def begin(command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, env=environ, text=True, start_new_session=True, cwd=tmp_path,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def rank_reports(folder: Path) -> list[list[str]]:
    return [path.read_text().split() for path in sorted(folder.glob("rank*"))]


@pytest.mark.parametrize("name", ["mpirun", "shadowrun", "shadowrun hosts", "horovodrun", "shadowrun horovod"])
def test_one_job_of_several_unbound_ranks(name: str, mpi: Mpi, start: Start, script: Path, tmp_path: Path) -> None:
    process = start([*launcher(name, mpi, 3), sys.executable, str(script), str(tmp_path), "0"])
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    reports = rank_reports(tmp_path)
    cores = len(os.sched_getaffinity(0))
    assert [report[:3] for report in reports] == [["3", "6", str(cores)]] * 3
    if name.startswith("shadowrun"):
        assert {report[3] for report in reports} == {str(max(1, cores // 3))}


LISTENS = """
import os, sys
from mpi4py import MPI
import hvd_shadowsync.comm.mpi as mpi
comm = mpi.world()
comm.allgather_object(None)
files = [open(f"/proc/self/net/{name}").read().splitlines()[1:] for name in ("tcp", "tcp6")]
inodes = {line.split()[9] for lines in files for line in lines if line.split()[3] == "0A"}
fds = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
own = {os.readlink(each) for each in fds if os.path.islink(each)}
print("listens", sum(f"socket:[{inode}]" in own for inode in inodes), flush=True)
comm.allgather_object(None)
comm.free()
"""


def test_ranks_of_one_host_need_no_port(mpi: Mpi, start: Start) -> None:
    if mpi.kind != "openmpi":
        pytest.skip(f"the options are Open MPI's, {mpi.mpirun} is of {mpi.kind}")
    ports = []
    for options in ([], ["--mpirun-args", "--mca pml ob1 --mca btl self,sm"]):
        process = start([*launcher("shadowrun", mpi, 2), *options, sys.executable, "-c", LISTENS])
        output, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, errors
        ports.append(sorted(line for line in output.splitlines() if line.startswith("listens")))
    assert ports[1] == ["listens 0"] * 2
    assert ports[0] != ports[1], "they were looked for where they are"


@pytest.mark.parametrize("name", ["shadowrun", "shadowrun horovod"])
def test_exit_code_of_the_job(name: str, mpi: Mpi, start: Start, script: Path, tmp_path: Path) -> None:
    process = start([*launcher(name, mpi, 2), sys.executable, str(script), str(tmp_path), "7"])
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 7


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["shadowrun", "shadowrun horovod"])
def test_a_signal_ends_all_ranks(
    name: str, kind: signal.Signals, mpi: Mpi, start: Start, script: Path, tmp_path: Path
) -> None:
    process = start([*launcher(name, mpi, 2), sys.executable, str(script), str(tmp_path), "sleep"])
    ranks = wait_for(lambda: [int(report[4]) for report in rank_reports(tmp_path) if len(report) == 5], count=2)
    process.send_signal(kind)
    try:
        process.communicate(timeout=30)
        deadline = time.monotonic() + 10
        while any(is_running(pid) for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        alive = [pid for pid in ranks if is_running(pid)]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
    assert alive == []
    assert process.returncode != 0


def test_dry_run_prints_what_a_shell_can_run(mpi: Mpi, start: Start, script: Path, tmp_path: Path) -> None:
    dry = start([*launcher("shadowrun", mpi, 2), "--dry-run", sys.executable, str(script), str(tmp_path), "0"])
    line, errors = dry.communicate(timeout=TIMEOUT_S)
    assert dry.returncode == 0, errors
    assert rank_reports(tmp_path) == []
    process = start(["sh", "-c", line])
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    assert [report[0] for report in rank_reports(tmp_path)] == ["2", "2"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_doctor_is_content(ranks: int, mpi: Mpi, start: Start) -> None:
    process = start([*launcher("shadowrun", mpi, ranks), sys.executable, "-m", "hvd_shadowsync", "--json"])
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output + errors
    answer = json.loads(output)
    assert answer["ok"] is True
    assert len(answer["facts"]["ranks"]) == ranks
    measured = [each["num_bytes"] for each in answer["facts"]["allreduces"]]
    assert measured == ([] if ranks == 1 else [1 << 20, 16 << 20])
    assert all(each["ms"] > 0 for each in answer["facts"]["allreduces"])


def test_doctor_refuses_a_gloo_launch(mpi: Mpi, start: Start) -> None:
    needs_horovod(mpi)
    process = start(["horovodrun", "-np", "2", "--gloo", sys.executable, "-m", "hvd_shadowsync"])
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert "over Gloo" in output
    assert output.count("training would not work here") == 1, errors


def test_doctor_sees_a_pinned_rank(start: Start) -> None:
    taskset = shutil.which("taskset")
    if taskset is None or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs taskset and two cores")
    core = str(min(os.sched_getaffinity(0)))
    process = start([taskset, "-c", core, sys.executable, "-m", "hvd_shadowsync"])
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "pinned to one core" in output


def test_doctor_without_an_mpi_library(start: Start, environ: dict[str, str]) -> None:
    environ = {**environ, "MPI4PY_MPIABI": "openmpi", "MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
    command = [sys.executable, "-m", "hvd_shadowsync"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 1
    assert "ERROR   MPI" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def wait_for(look: Callable[[], list[int]], *, count: int) -> list[int]:
    deadline = time.monotonic() + TIMEOUT_S
    while len(found := look()) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} ranks came up"
        time.sleep(0.1)
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
