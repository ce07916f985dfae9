"""Rounds over MPI: every algorithm, merge and driver, at any number of ranks."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch
from problem import Data, Slopes, content, identical_everywhere, make_model, same, train

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.transfer import Transfer

ALGORITHMS: list[Algorithm] = [
    ModelAveraging(),
    ModelAveraging(alpha=0.5),
    BMUF(alpha=0.6, block_lr=0.9),
    BMUF(block_momentum=0.2, nesterov=True),
    ElasticAveraging(),
    ElasticAveraging(alpha=0.3, symmetric=True),
]
DRIVERS: dict[str, dict[str, Any]] = {
    "background": {"sync_every": 1},
    "budget": {"cpu_budget": 0.5},
    "interval": {"sync_interval_ms": 1.0, "sync_every": 2},
    "hogwild": {"sync_every": 2, "apply": "hogwild"},
    "foreground": {"sync_every": 3, "foreground": True},
}
CASES = [
    pytest.param(algorithm, driver, merge, id=f"{algorithm}-{driver}-{merge}")
    for algorithm, driver, merge in itertools.product(ALGORITHMS, DRIVERS, ["delta", "interpolate"])
    if merge == "delta" or algorithm.alpha < 1
]


@pytest.mark.parametrize(("algorithm", "driver", "merge"), CASES)
def test_replicas_are_bit_identical_after_synchronize(
    comm: Communicator, algorithm: Algorithm, driver: str, merge: str
) -> None:
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    with ShadowSync(optimizer, model=model, algorithm=algorithm, merge=merge, **DRIVERS[driver]) as sync:
        for _ in range(2):
            losses = train(model, optimizer, data, 18)
            assert all(map(math.isfinite, losses))
            sync.synchronize()
            assert identical_everywhere(sync, model)
        if comm.size > 1:
            metrics = sync.metrics()
            assert metrics["steps"] == 36
            assert metrics["bytes_sent"] > 0
            if driver == "foreground":
                assert metrics["rounds"] >= 12
                assert len(set(sync.gather(metrics["rounds"]))) == 1


@pytest.mark.parametrize("driver", ["background", "foreground"])
@pytest.mark.parametrize("algorithm", [ModelAveraging(), ModelAveraging(alpha=0.5), BMUF()], ids=str)
def test_delta_rule_keeps_the_mean(comm: Communicator, algorithm: Algorithm, driver: str) -> None:
    """Whatever was in flight, each rank's steps enter the mean with the weight 1/N.

    Not so with hogwild, by its nature: of a step and a merge that write at the same time one may be lost.
    """
    slopes = Slopes(comm.rank, comm.size)
    with ShadowSync(slopes.optimizer, algorithm=algorithm, merge="delta", **DRIVERS[driver]) as sync:
        for _ in range(24):
            slopes.step()
        settle(comm, sync, slopes)
        expected = slopes.moved(24 * slopes.all_slopes / slopes.size)
        for weights in sync.gather(slopes.weights.detach()):
            torch.testing.assert_close(weights, expected, rtol=0, atol=2e-5)


def test_symmetric_elastic_averaging_keeps_the_sum_of_replicas_and_center(comm: Communicator) -> None:
    slopes = Slopes(comm.rank, comm.size)
    with ShadowSync(slopes.optimizer, algorithm=ElasticAveraging(symmetric=True), sync_every=1) as sync:
        for _ in range(24):
            slopes.step()
        settle(comm, sync, slopes, rounds=60)
        with_center = slopes.size + 1 if slopes.size > 1 else 1
        expected = slopes.moved(24 * slopes.all_slopes / with_center)
        for weights in sync.gather(slopes.weights.detach()):
            torch.testing.assert_close(weights, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks_of_a_host", [1, 2, 3])
def test_rounds_go_on_while_chunks_change(
    comm: Communicator, ranks_of_a_host: int, wire_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for how to send tries all its settings, between ranks and between hosts; nothing gets lost in it."""
    if ranks_of_a_host >= comm.size:
        pytest.skip("no messages inside a host")
    share = mpi.MpiCommunicator.share
    monkeypatch.setattr(mpi.MpiCommunicator, "hosts", lambda self: [r - r % ranks_of_a_host for r in range(self.size)])
    monkeypatch.setattr(mpi.MpiCommunicator, "share", lambda self, n: share(self, n) if self.size < comm.size else None)
    monkeypatch.setattr(Transfer, "between", lambda size: Transfer(chunk_bytes=8192, in_flight=4, pause_s=0.0004))
    slopes = Slopes(comm.rank, comm.size, numel=20_000)
    tried: set[float] = set()
    with ShadowSync(slopes.optimizer, sync_every=1, wire_dtype=wire_dtype) as sync:
        steps = 0
        while (metrics := sync.metrics())["searching"] or steps < 40:
            slopes.step(moving=steps < 40)
            time.sleep(0.001)  # with more ranks than cores the shadow threads have to have their turn
            steps += 1
            tried.add(metrics["chunk_bytes"])
        assert tried >= {2048, 8192, 32768}
        settle(comm, sync, slopes)
        assert len(set(sync.gather(sync.metrics()["chunk_bytes"]))) == 1
        expected = slopes.moved(40 * slopes.all_slopes / slopes.size)
        atol = 0.2 if wire_dtype else 0.01  # of 12.5 at most that the steps moved it
        for weights in sync.gather(slopes.weights.detach()):
            torch.testing.assert_close(weights, expected, rtol=0, atol=atol)


def settle(comm: Communicator, sync: ShadowSync, slopes: Slopes, rounds: int = 30) -> None:
    """Take steps that move nothing until so many more rounds have reached every rank (collective).

    Nobody waits in a call of the handle before what all have stepped is averaged: a rank that waits there does not
    count, and what the others bring meanwhile is not divided by it.
    """
    comm.allgather_object("all have taken their steps")
    if sync.size == 1:
        return
    target = sync.metrics()["rounds"] + rounds
    while sync.metrics()["rounds"] < target:
        slopes.step(moving=False)
        time.sleep(0.001)
    others = sync.gather(sync.metrics()["rounds"])
    while sync.metrics()["rounds"] < max(others):
        slopes.step(moving=False)
    sync.gather("all have settled")


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_foreground_rounds_are_deterministic(comm: Communicator, algorithm: Algorithm) -> None:
    results = []
    for _ in range(2):
        model, data = make_model(1), Data(comm.rank)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with ShadowSync(optimizer, model=model, algorithm=algorithm, sync_every=4, foreground=True):
            train(model, optimizer, data, 22)
        results.append(content(model))
    assert same(*results)


def test_foreground_averaging_at_every_step_is_averaged_sgd(comm: Communicator) -> None:
    """With plain SGD the mean of the weights after a step is a step with the mean gradient."""
    slopes = Slopes(comm.rank, comm.size)
    with ShadowSync(slopes.optimizer, sync_every=1, foreground=True):
        for step in range(1, 11):
            slopes.step()
            expected = slopes.moved(step * slopes.all_slopes / slopes.size)
            torch.testing.assert_close(slopes.weights.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("driver", ["background", "budget", "foreground"])
@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF(block_momentum=0.2), ElasticAveraging()], ids=str)
def test_uneven_steps(comm: Communicator, algorithm: Algorithm, driver: str) -> None:
    """Rank r has r times more data, and one rank none at all."""
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    steps = 0 if comm.size > 1 and comm.rank == comm.size - 1 else 15 * (1 + comm.rank)
    with ShadowSync(optimizer, model=model, algorithm=algorithm, **DRIVERS[driver]) as sync:
        train(model, optimizer, data, steps)
        sync.synchronize()
        assert identical_everywhere(sync, model)
        assert sync.gather(int(sync.metrics()["steps"]))[comm.rank] == steps or comm.size == 1
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_a_waiting_rank_does_not_hold_the_others_back(comm: Communicator) -> None:
    """Once what it did has settled, a rank without data counts no more: the others' progress is not divided by it."""
    if comm.size == 1:
        pytest.skip("nobody waits in a world of one rank")
    slopes = Slopes(0, comm.size)
    with ShadowSync(slopes.optimizer, sync_every=1, foreground=True) as sync:
        for _ in range(40 if comm.rank == 0 else 10):
            slopes.step()
        sync.synchronize()
        torch.testing.assert_close(slopes.weights.detach(), slopes.moved(40), rtol=0, atol=1.5 * slopes.lr)


@pytest.mark.parametrize("wire_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("driver", ["background", "foreground"])
@pytest.mark.parametrize("algorithm", [ModelAveraging(alpha=0.8), BMUF(block_momentum=0.2)], ids=str)
def test_half_precision_on_the_wire(
    comm: Communicator, algorithm: Algorithm, driver: str, wire_dtype: torch.dtype
) -> None:
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ShadowSync(optimizer, model=model, algorithm=algorithm, wire_dtype=wire_dtype, **DRIVERS[driver]) as sync:
        train(model, optimizer, data, 30)
        sync.synchronize()
        assert identical_everywhere(sync, model)


@pytest.mark.parametrize("wire_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_halves_the_bytes_and_hardly_moves_the_result(
    comm: Communicator, wire_dtype: torch.dtype
) -> None:
    found = {}
    for width in (None, wire_dtype):
        model, data = make_model(1, batch_norm=False), Data(comm.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with ShadowSync(optimizer, model=model, sync_every=2, foreground=True, wire_dtype=width) as sync:
            train(model, optimizer, data, 20)
            found[width] = content(model), sync.metrics()["bytes_sent"]
    (exact, whole), (near, half) = found[None], found[wire_dtype]
    assert half == whole / 2
    for name, tensor in exact.items():
        torch.testing.assert_close(near[name], tensor, rtol=0, atol=2e-3)
    assert same(exact, near) is (comm.size == 1)


def test_buffers_are_averaged_and_integers_come_from_rank_0(comm: Communicator) -> None:
    model, data = make_model(1), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ShadowSync(optimizer, model=model, sync_every=1000, foreground=True) as sync:
        train(model, optimizer, data, 5 + comm.rank)
        if comm.size > 1:
            sync.pause()
        means = sync.gather(model[1].running_mean.clone())
        sync.synchronize()
        assert int(model[1].num_batches_tracked) == 5
        torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0), rtol=0, atol=1e-6)


def test_initial_weights_come_from_rank_0(comm: Communicator) -> None:
    model = make_model(comm.rank)
    with ShadowSync(torch.optim.SGD(model.parameters(), lr=0.1), model=model):
        assert same(content(model), content(make_model(0)))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_world_of_one_rank_is_bit_identical_to_the_plain_optimizer(
    comm: Communicator, driver: str, make: type[torch.optim.Optimizer]
) -> None:
    alone = mpi.world([comm.rank])
    plain, ours = make_model(3), make_model(3)
    reference = make(plain.parameters(), lr=0.01)
    train(plain, reference, Data(comm.rank), 20)
    optimizer = make(ours.parameters(), lr=0.01)
    with ShadowSync(optimizer, model=ours, warmup_steps=3, communicator=alone, **DRIVERS[driver]) as sync:
        assert (sync.rank, sync.size) == (0, 1)
        train(ours, optimizer, Data(comm.rank), 20)
        with sync.averaged_weights():
            assert same(content(plain), content(ours))
        sync.synchronize()
    alone.free()
    assert same(content(plain), content(ours))
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
