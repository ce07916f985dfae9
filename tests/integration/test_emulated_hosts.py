"""Real jobs on emulated hosts: rates, exit codes, and what is left after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launching import find_mpi, is_running

from hvd_shadowsync import emulated
from hvd_shadowsync.launcher.command import LaunchError

TIMEOUT_S = 90
SENDS = """
import socket, time
from mpi4py import MPI
import numpy
comm, data, best = MPI.COMM_WORLD, numpy.zeros(6_250_000, numpy.uint8), 1e9
for _ in range(6):
    comm.Barrier()
    begun = time.perf_counter()
    comm.Send(data, 1 - comm.rank) if comm.rank == 0 else comm.Recv(data, 1 - comm.rank)
    comm.Barrier()
    best = min(best, time.perf_counter() - begun)
print(f"{comm.rank} {socket.gethostname()} {data.nbytes * 8 / best / 1e6}")
"""
SLEEPS = """
import sys, time
from mpi4py import MPI
print("up", flush=True)
time.sleep(float(sys.argv[1]))
"""

PEERS = """
import os, socket, time
me, peer = (f"10.77.0.{1 + (int(os.environ['RANK']) + add) % 2}" for add in (0, 1))
first = os.environ["RANK"] == "0"
def connected():
    if not first:
        listening = socket.create_server((me, 5000))
        return listening.accept()[0]
    while True:
        try:
            return socket.create_connection((peer, 5000))
        except OSError:  # not listening yet, or the question for its address was lost
            time.sleep(0.02)
stream = connected()
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
"""
ECHOES = f"""{PEERS}
best = 1e9
for _ in range(30):
    begun = time.perf_counter()
    if first:
        stream.send(b"1")
    if stream.recv(1) != b"1":
        break
    if not first:
        stream.send(b"1")
    best = min(best, time.perf_counter() - begun)
if first:
    print(best * 1e3)
"""
DATAGRAMS = f"""{PEERS}
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if first:
    stream.recv(1)
    for number in range(1500):
        datagrams.sendto(b"1" * 100, (peer, 5001))
        if number % 20 == 0:
            time.sleep(0.005)
    time.sleep(0.2)
    stream.send(b"1")
    stream.recv(1)
else:
    datagrams.bind((me, 5001))
    stream.setblocking(False)
    stream.send(b"1")
    datagrams.settimeout(0.1)
    came = 0
    while True:
        try:
            datagrams.recv(200)
            came += 1
        except TimeoutError:
            try:
                stream.recv(1)
                break
            except BlockingIOError:
                pass
    print(came / 1500)
"""
STREAM = f"""{PEERS}
import hashlib, random
data = random.Random(1).randbytes(8_000_000)
def counted():
    names, numbers = [line.split() for line in open("/proc/self/net/snmp") if line.startswith("Tcp:")]
    return dict(zip(names[1:], map(int, numbers[1:])))
if first:
    stream.sendall(data)
    stream.shutdown(socket.SHUT_WR)
    assert stream.recv(1) == b"1"
    print(counted()["RetransSegs"], counted()["OutSegs"])
else:
    got = b"".join(iter(lambda: stream.recv(1 << 20), b""))
    assert got == data
    stream.send(b"1")
"""
GLOO = """
import socket, torch, torch.distributed
torch.distributed.init_process_group("gloo")
values = torch.tensor([1.0 + torch.distributed.get_rank()])
torch.distributed.all_reduce(values)
print(socket.gethostname(), values.item(), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def _possible() -> None:
    try:
        code = emulated.run(emulated.Network(2), [sys.executable, "-c", ""], os.environ)
    except LaunchError as error:
        pytest.skip(str(error))
    assert code == 0


def started(*arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def measured(*arguments: str, enough: Callable[[str], bool]) -> str:
    """Return what comes out; once more, up to twice, where a machine that was busy may have spoilt the measurement."""
    for _ in range(3):
        job = started("hvd_shadowsync.emulated", *arguments)
        output, errors = job.communicate(timeout=TIMEOUT_S)
        assert job.returncode == 0, errors
        if enough(output):
            break
    return output


def require_latency() -> None:
    try:
        emulated.run(emulated.Network(1, latency="1ms"), [sys.executable, "-c", ""], os.environ)
    except LaunchError as error:
        pytest.skip(str(error))


def devices() -> str:
    return subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True, timeout=10).stdout


@pytest.mark.parametrize("more", [[], ["--latency", "1ms"]], ids=["no latency", "latency"])
def test_a_link_has_the_rate_that_was_asked_for(more: list[str], tmp_path: Path) -> None:
    if more:
        require_latency()
    if find_mpi().kind != "openmpi":
        pytest.skip("needs Open MPI")
    script = tmp_path / "sends.py"
    script.write_text(SENDS)
    before = devices()
    job = started("hvd_shadowsync.run", "--emulated", "2", "--rate", "50mbit", *more, "-np", "2", "python", str(script))
    output, errors = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, errors
    found = sorted(line.split() for line in output.splitlines())
    assert [line[:2] for line in found] == [["0", "10.77.0.1"], ["1", "10.77.0.2"]]
    assert all(45 < float(line[2]) < 55 for line in found), output
    assert devices() == before


def test_a_job_after_one_that_was_killed(tmp_path: Path) -> None:
    """What Open MPI leaves behind then is under process ids, which are the same in each job here."""
    if find_mpi().kind != "openmpi":
        pytest.skip("needs Open MPI")
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import sys, time\nfrom mpi4py import MPI\nprint('up', flush=True)\ntime.sleep(float(sys.argv[1]))\n"
    )
    for _ in range(2):
        job = started("hvd_shadowsync.run", "--emulated", "2", "-np", "2", "python", str(script), "999")
        assert job.stdout is not None
        assert job.stdout.readline() == "up\n", job.stderr and job.stderr.read()
        job.kill()
        job.wait(TIMEOUT_S)
    job = started("hvd_shadowsync.run", "--emulated", "2", "-np", "2", "python", str(script), "0")
    assert job.wait(TIMEOUT_S) == 0


def test_round_trips_take_the_latency_of_four_links() -> None:
    require_latency()
    options = ["--hosts", "2", "--latency", "5ms", "--each"]
    found = measured(*options, sys.executable, "-c", ECHOES, enough=lambda output: float(output) < 1.1 * 20)
    assert 0.98 * 20 < float(found) < 1.1 * 20


def test_packets_are_lost_on_both_links() -> None:
    require_latency()
    options = ["--hosts", "2", "--loss", "10%", "--each"]
    found = measured(*options, sys.executable, "-c", DATAGRAMS, enough=lambda output: float(output) > 0.75)
    assert 0.75 < float(found) < 0.87, "0.9 squared, within three and more standard deviations"


def test_a_stream_is_whole_in_spite_of_losses() -> None:
    """Where many packets come at once, those around a lost one have to go on as packets of their own."""
    require_latency()
    options = ["--hosts", "2", "--loss", "1%", "--latency", "0.2ms", "--each"]

    def share(output: str) -> float:
        sent_again, packets = map(int, output.split())
        return sent_again / packets

    found = measured(*options, sys.executable, "-c", STREAM, enough=lambda output: share(output) < 0.06)
    assert 0.005 < share(found) < 0.06, "about 2 %; TCP may send more again than was lost"


def test_a_command_on_each_host_finds_the_others() -> None:
    pytest.importorskip("torch")
    job = started("hvd_shadowsync.emulated", "--hosts", "2", "--each", sys.executable, "-c", GLOO)
    output, errors = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, errors
    assert sorted(output.splitlines()) == ["10.77.0.1 3.0", "10.77.0.2 3.0"]


def test_when_one_of_them_fails_all_end() -> None:
    before = devices()
    command = "[ $RANK = 1 ] && exit 4; exec sleep 999.7"
    job = started("hvd_shadowsync.emulated", "--hosts", "3", "--each", "sh", "-c", command)
    assert job.wait(TIMEOUT_S) == 4
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and b"sleep\x00999.7" in _command(pid)]
    assert devices() == before


def test_the_exit_code_is_that_of_the_command() -> None:
    job = started("hvd_shadowsync.emulated", "--hosts", "1", "sh", "-c", "exit 7")
    assert job.wait(TIMEOUT_S) == 7
    job = started("hvd_shadowsync.emulated", "--hosts", "1", "no-such-command")
    assert job.wait(TIMEOUT_S) == 2
    assert "no-such-command" in job.communicate()[1]


def test_a_job_of_somebody_else_than_root(tmp_path: Path) -> None:
    if find_mpi().kind != "openmpi":
        pytest.skip("needs Open MPI")
    as_user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*as_user, "true"], check=False, capture_output=True, timeout=10).returncode:
        pytest.skip("this system has no user namespaces")
    script = tmp_path / "names.py"
    script.write_text("import socket\nfrom mpi4py import MPI\nprint(MPI.COMM_WORLD.rank, socket.gethostname())\n")
    options = ["--emulated", "2", "-np", "2", "python", str(script)]
    job = started("hvd_shadowsync.run", *options, before=as_user)
    output, errors = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, errors
    assert sorted(output.splitlines()) == ["0 10.77.0.1", "1 10.77.0.2"]


@pytest.mark.parametrize("more", [[], ["--latency", "1ms"]], ids=["no latency", "latency"])
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_leaves_nothing(kind: signal.Signals, more: list[str]) -> None:
    if more:
        require_latency()
    before = devices()
    job = started("hvd_shadowsync.emulated", "--hosts", "2", *more, "sh", "-c", "echo up; exec sleep 999.5")
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and b"999.5" in _command(pid)]
    assert len(pids) >= 2
    job.send_signal(kind)
    job.wait(TIMEOUT_S)
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in pids)
    assert devices() == before
    assert job.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 128 + signal.SIGTERM)


def test_a_signal_that_comes_while_hosts_are_made_ends_the_job() -> None:
    """At any moment of it."""
    for tenths in range(1, 8):
        job = started("hvd_shadowsync.emulated", "--hosts", "3", "sleep", "999.125")
        time.sleep(0.1 * tenths)
        job.send_signal(signal.SIGTERM)
        job.wait(20)
        assert job.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
