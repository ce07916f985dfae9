"""Several hosts on one machine: network namespaces with links of known rate, latency and loss, made for one command.

The hosts, the switches between them and the command live in namespaces of their own, down to process ids. When the
first process in there ends, by whatever signal, the kernel takes all of it away: nothing is left to be cleaned up, and
the machine's own network is never touched. Temporary files (TMPDIR) and /dev/shm are the job's own as well. Needs
Linux with `ip` and `tc`, and root or user namespaces.

    python -m hvd_shadowsync.emulated --hosts 4 --rate 1gbit --latency 0.2ms [--racks 2 --rack-rate 1gbit] COMMAND...

COMMAND runs on the first host. The others, listed in SHADOW_EMULATED, are reached by `/proc/1/fd/200 HOST COMMAND`,
which takes ssh's place. `shadowrun --emulated 4 ...` starts the ranks of one job on all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from hvd_shadowsync.command import FORWARDED_SIGNALS, Host, LaunchError

SUBNET = "10.77.0"
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
  [ "${{place%%=*}}" = "$host" ] && exec nsenter --target "${{place#*=}}" --net --uts /bin/sh -c "$*"
done
echo "there is no host $host here: ${VARIABLE}" >&2
exit 2
"""
"""Without Python, which would take a second for each host."""
MOST_HOSTS = 64
NEW_MOUNTS, NEW_UTS, NEW_USER, NEW_PIDS, NEW_NET = 1 << 17, 1 << 26, 1 << 28, 1 << 29, 1 << 30
MS_REC_PRIVATE = (1 << 14) | (1 << 18)
PR_SET_PDEATHSIG = 1
FSOPEN, FSCONFIG, FSMOUNT, FSCONFIG_CMD_CREATE = 430, 431, 432, 6
RATE, TIME, SHARE = r"\d+(\.\d+)?[kmg]?bit", r"\d+(\.\d+)?(us|ms|s)", r"\d+(\.\d+)?%"


@dataclass(frozen=True)
class Network:
    """What joins the hosts: a link from each to its rack's switch, and from each switch to the others.

    Attributes:
        hosts: 1 to 64.
        rate: of each host's link in each direction, such as "1gbit".
        latency: of each host's link, one way, such as "0.2ms"; a packet passes two of them. Empty: none added.
        loss: of packets on each host's link, one way, such as "0.1%". Empty: none.
        racks: switches, over which hosts are spread evenly, the first hosts under the first.
        rack_rate: of each switch's link to the others; empty: as fast as it goes.

    Raises:
        LaunchError: an attribute is not what it should be; names it and the remedy.
    """

    hosts: int
    rate: str = "1gbit"
    latency: str = ""
    loss: str = ""
    racks: int = 1
    rack_rate: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= MOST_HOSTS:
            raise LaunchError(f"--emulated {self.hosts}: give 1 to {MOST_HOSTS} hosts")
        if not 1 <= self.racks <= self.hosts:
            raise LaunchError(f"--racks {self.racks}: give 1 to {self.hosts}, the number of hosts")
        for name, pattern, example in (
            ("rate", RATE, "1gbit"), ("latency", TIME, "0.2ms"), ("loss", SHARE, "0.1%"), ("rack_rate", RATE, "1gbit")
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value == "" and name != "rate") and not re.fullmatch(pattern, value):
                raise LaunchError(f"--{name.replace('_', '-')} {value!r} is none; give one such as {example}")

    def as_hosts(self) -> tuple[Host, ...]:
        """Return the hosts as launchers take them, ranks spread evenly."""
        return tuple(Host(self.address(host)) for host in range(self.hosts))

    def address(self, host: int) -> str:
        """Return the address, which is the name as well, of a host, from 0."""
        return f"{SUBNET}.{host + 1}"

    def rack(self, host: int) -> int:
        """Return the rack of a host."""
        return host * self.racks // self.hosts


OPTIONS: dict[str, Any] = {field.name: field.default for field in fields(Network) if field.name != "hosts"}


def wrapped(network: Network, command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` on the first of the hosts (pure)."""
    links = [f"--{name.replace('_', '-')}={getattr(network, name)}" for name in OPTIONS]
    return [sys.executable, "-m", "hvd_shadowsync.emulated", f"--hosts={network.hosts}", *links, "--", *command]


def run(network: Network, command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `command` on the first of the hosts; return its exit code, 128 + the signal where that ended it.

    Only in the main thread, whose signals it passes on.

    Raises:
        LaunchError: this machine cannot have such hosts; says what it lacks.
    """
    require_tools()
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        _become_first(network, command, dict(environ), told)
    os.close(told)
    previous = {each: signal.signal(each, lambda number, _: os.kill(child, number)) for each in FORWARDED_SIGNALS}
    try:
        with os.fdopen(ready, encoding="utf-8") as said:
            failure = said.read()
        _, status = os.waitpid(child, 0)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    if failure:
        raise LaunchError(failure)
    return _exit_code(status)


def require_tools() -> None:
    """Raise unless this machine has what emulated hosts need."""
    if not sys.platform.startswith("linux"):
        raise LaunchError("emulated hosts are Linux namespaces; use a Linux machine, or real hosts")
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            raise LaunchError(f"emulated hosts need {tool}; install it (Debian, Ubuntu: apt-get install {package})")


# --- inside -----------------------------------------------------------------------------------------------------------


def _become_first(network: Network, command: Sequence[str], environ: dict[str, str], told: int) -> NoReturn:
    """Make the namespaces, and in them a process that is their first; pass signals on to it, and end as it ends."""
    try:
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _unshare_all()
        first = os.fork()
        if first == 0:
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os._exit(_as_first(network, command, environ, told))
        os.close(told)
        for each in FORWARDED_SIGNALS:
            signal.signal(each, lambda number, _: os.kill(first, number))
        os._exit(_exit_code(os.waitpid(first, 0)[1]))
    except BaseException as error:
        os.write(told, _why_not(error))
    finally:
        os._exit(2)  # whatever happened, this process does not go on as a second copy of its parent


def _as_first(network: Network, command: Sequence[str], environ: dict[str, str], told: int) -> int:
    """Build the network and run the command; all processes in here end with this one."""
    try:
        _call("mount", b"none", b"/", None, MS_REC_PRIVATE, None)
        _call("mount", b"proc", b"/proc", b"proc", 0, None)
        _call("mount", b"none", b"/dev/shm", b"tmpfs", 0, None)
        _mount_temporary()
        pids = [_host(network.address(host)) for host in range(network.hosts)]
        for line in commands(network, pids):
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode and "netem" in line and "qdisc kind is unknown" in done.stderr:
                raise LaunchError(
                    "this kernel has no netem, which latency and loss need; leave --latency and --loss out"
                )
            if done.returncode:
                raise OSError(f"{' '.join(line)}: {done.stderr.strip()}")
        agent = os.memfd_create("agent", 0)
        os.write(agent, AGENT_SCRIPT.encode())
        os.fchmod(agent, 0o755)
        os.dup2(os.open(f"/proc/self/fd/{agent}", os.O_RDONLY), AGENT_DESCRIPTOR)  # nobody has it open for writing then
        os.close(agent)
        environ["TMPDIR"] = TEMPORARY
        environ[VARIABLE] = ",".join(f"{network.address(host)}={pid}" for host, pid in enumerate(pids))
        job = subprocess.Popen(command, env=environ, preexec_fn=lambda: _join(pids[0]), start_new_session=True)
    except (LaunchError, OSError, subprocess.SubprocessError) as error:
        os.write(told, _why_not(error))
        return 2
    os.close(told)
    for each in FORWARDED_SIGNALS:
        signal.signal(each, lambda number, _: os.killpg(job.pid, number))
    while True:  # whose parents end become this process's children
        pid, status = os.wait()
        if pid == job.pid:
            return _exit_code(status)


def _why_not(error: BaseException) -> bytes:
    if isinstance(error, LaunchError):
        return str(error).encode()
    return f"emulated hosts cannot be made here ({error}); be root, or allow user namespaces".encode()


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def commands(network: Network, pids: Sequence[int]) -> list[list[str]]:
    """Return what builds the network, given a process of each host (pure)."""
    lines = [["ip", "link", "set", "lo", "up"]]
    for rack in range(network.racks):
        lines += [["ip", "link", "add", f"rack{rack}", "type", "bridge"], ["ip", "link", "set", f"rack{rack}", "up"]]
    for rack in range(1, network.racks):
        up, down = f"up{rack}", f"down{rack}"
        lines.append(["ip", "link", "add", up, "type", "veth", "peer", "name", down])
        lines.append(["ip", "link", "set", up, "master", "rack0", "up"])
        lines.append(["ip", "link", "set", down, "master", f"rack{rack}", "up"])
        if network.rack_rate:
            lines += [_shaped(end, network.rack_rate) for end in (up, down)]
    for host, pid in enumerate(pids):
        end, inside = f"host{host}", ["nsenter", "--target", str(pid), "--net"]
        lines.append(["ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", str(pid)])
        lines.append(["ip", "link", "set", end, "master", f"rack{network.rack(host)}", "up"])
        lines.append([*inside, "ip", "addr", "add", f"{network.address(host)}/24", "dev", "eth0"])
        lines += [[*inside, "ip", "link", "set", device, "up"] for device in ("eth0", "lo")]
        lines += [_shaped(end, network.rate), [*inside, *_shaped("eth0", network.rate)]]
        wanted = {"delay": network.latency, "loss": network.loss}
        netem = [word for name, value in wanted.items() if value for word in (name, value)]
        if netem:
            added = ["parent", "1:1", "handle", "10:", "netem", *netem, "limit", "100000"]
            lines += [
                ["tc", "qdisc", "add", "dev", end, *added],
                [*inside, "tc", "qdisc", "add", "dev", "eth0", *added],
            ]
    return lines


def _shaped(device: str, rate: str) -> list[str]:
    shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
    return ["tc", "qdisc", "add", "dev", device, "root", "handle", "1:", *shape]


def _host(name: str) -> int:
    """Make a host: a process that does nothing, in a network of its own; return its pid."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _call("unshare", NEW_NET | NEW_UTS)
            socket.sethostname(name)
            os.write(told, b"1")
            os.close(told)
            while True:
                signal.pause()
        finally:
            os._exit(2)
    os.close(told)
    with os.fdopen(ready, "rb") as said:
        if said.read(1) != b"1":
            raise OSError(f"host {name} has no network of its own")
    return pid


def _mount_temporary() -> None:
    """Have a file system in memory that nothing but this descriptor leads to."""
    context = _system_call(FSOPEN, b"tmpfs", 0)
    _system_call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
    mounted = _system_call(FSMOUNT, context, 0, 0)
    os.dup2(mounted, TEMPORARY_DESCRIPTOR, inheritable=False)
    os.close(mounted)
    os.close(context)


def _unshare_all() -> None:
    """Leave this process's namespaces; as somebody else than root, with a user namespace."""
    wanted = NEW_MOUNTS | NEW_PIDS | NEW_NET
    if os.geteuid() == 0:
        _call("unshare", wanted)
        return
    user, group = os.geteuid(), os.getegid()
    _call("unshare", wanted | NEW_USER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _join(pid: int) -> None:
    for kind, flag in (("net", NEW_NET), ("uts", NEW_UTS)):
        descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        _call("setns", descriptor, flag)
        os.close(descriptor)


def _system_call(number: int, *arguments: object) -> int:
    found: int = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return found


def _call(name: str, *arguments: object) -> None:
    function: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command on emulated hosts."""
    options = parser().parse_args(arguments)
    try:
        command = options.command[1:] if options.command[:1] == ["--"] else options.command
        if not command:
            raise LaunchError("no command given; put it last")
        network = Network(options.hosts, **{name: getattr(options, name) for name in OPTIONS})
        return run(network, command, os.environ)
    except LaunchError as error:
        print(f"emulated: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--hosts", type=int, required=True)
    add_options(result)
    result.add_argument("command", nargs=argparse.REMAINDER)
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the links."""
    add = parser.add_argument
    add("--rate", default=OPTIONS["rate"], help="of each emulated host's link, each way; default 1gbit")
    add(
        "--latency",
        default=OPTIONS["latency"],
        help="of each emulated host's link, one way, such as 0.2ms; default none",
    )
    add("--loss", default=OPTIONS["loss"], help="of packets on each emulated host's link, such as 0.1%%; default none")
    add("--racks", type=int, default=OPTIONS["racks"], help="switches with emulated hosts of their own; default 1")
    add("--rack-rate", default=OPTIONS["rack_rate"], help="of the links between racks; default as fast as it goes")


if __name__ == "__main__":
    sys.exit(main())
