"""S-MA: what survives of steps in flight, and that the delta rule keeps the mean of the replicas."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies
from simulation import merged, surviving_share

from hvd_shadowsync.algorithms import ModelAveraging

ALPHAS = [0.1, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_progress_survives_the_delta_rule(alpha: float, size: int) -> None:
    algorithm = ModelAveraging(alpha=alpha)
    assert surviving_share(algorithm, "delta", size) == pytest.approx(1, abs=1e-9)
    assert algorithm.surviving_progress("delta", size) == 1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_interpolation_keeps_1_minus_alpha(alpha: float) -> None:
    algorithm = ModelAveraging(alpha=alpha)
    assert surviving_share(algorithm, "interpolate", 3) == pytest.approx(1 - alpha, abs=1e-9)
    assert algorithm.surviving_progress("interpolate", 3) == pytest.approx(1 - alpha)


def test_the_anchor_is_the_mean() -> None:
    mean = torch.tensor([1.0, 2.0])
    algorithm = ModelAveraging(alpha=0.5)
    assert torch.equal(algorithm.update(mean, algorithm.init(mean))[0], mean)


@hypothesis.given(
    alpha=strategies.floats(0.01, 1),
    steps=strategies.lists(strategies.floats(-10, 10), min_size=1, max_size=6),
    starts=strategies.lists(strategies.floats(-10, 10), min_size=6, max_size=6),
)
def test_the_delta_rule_keeps_the_mean_of_the_replicas(alpha: float, steps: list[float], starts: list[float]) -> None:
    """Whatever each rank does while a round is in flight, the mean moves by the mean of the steps."""
    snapshots = [torch.tensor([start], dtype=torch.float64) for start in starts[: len(steps)]]
    mean = sum(snapshots) / len(snapshots)
    algorithm = ModelAveraging(alpha=alpha)
    anchor, _ = algorithm.update(torch.as_tensor(mean), algorithm.init(snapshots[0]))
    replicas = [
        merged(snapshot + step, snapshot, anchor, alpha, "delta")
        for snapshot, step in zip(snapshots, steps, strict=True)
    ]
    expected = float(mean) + sum(steps) / len(steps)
    assert float(sum(replicas)) / len(replicas) == pytest.approx(expected, abs=1e-9)


@hypothesis.given(alpha=strategies.floats(0.01, 0.99), weights=strategies.lists(strategies.floats(0.1, 3), min_size=2))
def test_the_delta_rule_keeps_the_weighted_mean_as_well(alpha: float, weights: list[float]) -> None:
    snapshots = [torch.tensor([float(index**2)], dtype=torch.float64) for index in range(len(weights))]
    mean = sum(w * s for w, s in zip(weights, snapshots, strict=True)) / sum(weights)
    replicas = [merged(each, each, torch.as_tensor(mean), alpha, "delta") for each in snapshots]
    after = sum(w * float(r) for w, r in zip(weights, replicas, strict=True)) / sum(weights)
    assert after == pytest.approx(float(mean), abs=1e-9)
