"""Whether replicas match: refused on every rank, with the first difference named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from ranks_as_threads import on_ranks
from torch import Tensor

from hvd_shadowsync.agree import (
    describe_optimizer,
    describe_settings,
    describe_tensors,
    describe_values,
    require_same,
)
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.errors import ReplicaMismatchError
from hvd_shadowsync.replica import NamedTensor

REMEDY = "build the same model, optimizer and wrapper, in the same order, on every rank"


def complaints(lines: list[list[tuple[str, str]]]) -> list[str]:
    """Return what each rank is told."""

    def program(comm: Communicator) -> str:
        try:
            require_same(comm, lines[comm.rank])
        except ReplicaMismatchError as error:
            return str(error)
        return ""

    return on_ranks(len(lines), program)


def values_complaints(tensors: list[Tensor]) -> list[str]:
    def program(comm: Communicator) -> str:
        try:
            named = [NamedTensor("w", torch.ones(1)), NamedTensor("v", tensors[comm.rank])]
            require_same(comm, describe_values(named))
        except ReplicaMismatchError as error:
            return str(error)
        return ""

    return on_ranks(len(tensors), program)


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_lines_pass(size: int) -> None:
    assert complaints([[("a", "1"), ("b", "2")]] * size) == [""] * size


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([("a", "1"), ("b", "2")], [("a", "1"), ("b", "3")], "replicas differ in b: 2 on rank 0, 3 on rank 1"),
        ([("a", "1"), ("b", "2")], [("a", "1"), ("c", "2")], "replicas differ: rank 0 has b where rank 1 has c"),
        ([("a", "1")], [("a", "1"), ("c", "2")], "replicas differ: rank 1 has c (2), which rank 0 lacks"),
        ([("a", "1"), ("c", "2")], [("a", "1")], "replicas differ: rank 0 has c (2), which rank 1 lacks"),
        ([], [("a", "1")], "replicas differ: rank 1 has a (1), which rank 0 lacks"),
        ([("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")], "replicas differ: rank 0 has a where rank 1 has b"),
    ],
)
def test_the_first_difference_is_named_on_every_rank(
    first: list[tuple[str, str]], second: list[tuple[str, str]], message: str
) -> None:
    assert complaints([first, second]) == [f"{message}; {REMEDY}"] * 2


def test_the_rank_that_differs_is_named() -> None:
    told = complaints([[("a", "1")], [("a", "1")], [("a", "2")], [("a", "3")]])
    assert told == [f"replicas differ in a: 1 on rank 0, 2 on rank 2; {REMEDY}"] * 4


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_equal_values_pass_and_others_do_not(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape).to(dtype)
    assert values_complaints([ones, ones.clone()]) == ["", ""]
    if ones.numel():
        other = ones.clone()
        other.view(-1)[-1] = 0
        for told in values_complaints([ones, other]):
            assert re.match(r"replicas differ in initial value of v: sha256 \w+ on rank 0, sha256 \w+ on rank 1", told)


def test_values_are_compared_bit_by_bit() -> None:
    assert values_complaints([torch.tensor([float("nan")])] * 2) == ["", ""]
    assert all(values_complaints([torch.tensor([0.0]), torch.tensor([-0.0])]))
    third = torch.tensor([1 / 3])
    assert all(values_complaints([third, torch.nextafter(third, torch.ones(1))]))


def test_how_values_lie_in_memory_does_not_matter() -> None:
    square = torch.arange(6.0).view(2, 3)
    assert values_complaints([square, square.t().contiguous().t()]) == ["", ""]


# --- descriptions -----------------------------------------------------------------------------------------------------


def test_tensors_are_described_by_shape_and_dtype() -> None:
    described = describe_tensors([NamedTensor("w", torch.ones(2, 3)), NamedTensor("n", torch.tensor(1))])
    assert described == [
        ("parameter w", "shape (2, 3), torch.float32"),
        ("parameter n", "shape (), torch.int64"),
    ]


def test_settings_are_described_by_value() -> None:
    described = describe_settings({"merge": "delta", "wire_dtype": torch.float16})
    assert described == [("argument merge", "'delta'"), ("argument wire_dtype", "torch.float16")]


def optimizer(**options: Any) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    return torch.optim.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], lr=0.1, **options)


def test_optimizers_are_described_by_class_settings_and_group_sizes() -> None:
    lines = dict(describe_optimizer(optimizer(momentum=0.9)))
    assert lines["optimizer"] == "SGD"
    assert (lines["optimizer group 0, lr"], lines["optimizer group 1, lr"]) == ("0.1", "0.5")
    assert lines["optimizer group 0, momentum"] == "0.9"
    assert (lines["optimizer group 0, parameters"], lines["optimizer group 1, parameters"]) == ("2", "1")


def test_settings_that_are_tensors_or_objects_do_not_depend_on_the_process() -> None:
    """An address in a description would make every pair of ranks differ."""
    made = [optimizer() for _ in range(2)]
    for each in made:
        each.param_groups[0]["lr"] = torch.tensor(0.25)
        each.param_groups[0]["schedule"] = object()
    first, second = map(describe_optimizer, made)
    assert first == second
    assert dict(first)["optimizer group 0, lr"] == "0.25"
    assert dict(first)["optimizer group 0, schedule"] == "object"


@pytest.mark.parametrize("change", [{"momentum": 0.8}, {"nesterov": False, "weight_decay": 0.1}])
def test_other_settings_differ(change: dict[str, Any]) -> None:
    told = complaints(
        [describe_optimizer(optimizer(momentum=0.9)), describe_optimizer(optimizer(**{"momentum": 0.9} | change))]
    )
    assert f"optimizer group 0, {'weight_decay' if 'weight_decay' in change else 'momentum'}: " in told[0]
