"""Ranks die one after the other while three threads of each use a communicator of their own: all recover at once.

Each thread gathers until its rank is the last one; a rank dies when all ranks before it have, and each of its threads
has gathered so many times without them: two do not die in the same moment.
"""

from __future__ import annotations

import json
import os
import signal
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


LIVES = list["Life"]()
DYING = threading.Lock()


class Life:
    """One thread of a rank."""

    def __init__(self, copies: int) -> None:
        self.survivors = Survivors(mpi.world())
        self._num_copies, self._copies = copies, list[Communicator]()
        self.gathers = self.gathers_since = 0

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
            self.gathers, self.gathers_since = max(counts) + 1, self.gathers_since + 1
            if all(each.is_next and each.gathers_since >= GATHERS_A_LIFE for each in LIVES):
                DYING.acquire()  # and never let go: one thread says so
                ranks.say("dies", f"after {self.gathers}")
                os.kill(os.getpid(), signal.SIGKILL)

    @property
    def is_next(self) -> bool:
        return self.survivors.comm.size > 1 and self.survivors.comm.rank == 0

    def _begin(self, comm: Communicator) -> None:
        self._copies = [comm.dup() for _ in range(self._num_copies)]
        comm.share(8)
        self._awaited = [copy.irecv(torch.empty(8), (copy.rank + 1) % copy.size, 7) for copy in self._copies]
        self.gathers_since = 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.begin()
    LIVES.extend(Life(copies) for copies in COPIES)
    threads = [threading.Thread(target=life.live) for life in LIVES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = {"gathers": [life.gathers for life in LIVES], "lost": [life.survivors.lost for life in LIVES]}
    ranks.say("ended", "well", json.dumps(told))
