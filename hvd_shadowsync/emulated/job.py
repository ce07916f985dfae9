"""A command on emulated hosts: once on the first of them, or once on each with what PyTorch's `env://` asks for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hvd_shadowsync.emulated import delay
from hvd_shadowsync.emulated.namespaces import (
    HostPlace,
    end_with_parent,
    exit_code,
    forked,
    ignore_signals,
    leave_all,
    make_host,
    mount_own,
    pass_on,
    places,
    waited_for,
)
from hvd_shadowsync.emulated.network import OPTIONS, Cut, Network, commands, link_commands
from hvd_shadowsync.launcher.command import FORWARDED_SIGNALS, LaunchError

VARIABLE = "SHADOW_EMULATED"
AGENT_DESCRIPTOR = 200
AGENT = f"/proc/1/fd/{AGENT_DESCRIPTOR}"
TEMPORARY_DESCRIPTOR = 201
TEMPORARY = f"/proc/1/fd/{TEMPORARY_DESCRIPTOR}"
"""A file system in memory: Open MPI's files carry process ids there, which are the same for every job in here."""
AGENT_SCRIPT = f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
for place in $(echo "${VARIABLE}" | tr , ' '); do
  [ "${{place%%=*}}" = "$host" ] || continue
  net=${{place#*=}}
  exec nsenter --net=/proc/1/fd/$net --uts=/proc/1/fd/$((net + 1)) /bin/sh -c "$*"
done
echo "there is no host $host here: ${VARIABLE}" >&2
exit 2
"""
"""Without Python, which would take a second for each host."""
MASTER_PORT = "29500"
GRACE_S = 5


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        command: a program and its arguments.
        environ: its environment variables.
        hosts: how many hosts there are for it.
        each: once on each of them, instead of once on the first.
    """

    command: Sequence[str]
    environ: Mapping[str, str]
    hosts: int
    each: bool = False

    def processes(self, address: Callable[[int], str]) -> list[dict[str, str]]:
        """Return the environment variables of each process, in the order of the hosts (pure)."""
        listed = ",".join(f"{address(host)}={place.net}" for host, place in enumerate(places(self.hosts)))
        common = {**self.environ, "TMPDIR": TEMPORARY, VARIABLE: listed}
        if not self.each:
            return [common]
        common = {"MASTER_PORT": MASTER_PORT, **common, "MASTER_ADDR": address(0), "WORLD_SIZE": str(self.hosts)}
        common |= {"GLOO_SOCKET_IFNAME": "eth0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return [{**common, "RANK": str(rank)} for rank in range(self.hosts)]


def wrapped(network: Network, command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` on the first of the hosts (pure)."""
    links = [f"--{name.replace('_', '-')}={getattr(network, name)}" for name in OPTIONS]
    return [sys.executable, "-m", "hvd_shadowsync.emulated", f"--hosts={network.hosts}", *links, "--", *command]


def run(network: Network, command: Sequence[str], environ: Mapping[str, str], *, each: bool = False) -> int:
    """Run `command` on the first of the hosts, or on each; return its exit code, 128 + the signal where that ended it.

    Of several processes, it is that of the first that fails, at which the others are ended. Only in the main thread,
    whose signals it passes on.

    Raises:
        LaunchError: this machine cannot have such hosts; says what it lacks.
    """
    require_tools()
    job = Job(command, environ, network.hosts, each)

    def first(told: int) -> int:
        signals = Signals()
        end_with_parent()
        mount_own(TEMPORARY_DESCRIPTOR)
        lines = build(network)
        for each in network.cuts:
            _cut_in_time(network, each)
        return run_job(job, network, lines, told, signals)

    def outside(told: int) -> int:
        end_with_parent()
        leave_all()
        return waited_for(telling(first, told))

    return told_by(outside)


def require_tools() -> None:
    """Raise unless this machine has what emulated hosts need."""
    if not sys.platform.startswith("linux"):
        raise LaunchError("emulated hosts are Linux namespaces; use a Linux machine, or real hosts")
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            raise LaunchError(f"emulated hosts need {tool}; install it (Debian, Ubuntu: apt-get install {package})")


def told_by(body: Callable[[int], int]) -> int:
    """Run `body` in a process of its own and return its exit code; what it writes to the descriptor that it is given is
    why it failed, and it closes that once it has not.

    Raises:
        LaunchError: it wrote something.
    """
    ready, told = os.pipe()
    child = telling(body, told)
    previous = {each: signal.signal(each, lambda number, _: pass_on(child, number)) for each in FORWARDED_SIGNALS}
    try:
        with os.fdopen(ready, encoding="utf-8") as said:
            failure = said.read()
        code = waited_for(child)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    if failure:
        raise LaunchError(failure)
    return code


def telling(body: Callable[[int], int], told: int) -> int:
    """Return the pid of a process that runs `body`, and tells why where it raises; `told` is closed here."""

    def guarded() -> int:
        try:
            return body(told)
        except (LaunchError, OSError, subprocess.SubprocessError) as error:
            os.write(told, why_not(error).encode())
            return 2

    pid = forked(guarded)
    os.close(told)
    return pid


def why_not(error: BaseException) -> str:
    """Return what to tell of an error."""
    if isinstance(error, LaunchError):
        return str(error)
    return f"emulated hosts cannot be made here ({error}); be root, or allow user namespaces"


# --- in the process with the first id ---------------------------------------------------------------------------------


def build(network: Network) -> dict[int, str]:
    """Make the hosts at their places, and what joins them; return the delay lines: the host by pid."""
    kept = places(network.hosts)
    pids = [make_host(network.address(host), place) for host, place in enumerate(kept)]
    netem = not network.is_disturbed or _has_netem()
    if not netem:
        delay.load()
    for line in commands(network, pids, netem=netem):
        done = _done(line)
        if done.returncode:
            said = f"{' '.join(line)}: {done.stderr.strip()}"
            denied = re.search("permitted|denied", said)
            raise OSError(said) if denied else LaunchError(f"emulated hosts cannot be made here ({said})")
    return {} if netem else delay.start(network)


def set_link(network: Network, link: str, *, whole: bool) -> None:
    """Cut a link, or make it whole again; in the network of the first process.

    Raises:
        LaunchError: it does not work; says what did not.
    """
    for line in link_commands(network, link, whole=whole):
        done = _done(line)
        if done.returncode:
            raise LaunchError(f"the link of {link} cannot be changed ({' '.join(line)}: {done.stderr.strip()})")


def _cut_in_time(network: Network, cut: Cut) -> None:
    def body() -> int:
        ignore_signals()
        time.sleep(cut.start_s)
        set_link(network, cut.link, whole=False)
        _say(f"the link of {cut.link} is cut, {cut.start_s:g} s after the hosts were there")
        if cut.seconds is not None:
            time.sleep(cut.seconds)
            set_link(network, cut.link, whole=True)
            _say(f"the link of {cut.link} is whole again")
        return 0

    forked(body)


def _say(what: str) -> None:
    os.write(2, f"hvd_shadowsync.emulated: {what}\n".encode())


def _has_netem() -> bool:
    has = _done(["tc", "qdisc", "add", "dev", "lo", "root", "netem"]).returncode == 0
    if has:
        _done(["tc", "qdisc", "delete", "dev", "lo", "root"])
    return has


def _done(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Signals:
    """What this process gets, for the job's processes; kept until they are there.

    The first process of a namespace gets only those that it handles: others are lost.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._processes: Sequence[subprocess.Popen[Any]] | None = None
        for each in FORWARDED_SIGNALS:
            signal.signal(each, self._note)

    def pass_to(self, processes: Sequence[subprocess.Popen[Any]]) -> None:
        """Pass on what has come, and what comes."""
        self._processes = processes
        for number in self._received:
            _signal(processes, number)

    def _note(self, number: int, _: object) -> None:
        if self._processes is None:
            self._received.append(number)
        else:
            _signal(self._processes, number)


def run_job(job: Job, network: Network, lines: Mapping[int, str], told: int, signals: Signals) -> int:
    """Start the job's processes, close `told`, and return the exit code; all processes in here end with this one."""
    _offer_agent()
    kept = places(job.hosts)
    started = [
        _start(job.command, environ, place)
        for environ, place in zip(job.processes(network.address), kept, strict=False)
    ]
    os.close(told)
    signals.pass_to(started)
    return _ended(started, lines)


def _offer_agent() -> None:
    agent = os.memfd_create("agent", 0)
    os.write(agent, AGENT_SCRIPT.encode())
    os.fchmod(agent, 0o755)
    os.dup2(os.open(f"/proc/self/fd/{agent}", os.O_RDONLY), AGENT_DESCRIPTOR)  # nobody has it open for writing then
    os.close(agent)


def _start(command: Sequence[str], environ: Mapping[str, str], place: HostPlace) -> subprocess.Popen[Any]:
    try:
        return subprocess.Popen(command, env=environ, preexec_fn=place.join, start_new_session=True)
    except OSError as error:
        raise LaunchError(f"{command[0]} does not start ({error.strerror}); check its name, or give its path") from None


def _signal(processes: Sequence[subprocess.Popen[Any]], number: int) -> None:
    for process in processes:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _ended(processes: Sequence[subprocess.Popen[Any]], lines: Mapping[int, str]) -> int:
    """Wait for all processes, or for one that fails: its exit code, once the others have had time to end."""
    running, first_failure = {process.pid: process for process in processes}, 0
    while running:
        pid, status = os.wait()  # also for those whose parents end, which become this process's children
        if pid in lines:
            print(f"emulated: the delay line of {lines[pid]} has ended, and the job with it", file=sys.stderr)
            return 2
        if pid not in running:
            continue
        ended = running.pop(pid)
        ended.returncode = exit_code(status)
        if ended.returncode and not first_failure:
            first_failure = ended.returncode
            _end_soon(processes, first_failure)
    return first_failure


def _end_soon(processes: Sequence[subprocess.Popen[Any]], code: int) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
    signal.alarm(GRACE_S)
    _signal(processes, signal.SIGTERM)
