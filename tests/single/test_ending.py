"""How ranks end: what each says of it, what shadowrun makes of that, and the process that runs a rank's program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_shadowsync import ending, rank
from hvd_shadowsync.ending import Endings
from hvd_shadowsync.launcher import supervision

SAY = f"import os; os.write(int(os.environ[{rank.DESCRIPTOR!r}].partition(':')[0]), b%r); "
STARTED, ENDED = SAY % rank.STARTED.decode(), SAY % rank.ENDED.decode()
TIMEOUT_S = 60


def start(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, rank.__file__, sys.executable, "-c", program]
    environ = {**os.environ, "OMPI_COMM_WORLD_RANK": "2"}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (STARTED + ENDED, 0, ""),
        (STARTED + ENDED + "os._exit(5)", 5, ""),
        (STARTED, -signal.SIGKILL, ""),
        (STARTED + "os._exit(3)", -signal.SIGKILL, ""),
        (STARTED + "os.kill(os.getpid(), 11)", -signal.SIGKILL, ""),
        (STARTED + ENDED + "os.kill(os.getpid(), 14)", -signal.SIGKILL, ""),
        ("pass", 0, ""),
        ("import os; os._exit(3)", -signal.SIGKILL, "code: 3"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, "code: -9"),
        (ENDED, 0, ""),
    ],
    ids=str,
)
def test_a_rank_ends_as_its_program_or_such_that_others_notice(program: str, code: int, said: str) -> None:
    process = start(program)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert errors == (f"hvd_shadowsync: rank 2 ended before it had begun; {said}\n" if said else "")


def test_the_last_word_of_a_last_checkpoint_counts(capfd: pytest.CaptureFixture[str]) -> None:
    """One that has said that it makes one may be lost, and another takes that back."""
    endings = Endings()
    for words, saves in ([True], True), ([False], False), ([False, True], True), ([True, True, False], False):
        for made in words:
            ending.note_last_checkpoint(made)
        assert endings.without(b"before\n" + capfd.readouterr().err.encode()) == b"before\n"
        assert endings.saves is saves


def test_another_file_with_the_number_of_the_pipe_is_left_alone(tmp_path: Path) -> None:
    """As where something between the two has closed all descriptors, as Python's subprocess does."""
    program = f"""
import os
from hvd_shadowsync import ending, rank
number = int(os.environ[rank.DESCRIPTOR].partition(":")[0])
ending._say(rank.STARTED)
os.close(number)
ending._say(b"!")  # there is none
theirs = os.open({str(tmp_path / "theirs")!r}, os.O_CREAT | os.O_WRONLY)
os.dup2(theirs, number)
ending._say(b"!")
"""
    process = start(program)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors) == (-signal.SIGKILL, ""), "it has said that it began, and not that it ended"
    assert (tmp_path / "theirs").read_bytes() == b""


def test_what_a_program_leaves_behind_holds_nobody_up() -> None:
    process = start(STARTED + ENDED + "import subprocess, sys; subprocess.Popen(['sleep', '60'], close_fds=False)")
    assert process.wait(timeout=TIMEOUT_S / 2) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_program(number: signal.Signals) -> None:
    handler = f"import signal, sys, time; signal.signal({int(number)}, lambda *_: sys.exit(7)); "
    process = start(STARTED + ENDED + handler + "print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=TIMEOUT_S / 2) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_program_does_not_outlive_what_runs_it() -> None:
    process = start("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait(timeout=TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while is_running(child):
        assert time.monotonic() < deadline, f"process {child} is there yet"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_ranks_say_is_taken_out_of_their_lines() -> None:
    endings = Endings()
    lines = [
        b"hvd_shadowsync: rank 0 ended; lost: none\n",
        b"a warning\n",
        b"half a line, hvd_shadowsync: rank 3 ended; lost: 1 12\n",
        b"hvd_shadowsync: rank 4 ended before it had begun; code: -9\n",
        b"hvd_shadowsync: rank 3 has begun\n",
        b"hvd_shadowsync: rank 5 ended; lost: 1 2; replaced: 2\n",
        b"---\n\0words after a box of Open MPI's\n",
    ]
    passed_on = [b"", b"a warning\n", b"half a line, ", b"", b"", b"", b"---\nwords after a box of Open MPI's\n"]
    assert [endings.without(line) for line in lines] == passed_on
    assert (endings.ended, endings.lost, endings.begun) == ({0, 3, 5}, {1, 2, 12}, {3})
    assert endings.replaced == {2}
    assert endings.never_began == (4, -9)


STARTS_ANOTHER = """
import subprocess, sys
import hvd_shadowsync.ending
subprocess.run([sys.executable, "-c", "import hvd_shadowsync.ending"], check=True)
print("done", flush=True, file=sys.stderr)
"""
RANK = {ending.VARIABLE: "1", ending.RANK_VARIABLE: "2"}


def said_by(code: str, environ: dict[str, str]) -> str:
    own = {name: value for name, value in os.environ.items() if name not in (*RANK, ending.SPEAKER_VARIABLE)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**own, **environ}, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    return done.stderr


def test_a_rank_says_how_it_ended_and_a_program_that_it_starts_does_not() -> None:
    assert said_by(STARTS_ANOTHER, RANK) == "done\nhvd_shadowsync: rank 2 ended; lost: none\n"


@pytest.mark.parametrize("instead", ["open(os.devnull, 'w')", "None", "open('/dev/full', 'w')"])
def test_a_rank_says_how_it_ended_whatever_its_program_makes_of_stderr(instead: str) -> None:
    program = f"import os, sys\nimport hvd_shadowsync.ending\nsys.stderr = {instead}"
    assert said_by(program, RANK) == "hvd_shadowsync: rank 2 ended; lost: none\n"


def test_what_is_no_rank_says_nothing() -> None:
    """Such as the processes between shadowrun and the ranks on emulated hosts."""
    assert said_by("import hvd_shadowsync.ending", {ending.VARIABLE: "1"}) == ""
    assert said_by("import hvd_shadowsync.ending", {ending.RANK_VARIABLE: "2"}) == ""


@pytest.mark.parametrize(
    ("code", "endings", "strict", "judged"),
    [
        (0, Endings({0, 1, 2}), True, 0),
        (0, Endings({0, 1}, {2}), False, 0),
        (0, Endings({0, 1}, {2}), True, supervision.LOST_CODE),
        (0, Endings({0, 1}), True, supervision.LOST_CODE),  # the last one was killed when the others had left
        (7, Endings({0, 1}, {2}), True, 7),
        (0, Endings(), False, 1),
        (137, Endings(), False, 137),
        (143, Endings(never_began=(1, 3)), False, 3),
        (143, Endings(never_began=(1, -9)), False, 137),
        (0, Endings({0, 2}, begun={0, 2}, never_began=(1, -9)), False, 0),
        (0, Endings({0, 2}, begun={0, 2}, never_began=(1, -9)), True, supervision.LOST_CODE),
    ],
)
def test_the_exit_code_of_a_job_that_outlives_its_ranks(code: int, endings: Endings, strict: bool, judged: int) -> None:
    assert supervision.judge(code, 3, endings, strict=strict) == judged


@pytest.mark.parametrize(
    ("lines", "are_all"),
    [
        ([], False),
        (["rank 0 ended; lost: none", "rank 1 ended; lost: none", "rank 2 ended; lost: none"], False),
        (["rank 0 ended; lost: 2"], False),
        (["rank 0 ended; lost: 2", "rank 1 ended; lost: 2"], True),
        (["rank 0 ended; lost: 1 2"], True),
        (["rank 1 ends the job: uncaught StallError"], True),
        (["rank 1 leaves the job: uncaught CutOffError"], False),
    ],
    ids=str,
)
def test_when_the_launcher_has_nothing_left_to_wait_for(lines: list[str], are_all: bool) -> None:
    """Without lost ranks it hears of every end by itself."""
    endings = Endings(size=3)
    for line in lines:
        endings.without(f"hvd_shadowsync: {line}\n".encode())
    assert endings.are_all is are_all


@pytest.mark.parametrize(
    ("said", "are_all"),
    [
        ({0: "none", 1: "none"}, False),
        ({0: "none", 1: "none", 2: "none"}, True),
        ({0: "2", 1: "2"}, True),
        ({0: "2; replaced: 2", 1: "2; replaced: 2"}, False),
        ({0: "2; replaced: 2", 1: "2; replaced: 2", 2: "2; replaced: 2"}, True),
    ],
    ids=str,
)
def test_spare_processes_are_not_waited_for_and_those_that_replace_a_rank_are(
    said: dict[int, str], are_all: bool
) -> None:
    """A spare that is stopped would keep the launcher from ending."""
    endings = Endings(size=3, spares=1)
    for number, lost in said.items():
        endings.without(f"hvd_shadowsync: rank {number} ended; lost: {lost}\n".encode())
    assert endings.are_all is are_all


NOTES = """
from hvd_shadowsync import ending
ending.note_lost([1, 3])
ending.note_replaced(3)
ending.note_replaced(1)
ending.note_lost([1])
"""


def test_a_rank_says_who_was_replaced_and_not_lost_again() -> None:
    assert said_by(NOTES, RANK) == "hvd_shadowsync: rank 2 ended; lost: 1 3; replaced: 3\n"
