"""What is used around an optimizer: schedulers, GradScaler, autocast, zero_grad, clipping, torch.compile."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks_as_threads import (
    Content,
    Lockstep,
    await_rounds,
    batch,
    content,
    identical_everywhere,
    loss_of,
    make_model,
    on_ranks,
    same,
    sgd,
)
from torch.optim import Optimizer, lr_scheduler

from hvd_shadowsync import DistributedOptimizer, ShadowSync
from hvd_shadowsync.comm import job, mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.errors import ShadowSyncError

STEPS = 9
Scheduler = Any
SCHEDULERS: dict[str, Callable[[Optimizer], Scheduler]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=6),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, STEPS, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, STEPS),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.3, total_steps=STEPS + 1),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=3),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.7)], milestones=[3]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
}
Outcome = tuple[list[float], list[float], Content]


def scheduled(model: torch.nn.Module, optimizer: Optimizer, scheduler: Scheduler, after: Callable[[], object]) -> Any:
    """Train, and return learning rates and momenta before each step, and the weights."""
    rates, momenta = [], []
    for step in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.zero_grad()
        loss_of(model, batch(0, step)).backward()
        optimizer.step()
        after()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return rates, momenta, content(model)


def assert_outcomes_equal(left: Outcome, right: Outcome) -> None:
    assert left[:2] == right[:2]
    for key, value in right[2].items():
        torch.testing.assert_close(left[2][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error")  # "lr_scheduler.step() before optimizer.step()" among them
@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_made_before_and_after_the_wrap(name: str, order: str, foreground: bool) -> None:
    model = make_model()
    optimizer = sgd(model, momentum=0.9)
    with warnings.catch_warnings():
        expected = scheduled(model, optimizer, SCHEDULERS[name](optimizer), lambda: None)
    assert len(set(expected[0])) > 1

    def program(comm: Communicator) -> Outcome:
        model = make_model(comm.rank)
        optimizer = sgd(model, momentum=0.9)
        if order == "before":
            scheduler = SCHEDULERS[name](optimizer)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, foreground=foreground) as sync:
            if order == "after":
                scheduler = SCHEDULERS[name](optimizer)
            return scheduled(model, optimizer, scheduler, after=(lambda: None) if foreground else Lockstep(sync))

    for outcome in on_ranks(2, program):
        assert_outcomes_equal(outcome, expected)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR"])
def test_a_scheduler_outlives_the_wrap(name: str) -> None:
    """Half of the steps inside, half after close()."""

    def outcome(comm: Communicator, *, wrapped: bool) -> tuple[list[float], Content]:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        scheduler, rates = SCHEDULERS[name](optimizer), []
        sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, foreground=True) if wrapped else None
        for step in range(STEPS):
            if sync is not None and step == STEPS // 2:
                sync.close()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            loss_of(model, batch(0, step)).backward()
            optimizer.step()
            scheduler.step()
        return rates, content(model)

    for comm_rank in on_ranks(2, lambda comm: (outcome(comm, wrapped=True), outcome(comm, wrapped=False))):
        (rates, weights), (plain_rates, plain_weights) = comm_rank
        assert rates == plain_rates
        assert same(weights, plain_weights)


def scaled(
    model: torch.nn.Module, optimizer: Optimizer, overflow: Callable[[int], bool], after: Callable[[], object]
) -> tuple[list[float], Content]:
    """Train with autocast and a GradScaler, and clipping; `overflow` tells at which steps the gradients are inf."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=bool(step % 2))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(0, step))
        scaler.scale(loss).backward()
        if overflow(step):
            next(model.parameters()).grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        after()
    return scales, content(model)


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_grad_scaler_with_skipped_steps_on_all_ranks(kind: str, foreground: bool) -> None:
    """Scales, skipped steps and weights are those of one process; a skipped step is no step."""

    def make(model: torch.nn.Module) -> Optimizer:
        return sgd(model, momentum=0.5) if kind == "sgd" else torch.optim.Adam(model.parameters(), lr=0.01)

    model = make_model()
    expected_scales, expected = scaled(model, make(model), lambda step: step in (2, 6), lambda: None)
    assert min(expected_scales) < 1024

    def program(comm: Communicator) -> tuple[list[float], Content, dict[str, float]]:
        model = make_model(comm.rank)
        optimizer = make(model)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, foreground=foreground) as sync:

            def settle() -> None:
                await_rounds(sync, int(sync.metrics()["steps"]))

            scales, weights = scaled(model, optimizer, lambda step: step in (2, 6), settle)
            return scales, weights, sync.metrics()

    for scales, weights, metrics in on_ranks(2, program):
        assert scales == expected_scales
        assert metrics["steps"] == STEPS - 2
        assert metrics["rounds"] == STEPS - 2
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
def test_grad_scaler_with_steps_skipped_on_one_rank(foreground: bool) -> None:
    def program(comm: Communicator) -> tuple[bool, float, bool]:
        model = make_model()
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=2, foreground=foreground) as sync:
            scaled(model, optimizer, lambda step: comm.rank == 1 and step in (1, 4, 5), lambda: None)
            sync.synchronize()
            finite = all(bool(param.isfinite().all()) for param in model.parameters())
            return identical_everywhere(sync, model), sync.metrics()["steps"], finite

    assert on_ranks(2, program) == [(True, STEPS, True), (True, STEPS - 3, True)]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    def program(comm: Communicator) -> None:
        model = make_model(batch_norm=False)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, foreground=True):
            for step in range(3):
                loss_of(model, batch(comm.rank, step)).backward()
                optimizer.step()
                before = [param.grad for param in model.parameters()]
                optimizer.zero_grad(set_to_none=set_to_none)
                for param, gradient in zip(model.parameters(), before, strict=True):
                    assert param.grad is (None if set_to_none else gradient)
                    assert set_to_none or not gradient.any()

    on_ranks(2, program)


@pytest.fixture
def threads_are_the_world(monkeypatch: pytest.MonkeyPatch) -> Callable[[Communicator], None]:
    """Return what a rank calls for its thread's communicator to be "all ranks of MPI" in that thread."""
    own = threading.local()
    monkeypatch.setattr(mpi, "world", lambda ranks=None: own.comm.dup())
    monkeypatch.setattr(job, "end_job_on_exception", lambda active: None)
    return lambda comm: setattr(own, "comm", comm)


def clipped(comm: Communicator, step: int, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Take a step by Horovod's recipe for clipping averaged gradients."""
    optimizer.zero_grad()
    loss_of(model, batch(comm.rank, step)).backward()
    optimizer.synchronize()  # type: ignore[attr-defined]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with optimizer.skip_synchronize():  # type: ignore[attr-defined]
        optimizer.step()


def clipped_by_hand(size: int, steps: int) -> Content:
    """Return the weights after steps with the clipped mean of the gradients of all ranks, in one process."""
    model = make_model(batch_norm=False)
    optimizer = sgd(model)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(size):
            (loss_of(model, batch(rank, step)) / size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return content(model)


def test_clipping_recipe_in_the_warmup(threads_are_the_world: Callable[[Communicator], None]) -> None:
    def program(comm: Communicator) -> Content:
        threads_are_the_world(comm)
        model = make_model(comm.rank, batch_norm=False)
        optimizer = DistributedOptimizer(sgd(model), model=model, warmup_steps=STEPS)
        for step in range(STEPS):
            clipped(comm, step, model, optimizer)
        weights = content(model)
        optimizer.shadow.close()  # type: ignore[attr-defined]
        return weights

    expected = clipped_by_hand(2, STEPS)
    for weights in on_ranks(2, program):
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_clipping_recipe_after_the_warmup_is_local(
    threads_are_the_world: Callable[[Communicator], None], size: int
) -> None:
    """Without rounds due, each rank trains as if alone."""

    def program(comm: Communicator) -> tuple[Content, Content]:
        threads_are_the_world(comm)
        model, plain = make_model(batch_norm=False), make_model(batch_norm=False)
        optimizer = DistributedOptimizer(sgd(model), model=model, sync_every=1000)
        by_hand = sgd(plain)
        for step in range(STEPS):
            clipped(comm, step, model, optimizer)
            by_hand.zero_grad()
            loss_of(plain, batch(comm.rank, step)).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            by_hand.step()
        trained = content(model)
        optimizer.shadow.close()  # type: ignore[attr-defined]
        return trained, content(plain)

    for trained, plain in on_ranks(size, program):
        assert same(trained, plain)


def test_a_step_of_the_warmup_that_nobody_averages_is_refused(
    threads_are_the_world: Callable[[Communicator], None],
) -> None:
    def program(comm: Communicator) -> list[float]:
        threads_are_the_world(comm)
        weights = torch.nn.Parameter(torch.zeros(3))
        optimizer = DistributedOptimizer(torch.optim.SGD([weights], lr=1.0), warmup_steps=2, sync_every=1000)
        weights.grad = torch.full((3,), -2.0 * (comm.rank + 1))
        refused = pytest.raises(ShadowSyncError, match=r"warmup_steps=2 left, .* call optimizer.synchronize\(\) before")
        with optimizer.skip_synchronize(), refused:  # type: ignore[attr-defined]
            optimizer.step()
        optimizer.step()
        moved = weights.detach().tolist()
        optimizer.shadow.close()  # type: ignore[attr-defined]
        return moved

    assert on_ranks(2, program) == [[3.0] * 3] * 2


def test_synchronize_without_skip_does_not_average_twice(
    threads_are_the_world: Callable[[Communicator], None],
) -> None:
    """Gradients averaged by hand, then changed on each rank, are what step() takes."""

    def program(comm: Communicator) -> list[float]:
        threads_are_the_world(comm)
        weights = torch.nn.Parameter(torch.zeros(3))
        optimizer = DistributedOptimizer(torch.optim.SGD([weights], lr=1.0), warmup_steps=2, sync_every=1000)
        weights.grad = torch.full((3,), -2.0 * (comm.rank + 1))
        optimizer.synchronize()  # type: ignore[attr-defined]
        mean = weights.grad.tolist()
        weights.grad.mul_(comm.rank + 1)
        optimizer.step()
        own = weights.detach().tolist()
        optimizer.shadow.close()  # type: ignore[attr-defined]
        return mean + own

    assert on_ranks(2, program) == [[-3.0] * 3 + [3.0] * 3, [-3.0] * 3 + [6.0] * 3]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILING = threading.Lock()


def compiled(model: torch.nn.Module, optimizer: Optimizer, what: str, after: Callable[[], object]) -> Content:
    """Train with a compiled model or a compiled `optimizer.step`."""
    net, step = model, optimizer.step
    if what == "model":
        net = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    else:
        step = torch.compile(step, backend="eager")
    for index in range(6):
        optimizer.zero_grad()
        with COMPILING:
            loss_of(net, batch(0, index)).backward()
        step()
        after()
    return content(model)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("what", ["model", "step"])
def test_torch_compile(what: str, foreground: bool) -> None:
    """Hooks fire once a compiled step, outside of what is compiled; weights are those without us."""

    def make(seed: int) -> tuple[torch.nn.Module, Optimizer]:
        model = make_model(seed)
        return model, torch.optim.Adam(model.parameters(), lr=0.02)

    expected = compiled(*make(0), what, lambda: None)

    def program(comm: Communicator) -> tuple[Content, dict[str, float]]:
        model, optimizer = make(comm.rank)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, foreground=foreground) as sync:
            weights = compiled(model, optimizer, what, (lambda: None) if foreground else Lockstep(sync))
            return weights, sync.metrics()

    for weights, metrics in on_ranks(2, program):
        assert metrics["steps"] == metrics["rounds"] == 6
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)
