"""Emulated hosts that stay: from up to down, and what is left when something is killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import find_mpi, is_running

from hvd_shadowsync.emulated import Network, cluster
from hvd_shadowsync.emulated.__main__ import main
from hvd_shadowsync.launcher.command import LaunchError

SCRIPT = Path(__file__).parents[2] / "launch" / "emulated-cluster"
TIMEOUT_S = 90


def environment(temporary: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "TMPDIR": str(temporary)}


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Have two hosts up, which this test's own file tells of."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        cluster.up(Network(2, "100mbit"))
    except LaunchError as error:
        pytest.skip(str(error))
    yield environment(tmp_path)
    cluster.down()


Given = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def given(capfd: pytest.CaptureFixture[str]) -> Given:
    """Run the command in this process; return its exit code, the lines that it printed, sorted, and its errors."""

    def run(*arguments: str) -> tuple[int, list[str], str]:
        capfd.readouterr()
        code = main(arguments)
        said = capfd.readouterr()
        return code, sorted(said.out.splitlines()), said.err

    return run


def state(environ: dict[str, str]) -> list[Path]:
    return sorted(Path(environ["TMPDIR"]).glob("*.json"))


def devices() -> str:
    return subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True, timeout=10).stdout


def sleeping(environ: dict[str, str], seconds: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a command that sleeps on the first host; return it, and the pids of all processes of it."""
    command = [str(SCRIPT), "run", "2", "--first", "sh", "-c", f"echo up; sleep {seconds}; true"]
    job = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n", job.communicate()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and seconds.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    assert len(found) >= 3
    return job, found


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(is_running(pid) for pid in pids)


def test_from_up_to_down(environ: dict[str, str], given: Given) -> None:
    before = devices()
    (file,) = state(environ)
    held = json.loads(file.read_text())
    refused = {
        ("up", "2"): "hosts are up already (2); take them away with `down` first",
        ("run", "3", "hostname"): "run 3: give 1 to 2, the number of hosts that are up",
        ("run", "1", "--first", "no-such-command"): "no-such-command does not start (No such file or directory); check "
        "its name, or give its path",
    }
    for arguments, message in refused.items():
        assert given(*arguments) == (2, [], f"emulated: {message}\n")
    each = given("run", "2", "--each", "sh", "-c", "echo $(hostname) $RANK $WORLD_SIZE")
    assert each == (0, ["10.77.0.1 0 2", "10.77.0.2 1 2"], "")
    first = given("run", "2", "--first", "sh", "-c", "hostname; /proc/1/fd/200 10.77.0.2 hostname; exit 3")
    assert first == (3, ["10.77.0.1", "10.77.0.2"], "")
    assert given("down") == (0, ["the hosts are gone"], "")
    assert state(environ) == []
    assert all_end([held["holder"], held["first"]])
    assert given("down") == (0, ["no hosts were up"], "")
    assert given("run", "2", "hostname") == (2, [], "emulated: no hosts are up; make some with `up N`\n")
    assert devices() == before


CALL = """import socket
def is_there():
    try:
        socket.create_connection(("10.77.0.2", 9), timeout=1)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
"""
SAYS = CALL + "print(is_there())"
WAITS = CALL + "while is_there(): pass\nprint('away', flush=True)\nwhile not is_there(): pass\nprint('back')"


def test_a_link_is_cut_and_made_whole(environ: dict[str, str], given: Given) -> None:
    def is_there() -> bool:
        code, said, errors = given("run", "2", "--first", sys.executable, "-c", SAYS)
        assert (code, errors) == (0, "")
        return said == ["True"]

    assert is_there()
    assert given("cut", "host2") == (0, [], "")
    assert not is_there()
    assert given("mend", "host2") == (0, [], "")
    assert is_there()
    begun = time.monotonic()
    assert given("cut", "host1", "0.5") == (0, [], "")
    assert time.monotonic() - begun >= 0.5
    assert is_there()
    assert given("cut", "host3")[2] == "emulated: cut host3: there is no host3; give host1 to host2\n"


def test_a_link_is_cut_while_a_command_runs(given: Given) -> None:
    code, said, errors = given("--hosts", "2", "--cut", "host2@1+8", sys.executable, "-c", WAITS)
    if code == 2:
        pytest.skip(errors)
    assert said == ["away", "back"]


def test_a_rank_on_each_host(environ: dict[str, str], given: Given, tmp_path: Path) -> None:
    if find_mpi().kind != "openmpi":
        pytest.skip("needs Open MPI")
    script = tmp_path / "names.py"
    script.write_text("import socket\nfrom mpi4py import MPI\nprint(MPI.COMM_WORLD.rank, socket.gethostname())\n")
    for ranks in (2, 1):
        code, names, errors = given("run", str(ranks), sys.executable, str(script))
        assert code == 0, errors
        assert names == [f"{rank} 10.77.0.{rank + 1}" for rank in range(ranks)]


def test_a_job_that_is_killed_leaves_the_hosts_alone(environ: dict[str, str], given: Given) -> None:
    job, pids = sleeping(environ, "998.25")
    job.kill()
    job.communicate(timeout=TIMEOUT_S)
    assert all_end(pids)
    assert given("run", "1", "--first", "hostname") == (0, ["10.77.0.1"], "")


def test_a_job_that_is_interrupted_ends_with_its_signal(environ: dict[str, str]) -> None:
    job, pids = sleeping(environ, "998.5")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 128 + signal.SIGTERM
    assert all_end(pids)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_holder_is_killed_nothing_is_left(kind: signal.Signals, environ: dict[str, str], given: Given) -> None:
    before = devices()
    (file,) = state(environ)
    held = json.loads(file.read_text())
    job, pids = sleeping(environ, "998.75")
    os.kill(held["holder"], kind)
    job.communicate(timeout=TIMEOUT_S)
    assert job.returncode != 0
    assert all_end([*pids, held["holder"], held["first"]])
    assert devices() == before
    assert given("run", "1", "--first", "hostname")[0] == 2
    assert state(environ) == []
    assert given("up", "1") == (0, ["up: 10.77.0.1"], "")


def test_hosts_of_somebody_else_than_root(tmp_path: Path) -> None:
    as_user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*as_user, "true"], check=False, capture_output=True, timeout=10).returncode:
        pytest.skip("this system has no user namespaces")
    environ = environment(tmp_path)
    script = f"{SCRIPT} up 2 && {SCRIPT} run 2 --each hostname; {SCRIPT} down"
    command = [*as_user, "sh", "-c", script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert sorted(done.stdout.splitlines()) == [
        "10.77.0.1",
        "10.77.0.2",
        "the hosts are gone",
        "up: 10.77.0.1, 10.77.0.2",
    ]
    assert done.stderr == ""


def test_the_script_says_what_it_takes() -> None:
    away, told = (
        subprocess.run([str(SCRIPT), word], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        for word in ("away", "--help")
    )
    assert away.stderr == "launch/emulated-cluster: unknown word 'away' (known: up, run, cut, mend, down, --help)\n"
    assert (away.returncode, told.returncode) == (2, 0)
    assert "run 2 COMMAND" in told.stdout
