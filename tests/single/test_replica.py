"""The replica: round trips of mixed tensors, parts of snapshots, the three merges, names and fingerprints."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from hvd_shadowsync.replica import Merge, NamedTensor, Replica

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.dim() > 1 else tensor,
    "every second": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "a window": lambda tensor: torch.cat([tensor] * 3)[len(tensor) : 2 * len(tensor)] if tensor.dim() else tensor,
}


@strategies.composite
def tensors(draw: strategies.DrawFn, dtypes: list[torch.dtype]) -> Tensor:
    """Small integers, exact in every type; any shape and layout, empty ones and numbers without dimension as well."""
    shape = draw(strategies.lists(strategies.integers(0, 4), max_size=3))
    dtype = draw(strategies.sampled_from(dtypes))
    values = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(draw(strategies.integers(0, 999))))
    return LAYOUTS[draw(strategies.sampled_from(sorted(LAYOUTS)))](values.to(dtype))


def lists_of(dtypes: list[torch.dtype], *, least: int = 0) -> strategies.SearchStrategy[list[Tensor]]:
    return strategies.lists(tensors(dtypes), min_size=least, max_size=4)


def replica_of(params: list[Tensor], buffers: list[Tensor] | None = None) -> Replica:
    return Replica(named("param", params), named("buffer", buffers or []))


def named(kind: str, given: list[Tensor]) -> list[NamedTensor]:
    return [NamedTensor(f"{kind}{index}", tensor) for index, tensor in enumerate(given)]


def snapshot_of(replica: Replica) -> Tensor:
    flat = replica.empty().fill_(float("nan"))
    replica.snapshot(flat)
    return flat


def integers_of(replica: Replica) -> Tensor:
    flat = replica.empty_integers().fill_(-99)
    replica.snapshot_integers(flat)
    return flat


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


mixed = hypothesis.given(
    params=lists_of(FLOATS + COMPLEX, least=1), buffers=lists_of(FLOATS + COMPLEX + INTEGERS), data=strategies.data()
)


# --- snapshots --------------------------------------------------------------------------------------------------------


@mixed
def test_weights_then_buffers_in_one_vector_and_integers_in_another(
    params: list[Tensor], buffers: list[Tensor], data: strategies.DataObject
) -> None:
    replica = replica_of(params, buffers)
    floating = [each for each in buffers if each.is_floating_point() or each.is_complex()]
    whole = [each for each in buffers if not (each.is_floating_point() or each.is_complex())]
    flat = [value for each in params + floating for value in real(each).reshape(-1).tolist()]
    assert snapshot_of(replica).tolist() == flat
    assert integers_of(replica).tolist() == [int(value) for each in whole for value in each.reshape(-1).tolist()]
    assert replica.num_weights == sum(real(each).numel() for each in params)
    assert replica.numel == len(flat)


@mixed
def test_what_is_assigned_back_is_what_was_there(
    params: list[Tensor], buffers: list[Tensor], data: strategies.DataObject
) -> None:
    replica = replica_of(params, buffers)
    live = params + buffers
    before = [each.clone() for each in live]
    places = [(each.data_ptr(), each.stride(), each.dtype) for each in live]
    flat, integers = snapshot_of(replica), integers_of(replica)
    for each in live:
        each.zero_()
    replica.merge(flat, Merge.ASSIGN)
    replica.assign_integers(integers)
    assert all(torch.equal(left, right) for left, right in zip(live, before, strict=True))
    assert places == [(each.data_ptr(), each.stride(), each.dtype) for each in live], "live tensors keep their storage"


@mixed
def test_parts_in_order_are_the_snapshot(
    params: list[Tensor], buffers: list[Tensor], data: strategies.DataObject
) -> None:
    replica = replica_of(params, buffers)
    cuts = data.draw(strategies.lists(strategies.integers(0, replica.numel), max_size=5))
    borders = sorted({0, replica.numel, *cuts})
    flat = replica.empty().fill_(float("nan"))
    for start, stop in itertools.pairwise(borders):
        replica.snapshot_part(flat, slice(start, stop))
        assert not flat[start:stop].isnan().any()
    assert torch.equal(flat, snapshot_of(replica))


@mixed
@pytest.mark.parametrize("hogwild", [False, True])
def test_adding_and_pulling(
    params: list[Tensor], buffers: list[Tensor], data: strategies.DataObject, hogwild: bool
) -> None:
    """Every live number moves by what is staged for it; halves and quarters are exact in every type."""
    for how, alpha, move in [(Merge.ADD, 0.3, lambda live: live + 0.5), (Merge.PULL, 0.25, lambda live: live + 0.25)]:
        replica = replica_of(params, buffers)
        expected = [move(real(each.tensor).double()) for each in replica.tensors]
        staged = torch.full((replica.numel,), 0.5, dtype=replica.dtype)
        if how is Merge.PULL:
            staged = snapshot_of(replica) + 1
        replica.merge(staged, how, alpha, hogwild=hogwild)
        for each, wanted in zip(replica.tensors, expected, strict=True):
            assert torch.equal(real(each.tensor).double(), wanted)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.complex64], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.complex128], torch.float64),
    ],
)
def test_the_precision_of_the_flat_vector(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    assert replica_of([torch.ones(2, dtype=dtype) for dtype in dtypes]).empty().dtype == expected


def test_a_double_among_the_buffers_counts() -> None:
    buffer = torch.tensor([1 / 3], dtype=torch.float64)
    assert snapshot_of(replica_of([torch.ones(1)], [buffer]))[1] == buffer[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_numbers_that_are_none_travel(value: float) -> None:
    (param,) = params = [torch.tensor([value])]
    flat = snapshot_of(replica_of(params))
    param.zero_()
    replica_of(params).merge(flat, Merge.ASSIGN)
    assert str(param.item()) == str(value)


def test_integers_beyond_floating_point_travel() -> None:
    counter = torch.tensor(2**62 + 1)
    assert integers_of(replica_of([torch.ones(1)], [counter])).tolist() == [2**62 + 1]


def test_a_replica_of_nothing() -> None:
    replica = replica_of([])
    assert (replica.numel, replica.num_weights) == (0, 0)
    for how in Merge:
        replica.merge(snapshot_of(replica), how)


def test_empty_buffers_behind_the_weights() -> None:
    weight, nothing = torch.ones(3), torch.empty(0)
    replica = replica_of([weight], [nothing])
    assert snapshot_of(replica).tolist() == [1.0] * 3
    replica.merge(torch.full((3,), 2.0), Merge.ASSIGN)
    assert weight.tolist() == [2.0] * 3


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", list(Merge))
@pytest.mark.parametrize("hogwild", [False, True])
def test_autograd_notices_a_merge_unless_it_is_hogwild(how: Merge, hogwild: bool) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    version = param._version
    replica_of([param]).merge(torch.full((3,), 2.0), how, 0.5, hogwild=hogwild)
    assert (param._version == version) == hogwild
    assert param.requires_grad
    assert param.is_leaf


def test_snapshots_know_no_gradients() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    replica = replica_of([param])
    assert not snapshot_of(replica).requires_grad
    part = replica.empty()
    replica.snapshot_part(part, slice(0, 3))
    assert not part.requires_grad


# --- names ------------------------------------------------------------------------------------------------------------


@hypothesis.given(params=lists_of(FLOATS + COMPLEX, least=1), buffers=lists_of(FLOATS))
def test_by_name_and_back(params: list[Tensor], buffers: list[Tensor]) -> None:
    replica = replica_of(params, buffers)
    weights = snapshot_of(replica)[: replica.num_weights]
    parts = replica.by_name(weights)
    assert list(parts) == [f"param{index}" for index in range(len(params))]
    for tensor, part in zip(params, parts.values(), strict=True):
        assert torch.equal(part.to(real(tensor).dtype), real(tensor))
    assert torch.equal(replica.from_names(parts, torch.zeros_like(weights)), weights)


def test_by_name_copies() -> None:
    replica = replica_of([torch.ones(2)])
    flat = snapshot_of(replica)
    replica.by_name(flat)["param0"].zero_()
    assert flat.tolist() == [1.0, 1.0]


def test_names_that_are_missing_stay_at_the_default_and_unknown_ones_are_passed_over() -> None:
    replica = replica_of([torch.zeros(2), torch.zeros(1)], [torch.zeros(1)])
    found = replica.from_names(
        {"param1": torch.tensor([5.0]), "other": torch.ones(9)}, torch.tensor([1.0, 2.0, 3.0, 4.0])
    )
    assert found.tolist() == [1.0, 2.0, 5.0]


def test_segments_say_where_tensors_lie() -> None:
    replica = replica_of([torch.zeros(2, 3), torch.zeros(2, dtype=torch.complex64)], [torch.zeros(1), torch.tensor(1)])
    lies = [(segment.name, segment.start, segment.stop) for segment in replica.segments]
    assert lies == [("param0", 0, 6), ("param1", 6, 10), ("buffer0", 10, 11)]


# --- fingerprints -----------------------------------------------------------------------------------------------------


def fingerprint(
    *shapes: tuple[int, ...], names: str = "ab", dtype: torch.dtype = torch.float32, counters: int = 0
) -> int:
    params = [NamedTensor(name, torch.rand(shape).to(dtype)) for name, shape in zip(names, shapes, strict=False)]
    return Replica(params, named("counter", [torch.tensor(5)] * counters)).fingerprint


def test_fingerprints_do_not_depend_on_values() -> None:
    assert fingerprint((2, 3)) == fingerprint((2, 3))


def test_fingerprints_tell_shapes_names_types_order_and_counters_apart() -> None:
    others = [
        fingerprint((2, 3)),
        fingerprint((3, 2)),
        fingerprint((6,)),
        fingerprint((2, 3), names="xy"),
        fingerprint((2, 3), dtype=torch.float64),
        fingerprint((2, 3), counters=1),
        fingerprint((2, 3), (1,)),
        fingerprint((2, 3), (1,), names="ba"),
    ]
    assert len(set(others)) == len(others)
    assert all(0 <= each < 2**62 for each in others)


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """Python's own hash is not."""
    assert Replica([NamedTensor("w", torch.zeros(2))]).fingerprint == 2_087_793_811_510_646_672
