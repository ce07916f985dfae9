"""The handle over MPI: warm-up, process sets, pauses, evaluation, several optimizers, metrics, added parameters."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problem import Data, Slopes, content, identical_everywhere, loss_of, make_model, same, train

from hvd_shadowsync import BMUF, DistributedOptimizer, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator

Make = Callable[[Any], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


def averaged_by_hand(make: Make, size: int, steps: int) -> torch.nn.Module:
    """Train one model on all ranks' data in this process: the mean of the gradients, in rank order, in float32."""
    model = make_model(0, batch_norm=False)
    optimizer = make(model.parameters())
    streams = [Data(rank) for rank in range(size)]
    for _ in range(steps):
        total = [torch.zeros_like(param) for param in model.parameters()]
        for stream in streams:
            model.zero_grad()
            loss_of(model, stream.batch()).backward()
            for into, param in zip(total, model.parameters(), strict=True):
                into.add_(param.grad)
        for mean, param in zip(total, model.parameters(), strict=True):
            param.grad = mean.div_(size)
        optimizer.step()
    return model


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("name", MAKERS)
def test_warmup_is_averaged_sgd_exactly(comm: Communicator, name: str, foreground: bool) -> None:
    model, data = make_model(comm.rank, batch_norm=False), Data(comm.rank)
    optimizer = MAKERS[name](model.parameters())
    options: dict[str, Any] = {"sync_every": 3, "foreground": foreground}
    if comm.size == 1:
        model.load_state_dict(make_model(0, batch_norm=False).state_dict())
    with ShadowSync(optimizer, model=model, warmup_steps=12, **options) as sync:
        train(model, optimizer, data, 12)
        assert same(content(model), content(averaged_by_hand(MAKERS[name], comm.size, 12)))
        assert comm.size == 1 or foreground is False or sync.metrics()["rounds"] == 0
        train(model, optimizer, data, 12)
        sync.synchronize()
        assert identical_everywhere(sync, model)


def test_clipping_recipe_in_the_warmup(comm: Communicator) -> None:
    """synchronize(), clip, skip_synchronize(): what is clipped is the mean of the gradients."""
    slopes = Slopes(comm.rank, comm.size)
    optimizer = DistributedOptimizer(slopes.optimizer, warmup_steps=4, sync_every=100, foreground=True)
    for step in range(1, 5):
        slopes.weights.grad = -(comm.rank + 1) * slopes.direction
        optimizer.synchronize()
        mean = slopes.all_slopes / comm.size
        torch.testing.assert_close(slopes.weights.grad, -mean * slopes.direction)
        torch.nn.utils.clip_grad_value_([slopes.weights], 0.0)
        slopes.weights.grad.add_(-slopes.direction)
        with optimizer.skip_synchronize():
            optimizer.step()
        torch.testing.assert_close(slopes.weights.detach(), slopes.moved(step))
    optimizer.shadow.close()


@pytest.mark.parametrize("driver", [{"sync_every": 1}, {"sync_every": 1, "foreground": True}], ids=["back", "fore"])
@pytest.mark.parametrize(
    "algorithm", [ModelAveraging(), BMUF(block_lr=0.5), BMUF(block_momentum=0.2), ElasticAveraging()], ids=str
)
def test_rounds_begin_from_where_the_warmup_ended(
    comm: Communicator, algorithm: Algorithm, driver: dict[str, Any]
) -> None:
    """Anchors and centers are the warmed-up weights: rounds without progress move nothing, nor does synchronize()."""
    slopes = Slopes(comm.rank, comm.size)
    with ShadowSync(slopes.optimizer, algorithm=algorithm, warmup_steps=8, **driver) as sync:
        for _ in range(8):
            slopes.step()
        warmed_up = slopes.moved(8 * slopes.all_slopes / comm.size)
        for _ in range(100):
            slopes.step(moving=False)
        sync.gather("all have stepped")
        torch.testing.assert_close(slopes.weights.detach(), warmed_up, rtol=0, atol=1e-5)
        sync.synchronize()
        torch.testing.assert_close(slopes.weights.detach(), warmed_up, rtol=0, atol=1e-5)


def test_warmup_with_fewer_steps_on_some_ranks(comm: Communicator) -> None:
    slopes = Slopes(comm.rank, comm.size)
    with ShadowSync(slopes.optimizer, warmup_steps=10, sync_every=2, foreground=True) as sync:
        for _ in range(10 if comm.rank == 0 else 4):
            slopes.step()
        sync.synchronize()
        expected = slopes.moved(4 * slopes.all_slopes / comm.size + 6)
        if comm.size > 1:
            torch.testing.assert_close(slopes.weights.detach(), expected, rtol=0, atol=1e-4)
        assert len({tuple(each.tolist()) for each in sync.gather(slopes.weights.detach())}) == 1


def test_warmup_averages_sparse_gradients(comm: Communicator) -> None:
    table = torch.nn.Embedding(8, 2, sparse=True)
    torch.nn.init.zeros_(table.weight)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    with ShadowSync(optimizer, warmup_steps=1, sync_every=100, foreground=True):
        table(torch.tensor([comm.rank, 7])).sum().backward()
        optimizer.step()
        assert table.weight.grad.is_sparse
    expected = torch.zeros(8, 2)
    expected[: comm.size] = -1 / comm.size
    expected[7] = -1
    torch.testing.assert_close(table.weight.detach(), expected)


@dataclass(frozen=True)
class ProcessSet:
    """What is read of a Horovod process set."""

    ranks: list[int]
    process_set_id: int = 1


def halves(comm: Communicator) -> ProcessSet:
    """Return the set of this rank: the first or the second half of the job."""
    middle = comm.size // 2
    return ProcessSet(list(range(middle)) if comm.rank < middle else list(range(middle, comm.size)))


@pytest.mark.parametrize("algorithm", [ModelAveraging(), ElasticAveraging()], ids=str)
def test_process_sets_synchronise_apart(comm: Communicator, algorithm: Algorithm) -> None:
    own = halves(comm)
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), model=model, process_set=own, algorithm=algorithm, sync_every=2
    )
    assert (optimizer.shadow.size, optimizer.shadow.rank) == (len(own.ranks), own.ranks.index(comm.rank))
    assert same(content(model), content(make_model(own.ranks[0])))
    train(model, optimizer, data, 10 + 5 * comm.rank)
    optimizer.shadow.synchronize()
    weights = comm.allgather_object(content(model))
    for rank, theirs in enumerate(weights):
        assert same(theirs, weights[comm.rank]) is (rank in own.ranks)
    optimizer.shadow.close()


def test_a_process_set_of_some_ranks_leaves_the_others_alone(comm: Communicator) -> None:
    members = list(range(max(1, comm.size - 1)))
    model, data = make_model(comm.rank), Data(comm.rank)
    plain = torch.optim.SGD(model.parameters(), lr=0.05)
    if comm.rank in members:
        optimizer = DistributedOptimizer(plain, model=model, process_set=ProcessSet(members), sync_every=1)
        train(model, optimizer, data, 10)
        optimizer.shadow.synchronize()
        optimizer.shadow.close()
    else:
        with pytest.raises(ValueError, match="only its members may call"):
            DistributedOptimizer(plain, process_set=ProcessSet(members))
        assert not hasattr(plain, "shadow")
    weights = comm.allgather_object(content(model))
    assert all(same(weights[rank], weights[0]) for rank in members)


def test_evaluating_on_the_mean_gives_each_rank_its_own_back(comm: Communicator) -> None:
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ShadowSync(optimizer, model=model, sync_every=1000, foreground=True) as sync:
        train(model, optimizer, data, 6)
        own = content(model)
        with sync.averaged_weights():
            assert identical_everywhere(sync, model)
            everyone = sync.gather(own["0.weight"])
            torch.testing.assert_close(model[0].weight.detach(), torch.stack(everyone).mean(0))
        assert same(content(model), own)
        assert identical_everywhere(sync, model) is (comm.size == 1)


def test_a_rank_that_evaluates_for_a_while_is_waited_for(comm: Communicator) -> None:
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ShadowSync(optimizer, model=model, sync_every=1) as sync:
        train(model, optimizer, data, 10)
        if comm.rank == 0:
            model.eval()
            with torch.no_grad():
                losses = [float(loss_of(model, data.batch(512))) for _ in range(200)]
            assert all(map(math.isfinite, losses))
            model.train()
        train(model, optimizer, data, 10)
        sync.synchronize()
        assert identical_everywhere(sync, model)


@pytest.mark.parametrize("algorithm", [ModelAveraging(), ElasticAveraging()], ids=str)
def test_pause_on_one_rank(comm: Communicator, algorithm: Algorithm) -> None:
    """A paused rank merges nothing, and trains on; the rounds go on after resume()."""
    slopes = Slopes(comm.rank, comm.size)
    with ShadowSync(slopes.optimizer, algorithm=algorithm, sync_every=1) as sync:
        for _ in range(10):
            slopes.step()
        sync.gather("all have trained")
        if comm.rank == 0:
            sync.pause()
            at_pause = sync.metrics()["rounds"]
            for _ in range(60):
                slopes.step()
                time.sleep(0.001)
            assert sync.metrics()["rounds"] <= at_pause + 1  # the one that was under way
            sync.resume()
        for _ in range(10):
            slopes.step()
        sync.synchronize()
        assert len({tuple(each.tolist()) for each in sync.gather(slopes.weights.detach())}) == 1


def test_close_while_one_rank_is_paused(comm: Communicator) -> None:
    slopes = Slopes(comm.rank, comm.size)
    sync = ShadowSync(slopes.optimizer, sync_every=1)
    for step in range(20):
        slopes.step()
        if step == 5 and comm.rank == 0:
            sync.pause()
    sync.close()
    sync.close()
    assert not hasattr(slopes.optimizer, "shadow")


def test_two_optimizers_of_a_gan(comm: Communicator) -> None:
    generator, critic = make_model(comm.rank), make_model(10 + comm.rank)
    data = Data(comm.rank)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (generator, critic)]
    left = ShadowSync(optimizers[0], model=generator, sync_every=1)
    right = ShadowSync(optimizers[1], model=critic, algorithm=BMUF(block_momentum=0.1), cpu_budget=0.2)
    for step in range(20):
        train(generator, optimizers[0], data, 1)
        if step % 2 == comm.rank % 2:
            train(critic, optimizers[1], data, 1)
    left.synchronize()
    right.synchronize()
    assert identical_everywhere(left, generator)
    assert identical_everywhere(right, critic)
    assert right.metrics()["steps"] in (0, 10)
    left.close()
    right.close()


def test_one_handle_after_the_other_on_one_optimizer(comm: Communicator) -> None:
    model, data = make_model(comm.rank), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for algorithm in (ModelAveraging(), ElasticAveraging(), BMUF()):
        with ShadowSync(optimizer, model=model, algorithm=algorithm, sync_every=1) as sync:
            train(model, optimizer, data, 5)
            sync.synchronize()
            assert identical_everywhere(sync, model)


def test_a_handle_that_never_steps(comm: Communicator) -> None:
    model = make_model(comm.rank)
    with ShadowSync(torch.optim.SGD(model.parameters(), lr=0.1), model=model) as sync:
        sync.synchronize()
        assert same(content(model), content(make_model(0)))
        sync.synchronize()
    unused = ShadowSync(torch.optim.SGD(make_model(0).parameters(), lr=0.1))
    unused.close()


def test_merged_metrics(comm: Communicator) -> None:
    slopes = Slopes(comm.rank, comm.size)
    with ShadowSync(slopes.optimizer, sync_every=2, foreground=True) as sync:
        for _ in range(10):
            slopes.step()
        own, merged = sync.metrics(), sync.metrics(merged=True)
        everyone = sync.gather(own)
        assert merged["bytes_sent"] == sum(each["bytes_sent"] for each in everyone)
        if comm.size > 1:
            assert merged["rounds"] == 5
            assert merged["sync_gap_steps"] == 2
            assert merged["steps"] == 10
            assert merged["distance"] > 0


@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF(block_momentum=0.1)], ids=str)
def test_parameters_added_later_on_every_rank(comm: Communicator, algorithm: Algorithm) -> None:
    model, extra = make_model(comm.rank), torch.nn.Linear(3, 3)
    with torch.no_grad():
        extra.weight.fill_(comm.rank)
    both = torch.nn.ModuleList([model, extra])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ShadowSync(optimizer, model=both, algorithm=algorithm, sync_every=1, sync_buffers=False) as sync:
        data = Data(comm.rank)
        train(model, optimizer, data, 5 + comm.rank)
        optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.01})
        train(model, optimizer, data, 10)
        sync.synchronize()
        assert len({tuple(each) for each in sync.gather(extra.weight.detach().flatten().tolist())}) == 1


def test_average_optimizer_state(comm: Communicator) -> None:
    slopes = Slopes(comm.rank, comm.size)
    slopes.optimizer.param_groups[0]["momentum"] = 0.9
    with ShadowSync(slopes.optimizer, sync_every=100, foreground=True) as sync:
        slopes.step()
        sync.average_optimizer_state()
        expected = -slopes.direction * slopes.all_slopes / comm.size
        buffer = slopes.optimizer.state[slopes.weights]["momentum_buffer"]
        torch.testing.assert_close(buffer, expected)
        assert len({tuple(each.tolist()) for each in sync.gather(buffer)}) == 1


def test_a_communicator_that_is_given_stays_the_callers(comm: Communicator) -> None:
    part = mpi.world()
    slopes = Slopes(comm.rank, comm.size)
    for _ in range(3):
        with ShadowSync(slopes.optimizer, communicator=part, sync_every=1):
            slopes.step()
    assert part.allgather_object(comm.rank) == list(range(comm.size))
    part.free()


def test_no_communicator_is_lost(comm: Communicator) -> None:
    """MPI libraries have only so many communicators; a handle gives all of its own back."""
    slopes = Slopes(comm.rank, comm.size)
    everyone = ProcessSet(list(range(comm.size)))
    used = []
    for index in range(12):
        algorithm = ElasticAveraging() if index % 2 else ModelAveraging()
        optimizer = DistributedOptimizer(slopes.optimizer, algorithm=algorithm, process_set=everyone, sync_every=1)
        slopes.step()
        optimizer.shadow.close()
        used.append(next_communicator_number())
    assert used[-1] == used[1]


def next_communicator_number() -> int:
    """Return the number that MPI gives to the next communicator (Open MPI reuses those that were freed)."""
    from mpi4py import MPI

    communicator = MPI.COMM_WORLD.Dup()
    number = communicator.py2f()
    communicator.Free()
    return int(number)


@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF(block_momentum=0.2), ElasticAveraging()], ids=str)
def test_resumed_training_is_the_uninterrupted_one(comm: Communicator, algorithm: Algorithm) -> None:
    """At the same world size, in the foreground, from `state_dict()` of the optimizer and of the model."""
    model, data = make_model(0, batch_norm=False), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options: dict[str, Any] = {"algorithm": algorithm, "sync_every": 3, "foreground": True}
    with ShadowSync(optimizer, model=model, **options) as sync:
        train(model, optimizer, data, 9)
        sync.synchronize()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), data))
        train(model, optimizer, data, 9)
    again = make_model(5, batch_norm=False)
    resumed = torch.optim.SGD(again.parameters(), lr=0.05)
    again.load_state_dict(saved[0])
    with ShadowSync(resumed, model=again, **options) as sync:
        resumed.load_state_dict(saved[1])
        train(again, resumed, saved[2], 9)
        if comm.size > 1:
            assert sync.metrics()["steps"] == 18
    assert same(content(again), content(model))
