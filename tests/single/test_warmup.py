"""The warm-up: gradients averaged in the training thread, ranks that stop earlier, sparse and missing gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks_as_threads import on_ranks
from recording import Recorded
from torch import Tensor

from hvd_shadowsync.ballot import Intent
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.errors import ShadowSyncError
from hvd_shadowsync.replica import NamedTensor
from hvd_shadowsync.warmup import Warmup


def parameters(
    *gradients: Tensor | None, shape: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32
) -> list[NamedTensor]:
    made = []
    for index, gradient in enumerate(gradients):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = gradient
        made.append(NamedTensor(f"p{index}", param))
    return made


def warmup_of(comm: Communicator, steps: int, **options: Any) -> Warmup:
    return Warmup(Survivors(comm), Poller(), steps, **options)


def root_of(warmup: Warmup) -> int:
    return warmup.trained[0] if warmup.trained else 0


def full(value: float, **options: Any) -> Tensor:
    return torch.full((4,), value, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_gradients_become_their_mean(dtype: torch.dtype) -> None:
    def program(comm: Communicator) -> tuple[list[Tensor], int]:
        warmup = warmup_of(comm, 3)
        params = parameters(full(float(comm.rank), dtype=dtype), full(4.0 * comm.rank + 1, dtype=dtype), dtype=dtype)
        warmup.average(params)
        return [each.tensor.grad for each in params], warmup.left

    for gradients, left in on_ranks(3, program):
        assert [gradient.real.tolist() for gradient in gradients] == [[1.0] * 4, [5.0] * 4]
        assert gradients[0].dtype == dtype
        assert left == 2


def test_weights_are_left_alone_and_gradients_stay_where_they_are() -> None:
    def program(comm: Communicator) -> tuple[list[float], bool]:
        (each,) = params = parameters(full(1.0 + comm.rank))
        place = each.tensor.grad.data_ptr()
        warmup_of(comm, 1).average(params)
        return each.tensor.tolist(), each.tensor.grad.data_ptr() == place

    assert on_ranks(2, program) == [([0.0] * 4, True)] * 2


def test_a_rank_without_a_gradient_contributes_zeros_and_gets_the_mean() -> None:
    def program(comm: Communicator) -> list[list[float] | None]:
        params = parameters(full(6.0) if comm.rank == 1 else None, None, full(3.0))
        warmup_of(comm, 1).average(params)
        return [None if each.tensor.grad is None else each.tensor.grad.tolist() for each in params]

    assert on_ranks(3, program) == [[[2.0] * 4, None, [3.0] * 4]] * 3


def test_frozen_parameters_are_left_out() -> None:
    def program(comm: Communicator) -> list[Any]:
        params = parameters(full(float(comm.rank)), full(float(comm.rank)))
        params[0].tensor.requires_grad_(False)
        warmup_of(comm, 1).average(params)
        return [each.tensor.grad.tolist() for each in params]

    assert on_ranks(2, program) == [[[0.0] * 4, [0.5] * 4], [[1.0] * 4, [0.5] * 4]]


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_gradients(sparse_as_dense: bool) -> None:
    def program(comm: Communicator) -> Tensor:
        rows = torch.tensor([[comm.rank, 3]])
        values = torch.ones(2, 2) * (comm.rank + 1)
        gradient = torch.sparse_coo_tensor(rows, values, (5, 2), check_invariants=True)
        (each,) = params = parameters(gradient, shape=(5, 2))
        warmup_of(comm, 1, sparse_as_dense=sparse_as_dense).average(params)
        return each.tensor.grad

    for gradient in on_ranks(2, program):
        assert gradient.is_sparse != sparse_as_dense
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        assert dense.tolist() == [[0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [1.5, 1.5], [0.0, 0.0]]
        if gradient.is_sparse:
            assert gradient.sparse_dim() == 1
            assert sorted(gradient.coalesce().indices()[0].tolist()) == [0, 1, 3]


def test_what_travels_are_the_gradients_and_who_has_them() -> None:
    def program(comm: Communicator) -> list[tuple[str, int]]:
        watched = Recorded(comm)
        warmup = warmup_of(watched, 1)
        warmup.average(parameters(full(1.0), None))
        return watched.record.calls

    assert on_ranks(2, program) == [[("iallgather", 3), ("ialltoall", 16), ("iallgather", 8)]] * 2


# --- ranks with fewer steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaving", [False, True])
def test_a_rank_that_stops_does_not_count_and_holds_nobody_up(leaving: bool) -> None:
    """Rank 1 has one step of three; rank 0 goes on with its own gradients."""

    def program(comm: Communicator) -> tuple[list[Any], int, int]:
        warmup, seen = warmup_of(comm, 3), []
        for _ in range(3 if comm.rank == 0 else 1):
            params = parameters(full(1.0 + comm.rank))
            warmup.average(params)
            seen.append(params[0].tensor.grad[0].item())
        warmup.finish(parameters(full(99.0)), Intent.LEAVE if leaving else Intent.CONSOLIDATE)
        return seen, warmup.left, root_of(warmup)

    first, second = on_ranks(2, program)
    assert first == ([1.5, 1.0, 1.0], 0, 0)
    assert second == ([1.5], 0, 0)


def test_the_gradients_of_a_rank_that_stopped_stay_as_they_are() -> None:
    def program(comm: Communicator) -> list[float]:
        warmup, params = warmup_of(comm, 1), parameters(full(1.0 + comm.rank))
        if comm.rank == 0:
            warmup.average(params)
        else:
            warmup.finish(params, Intent.CONSOLIDATE)
        return params[0].tensor.grad.tolist()

    assert on_ranks(2, program) == [[1.0] * 4, [2.0] * 4]


def test_where_all_ranks_wait_the_warm_up_goes_on_afterwards() -> None:
    """synchronize() in the middle of the warm-up."""

    def program(comm: Communicator) -> tuple[int, float, int]:
        warmup = warmup_of(comm, 3)
        warmup.average(parameters(full(1.0)))
        warmup.finish(parameters(full(1.0)), Intent.CONSOLIDATE)
        left, params = warmup.left, parameters(full(2.0 * comm.rank))
        warmup.average(params)
        return left, params[0].tensor.grad[0].item(), warmup.left

    assert on_ranks(2, program) == [(2, 1.0, 1)] * 2


@pytest.mark.parametrize("leavers", [{0}, {0, 1}])
def test_where_ranks_leave_and_none_trains_the_warm_up_is_over(leavers: set[int]) -> None:
    def program(comm: Communicator) -> int:
        warmup = warmup_of(comm, 5)
        warmup.average(parameters(full(1.0)))
        warmup.finish(parameters(full(1.0)), Intent.LEAVE if comm.rank in leavers else Intent.CONSOLIDATE)
        return warmup.left

    assert on_ranks(2, program) == [0, 0]


def test_ranks_that_wait_in_different_calls_are_an_error_on_all() -> None:
    def program(comm: Communicator) -> str:
        warmup = warmup_of(comm, 3)
        with pytest.raises(ShadowSyncError) as caught:
            warmup.finish(parameters(full(1.0)), Intent.CONSOLIDATE if comm.rank else Intent.MEET)
        return str(caught.value)

    (message,) = set(on_ranks(2, program))
    assert message.startswith("the ranks wait for one another: rank 0 in a collective call")
    assert "rank 1 in synchronize(); make these calls on every rank" in message


def test_who_waits_is_asked_to_end_where_another_rank_does() -> None:
    """And waits on, where it does not, until it comes to its end by itself."""

    def program(comm: Communicator) -> tuple[int, int]:
        warmup, asked = warmup_of(comm, 3), [0]

        def ask() -> None:
            asked[0] += 1
            if asked[0] == 3:
                raise InterruptedError

        try:
            warmup.finish(parameters(full(1.0)), Intent.MEET if comm.rank == 0 else Intent.END, ask)
        except InterruptedError:
            warmup.finish(parameters(full(1.0)), Intent.END, ask)
        return asked[0], warmup.left

    assert on_ranks(2, program) == [(3, 3), (0, 3)]


def test_the_root_is_a_rank_that_made_every_step() -> None:
    def program(comm: Communicator) -> list[int]:
        warmup, roots = warmup_of(comm, 3), []
        roots.append(root_of(warmup))
        for _ in range(1 + comm.rank):  # rank 2 alone makes all three
            warmup.average(parameters(full(1.0)))
            roots.append(root_of(warmup))
        warmup.finish(parameters(full(1.0)), Intent.CONSOLIDATE)
        return [*roots, root_of(warmup)]

    assert on_ranks(3, program) == [[0, 0, 2], [0, 0, 1, 2], [0, 0, 1, 2, 2]]


def test_without_steps_there_is_nothing_to_finish() -> None:
    def program(comm: Communicator) -> int:
        warmup = warmup_of(comm, 0)
        if comm.rank == 0:  # the other rank would not take part
            warmup.finish(parameters(full(1.0)), Intent.CONSOLIDATE)
        return warmup.left

    assert on_ranks(2, program) == [0, 0]
