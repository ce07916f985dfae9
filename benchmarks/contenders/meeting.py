"""Where the ranks of a run meet without any framework: barriers and one agreed number, in a file that all have mapped.

Ranks are processes of one machine, in whatever network, so a file serves; what is measured stays alone on the links.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

PAUSE_S = 0.001


class Meeting:
    """A barrier of all ranks, and a number that rank 0 tells the others.

    Args:
        path: a file of `size` + 1 zeros of 8 bytes.
        rank: of this process, from 0.
        size: number of ranks.
        timeout_s: of a barrier.
    """

    def __init__(self, path: Path, rank: int, size: int, timeout_s: float) -> None:
        self._slots = np.memmap(path, dtype=np.int64, mode="r+", shape=(size + 1,))
        self._rank, self._timeout_s = rank, timeout_s
        self._meetings = 0

    def wait(self) -> None:
        """Return once all ranks are here.

        Raises:
            TimeoutError: names the ranks that did not come.
        """
        self._meetings += 1
        self._slots[self._rank] = self._meetings
        deadline = time.monotonic() + self._timeout_s
        while self._slots[:-1].min() < self._meetings:
            if time.monotonic() > deadline:
                absent = [int(rank) for rank in np.flatnonzero(self._slots[:-1] < self._meetings)]
                raise TimeoutError(f"ranks {absent} did not come to meeting {self._meetings} in {self._timeout_s:g} s")
            time.sleep(PAUSE_S)

    def agree(self, number: int) -> int:
        """Return rank 0's number on all ranks."""
        if self._rank == 0:
            self._slots[-1] = number
        self.wait()
        agreed = int(self._slots[-1])
        self.wait()  # nobody writes the next number before all have read this one
        return agreed
