"""Runs a launcher until all that it has started has ended, and judges how a job that outlives its ranks did."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from hvd_shadowsync.ending import END_SIGNAL, MARKS, Endings, tell
from hvd_shadowsync.launcher.command import FORWARDED_SIGNALS

GUARD = 'read -r group && { read -r _; kill -s TERM -- "-$group"; sleep 2; kill -s KILL -- "-$group"; }'
"""A shell's program: is told a process group, and ends it when shadowrun is gone, unless that has ended it before."""
HELD_PIECES = 1024
"""So much of the job's stderr, in pieces of up to 64 KiB, is held for whoever reads it late."""
GRACE_S = 10.0
LOST_CODE = 3
BEGINNING_S = 60.0
"""How long ranks may take from MPI_Init to the import of this package, where one is gone that may not have begun."""
OVERDUE_S = 10.0
TERMINATION_S = 2.0
ENDING_S = 30.0
"""How long a job may take to end after a signal that leaves it no time for a last checkpoint; Open MPI's mpirun, which
kills the ranks at once, may itself wait for ever, for ssh say."""
LOOK_S = 0.5
"""After so long at the latest a signal is passed on that has come right before a call that waits, or in a thread."""


def supervise(
    command: Sequence[str],
    environ: Mapping[str, str],
    endings: Endings | None = None,
    received: list[int] | None = None,
    *,
    kills_at_once: bool = False,
) -> int:
    """Run `command` in a session of its own, pass signals on to all of it, and return its exit code when all has ended.

    What ranks say of their ends goes into `endings`, where given, and nowhere else; signals that came are added to
    `received`. The first SIGTERM reaches ranks that make a last checkpoint at `END_SIGNAL` as that, and `command` is
    Open MPI's launcher then.

    horovodrun leaves a shell between itself and mpirun that does not pass signals on: they go to the whole group.
    After a signal the code is that signal's, unless ranks have made a last checkpoint: MPICH's mpirun exits with 0, and
    Open MPI's with 1. What has not ended `ENDING_S` later is killed: after the first SIGTERM only where the launcher
    `kills_at_once`, as others leave ranks the time for what they do then. What is ignored here (nohup) stays so.
    """
    received = [] if received is None else received
    child: subprocess.Popen[bytes] | None = None
    guard: subprocess.Popen[bytes] | None = None
    saves = False
    told_at = math.inf

    def forward(number: int, _: object) -> None:
        received.append(number)
        if child is not None:
            pass_on(child, number)

    def pass_on(child: subprocess.Popen[bytes], number: int) -> None:
        nonlocal saves, told_at
        if received == [signal.SIGTERM] and endings is not None and endings.saves:
            saves = True
            child.send_signal(END_SIGNAL)
        else:
            _signal_group(child.pid, number)
            if number != signal.SIGTERM or kills_at_once or len(received) > 1:
                told_at = min(told_at, time.monotonic())

    wanted = [each for each in FORWARDED_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, forward) for each in wanted}
    try:
        stderr = None if endings is None else subprocess.PIPE
        guard = _guard()
        child = subprocess.Popen(
            command, env=environ, start_new_session=True, stderr=stderr, preexec_fn=partial(_tell_guard, guard)
        )
        for number in list(received):
            pass_on(child, number)
        if endings is not None:
            stderr_of = _Stderr(child, endings)
        code = _wait(child, is_late=lambda: time.monotonic() - told_at >= ENDING_S)
        if received or not 0 <= code <= 128:  # mpirun was killed: ranks are no children of its, nor in its group
            _end_rest(child.pid)
        if endings is not None:
            stderr_of.close(received)
            if endings.aborts:
                _end_rest(child.pid)
    finally:
        if guard is not None:
            guard.kill()
            guard.communicate()
        for each, handler in previous.items():
            signal.signal(each, handler)
    if received and not saves:
        return 128 + received[0]
    if endings is not None and endings.overdue:
        return int(endings.aborts)
    if endings is not None and (endings.host_away or endings.aborts) and code == 0:
        return 1  # MPI_Abort may have ended no rank but its own
    return 128 - code if code < 0 else code


def _guard() -> subprocess.Popen[bytes]:
    """Start what ends a process group when this process ends, however that is.

    Not the kernel's word of a parent's end, which comes to the child alone: horovodrun becomes a shell, of which mpirun
    is a child.
    """
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        ["/bin/sh", "-c", GUARD], stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
    )


def _tell_guard(guard: subprocess.Popen[bytes]) -> None:
    """Say which group it is; in the child, before it becomes another program: shadowrun may be killed any time."""
    assert guard.stdin is not None, "it is a pipe"
    with contextlib.suppress(OSError):
        os.write(guard.stdin.fileno(), b"%d\n" % os.getpid())


class _Stderr:
    """Copies the child's stderr, takes note of what is said there, and shows the rest.

    Two threads: whoever reads shadowrun's stderr late does not keep it from hearing of ranks' ends.
    """

    def __init__(self, child: subprocess.Popen[bytes], endings: Endings) -> None:
        self._pieces: queue.Queue[bytes | None] = queue.Queue(HELD_PIECES)
        self._reads = threading.Thread(target=self._read, args=(child, endings), name="shadowrun-stderr", daemon=True)
        self._shows = threading.Thread(target=self._show, name="shadowrun-shows", daemon=True)
        self._reads.start()
        self._shows.start()

    def close(self, received: Sequence[int]) -> None:
        """Wait for what is left there, but not for other processes that keep it open, nor after another signal."""
        signals = len(received)
        self._reads.join(GRACE_S)
        while self._shows.is_alive() and not self._reads.is_alive() and len(received) == signals:
            self._shows.join(LOOK_S)

    def _read(self, child: subprocess.Popen[bytes], endings: Endings) -> None:
        try:
            _pass_on(child, endings, self._pieces.put)
        finally:
            self._pieces.put(None)

    def _show(self) -> None:
        while (text := self._pieces.get()) is not None:
            _show(text)


def _pass_on(child: subprocess.Popen[bytes], endings: Endings, show: Callable[[bytes], None]) -> None:
    """Read the child's stderr until it ends.

    Where a rank has ended before it had begun, and none is heard to begin for a minute, the others wait for it in
    MPI_Init: the job is ended then. A shorter time would take slow imports, of all ranks at once, for that. Where all
    ranks that can be reached have ended mpirun may wait for a host that cannot, for a quarter of an hour or for ever,
    or for a spare process that does not end: it is ended as well.
    """
    assert child.stderr is not None, "it is a pipe"

    def end_unless_begun() -> None:
        if not endings.begun:
            _signal_group(child.pid, signal.SIGTERM)

    def end_overdue() -> None:
        if child.poll() is None:
            endings.overdue = True
            what = "a spare process that does not end, or for " if endings.spares else ""
            why = f"waits for {what}a host that it cannot reach"
            if endings.aborts:
                why = "outlives the job that a rank has ended (it may not reach a host)"
            tell(f"shadowrun: mpirun {why}, and is ended")
            _end_session(child)

    timers: dict[str, threading.Timer] = {}
    touched = not endings.begun_file
    for text in _pieces(child.stderr.fileno()):
        show(endings.without(text))
        if endings.begun and not touched:
            touched = True
            with contextlib.suppress(OSError):  # nobody but agents would know, and they have time-outs
                Path(endings.begun_file).touch()
        if endings.never_began is not None and "begun" not in timers:
            timers["begun"] = threading.Timer(BEGINNING_S, end_unless_begun)
            timers["begun"].start()
        if endings.are_all and "overdue" not in timers:
            timers["overdue"] = threading.Timer(OVERDUE_S, end_overdue)
            timers["overdue"].start()
    child.wait()
    for each in timers.values():
        each.cancel()


def _show(text: bytes) -> None:
    """Write to stderr; what cannot be written there (a full disk) is dropped, as ranks' ends have to be heard on."""
    with contextlib.suppress(OSError):
        while text:
            try:
                text = text[os.write(2, text) :]
            except BlockingIOError:
                select.select([], [2], [])


def _pieces(descriptor: int) -> Iterator[bytes]:
    """Read until the end, such that a line that `Endings` looks for is in one piece, and all else is there at once."""
    held = b""
    while data := os.read(descriptor, 1 << 16):
        held += data
        end = held.rfind(b"\n") + 1
        end += _settled(held[end:])
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _settled(text: bytes) -> int:
    """Return how much of the beginning of a line can be no part of one that `Endings` looks for."""
    places = [text.find(mark) for mark in MARKS if mark in text]
    for mark in MARKS:
        places += [len(text) - num for num in range(1, len(mark)) if text.endswith(mark[:num])]
    return min(places, default=len(text))


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """End mpirun, which may remove its files at the second signal, and what it has started (ssh) and leaves behind."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        _signal_group(child.pid, number)
        try:
            child.wait(TERMINATION_S)
            break
        except subprocess.TimeoutExpired:
            continue
    _kill(_session(child.pid))


def _end_rest(session: int) -> None:
    """End ranks that MPI_Abort and mpirun, which is gone, have left behind on this host; it happens."""
    deadline = time.monotonic() + TERMINATION_S
    while (left := _session(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    _kill(left)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """Return the processes of a session, where the system tells."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(leader) and fields[0] != "Z":
            found.append(int(file.parent.name))
    return found


def _wait(child: subprocess.Popen[bytes], is_late: Callable[[], bool]) -> int:
    """Return the exit code of `child` when its process group is gone too: mpirun ends its ranks after the shell."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(LOOK_S)
            break
        if is_late():
            tell(f"shadowrun: the job has not ended {ENDING_S:.0f} s after the signal, and is killed")
            _end_session(child)
    deadline = time.monotonic() + GRACE_S
    while _signal_group(child.pid, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    return code


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; tell whether it still exists."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def judge(code: int, size: int, endings: Endings, *, strict: bool, told: bool = False) -> int:
    """Return the exit code of a job that outlives its ranks, where its launcher's is `code`; say what was lost.

    Lost is also who was there when the others left, and did not come to its own end. Where `shadowrun` was `told` to
    end the job nobody needs to hear that it did.
    """
    if endings.never_began is not None and not endings.begun:
        rank, own = endings.never_began
        tell(f"shadowrun: rank {rank} ended with code {own} before MPI was initialised: the job ends")
        return own if own > 0 else 128 - own
    lost = endings.lost | (set(range(size)) - endings.ended)
    if not endings.ended:
        if not told:
            tell("shadowrun: no rank came to its end (or none imports hvd_shadowsync)")
        return code or 1
    if lost:
        listed = ", ".join(map(str, sorted(lost)))
        tell(f"shadowrun: lost ranks: {listed}; {len(endings.ended)} came to their end")
    return code or (LOST_CODE if strict and lost else 0)
