"""How a job that outlives its ranks ended: who says so, and what `shadowrun` makes of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hvd_shadowsync import ending
from hvd_shadowsync.ending import Endings
from hvd_shadowsync.run import LOST_CODE, _judge

RANK = {ending.VARIABLE: "1", ending.RANK_VARIABLE: "2"}
STARTS_ANOTHER = """
import subprocess, sys
import hvd_shadowsync.ending
subprocess.run([sys.executable, "-c", "import hvd_shadowsync.ending"], check=True)
print("done", flush=True, file=sys.stderr)
"""


def said(code: str, environ: dict[str, str]) -> str:
    own = {name: value for name, value in os.environ.items() if name not in (*RANK, ending.SPEAKER_VARIABLE)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**own, **environ}, capture_output=True, text=True, check=True).stderr


def test_a_rank_says_how_it_ended_and_a_program_that_it_starts_does_not() -> None:
    assert said(STARTS_ANOTHER, RANK) == "done\nhvd_shadowsync: rank 2 ended; lost: none\n"


def test_what_is_no_rank_says_nothing() -> None:
    """Such as the processes between shadowrun and the ranks on emulated hosts."""
    assert said("import hvd_shadowsync.ending", {ending.VARIABLE: "1"}) == ""
    assert said("import hvd_shadowsync.ending", {ending.RANK_VARIABLE: "2"}) == ""


def test_what_ranks_say_is_taken_out_of_what_is_passed_on() -> None:
    endings = Endings()
    assert endings.without(b"a line\n") == b"a line\n"
    assert endings.without(b"hvd_shadowsync: rank 0 ended; lost: 1 3\n") == b""
    assert endings.without(b"half a lhvd_shadowsync: rank 2 ended; lost: none\n") == b"half a l"
    assert (endings.ended, endings.lost) == ({0, 2}, {1, 3})


@pytest.mark.parametrize(
    ("code", "ended", "lost", "strict", "expected"),
    [
        (0, {0, 1, 2}, set(), True, 0),
        (0, {0, 1}, {2}, False, 0),
        (0, {0, 1}, {2}, True, LOST_CODE),
        (0, {0, 1}, set(), True, LOST_CODE),  # the last one was killed when the others had left
        (7, {0, 1}, {2}, True, 7),
        (0, set(), set(), False, 1),
        (137, set(), set(), False, 137),
    ],
)
def test_the_exit_code(code: int, ended: set[int], lost: set[int], strict: bool, expected: int) -> None:
    assert _judge(code, 3, Endings(ended, lost), strict=strict) == expected
