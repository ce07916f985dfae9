"""S-BMUF: the block rule in both forms, and what survives of steps in flight."""

from __future__ import annotations

import pytest
import torch
from simulation import surviving_share

from hvd_shadowsync.algorithms import BMUF
from hvd_shadowsync.algorithms.bmuf import BlockState, PlainBlockState

VARIANTS = [
    (1.0, 1.0, 0.0, False),
    (0.5, 1.0, 0.0, False),
    (0.5, 0.6, 0.0, False),
    (0.3, 1.3, 0.0, False),
    (1.0, 0.5, 0.5, False),
    (1.0, 1.0, 0.5, False),
    (0.5, 0.5, 0.6, False),
    (0.5, 0.8, 0.4, True),
    (1.0, 0.4, 0.6, True),
]


def gain(block_lr: float, block_momentum: float) -> float:
    return block_lr / (1 - block_momentum)


@pytest.mark.parametrize(("alpha", "eta", "m", "nesterov"), VARIANTS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("merge", ["delta", "interpolate"])
def test_surviving_progress(alpha: float, eta: float, m: float, nesterov: bool, size: int, merge: str) -> None:
    algorithm = BMUF(alpha=alpha, block_lr=eta, block_momentum=m, nesterov=nesterov)
    measured = surviving_share(algorithm, merge, size)
    assert measured == pytest.approx(algorithm.surviving_progress(merge, size), abs=1e-6)


@pytest.mark.parametrize(("alpha", "eta"), [(0.5, 1.0), (0.5, 0.6), (0.3, 1.3)])
def test_the_published_share_without_momentum(alpha: float, eta: float) -> None:
    published = (1 - alpha) * eta / (eta + alpha * (1 - eta))
    assert surviving_share(BMUF(alpha=alpha, block_lr=eta), "interpolate", 2) == pytest.approx(published, abs=1e-9)


@pytest.mark.parametrize(("eta", "m"), [(1.0, 0.5), (0.5, 0.5), (1.0, 2 / 3)])
def test_the_published_gain_of_the_delta_rule_with_momentum(eta: float, m: float) -> None:
    measured = surviving_share(BMUF(block_lr=eta, block_momentum=m), "delta", 2)
    assert measured == pytest.approx(gain(eta, m), abs=1e-6)


def test_without_momentum_the_global_model_goes_block_lr_of_the_way() -> None:
    algorithm = BMUF(block_lr=0.25)
    anchor, state = algorithm.update(torch.tensor([4.0]), PlainBlockState(torch.tensor([0.0])))
    assert anchor.tolist() == [1.0]
    assert state.global_model.tolist() == [1.0]


def test_block_momentum_by_hand() -> None:
    algorithm = BMUF(block_lr=0.5, block_momentum=0.5)
    state = BlockState(torch.tensor([1.0]), torch.tensor([2.0]))
    anchor, state = algorithm.update(torch.tensor([3.0]), state)
    assert (state.velocity.tolist(), state.global_model.tolist(), anchor.tolist()) == ([2.0], [3.0], [3.0])


def test_nesterov_pulls_to_the_look_ahead_and_measures_from_it() -> None:
    algorithm = BMUF(block_lr=1.0, block_momentum=0.5, nesterov=True)
    state = BlockState(torch.tensor([1.0]), torch.tensor([2.0]))  # look-ahead at 2
    anchor, state = algorithm.update(torch.tensor([3.0]), state)  # block gradient 1
    assert (state.velocity.tolist(), state.global_model.tolist(), anchor.tolist()) == ([2.0], [3.0], [4.0])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("eta", "m"), [(1.0, 0.5), (0.7, 0.9), (1.4, 0.3)])
def test_the_anchor_goes_the_way_of_sgd_on_the_block_gradient(eta: float, m: float, nesterov: bool) -> None:
    """DiLoCo's outer step: torch's SGD with momentum, on anchor - mean."""
    algorithm = BMUF(block_lr=eta, block_momentum=m, nesterov=nesterov)
    outer = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    sgd = torch.optim.SGD([outer], lr=eta, momentum=m, nesterov=nesterov)
    state = algorithm.init(outer.detach())
    for block in range(8):
        mean = outer.detach() + torch.sin(torch.arange(5, dtype=torch.float64) + block)
        outer.grad = outer.detach() - mean
        sgd.step()
        anchor, state = algorithm.update(mean, state)
        torch.testing.assert_close(anchor, outer.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.25, 1.0, 1.5])
def test_without_momentum_too(eta: float) -> None:
    algorithm = BMUF(block_lr=eta)
    outer = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    sgd = torch.optim.SGD([outer], lr=eta)
    state = algorithm.init(outer.detach())
    for block in range(8):
        mean = torch.cos(torch.arange(3, dtype=torch.float64) * block)
        outer.grad = outer.detach() - mean
        sgd.step()
        anchor, state = algorithm.update(mean, state)
        torch.testing.assert_close(anchor, outer.detach(), rtol=1e-12, atol=1e-12)


def test_block_lr_1_without_momentum_is_model_averaging() -> None:
    mean = torch.tensor([3.0, -1.0])
    anchor, _ = BMUF().update(mean, BMUF().init(torch.tensor([7.0, 5.0])))
    assert torch.equal(anchor, mean)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("eta", "m"), [(1.0, 0.5), (0.6, 0.7)])
def test_replicas_that_do_not_train_come_to_rest_at_the_mean(eta: float, m: float, nesterov: bool) -> None:
    """Whatever the velocity: at rest all replicas and the anchor are one."""
    algorithm = BMUF(alpha=0.5, block_lr=eta, block_momentum=m, nesterov=nesterov)
    replicas = [torch.tensor([float(rank)], dtype=torch.float64) for rank in range(3)]
    state = algorithm.init(torch.zeros(1, dtype=torch.float64))
    for _ in range(400):
        anchor, state = algorithm.update(torch.as_tensor(sum(replicas) / 3), state)
        replicas = [each + 0.5 * (anchor - each) for each in replicas]
    for each in replicas:
        torch.testing.assert_close(each, anchor, rtol=1e-9, atol=1e-9)
    assert state.velocity.abs().item() < 1e-9


@pytest.mark.parametrize("nesterov", [False, True])
def test_rebase_puts_what_replicas_start_from_at_the_mean_and_keeps_the_velocity(nesterov: bool) -> None:
    algorithm = BMUF(block_momentum=0.5, nesterov=nesterov)
    mean, velocity = torch.tensor([3.0]), torch.tensor([2.0])
    state = algorithm.rebase(mean, BlockState(torch.tensor([9.0]), velocity))
    assert torch.equal(state.velocity, velocity)
    assert state.global_model.tolist() == ([2.0] if nesterov else [3.0])


def test_without_momentum_there_is_one_vector_of_state() -> None:
    assert len(BMUF().init(torch.zeros(3))) == 1
    assert len(BMUF(block_momentum=0.1).init(torch.zeros(3))) == 2
