"""Ranks that train over links which somebody else spoils: `links.py CASE '{"width": 200, "stall_timeout_s": 3.0}'`.

They train until a file says that it is enough, then end with the same weights. Each says every fifth of a second how
many steps and rounds there were.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import ranks
import torch

from hvd_shadowsync import ElasticAveraging, ModelAveraging, ShadowSync

SECONDS = 100.0
ALGORITHMS = {"S-MA": ModelAveraging, "S-EASGD": ElasticAveraging}


def main(algorithm: str, width: int = 12, **options: Any) -> None:
    """Train with rounds as soon as they can be."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.manual_seed(ranks.RANK)
    model = torch.nn.Sequential(torch.nn.Linear(50, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sync = ShadowSync(optimizer, model=model, algorithm=ALGORITHMS[algorithm](), sync_every=2, **options)
    began = said = time.monotonic()
    steps = 0

    def say() -> None:
        metrics = sync.metrics()
        told = {"rounds": metrics["rounds"], "size": sync.size, "lost": metrics["ranks_lost"]}
        ranks.say("steps", str(steps), json.dumps(told))

    while time.monotonic() - began < SECONDS and not Path("enough").exists():
        optimizer.zero_grad()
        model(torch.randn(8, 50)).square().mean().backward()
        optimizer.step()
        steps += 1
        time.sleep(0.002)
        if time.monotonic() - said > 0.2:
            said = time.monotonic()
            say()
    say()
    sync.synchronize()
    weights = sync.gather([param.detach() for param in model.parameters()])
    assert all(torch.equal(own, first) for each in weights for own, first in zip(each, weights[0], strict=True))
    ranks.say("trained", str(sync.size))
    sync.close()


if __name__ == "__main__":
    ranks.begin()
    main(sys.argv[1], **json.loads(sys.argv[2]))
