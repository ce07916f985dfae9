"""Replicas with NaN over MPI: healed from the others', and an error everywhere when all are bad."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from problem import Data, identical_everywhere, loss_of, make_model

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync, ShadowSyncError
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm.base import Communicator

ALGORITHMS: list[Algorithm] = [ModelAveraging(), BMUF(block_momentum=0.2, nesterov=True), ElasticAveraging()]
DRIVERS: dict[str, dict[str, Any]] = {
    "background": {"sync_every": 1},
    "hogwild": {"sync_every": 1, "apply": "hogwild"},
    "foreground": {"sync_every": 2, "foreground": True},
    "halves": {"sync_every": 1, "wire_dtype": torch.float16},
    "messages": {"sync_every": 1, "hierarchical": False},
}
CASES = [
    pytest.param(algorithm, driver, id=f"{algorithm}-{driver}")
    for algorithm, driver in itertools.product(ALGORITHMS, DRIVERS)
    if not (algorithm.asynchronous and driver == "halves")
]


def step(model: torch.nn.Sequential, optimizer: torch.optim.Optimizer, data: Data, *, spoil: bool) -> None:
    """Take a step, with a NaN in a gradient of the last layer if asked."""
    optimizer.zero_grad()
    loss_of(model, data.batch()).backward()
    if spoil:
        gradient = model[-1].weight.grad
        assert isinstance(gradient, torch.Tensor)
        gradient[0, 0] = math.nan
    optimizer.step()


@pytest.mark.parametrize(("algorithm", "driver"), CASES)
def test_bad_replicas_are_healed(
    comm: Communicator, algorithm: Algorithm, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the ranks, the last ones, have bad gradients every now and then."""
    if comm.size == 1:
        pytest.skip("needs others to heal from")
    model, data, is_bad = make_model(comm.rank), Data(comm.rank), comm.rank >= (comm.size + 1) // 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with ShadowSync(optimizer, model=model, algorithm=algorithm, **DRIVERS[driver]) as sync:
        with caplog.at_level(logging.WARNING, logger="hvd_shadowsync"):
            for turn in range(60):
                step(model, optimizer, data, spoil=is_bad and turn % 20 == 7)
                assert is_bad or all(bool(each.isfinite().all()) for each in model.parameters())
            sync.synchronize()
        assert identical_everywhere(sync, model)
        assert all(bool(each.isfinite().all()) for each in model.parameters())
        assert (sync.metrics()["times_healed"] > 0) == is_bad
        assert any(
            f"rank {comm.rank}: " in message and "has NaN at step" in message for message in caplog.messages
        ) == (is_bad)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("waiting", [False, True])
def test_when_all_are_bad_every_rank_raises(comm: Communicator, driver: str, waiting: bool) -> None:
    if comm.size == 1:
        pytest.skip("nobody looks")
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sync = ShadowSync(optimizer, model=model, end_job_on_exception=False, **DRIVERS[driver])
    for _ in range(6):
        step(model, optimizer, data, spoil=False)
    with pytest.raises(ShadowSyncError, match=rf"all replicas hold NaN or infinity: here \(rank {comm.rank}\) \S+ has"):
        for turn in range(10_000):
            step(model, optimizer, data, spoil=True)
            if waiting and turn == 5 and comm.rank:
                sync.synchronize() if comm.rank == 1 else sync.gather(None)
    sync._detach()
