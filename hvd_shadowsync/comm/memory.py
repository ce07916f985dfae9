"""Memory that processes of one host share: anonymous files, which the others open through the owner's /proc.

Nothing has a name in a file system: no limit of /dev/shm counts (64 MB in many containers), and nothing is left behind
however a process ends.
"""

from __future__ import annotations

import os
import platform
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MARK_BYTES = 64


def machine() -> str:
    """Return what is the same for processes of one host that see the same pids, and for no others."""
    try:
        seen = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        seen = str(os.getpid())  # nobody can tell that he sees the same
    return f"{platform.node()} {seen}"


@dataclass(frozen=True)
class Address:
    """Where another process of this host finds a file, and the mark by which it knows that it is the right one."""

    pid: int
    descriptor: int
    num_bytes: int
    mark: bytes


class AnonymousFile:
    """Zeroed memory of this process that others may `attach`; `close` once they have."""

    def __init__(self, num_bytes: int) -> None:
        """Make the file.

        Raises:
            OSError: the system has no such files.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create")
        self._descriptor = os.memfd_create("hvd_shadowsync")
        try:
            os.ftruncate(self._descriptor, MARK_BYTES + num_bytes)
            mark = uuid.uuid4().bytes
            os.pwrite(self._descriptor, mark, num_bytes)
        except OSError:
            self.close()
            raise
        self.address = Address(os.getpid(), self._descriptor, num_bytes, mark)

    def close(self) -> None:
        """Let no more processes attach; who has goes on using it."""
        os.close(self._descriptor)


def attach(address: Address) -> Tensor:
    """Return the memory at `address`, without its mark, uint8; it takes no descriptor.

    Raises:
        OSError: it is not there: another host, another container, another user.
    """
    with _opened(f"/proc/{address.pid}/fd/{address.descriptor}") as descriptor:
        if os.pread(descriptor, len(address.mark), address.num_bytes) != address.mark:
            raise OSError(f"process {address.pid} is another one here")
        path = f"/proc/self/fd/{descriptor}"
        try:
            return torch.from_file(path, shared=True, size=address.num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(f"{address.num_bytes} bytes cannot be mapped: {error}") from error


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fence() -> None:
    """Order this thread's reads and writes of memory: those before it come before those after it.

    Letting go of a lock orders what came before, taking it orders what comes after; once each would leave a gap.
    """
    for _ in range(2):
        with _FENCE:
            pass


_FENCE = threading.Lock()
