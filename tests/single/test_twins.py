"""Foreground twins: the same as the sequential algorithm, and the same as background rounds with nothing in flight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks_as_threads import (
    Content,
    Lockstep,
    Slopes,
    batch,
    content,
    flat,
    loss_of,
    make_model,
    on_ranks,
    same,
    sgd,
    train,
)
from torch import Tensor

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm.base import Communicator

STEPS = 12
RULES: list[tuple[Algorithm, str]] = [
    (ModelAveraging(), "delta"),
    (ModelAveraging(alpha=0.6), "delta"),
    (ModelAveraging(alpha=0.6), "interpolate"),
    (BMUF(alpha=0.7, block_lr=0.8), "delta"),
    (BMUF(alpha=0.7, block_lr=0.8), "interpolate"),
    (BMUF(block_momentum=0.5), "delta"),
    (BMUF(alpha=0.7, block_lr=0.6, block_momentum=0.5, nesterov=True), "interpolate"),
]
ELASTIC: list[tuple[Algorithm, str]] = [
    (ElasticAveraging(alpha=0.4), "delta"),
    (ElasticAveraging(alpha=0.4), "interpolate"),
    (ElasticAveraging(alpha=0.4, symmetric=True), "delta"),
]
collective = pytest.mark.parametrize(("algorithm", "merge"), RULES, ids=str)
elastic = pytest.mark.parametrize(("algorithm", "merge"), ELASTIC, ids=str)


def trained(
    size: int, *, foreground: bool, in_turn: bool = False, steps: int = STEPS, **options: Any
) -> list[tuple[Content, dict[str, float]]]:
    """Train with a round after every step, and return each rank's content and metrics."""

    def program(comm: Communicator) -> tuple[Content, dict[str, float]]:
        model = make_model()
        optimizer = sgd(model, momentum=0.5)
        options_here = {"foreground": foreground, "sync_every": 1, "communicator": comm, **options}
        with ShadowSync(optimizer, model=model, **options_here) as sync:
            if in_turn:
                sync.pause()
            after = (lambda: None) if foreground else Lockstep(sync, in_turn=in_turn)
            train(model, optimizer, steps, stream=comm.rank, after=after)
            return content(model), sync.metrics()

    return on_ranks(size, program)


def assert_close(left: Content, right: Content) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=2e-5, atol=2e-6)


# --- foreground = background with nothing in flight -------------------------------------------------------------------


@collective
def test_two_ranks_bit_for_bit(algorithm: Algorithm, merge: str) -> None:
    """Two numbers have one sum, so the two reducers agree to the bit."""
    options = {"algorithm": algorithm, "merge": merge}
    foreground, background = trained(2, foreground=True, **options), trained(2, foreground=False, **options)
    for (left, _), (right, metrics) in zip(foreground, background, strict=True):
        assert metrics["rounds"] == STEPS
        assert same(left, right)


@collective
def test_three_ranks_to_the_last_digits(algorithm: Algorithm, merge: str) -> None:
    options = {"algorithm": algorithm, "merge": merge}
    foreground, background = trained(3, foreground=True, **options), trained(3, foreground=False, **options)
    for (left, _), (right, _) in zip(foreground, background, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("wire_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_on_the_wire_bit_for_bit(wire_dtype: torch.dtype) -> None:
    options = {"algorithm": BMUF(alpha=0.7, block_lr=0.8), "wire_dtype": wire_dtype}
    foreground, background = trained(3, foreground=True, **options), trained(3, foreground=False, **options)
    assert all(same(left, right) for (left, _), (right, _) in zip(foreground, background, strict=True))


@elastic
def test_elastic_ranks_in_turn(algorithm: Algorithm, merge: str) -> None:
    options = {"algorithm": algorithm, "merge": merge, "steps": 6}
    foreground = trained(3, foreground=True, **options)
    background = trained(3, foreground=False, in_turn=True, **options)
    for (left, _), (right, metrics) in zip(foreground, background, strict=True):
        assert metrics["rounds"] == 6
        assert_close(left, right)


def test_the_twins_differ_from_training_alone() -> None:
    """The tests above could not fail if rounds did nothing."""
    alone = make_model()
    train(alone, sgd(alone, momentum=0.5), STEPS)
    (first, _), _ = trained(2, foreground=True, algorithm=ModelAveraging())
    assert max(float((first[name] - tensor).abs().max()) for name, tensor in content(alone).items()) > 1e-2


# --- foreground = the sequential algorithm ----------------------------------------------------------------------------


def set_to(model: torch.nn.Module, vector: Tensor) -> None:
    torch.nn.utils.vector_to_parameters(vector, model.parameters())


def sequentially(algorithm: Algorithm, size: int, steps: int, every: int) -> list[Tensor]:
    """Train `size` models in one thread as the papers have it: steps, mean or center, block momentum, share alpha."""
    models = [make_model(batch_norm=False).double() for _ in range(size)]
    anchor = flat(models[0])
    velocity = torch.zeros_like(anchor)
    for number in range(steps):
        for stream, model in enumerate(models):
            double_step(model, stream, number)
        if (number + 1) % every:
            continue
        replicas = [flat(model) for model in models]
        if isinstance(algorithm, ElasticAveraging):
            for model, replica in zip(models, replicas, strict=True):
                before, anchor = anchor, anchor + algorithm.alpha * (replica - anchor)
                set_to(model, replica + algorithm.alpha * ((before if algorithm.symmetric else anchor) - replica))
            continue
        mean = sum(replicas) / size
        if isinstance(algorithm, BMUF):
            ahead = algorithm.block_momentum * velocity if algorithm.nesterov else 0
            velocity = algorithm.block_momentum * velocity + algorithm.block_lr * (mean - anchor - ahead)
            anchor = anchor + velocity
            mean = anchor + (algorithm.block_momentum * velocity if algorithm.nesterov else 0)
        for model, replica in zip(models, replicas, strict=True):
            set_to(model, (1 - algorithm.alpha) * replica + algorithm.alpha * mean)
    return [flat(model) for model in models]


def double_step(model: torch.nn.Module, stream: int, number: int) -> None:
    inputs, wanted = batch(stream, number)
    model.zero_grad()
    loss_of(model, (inputs.double(), wanted.double())).backward()
    with torch.no_grad():
        for param in model.parameters():
            param -= 0.1 * param.grad


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(("algorithm", "merge"), RULES + ELASTIC, ids=str)
def test_foreground_rounds_are_the_sequential_algorithm(algorithm: Algorithm, merge: str, every: int) -> None:
    size, steps = 3, 20

    def program(comm: Communicator) -> Tensor:
        model = make_model(batch_norm=False).double()
        optimizer = sgd(model)
        options = {"algorithm": algorithm, "merge": merge, "foreground": True, "sync_every": every}
        with ShadowSync(optimizer, communicator=comm, **options):
            for number in range(steps):
                inputs, wanted = batch(comm.rank, number)
                optimizer.zero_grad()
                loss_of(model, (inputs.double(), wanted.double())).backward()
                optimizer.step()
            return flat(model)

    expected = sequentially(algorithm, size, steps, every)
    for replica, wanted in zip(on_ranks(size, program), expected, strict=True):
        torch.testing.assert_close(replica, wanted, rtol=1e-10, atol=1e-10)


def test_averaging_every_step_is_synchronous_sgd() -> None:
    """FR-MA with k = 1 and plain SGD: the mean of the replicas is a step on the mean gradient."""
    size, steps = 4, 10

    def program(comm: Communicator) -> Tensor:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, foreground=True, sync_every=1, communicator=comm):
            for number in range(steps):
                slopes.step(factor=1 + number)
        return slopes.weights.detach()

    moved = Slopes(0).moved(sum(1 + number for number in range(steps)) * (1 + 2 + 3 + 4) / size)
    for weights in on_ranks(size, program):
        torch.testing.assert_close(weights, moved)
