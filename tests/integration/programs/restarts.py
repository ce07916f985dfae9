"""A training that goes on from its last checkpoint, and ends badly in a named way: `restarts.py HOW FOLDER STEPS`.

Each rank says at which step it begins; the one that ends badly says of which step the newest checkpoint is, and at
which it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import ranks
import torch
from parallel.programs.problem import Data, loss_of, make_model

from hvd_shadowsync import Checkpointer, ShadowSync

EVERY_STEPS, LAST_STEP = 20, 200
RESTARTS = int(os.environ.get("SHADOWRUN_RESTARTS", "0"))
ALWAYS = ("exception", "always killed")


def is_due(how: str, checkpointer: Checkpointer, loaded: bool) -> bool:
    """Tell whether the last rank ends now: once there are two checkpoints, so that one is lost with no more."""
    if how not in ALWAYS and loaded:
        return False
    return checkpointer.metrics()["checkpoints"] >= 2


def train(how: str, folder: str) -> None:
    model = make_model(ranks.RANK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sync = ShadowSync(optimizer, model=model, sync_every=2)
    checkpointer = Checkpointer(folder, model, sync, every_steps=EVERY_STEPS)
    checkpointer.load_latest()
    begun = int(checkpointer.loaded.name.removeprefix("step-").split(".")[0]) if checkpointer.loaded else 0
    ranks.say("begins", str(RESTARTS), str(begun))
    data = Data(ranks.RANK)
    deadline = time.monotonic() + 60
    while sync.steps < LAST_STEP or how in (*ALWAYS, "told"):
        assert time.monotonic() < deadline
        optimizer.zero_grad()
        loss_of(model, data.batch()).backward()
        optimizer.step()
        time.sleep(0.002)
        if sync.steps >= begun + 10 and not said:
            said.append(True)
            ranks.say("trains", str(RESTARTS))
        if sync.rank == 0 and how != "told" and is_due(how, checkpointer, begun > 0):
            ranks.say("ends", how, f"{checkpointer.metrics()['checkpoint_step']:.0f} {sync.steps}")
            if how == "exception":
                raise RuntimeError("the data of this rank are broken")
            os.kill(os.getpid(), signal.SIGKILL)
    sync.synchronize()
    sync.close()
    ranks.say("ended", "well", str(sync.steps))


said: list[bool] = []

if __name__ == "__main__":
    ranks.begin()
    if sys.argv[1] == "fails at once":
        ranks.say("begins", str(RESTARTS), "0")
        sys.exit(5)
    train(sys.argv[1], sys.argv[2])
