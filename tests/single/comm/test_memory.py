"""Memory that processes share: what one writes the other reads, and what is not there is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from hvd_shadowsync.comm import memory

WRITER = """
import sys
from hvd_shadowsync.comm.memory import Address, attach
there = attach(eval(sys.argv[1]))
assert bytes(there[:3].tolist()) == b"abc"
there[100_000:100_003].copy_(there.new_tensor(list(b"xyz")))
"""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _possible() -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd_create")


def test_two_processes_see_each_others_writes() -> None:
    file = memory.AnonymousFile(200_000)
    here = memory.attach(file.address)
    assert len(here) == 200_000
    assert not here.any()
    here[:3].copy_(here.new_tensor(list(b"abc")))
    subprocess.run([sys.executable, "-c", WRITER, repr(file.address)], check=True, timeout=60)
    assert bytes(here[100_000:100_003].tolist()) == b"xyz"
    file.close()
    here[5] = 7  # who has attached goes on using it
    assert here[5] == 7


def test_no_descriptor_is_left() -> None:
    before = descriptors()
    file = memory.AnonymousFile(4096)
    here = memory.attach(file.address)
    file.close()
    assert len(here) == 4096
    assert descriptors() == before


def test_another_file_of_that_number_is_refused() -> None:
    """As on another host, where a process of the same number may be anything."""
    file = memory.AnonymousFile(4096)
    with pytest.raises(OSError, match=f"process {os.getpid()} is another one here"):
        memory.attach(replace(file.address, mark=bytes(16)))
    file.close()


def test_a_process_that_is_not_there() -> None:
    file = memory.AnonymousFile(4096)
    with pytest.raises(OSError):
        memory.attach(replace(file.address, pid=2**22 + 1))
    file.close()
    with pytest.raises(OSError):
        memory.attach(file.address)


def test_a_system_without_such_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="no memfd_create"):
        memory.AnonymousFile(4096)


def test_a_fence_can_be_crossed_again_and_again() -> None:
    for _ in range(3):
        memory.fence()
