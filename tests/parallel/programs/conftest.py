"""The communicator of each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator


@pytest.fixture
def comm() -> Iterator[Communicator]:
    """A communicator over all ranks; all of them are here before the next test begins."""
    communicator = mpi.world()
    yield communicator
    communicator.allgather_object("end of test")
    communicator.free()
