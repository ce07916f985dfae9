"""Tests without a launcher: ranks are threads of this process (`hvd_shadowsync.comm.local`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_thread_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a shadow thread or a rank behind."""
    before = set(threading.enumerate())
    yield
    if request.node.get_closest_marker("leaves_threads"):
        return
    deadline = time.monotonic() + 5
    while (left := _ours(set(threading.enumerate()) - before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"left behind: {left}"


def _ours(threads: set[threading.Thread]) -> list[str]:
    return sorted(thread.name for thread in threads if thread.name.startswith(("shadow", "rank-", "checkpointer")))
