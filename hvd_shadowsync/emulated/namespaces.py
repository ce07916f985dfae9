"""Namespaces of Linux: made, joined, mounted in; and processes that end with their parents."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvd_shadowsync.launcher.command import FORWARDED_SIGNALS

NEW_MOUNTS, NEW_UTS, NEW_USER, NEW_PIDS, NEW_NET = 1 << 17, 1 << 26, 1 << 28, 1 << 29, 1 << 30
MS_REC_PRIVATE = (1 << 14) | (1 << 18)
PR_SET_PDEATHSIG = 1
FSOPEN, FSCONFIG, FSMOUNT, FSCONFIG_CMD_CREATE = 430, 431, 432, 6
HOST_DESCRIPTOR = 210
"""Of the first host's network; its name follows, then the next host's."""


@dataclass(frozen=True)
class HostPlace:
    """Where a host is: descriptors of its network's and its name's namespace, of the process with the first id too."""

    net: int
    uts: int

    def join(self) -> None:
        """Move this process there."""
        call("setns", self.net, NEW_NET)
        call("setns", self.uts, NEW_UTS)


def places(hosts: int) -> list[HostPlace]:
    """Return where so many hosts are, in a process with the first id."""
    return [HostPlace(HOST_DESCRIPTOR + 2 * host, HOST_DESCRIPTOR + 2 * host + 1) for host in range(hosts)]


def make_host(name: str, place: HostPlace) -> int:
    """Make a host: a process that does nothing, in a network of its own; keep it at `place` and return its pid."""
    ready, told = os.pipe()

    def body() -> int:
        ignore_signals()
        call("unshare", NEW_NET | NEW_UTS)
        socket.sethostname(name)
        os.write(told, b"1")
        os.close(told)
        while True:
            signal.pause()

    pid = forked(body, keep=[told])
    os.close(told)
    with os.fdopen(ready, "rb") as said:
        if said.read(1) != b"1":
            raise OSError(f"host {name} has no network of its own")
    for kind, descriptor in (("net", place.net), ("uts", place.uts)):
        keep_at(descriptor, f"/proc/{pid}/ns/{kind}")
    return pid


def keep_at(descriptor: int, path: str) -> None:
    """Open a file at a descriptor of a given number."""
    opened = os.open(path, os.O_RDONLY)
    os.dup2(opened, descriptor, inheritable=False)
    os.close(opened)


def leave_all() -> None:
    """Leave this process's namespaces; as somebody else than root, with a user namespace. Its children have new ids."""
    wanted = NEW_MOUNTS | NEW_PIDS | NEW_NET
    if os.geteuid() == 0:
        call("unshare", wanted)
        return
    user, group = os.geteuid(), os.getegid()
    call("unshare", wanted | NEW_USER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def join_hosts(first: int, hosts: int) -> None:
    """Join the user and the network of a first process, for children its process ids, and know its hosts' places."""
    kinds = [("user", NEW_USER), ("net", NEW_NET), ("pid", NEW_PIDS)]
    if os.path.samefile("/proc/self/ns/user", f"/proc/{first}/ns/user"):
        del kinds[0]
    for place in places(hosts):
        keep_at(place.net, f"/proc/{first}/fd/{place.net}")
        keep_at(place.uts, f"/proc/{first}/fd/{place.uts}")
    opened = [(os.open(f"/proc/{first}/ns/{kind}", os.O_RDONLY), flag) for kind, flag in kinds]
    for descriptor, flag in opened:
        call("setns", descriptor, flag)
        os.close(descriptor)


def mount_own(temporary: int) -> None:
    """Have /proc and /dev/shm of one's own, and at a descriptor a file system in memory that nothing else leads to."""
    call("mount", b"none", b"/", None, MS_REC_PRIVATE, None)
    call("mount", b"proc", b"/proc", b"proc", 0, None)
    call("mount", b"none", b"/dev/shm", b"tmpfs", 0, None)
    context = _system_call(FSOPEN, b"tmpfs", 0)
    _system_call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
    mounted = _system_call(FSMOUNT, context, 0, 0)
    os.dup2(mounted, temporary, inheritable=False)
    os.close(mounted)
    os.close(context)


def forked(body: Callable[[], int], keep: Sequence[int] | None = None) -> int:
    """Return the pid of a process that ends with what `body` returns; `keep`: it has no other descriptors above 2."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        if keep is not None:
            limits = [2, *sorted(keep), os.sysconf("SC_OPEN_MAX")]
            for below, above in itertools.pairwise(limits):
                os.closerange(below + 1, above)
        os._exit(body())
    except Exception as error:
        print(f"emulated: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(2)  # whatever happened, this process does not go on as a second copy of its parent


def end_with_parent(wanted: bool = True) -> None:
    """Have this process killed when its parent ends, or no more."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL if wanted else 0, 0, 0, 0)


def ignore_signals() -> None:
    """Leave it to the first process to end this one: a terminal signals all of them at once."""
    for each in FORWARDED_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def pass_on(pid: int, number: int) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def waited_for(child: int) -> int:
    """Pass signals on to a child, and return its exit code."""
    previous = {each: signal.signal(each, lambda number, _: pass_on(child, number)) for each in FORWARDED_SIGNALS}
    try:
        return exit_code(os.waitpid(child, 0)[1])
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def exit_code(status: int) -> int:
    """Return the exit code of a wait status; 128 + the signal where that ended the process."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it returned anything but 0.
    """
    function: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _system_call(number: int, *arguments: object) -> int:
    found: int = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return found
