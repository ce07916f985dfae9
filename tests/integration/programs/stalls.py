"""Ranks that train until a file says that it is enough; some of them are stopped from outside."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ranks
import torch
from parallel.programs.problem import Data, content, loss_of, make_model

from hvd_shadowsync import ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.course import Course

SECONDS = 90.0


def main(case: str, options: dict[str, Any]) -> None:
    """Train, and end with the same weights everywhere; say every fifth of a second how many steps there were."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    model = make_model(ranks.RANK)
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.05), Data(ranks.RANK)
    algorithm = ElasticAveraging() if case == "easgd" else ModelAveraging()
    if case == "constructing" and ranks.RANK == 1:
        Course._start = lambda _: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment,method-assign]
    sync = ShadowSync(optimizer, model=model, algorithm=algorithm, sync_every=2, **options)
    began = said = time.monotonic()
    steps, begun = 0, False
    while time.monotonic() - began < SECONDS and not Path("enough").exists():
        optimizer.zero_grad()
        loss_of(model, data.batch()).backward()
        optimizer.step()
        steps += 1
        time.sleep(0.002)
        if not begun and sync.metrics()["rounds"] >= 2:
            begun = True
            ranks.say("trains", "on")
        if time.monotonic() - said > 0.2:
            said = time.monotonic()
            ranks.say("steps", str(steps))
    ranks.say("steps", str(steps))
    sync.synchronize()
    weights = sync.gather(content(model))
    assert all(torch.equal(each[name], weights[0][name]) for each in weights for name in each)
    ranks.say("trained", str(sync.size))
    sync.close()


if __name__ == "__main__":
    ranks.begin()
    main(sys.argv[1], {name: eval(value) for name, value in (each.split("=") for each in sys.argv[2:])})
