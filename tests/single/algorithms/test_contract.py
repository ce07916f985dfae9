"""What every algorithm promises: frozen, pure, element-wise, state a named tuple, bad hyper-parameters refused."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from hvd_shadowsync import algorithms
from hvd_shadowsync.algorithms import BMUF, Algorithm, ElasticAveraging, ModelAveraging
from hvd_shadowsync.algorithms.base import named, slices

EVERY = [
    ModelAveraging(),
    ModelAveraging(alpha=0.3),
    BMUF(),
    BMUF(alpha=0.5, block_lr=0.7),
    BMUF(block_momentum=0.6),
    BMUF(alpha=0.5, block_lr=0.9, block_momentum=0.6),
    BMUF(block_momentum=0.6, nesterov=True),
    ElasticAveraging(),
    ElasticAveraging(alpha=0.2, symmetric=True),
]
every = pytest.mark.parametrize("algorithm", EVERY, ids=str)


def vectors(numel: int, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


def test_every_algorithm_of_the_package_is_in_these_tests() -> None:
    public = {getattr(algorithms, name) for name in algorithms.__all__}
    concrete = {kind for kind in public if issubclass(kind, Algorithm) and not inspect.isabstract(kind)}
    assert concrete == {type(algorithm) for algorithm in EVERY}


@every
def test_is_a_frozen_value(algorithm: Algorithm) -> None:
    assert dataclasses.is_dataclass(algorithm)
    for field in dataclasses.fields(algorithm):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(algorithm, field.name, 0.5)
    assert algorithm == dataclasses.replace(algorithm)
    assert hash(algorithm) == hash(dataclasses.replace(algorithm))


@every
def test_state_is_a_named_tuple_of_tensors_like_the_weights(algorithm: Algorithm) -> None:
    (params,) = vectors(7, 1)
    for state in [algorithm.init(params), algorithm.update(params + 1, algorithm.init(params))[1]]:
        assert isinstance(state, tuple)
        assert len(state._fields) == len(state)
        assert type(state) is type(algorithm.init(params))
        for _, tensor in named(state):
            assert tensor.shape == params.shape
            assert tensor.dtype == params.dtype


@every
def test_init_keeps_no_view_of_the_weights(algorithm: Algorithm) -> None:
    (params,) = vectors(7, 1)
    state = algorithm.init(params)
    before = [tensor.clone() for tensor in state]
    params.zero_()
    assert all(map(torch.equal, state, before))


@every
def test_update_and_rebase_are_pure(algorithm: Algorithm) -> None:
    params, reduced, mean = vectors(9, 3)
    state = algorithm.update(params * 0.5, algorithm.init(params))[1]
    given = [reduced, mean, *state]
    before = [tensor.clone() for tensor in given]
    results: list[Any] = [(algorithm.update(reduced, state), algorithm.rebase(mean, state)) for _ in range(2)]
    assert all(map(torch.equal, given, before))
    (anchor, new_state), rebased = results[0]
    (again, new_again), rebased_again = results[1]
    for left, right in zip([anchor, *new_state, *rebased], [again, *new_again, *rebased_again], strict=True):
        assert torch.equal(left, right)


@every
@hypothesis.given(cuts=strategies.lists(strategies.integers(0, 40), max_size=4), seed=strategies.integers(0, 99))
def test_update_is_element_wise(algorithm: Algorithm, cuts: list[int], seed: int) -> None:
    """The whole vector at once, or slice by slice: the same, over several rounds."""
    params, *reduced = vectors(40, 4, seed)
    whole, pieces = algorithm.init(params), algorithm.init(params)
    borders = sorted({0, 40, *cuts})
    for vector in reduced:
        anchor, whole = algorithm.update(vector, whole)
        parts = [slice(*pair) for pair in itertools.pairwise(borders)]
        updated = [algorithm.update(vector[part], slices(pieces, part)) for part in parts]
        pieces = type(pieces)(*(torch.cat(columns) for columns in zip(*(new for _, new in updated), strict=True)))
        torch.testing.assert_close(torch.cat([part_anchor for part_anchor, _ in updated]), anchor)
        for left, right in zip(pieces, whole, strict=True):
            torch.testing.assert_close(left, right)


@every
def test_replicas_that_agree_and_stand_still_stay_where_they_are(algorithm: Algorithm) -> None:
    (params,) = vectors(7, 1)
    anchor, _ = algorithm.update(params, algorithm.init(params))
    torch.testing.assert_close(anchor, params)


@every
def test_after_a_rebase_a_velocity_is_all_that_moves_the_anchor(algorithm: Algorithm) -> None:
    params, reduced, mean = vectors(7, 3)
    state = algorithm.rebase(mean, algorithm.update(reduced, algorithm.init(params))[1])
    if "velocity" not in state._fields:
        torch.testing.assert_close(algorithm.update(mean, state)[0], mean)
        return
    at_rest = state._replace(velocity=torch.zeros_like(mean), global_model=mean)
    torch.testing.assert_close(algorithm.update(mean, at_rest)[0], mean)
    assert not torch.equal(algorithm.update(mean, state)[0], mean)


@every
def test_precision_is_that_of_the_weights(algorithm: Algorithm) -> None:
    for dtype in (torch.float32, torch.float64):
        params, reduced = (vector.to(dtype) for vector in vectors(5, 2))
        anchor, state = algorithm.update(reduced, algorithm.init(params))
        assert {tensor.dtype for tensor in (anchor, *state)} == {dtype}


@every
def test_vectors_may_be_empty(algorithm: Algorithm) -> None:
    anchor, state = algorithm.update(torch.empty(0), algorithm.init(torch.empty(0)))
    assert [tensor.numel() for tensor in (anchor, *state)] == [0] * (1 + len(state))


@every
@pytest.mark.parametrize("merge", ["delta", "interpolate"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_surviving_progress_lies_between_nothing_and_the_gain_of_a_round(
    algorithm: Algorithm, merge: str, size: int
) -> None:
    gain = algorithm.block_lr / (1 - algorithm.block_momentum) if isinstance(algorithm, BMUF) else 1.0
    share = algorithm.surviving_progress(merge, size)
    assert 0 <= share <= max(gain, 1.0)
    assert (share == 0) == (merge == "interpolate" and algorithm.alpha == 1)
    assert algorithm.surviving_progress("interpolate", size) <= algorithm.surviving_progress("delta", size)


def test_slices_are_views() -> None:
    state = BMUF(block_momentum=0.5).init(torch.zeros(6))
    slices(state, slice(2, 4)).velocity.fill_(1)
    assert state.velocity.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("kind", [ModelAveraging, BMUF, ElasticAveraging])
@pytest.mark.parametrize("alpha", [0, -0.5, 1.0001, float("nan"), float("inf")])
def test_alpha_outside_its_interval_is_refused(kind: type[Algorithm], alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha=.* is outside \(0, 1\]; give a number in that interval"):
        kind(alpha=alpha)


@pytest.mark.parametrize("kind", [ModelAveraging, BMUF, ElasticAveraging])
@pytest.mark.parametrize("alpha", ["0.5", None, True, [0.5]])
def test_alpha_that_is_no_number_is_refused(kind: type[Algorithm], alpha: Any) -> None:
    with pytest.raises(TypeError, match=r"alpha=.* is not a number; give one in \(0, 1\]"):
        kind(alpha=alpha)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_lr": 0}, r"block_lr=0 is outside \(0, inf\); give"),
        ({"block_lr": float("inf")}, r"block_lr=inf is outside \(0, inf\); give"),
        ({"block_momentum": 1.0}, r"block_momentum=1.0 is outside \[0, 1\); give"),
        ({"block_momentum": -0.1}, r"block_momentum=-0.1 is outside \[0, 1\); give"),
        ({"nesterov": True}, r"nesterov=True needs block_momentum > 0; give both or neither"),
    ],
)
def test_hyper_parameters_of_bmuf(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BMUF(**arguments)
