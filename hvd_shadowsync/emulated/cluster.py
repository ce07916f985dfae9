"""Emulated hosts that stay: made by `up`, used by one `run` after the other, taken away by `down`.

A holder, a process that nothing else waits for, has made them as for one job, and all of it ends with that. A file says
which process that is; one of a holder that is gone counts as none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hvd_shadowsync import run as shadowrun
from hvd_shadowsync.emulated import job
from hvd_shadowsync.emulated.namespaces import (
    NEW_MOUNTS,
    NEW_PIDS,
    call,
    end_with_parent,
    forked,
    ignore_signals,
    join_hosts,
    leave_all,
    mount_own,
    waited_for,
)
from hvd_shadowsync.emulated.network import Network
from hvd_shadowsync.launcher import finding
from hvd_shadowsync.launcher.command import THREAD_VARIABLES, LaunchError

GONE_S = 10.0


@dataclass(frozen=True)
class Cluster:
    """Hosts that are up.

    Attributes:
        holder: the process to end.
        first: its child, the first process of the hosts.
        begun: when the two began, in ticks of the kernel: another process of the same id began later.
        network: see `Network`.
    """

    holder: int
    first: int
    begun: tuple[int, int]
    network: Network

    @property
    def is_up(self) -> bool:
        """Whether both processes are still those."""
        return (_begun(self.holder), _begun(self.first)) == self.begun


def state_file() -> Path:
    """Return where it is written which hosts this user has up."""
    return Path(tempfile.gettempdir()) / f"hvd_shadowsync-emulated-{os.geteuid()}.json"


def find() -> Cluster | None:
    """Return the hosts that are up; what is written of others is removed.

    Raises:
        LaunchError: the file belongs to somebody else, or is none.
    """
    file = state_file()
    try:
        with open(file, "rb", opener=_open_own) as opened:
            if os.fstat(opened.fileno()).st_uid != os.geteuid():
                raise LaunchError(f"{file} belongs to somebody else; remove it, or set TMPDIR to a folder of your own")
            text = opened.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LaunchError(f"{file} cannot be read ({error.strerror}); remove it") from error
    with contextlib.suppress(ValueError, TypeError, KeyError):
        held = json.loads(text)  # bytes: what is no text is no state either
        found = Cluster(held["holder"], held["first"], tuple(held["begun"]), Network(**held["network"]))
        if found.is_up:
            return found
    file.unlink(missing_ok=True)
    return None


def _open_own(path: str, flags: int) -> int:
    """Open a file where others may write, too: no link, no pipe to wait at, and nothing for others to read or write."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def up(network: Network) -> Cluster:
    """Make hosts that stay.

    Raises:
        LaunchError: some are up already, or this machine cannot have them.
    """
    job.require_tools()
    if network.cut:
        raise LaunchError(
            f"--cut {network.cut} is for one command; cut links of hosts that stay with `cut LINK SECONDS`"
        )
    if (found := find()) is not None:
        raise LaunchError(f"hosts are up already ({found.network.hosts}); take them away with `down` first")
    ready, told = os.pipe()
    holder = forked(lambda: _hold(network, told), keep=[told])
    os.close(told)
    try:
        with os.fdopen(ready, encoding="utf-8") as said:
            first, _, failure = said.read().partition("\n")
        if failure or not first:
            raise LaunchError(failure or "emulated hosts cannot be made here; the lines above say why")
        made = Cluster(holder, int(first), (_begun(holder), _begun(int(first))), network)
        _write(made)
        return made
    except BaseException:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        raise


def _write(cluster: Cluster) -> None:
    try:
        with open(state_file(), "x", encoding="utf-8", opener=_open_own) as file:
            json.dump(asdict(cluster), file)
    except OSError as error:
        raise LaunchError(f"{state_file()} cannot be written ({error.strerror}); is another `up` running?") from error


def _hold(network: Network, told: int) -> int:
    """Be the holder: tell the pid of the first process, a newline, and why there are no hosts, or nothing."""
    os.setsid()
    ignored = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(ignored, descriptor)
    os.chdir("/")
    end_with_parent()
    try:
        leave_all()
    except OSError as error:
        os.write(told, f"\n{job.why_not(error)}".encode())
        return 2
    ready, told_inside = os.pipe()

    def first(told_inside: int) -> int:
        os.close(told)
        return _keep(network, told_inside)

    pid = job.telling(first, told_inside)
    with os.fdopen(ready, encoding="utf-8") as said:
        failure = said.read()
    end_with_parent(False)
    os.write(told, f"{pid}\n{failure}".encode())
    os.close(told)
    os.waitpid(pid, 0)
    return 2


def _keep(network: Network, told: int) -> int:
    """Be the first process: make the hosts, close `told`, and end only when a delay line does."""
    end_with_parent()
    ignore_signals()
    mount_own(job.TEMPORARY_DESCRIPTOR)
    lines = job.build(network)
    os.close(told)
    while os.wait()[0] not in lines:
        pass
    return 2


def _found() -> Cluster:
    if (cluster := find()) is None:
        raise LaunchError("no hosts are up; make some with `up N`")
    return cluster


def cut(link: str, seconds: float | None = None) -> None:
    """Cut a link of the hosts that are up; return at once, or after so many seconds, when it is whole again.

    Raises:
        LaunchError: no hosts are up, or they have no such link.
    """
    if seconds is not None and not 0 < seconds < math.inf:
        raise LaunchError(
            f"cut {link} {seconds:g}: give more than 0 seconds, or leave them out and `mend {link}` later"
        )
    _set_link(link, "cut", whole=False)
    if seconds is not None:
        try:
            time.sleep(seconds)
        finally:
            _set_link(link, "mend", whole=True)


def mend(link: str) -> None:
    """Make a link that was cut whole again.

    Raises:
        LaunchError: no hosts are up, or they have no such link.
    """
    _set_link(link, "mend", whole=True)


def _set_link(link: str, verb: str, *, whole: bool) -> None:
    cluster = _found()
    cluster.network.require_link(link, f"{verb} {link}")

    def body(told: int) -> int:
        join_hosts(cluster.first, cluster.network.hosts)
        job.set_link(cluster.network, link, whole=whole)
        os.close(told)
        return 0

    job.told_by(body)


def run(num_hosts: int, command: Sequence[str], environ: Mapping[str, str], *, how: str = "mpi") -> int:
    """Run a command on the hosts that are up; return its exit code.

    Args:
        num_hosts: how many of them to use, the first ones.
        command: a program and its arguments.
        environ: its environment variables.
        how: "mpi": by shadowrun, one rank on each host; "fault-tolerant": the same by `shadowrun --fault-tolerant`;
            "each": once on each host (see `job.run`); "first": once, on the first host.

    Raises:
        LaunchError: there are not so many, or the command does not start.
    """
    job.require_tools()
    cluster = _found()
    if not 1 <= num_hosts <= cluster.network.hosts:
        raise LaunchError(f"run {num_hosts}: give 1 to {cluster.network.hosts}, the number of hosts that are up")
    if how in ("mpi", "fault-tolerant"):
        command = _ranks(cluster.network, num_hosts, command, environ, outlive=how == "fault-tolerant")
    wanted = job.Job(command, environ, num_hosts, each=how == "each")

    def first(told: int) -> int:
        signals = job.Signals()
        end_with_parent()
        mount_own(job.TEMPORARY_DESCRIPTOR)
        return job.run_job(wanted, cluster.network, {}, told, signals)

    def inside(told: int) -> int:  # so that the job's processes end with the hosts as well
        end_with_parent()
        call("unshare", NEW_MOUNTS | NEW_PIDS)
        return waited_for(job.telling(first, told))

    def outside(told: int) -> int:
        end_with_parent()
        join_hosts(cluster.first, cluster.network.hosts)
        return waited_for(job.telling(inside, told))

    return job.told_by(outside)


def _ranks(
    network: Network, num_hosts: int, command: Sequence[str], environ: Mapping[str, str], *, outlive: bool
) -> list[str]:
    """Return what starts a rank of `command` on each host, from the first one."""
    mpi = finding.detect_mpi(environ)
    if mpi.kind != "openmpi":
        raise LaunchError(f"run needs Open MPI, {mpi.mpirun} is of {mpi.kind}; see SHADOWRUN_MPIRUN")
    hosts = ",".join(f"{host.name}:1" for host in network.as_hosts()[:num_hosts])
    threads = max(1, shadowrun.this_machine(environ).cores // num_hosts)
    start = [sys.executable, "-m", "hvd_shadowsync.run", *(["--fault-tolerant"] if outlive else [])]
    start += ["-np", str(num_hosts), "--hosts", hosts, f"--mpirun-args={shlex.join(shadowrun.MPI_ON_EMULATED)}"]
    if not any(name in environ for name in THREAD_VARIABLES):
        start += ["--threads", str(threads)]
    return [*start, "--", *command]


def down() -> bool:
    """Take the hosts away, and what runs on them; return whether there were any.

    Raises:
        LaunchError: they do not end.
    """
    cluster = find()
    if cluster is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(cluster.holder, signal.SIGKILL)
    deadline = time.monotonic() + GONE_S
    while _begun(cluster.first) == cluster.begun[1]:
        if time.monotonic() > deadline:
            raise LaunchError(f"process {cluster.first} does not end; see what holds it")
        time.sleep(0.01)
    state_file().unlink(missing_ok=True)
    return True


def _begun(pid: int) -> int:
    """Return when a process began, in ticks of the kernel; -1 where there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
