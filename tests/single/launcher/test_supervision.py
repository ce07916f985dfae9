"""Launchers that are supervised, to their end and after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_shadowsync import rank
from hvd_shadowsync.ending import Endings
from hvd_shadowsync.launcher import supervision

Executable = Callable[[str, str], Path]


def test_supervised_death_by_signal(executable: Executable) -> None:
    assert (
        supervision.supervise([str(executable("bin/killed", "kill -TERM $$"))], dict(os.environ))
        == 128 + signal.SIGTERM
    )


LEAVES = "echo 'hvd_shadowsync: rank 0 ended; lost: 1' >&2; "
ABORTS = "echo 'hvd_shadowsync: rank 1 ends the job: uncaught StallError' >&2; "


@pytest.mark.parametrize(
    ("said", "code"),
    [(LEAVES, 0), (ABORTS, 1), ("echo 'prterun has exited due to process rank 1 with PID 7' >&2; ", 1)],
    ids=["all that are left have ended", "a rank has ended the job", "MPI has ended it"],
)
def test_a_launcher_that_has_nothing_left_to_wait_for_is_ended(
    said: str, code: int, executable: Executable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With what it has started, in whatever group, which holds its stderr."""
    monkeypatch.setattr(supervision, "OVERDUE_S", 0.2)
    monkeypatch.setattr(supervision, "TERMINATION_S", 0.2)
    ssh = f"{sys.executable} -c 'import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(99)' &"
    launcher = executable("bin/launcher", f"trap : TERM; {ssh} {said} while true; do sleep 0.1; done")
    endings = Endings(size=2)
    begun = time.monotonic()
    assert supervision.supervise([str(launcher)], dict(os.environ), endings) == code
    assert time.monotonic() - begun < 20
    assert endings.overdue
    out, err = capfd.readouterr()
    why = (
        "waits for a host that it cannot reach"
        if said == LEAVES
        else "outlives the job that a rank has ended (it may not reach a host)"
    )
    assert f"shadowrun: mpirun {why}, and is ended" in err
    if out:  # it had begun
        with pytest.raises(ProcessLookupError):
            while True:  # until whoever inherits it has taken note
                os.kill(int(out), 0)
                assert time.monotonic() - begun < 20
                time.sleep(0.02)


@pytest.mark.parametrize("through", ["", "sh -c "], ids=["at once", "by way of a shell"])
def test_a_launcher_ends_with_shadowrun(through: str, executable: Executable, tmp_path: Path) -> None:
    mpirun = executable(
        "bin/mpirun", f"trap 'touch {tmp_path}/told; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    )
    launcher = executable("bin/launcher", f"{'exec ' if not through else ''}{through}{mpirun}; exit 1")
    program = f"from hvd_shadowsync.launcher import supervision; supervision.supervise([{str(launcher)!r}], {{}})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not (tmp_path / "told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("parts", "at_the_end"),
    [
        ([(b"a\nb", b"a\nb"), (b"c\n", b"c\n")], b""),
        ([(b" 50%\r 51%", b" 50%\r 51%"), (b"\r 52%", b"\r 52%")], b""),
        ([(b"x hvd_sha", b"x "), (b"dowsync: rank 1 end", b""), (b"ed\ny", b"hvd_shadowsync: rank 1 ended\ny")], b""),
        ([(b"hvd_shadowsync: hm", b"hvd_shadowsync: hm")], b""),
        ([(b"prterun", b""), (b" has exited\n", b"prterun has exited\n")], b""),
        ([(b"prterun", b""), (b"s", b"prteruns")], b""),
        ([(b"the end of a graph", b"the end of a grap")], b"h"),
    ],
)
def test_what_is_written_is_passed_on_at_once_but_for_what_may_be_a_rank_s_end(
    parts: list[tuple[bytes, bytes]], at_the_end: bytes
) -> None:
    reading, writing = os.pipe()
    found: list[bytes] = []
    got = threading.Event()

    def read() -> None:
        for piece in supervision._pieces(reading):
            found.append(piece)
            got.set()

    reader = threading.Thread(target=read)
    reader.start()
    for part, at_once in parts:
        os.write(writing, part)
        assert got.wait(20 if at_once else 0.1) == bool(at_once)
        got.clear()
    os.close(writing)
    reader.join(20)
    os.close(reading)
    assert found == [*(at_once for _, at_once in parts if at_once), *([at_the_end] if at_the_end else [])]


def test_a_launcher_that_waits_for_a_spare_process_is_ended_when_all_ranks_have(
    executable: Executable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Though no rank was lost; the job's code is 0."""
    monkeypatch.setattr(supervision, "OVERDUE_S", 0.2)
    monkeypatch.setattr(supervision, "TERMINATION_S", 0.2)
    says = "; ".join(f"echo 'hvd_shadowsync: rank {rank} ended; lost: none' >&2" for rank in range(2))
    launcher = executable("bin/launcher", f"trap : TERM; {says}; while true; do sleep 0.1; done")
    assert supervision.supervise([str(launcher)], dict(os.environ), Endings(size=2, spares=1)) == 0
    assert "waits for a spare process that does not end, or for a host" in capfd.readouterr().err


def test_a_launcher_that_has_lost_a_host_has_failed_whatever_its_code(executable: Executable) -> None:
    says = "echo 'PRTE has lost communication with a remote daemon.' >&2; exit"
    for own, code in ((0, 1), (7, 7)):
        launcher = executable(f"bin/launcher{own}", f"{says} {own}")
        assert supervision.supervise([str(launcher)], dict(os.environ), Endings(size=2)) == code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which processes there are")
def test_a_job_that_a_rank_has_ended_has_failed_and_leaves_no_rank_whatever_its_launcher_does(
    executable: Executable, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one that outlives its ranks Open MPI took the end of the job for the end of that rank, once in 200 jobs."""
    rank = "import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(99)"
    launcher = executable("bin/launcher", f"{sys.executable} -c '{rank}' 2>/dev/null & {ABORTS} sleep 1; exit 0")
    endings = Endings(size=2)
    assert supervision.supervise([str(launcher)], dict(os.environ), endings) == 1
    assert endings.aborts
    left = int(capfd.readouterr().out)
    until(lambda: not Path(f"/proc/{left}").exists() or ") Z " in Path(f"/proc/{left}/stat").read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which processes there are")
@pytest.mark.parametrize("endings", [None, Endings(size=2)], ids=["plain", "heard"])
def test_a_launcher_that_is_killed_leaves_no_rank(
    endings: Endings | None, executable: Executable, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor do they run beside those of a restart. They are in groups of their own."""
    rank = "import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(99)"
    launcher = executable("bin/launcher", f"{sys.executable} -c '{rank}' & sleep 1; kill -KILL $$")
    assert supervision.supervise([str(launcher)], dict(os.environ), endings) == 128 + signal.SIGKILL
    left = int(capfd.readouterr().out)
    until(lambda: not Path(f"/proc/{left}").exists() or ") Z " in Path(f"/proc/{left}/stat").read_text())


@pytest.mark.parametrize(
    ("saves", "kills"), [(False, True), (True, True), (False, False)], ids=["plain", "with a checkpoint", "other MPI"]
)
def test_a_launcher_that_does_not_end_at_a_signal_is_killed(
    saves: bool, kills: bool, executable: Executable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Open MPI's waits for ever where it gets one while it starts its daemons. A last checkpoint has all its time.

    So it has under other launchers, which do not say whether there is one.
    """
    monkeypatch.setattr(supervision, "ENDING_S", 0.3)
    monkeypatch.setattr(supervision, "TERMINATION_S", 0.2)
    traps = f"trap 'echo >> {tmp_path}/got' USR2 TERM"
    launcher = executable(
        "bin/launcher", f"{traps}; {SAVES if saves else ''}\ntouch {tmp_path}/up; while :; do sleep 0.05; done"
    )
    endings = Endings(size=2)
    sent: list[float] = []

    def tell() -> None:
        until(lambda: (tmp_path / "up").exists() and endings.saves == saves)
        for _ in range(2 if saves or not kills else 1):
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            if len(sent) == 1 and (saves or not kills):
                until(lambda: (tmp_path / "got").exists())
                time.sleep(1.0)

    threading.Thread(target=tell, daemon=True).start()
    code = supervision.supervise([str(launcher)], dict(os.environ), endings, kills_at_once=kills)
    assert code == (128 + signal.SIGKILL if saves else 128 + signal.SIGTERM)
    assert len(sent) == (2 if saves or not kills else 1)
    assert "the job has not ended 0 s after the signal, and is killed" in capfd.readouterr().err


def test_signals_that_are_ignored_stay_so(executable: Executable, tmp_path: Path) -> None:
    """As nohup has it."""
    launcher = executable("bin/launcher", f"touch {tmp_path}/up; sleep 1; exit 7")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def hang_up() -> None:
        until(lambda: (tmp_path / "up").exists())
        os.kill(os.getpid(), signal.SIGHUP)

    try:
        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        assert supervision.supervise([str(launcher)], dict(os.environ)) == 7
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        thread.join(20)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ends_are_heard_where_nobody_can_be_told_of_the_beginning(executable: Executable, tmp_path: Path) -> None:
    begins = "echo 'hvd_shadowsync: rank 0 has begun' >&2"
    launcher = executable("bin/launcher", f"{begins}; sleep 0.2; {LEAVES} exit 0")
    endings = Endings(size=2, begun_file=str(tmp_path / "removed" / "begun"))
    assert supervision.supervise([str(launcher)], dict(os.environ), endings) == 0
    assert (endings.begun, endings.ended) == ({0}, {0})


@pytest.mark.parametrize("waits", [True, False], ids=["is read late", "does not wait"])
def test_ends_are_heard_at_once_and_nothing_is_dropped_where_stderr(
    waits: bool, executable: Executable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shadowrun is a pipe that somebody reads late, or that whoever has made it has set to return at once."""
    monkeypatch.setattr(supervision, "GRACE_S", 2.0)
    line = "x" * 199
    writes = f"{sys.executable} -c 'import sys; sys.stderr.write((\"{line}\\n\") * 2000)'"
    launcher = executable("bin/launcher", f"{writes}; {LEAVES} exit 0")
    endings = Endings(size=2)
    reading, writing = os.pipe()
    os.set_blocking(writing, waits)
    found: list[bytes] = []

    def read() -> None:
        until(lambda: endings.ended == {0})
        time.sleep(3.0)
        while data := os.read(reading, 1 << 16):
            found.append(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    before = os.dup(2)
    os.dup2(writing, 2)
    try:
        assert supervision.supervise([str(launcher)], dict(os.environ), endings) == 0
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(writing)
    reader.join(20)
    assert b"".join(found).count(line.encode()) == 2000


def test_a_launcher_that_ends_in_time_keeps_its_code(executable: Executable) -> None:
    endings = Endings(size=2)
    assert supervision.supervise([str(executable("bin/launcher", f"{LEAVES} exit 7"))], dict(os.environ), endings) == 7
    assert (endings.ended, endings.lost, endings.overdue) == ({0}, {1}, False)


def test_forwards_signals_to_the_whole_group(executable: Executable, tmp_path: Path) -> None:
    """The launcher ignores the signal, its child does not; the launcher's 0 becomes the signal's code."""
    child = executable("bin/child", f"touch {tmp_path}/up; exec sleep 60")
    launcher = executable("bin/launcher", f"trap : TERM; {child}; exit 0")

    def terminate_when_up() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate_when_up, daemon=True)
    begun = time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    assert supervision.supervise([str(launcher)], dict(os.environ)) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 20
    assert signal.getsignal(signal.SIGTERM) is before


IN_A_THREAD = """
import os, signal, sys, threading, time
from pathlib import Path
from hvd_shadowsync import rank
from hvd_shadowsync.launcher import supervision

def tell():
    while not Path(sys.argv[1]).exists():
        time.sleep(.02)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=tell, daemon=True).start()
"""


@pytest.mark.parametrize(
    ("runs", "code"),
    [("supervision.supervise(sys.argv[2:], os.environ)", 128 + signal.SIGTERM), ("rank.main(sys.argv[2:])", 7)],
    ids=["shadowrun", "what starts a rank"],
)
def test_a_signal_that_does_not_interrupt_the_wait_is_passed_on(
    runs: str, code: int, executable: Executable, tmp_path: Path
) -> None:
    """As one that comes right before the call; here it comes to another thread, and is seen between two calls."""
    up = tmp_path / "up"
    said = (rank.STARTED + rank.ENDED).decode()
    begins = f'if [ "${{{rank.DESCRIPTOR}:-}}" ]; then printf {said} >&${{{rank.DESCRIPTOR}%%:*}}; fi'
    launcher = executable("bin/launcher", f"{begins}; trap 'exit 7' TERM; touch {up}; while :; do sleep 0.05; done")
    command = [sys.executable, "-c", f"{IN_A_THREAD}\nsys.exit({runs})", str(up), str(launcher)]
    assert subprocess.run(command, timeout=60).returncode == code


SAVES = "echo 'hvd_shadowsync: a last checkpoint is made at a signal' >&2"


@pytest.mark.parametrize(
    ("says", "signals", "code", "got"),
    [
        (SAVES, [signal.SIGTERM], 0, "USR2\n"),
        (SAVES, [signal.SIGTERM, signal.SIGTERM], 7, "USR2\nTERM\n"),
        (SAVES, [signal.SIGINT], 128 + signal.SIGINT, "INT\n"),
        ("true", [signal.SIGTERM], 128 + signal.SIGTERM, "TERM\n"),
    ],
    ids=["once", "twice", "another", "without a checkpoint"],
)
def test_the_first_sigterm_comes_as_the_signal_that_is_not_followed_by_a_kill(
    says: str, signals: list[int], code: int, got: str, executable: Executable, tmp_path: Path
) -> None:
    once = len(signals) == 1
    traps = f"trap 'echo USR2 >> {tmp_path}/got; {'exit 0' if once else ':'}' USR2; "
    traps += f"trap 'echo TERM >> {tmp_path}/got; exit 7' TERM; trap 'echo INT >> {tmp_path}/got; exit 0' INT; "
    launcher = executable("bin/launcher", f"{traps} {says}; touch {tmp_path}/up; while :; do sleep 0.05; done")
    endings = Endings(size=2)

    def tell() -> None:
        until(lambda: (tmp_path / "up").exists() and endings.saves == (says == SAVES))
        for count, number in enumerate(signals):
            os.kill(os.getpid(), number)
            until(lambda count=count: (tmp_path / "got").exists() and lines() > count)  # type: ignore[misc]

    def lines() -> int:
        return len((tmp_path / "got").read_text().splitlines())

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    assert supervision.supervise([str(launcher)], dict(os.environ), endings) == code
    assert (tmp_path / "got").read_text() == got


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_ends_are_heard_where_stderr_cannot_be_written(executable: Executable) -> None:
    launcher = executable("bin/launcher", f"echo a line >&2; {LEAVES} exit 0")
    program = "import os, sys; from hvd_shadowsync.launcher.supervision import *\nendings = Endings(size=1)\n"
    program += "print(judge(supervise(sys.argv[1:], os.environ, endings), 1, endings, strict=False), endings.ended)"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, str(launcher)], stdout=subprocess.PIPE, stderr=full, timeout=60
        )
    assert done.stdout == b"0 {0}\n"
