"""`EndSignals`: in a process of its own, with children that are forked from it."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGIN = """
import multiprocessing, os, signal, sys, time
from hvd_shadowsync.checkpointing.signals import EndSignals

fork = multiprocessing.get_context("fork")
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program], timeout=100, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("begun", [True, False])
def test_a_forked_child_dies_of_them(begun: bool) -> None:
    """At once as well, when it may not have come out of the fork yet."""
    program = f"""
signals = EndSignals([signal.SIGTERM])
for _ in range(20 if not {begun} else 2):
    ours, theirs = fork.Pipe()
    child = fork.Process(target=lambda: (theirs.send(1), time.sleep(60)))
    child.start()
    if {begun}:
        ours.recv()
    child.terminate()
    child.join(50)
    print(child.exitcode)
with fork.Pool(2) as pool:
    pool.map(abs, [1, 2])
print(signals.came, signal.getsignal(signal.SIGTERM) == signals._note)
os.kill(os.getpid(), signal.SIGTERM)
print(signals.came)
"""
    *codes, listening, told = run(program).splitlines()
    assert set(codes) == {"-15"}
    assert (listening, told) == ("False True", "True")


def test_a_forked_child_calls_the_handler_of_before() -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signals = [EndSignals([signal.SIGTERM]), EndSignals([signal.SIGTERM])]
child = fork.Process(target=lambda: os.kill(os.getpid(), signal.SIGTERM))
child.start()
child.join(50)
print(child.exitcode)
"""
    assert run(program) == "7\n"


def test_a_signal_for_ranks_passes_by_children_but_not_by_programs_that_they_become() -> None:
    program = """
signals = EndSignals([signal.SIGTERM, signal.SIGUSR2], for_ranks=signal.SIGUSR2)
child = fork.Process(target=lambda: (os.kill(os.getpid(), signal.SIGUSR2), sys.exit(3)))
child.start()
child.join(50)
print(child.exitcode)
kills = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"
child = fork.Process(target=lambda: os.execv(sys.executable, [sys.executable, "-c", kills]))
child.start()
child.join(50)
print(child.exitcode == -signal.SIGUSR2)
"""
    assert run(program) == "3\nTrue\n"


def test_a_signal_for_ranks_passes_by_who_listens_no_more() -> None:
    """Other ranks may listen still; and one that listens anew does."""
    program = """
from hvd_shadowsync import ending
os.environ[ending.END_SIGNAL_VARIABLE] = "1"
for _ in range(2):
    number = ending.end_signal()
    signals = EndSignals([signal.SIGTERM, number], for_ranks=number)
    os.kill(os.getpid(), number)
    print(signals.came)
    signals.restore()
    os.kill(os.getpid(), number)
with ending.heedless():
    os.kill(os.getpid(), number)
print(ending.end_signal() == number, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""
    assert run(program) == "True\nTrue\nTrue True\n"


def test_after_one_has_come_the_death_of_children_raises_nothing() -> None:
    program = """
def raises(*_):
    raise RuntimeError("DataLoader worker is killed")

signal.signal(signal.SIGCHLD, raises)
signals = EndSignals([signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGCHLD)
print("goes on")
signals.restore()
os.kill(os.getpid(), signal.SIGCHLD)
print("and ends")
"""
    assert run(program) == "goes on\nand ends\n"


def test_a_worker_that_got_one_a_moment_before() -> None:
    program = """
import threading

signals = EndSignals([signal.SIGTERM])
killed = RuntimeError("DataLoader worker (pid 5) is killed by signal: Terminated. ")
other = RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly")
assert not signals.comes_after(other)
other.__cause__ = killed
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
print(signals.comes_after(other), signals.came)
"""
    assert run(program) == "True True\n"
