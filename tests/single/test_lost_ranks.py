"""Ranks that are lost at any moment: the others go on, and end with the same weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from ranks_as_threads import TIMEOUT_S, batch, flat, loss_of, make_model, sgd
from torch import Tensor

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator

ALGORITHMS = [ModelAveraging(), ElasticAveraging(), BMUF(block_momentum=0.2, nesterov=True)]
DRIVERS: list[dict[str, Any]] = [{"sync_every": 1}, {"sync_every": 1, "foreground": True}]
STEPS = 6
Outcome = tuple[int, int, Tensor]
"""How many ranks are left, how many were lost, the weights."""


def job(comm: Communicator, **options: Any) -> Outcome:
    """Train with every call that a training makes, and end."""
    model = make_model(seed=comm.rank)
    optimizer = sgd(model, momentum=0.9)
    with ShadowSync(optimizer, model=model, communicator=comm, **options) as sync:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step)).backward()
            optimizer.step()
            time.sleep(0.001)
            if step == STEPS // 2:
                gathered = sync.gather(comm.rank)
                assert gathered == sorted(gathered)
                assert comm.rank in gathered
                sync.average_optimizer_state()
        sync.synchronize()
        lost = int(sync.metrics()["ranks_lost"])
        return sync.size, lost, flat(model)


def run(size: int, kill: Mapping[int, int], *, hosts: Sequence[int] | None = None, **options: Any) -> list[Outcome]:
    """Return what became of those that are left."""
    ended = local.run(size, lambda comm: job(comm, **options), timeout_s=TIMEOUT_S, kill=kill, hosts=hosts)
    return [each for each in ended if each is not None]


def require_alike(ended: Sequence[Outcome]) -> None:
    left = min(count for count, _, _ in ended)
    alike = [weights for count, _, weights in ended if count == left]
    for count, lost, weights in ended:
        assert torch.isfinite(weights).all()
        assert count + lost in (left + lost, count + lost)
    assert all(torch.equal(alike[0], weights) for weights in alike)


@pytest.mark.parametrize("driver", DRIVERS, ids=["background", "foreground"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.leaves_threads
def test_whenever_a_rank_is_lost_the_others_end_with_the_same_weights(
    victim: int, algorithm: Algorithm, driver: dict[str, Any]
) -> None:
    """In each of its first calls, and then in every seventh: from construction to the last call of close()."""
    for call in [*range(1, 40), *range(40, 300, 7)]:
        ended = run(3, {victim: call}, algorithm=algorithm, **driver)
        assert len(ended) >= 2, f"call {call}"
        require_alike(ended)
