"""Which ends of a job are followed by another attempt."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from hvd_shadowsync import run
from hvd_shadowsync.ending import Endings
from hvd_shadowsync.launcher import supervision
from hvd_shadowsync.restarts import End, run_with_restarts

FAILED = End(1, trained=True)
KILLED = End(137)


@pytest.mark.parametrize(
    ("ends", "most", "attempts"),
    [
        ([End(0, trained=True)], 3, 1),
        ([FAILED, End(0, trained=True)], 3, 2),
        ([FAILED, FAILED, End(7, trained=True)], 2, 3),
        ([FAILED], 0, 1),
        ([End(1)], 3, 1),  # it would end the same way
        ([FAILED, End(1)], 3, 2),
        ([KILLED, KILLED], 1, 2),  # before the first step, but by a signal
        ([End(213)], 1, 1),  # mpirun's own, which has started nothing
        ([End(143, told=True, trained=True)], 3, 1),
        ([End(3, trained=True, complete=True)], 3, 1),
    ],
)
def test_attempts(ends: list[End], most: int, attempts: int, capfd: pytest.CaptureFixture[str]) -> None:
    numbers: list[int] = []

    def attempt(number: int) -> End:
        numbers.append(number)
        return ends[number]

    assert run_with_restarts(attempt, most) == ends[attempts - 1].code
    assert numbers == list(range(attempts))
    assert capfd.readouterr().err.count("started again (") == attempts - 1


def test_that_training_has_begun_is_heard_among_progress_bars() -> None:
    reading, writing = os.pipe()
    for chunk in (b"half ", b"a line\n 10%\r 20%", b"\rhvd_shadowsync: training has", b" begun\nrest"):
        os.write(writing, chunk)
    os.close(writing)
    endings = Endings()
    passed_on = b"".join(endings.without(each) for each in supervision._pieces(reading))
    assert passed_on == b"half a line\n 10%\r 20%\rrest"
    assert endings.trains
    os.close(reading)


def test_a_signal_that_comes_to_shadowrun_is_noted(tmp_path: Path) -> None:
    launcher = ["/bin/sh", "-c", f"touch {tmp_path}/up; exec sleep 60"]
    received: list[int] = []

    def terminate_when_up() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), 15)

    threading.Thread(target=terminate_when_up, daemon=True).start()
    assert supervision.supervise(launcher, dict(os.environ), received=received) == 128 + 15
    assert received == [15]


@pytest.mark.parametrize("words", [["--restarts", "-1"], ["--restarts", "some"]])
def test_wrong_numbers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-np", "2", *words, "python"]) == 2
    assert "--restarts" in capsys.readouterr().err
