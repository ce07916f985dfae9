"""Rounds of replicas on GPUs, over MPI and through memory that ranks share; skipped where there is no GPU.

All ranks use the same GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problem import Data, content, identical_everywhere, loss_of, make_model, same

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm.base import Communicator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

ALGORITHMS: list[Algorithm] = [ModelAveraging(), ElasticAveraging(), BMUF()]
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "half precision": {"wire_dtype": torch.float16},
    "foreground": {"foreground": True},
    "hogwild": {"apply": "hogwild"},
}


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Data, count: int) -> None:
    device = next(model.parameters()).device
    for _ in range(count):
        inputs, targets = data.batch()
        optimizer.zero_grad()
        loss_of(model, (inputs.to(device), targets.to(device))).backward()
        optimizer.step()


def places(size: int, mixed: bool) -> Sequence[torch.device]:
    """Return the device of each rank's model."""
    return [torch.device("cpu" if mixed and rank % 2 else "cuda") for rank in range(size)]


@pytest.mark.parametrize("mixed", [False, True], ids=["gpus", "every second rank on its host"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_rounds(comm: Communicator, algorithm: Algorithm, way: str, mixed: bool) -> None:
    if algorithm.asynchronous and "wire_dtype" in WAYS[way]:
        pytest.skip("the elastic center has one precision")
    model, data = make_model(comm.rank).to(places(comm.size, mixed)[comm.rank]), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    with ShadowSync(optimizer, model=model, algorithm=algorithm, sync_every=2, **WAYS[way]) as sync:
        steps(model, optimizer, data, 40)
        while comm.size > 1 and sync.metrics()["rounds"] < 4:
            steps(model, optimizer, data, 2 if way != "foreground" else 40)
        sync.synchronize()
        everyone = sync.gather({name: value.cpu() for name, value in content(model).items()})
        assert all(same(each, everyone[0]) for each in everyone)
        assert all(torch.isfinite(value).all() for value in content(model).values())
        rounds = sync.metrics()["rounds"]
    assert comm.size == 1 or rounds >= 4


def test_no_step_is_lost_in_shared_memory(comm: Communicator) -> None:
    """Ten million weights, whose memory is shared, in many blocks: each has its mean of the steps."""
    direction = (1 + torch.arange(10_000_019) % 7).float().cuda()
    weights = torch.nn.Parameter(torch.zeros_like(direction))
    optimizer = torch.optim.SGD([weights], lr=0.5)
    taken = 0
    with ShadowSync(optimizer, sync_every=1) as sync:
        while taken < 50 or (comm.size > 1 and sync.metrics()["rounds"] < 6):
            weights.grad = -(comm.rank + 1) * direction
            optimizer.step()
            taken += 1
        sync.synchronize()
        totals = sync.gather(taken * (comm.rank + 1))
    moved = weights.detach() / (0.5 * direction)
    assert moved.min().item() >= 0.999 * min(totals)
    assert moved.max().item() <= 1.001 * max(totals)


def test_parameters_that_are_added(comm: Communicator) -> None:
    first, second = (torch.nn.Parameter(torch.full((numel,), float(comm.rank), device="cuda")) for numel in (9, 4))
    optimizer = torch.optim.SGD([first], lr=0.1)
    with ShadowSync(optimizer, sync_every=1) as sync:
        for _ in range(5):
            first.grad = torch.ones_like(first)
            optimizer.step()
        optimizer.add_param_group({"params": [second]})
        for _ in range(20):
            first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
            optimizer.step()
        sync.synchronize()
        everyone = sync.gather([first.detach().cpu(), second.detach().cpu()])
    assert all(torch.equal(a, b) for each in everyone for a, b in zip(each, everyone[0], strict=True))


def test_metrics_tell_what_a_merge_kept(comm: Communicator) -> None:
    model, data = make_model(0, batch_norm=False).cuda(), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ShadowSync(optimizer, model=model, sync_every=1) as sync:
        while comm.size > 1 and math.isnan(sync.metrics()["surviving_progress"]):
            steps(model, optimizer, data, 10)
        kept: float = sync.metrics()["surviving_progress"]
        sync.synchronize()
        assert identical_everywhere(sync, model)
    assert comm.size == 1 or kept == pytest.approx(1.0, abs=1e-3)
