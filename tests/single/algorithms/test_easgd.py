"""S-EASGD: the exchange with the center in both forms, and what survives of steps in flight."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies
from simulation import surviving_share

from hvd_shadowsync.algorithms import ElasticAveraging


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("merge", ["delta", "interpolate"])
def test_surviving_progress(alpha: float, size: int, symmetric: bool, merge: str) -> None:
    algorithm = ElasticAveraging(alpha=alpha, symmetric=symmetric)
    measured = surviving_share(algorithm, merge, size)
    assert measured == pytest.approx(algorithm.surviving_progress(merge, size), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_published_share(alpha: float, size: int) -> None:
    """Sequential exchanges with nothing in flight but the step: N / (N + 1 - alpha)."""
    measured = surviving_share(ElasticAveraging(alpha=alpha), "delta", size)
    assert measured == pytest.approx(size / (size + 1 - alpha), abs=1e-6)


def test_the_papers_exchange_answers_with_the_value_just_updated() -> None:
    center, answer = ElasticAveraging(alpha=0.25).elastic(torch.tensor([0.0]), torch.tensor([4.0]))
    assert (center.tolist(), answer.tolist()) == ([1.0], [1.0])


def test_the_symmetric_exchange_answers_with_the_value_before() -> None:
    center, answer = ElasticAveraging(alpha=0.25, symmetric=True).elastic(torch.tensor([0.0]), torch.tensor([4.0]))
    assert (center.tolist(), answer.tolist()) == ([1.0], [0.0])


@hypothesis.given(
    alpha=strategies.floats(0.01, 1),
    starts=strategies.lists(strategies.floats(-10, 10), min_size=1, max_size=5),
    turns=strategies.lists(strategies.tuples(strategies.integers(0, 4), strategies.floats(-1, 1)), max_size=20),
)
def test_the_symmetric_form_keeps_the_sum_of_replicas_and_center(
    alpha: float, starts: list[float], turns: list[tuple[int, float]]
) -> None:
    """sum(w) + z moves by the steps alone, in whatever order ranks exchange, and whatever is in flight."""
    algorithm = ElasticAveraging(alpha=alpha, symmetric=True)
    replicas = [torch.tensor([start], dtype=torch.float64) for start in starts]
    center = torch.tensor([1.0], dtype=torch.float64)
    expected = float(sum(replicas) + center)
    for turn, step in turns:
        rank = turn % len(replicas)
        snapshot = replicas[rank]
        center, answer = algorithm.elastic(center, snapshot)
        replicas[rank] = snapshot + step + alpha * (answer - snapshot)
        expected += step
        assert float(sum(replicas) + center) == pytest.approx(expected, abs=1e-9)


def test_the_exchange_is_pure() -> None:
    center, replica = torch.tensor([1.0]), torch.tensor([2.0])
    for symmetric in (False, True):
        ElasticAveraging(symmetric=symmetric).elastic(center, replica)
    assert (center.tolist(), replica.tolist()) == ([1.0], [2.0])


def test_the_center_is_not_met_in_lockstep() -> None:
    assert ElasticAveraging.asynchronous
