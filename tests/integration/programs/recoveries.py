"""Ranks die one after the other while three threads of each use a communicator of their own: all recover at once.

Each thread gathers until its rank is the last one; rank r dies when its first thread has gathered so many times.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import ranks
import torch

from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.errors import RankLostError

COPIES = (0, 2, 2)
"""For each thread how many copies of its communicator it makes, in which a message is under way for ever."""
GATHERS_A_LIFE = 60


class Life:
    """One thread of a rank."""

    def __init__(self, copies: int, *, dies: bool) -> None:
        self.survivors = Survivors(mpi.world())
        self._num_copies, self._dies, self._copies = copies, dies, list[Communicator]()
        self.gathers = 0

    def live(self) -> None:
        self.survivors.together(self._begin)
        while self.survivors.comm.size > 1:
            try:
                counts = self.survivors.comm.allgather_object(self.gathers)
                for copy in self._copies:
                    copy.check()
            except RankLostError:
                self.survivors.go_on(self._begin)
                continue
            assert max(counts) - min(counts) <= 1, f"{counts}: ranks are at most one call apart"
            self.gathers = max(counts) + 1
            if self._dies and self.gathers >= GATHERS_A_LIFE * (1 + ranks.RANK) and ranks.RANK < ranks.SIZE - 1:
                ranks.say("dies", f"after {self.gathers}")
                os.kill(os.getpid(), signal.SIGKILL)

    def _begin(self, comm: Communicator) -> None:
        self._copies = [comm.dup() for _ in range(self._num_copies)]
        self._awaited = [copy.irecv(torch.empty(8), (copy.rank + 1) % copy.size, 7) for copy in self._copies]


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.begin()
    lives = [Life(copies, dies=not number) for number, copies in enumerate(COPIES)]
    threads = [threading.Thread(target=life.live) for life in lives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = {"gathers": [life.gathers for life in lives], "lost": [life.survivors.lost for life in lives]}
    ranks.say("ended", "well", json.dumps(told))
    sys.stdout.flush()
