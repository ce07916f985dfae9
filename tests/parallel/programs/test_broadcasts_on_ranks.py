"""broadcast_parameters and broadcast_optimizer_state over MPI."""

from __future__ import annotations

import pytest
import torch
from problem import Data, content, make_model, same, train

from hvd_shadowsync import ReplicaMismatchError, ShadowSync, broadcast_optimizer_state, broadcast_parameters
from hvd_shadowsync.comm.base import Communicator


def test_parameters_of_each_root(comm: Communicator) -> None:
    for root in range(comm.size):
        model = make_model(comm.rank)
        broadcast_parameters(model.state_dict(), root)
        assert same(content(model), content(make_model(root)))
        model = make_model(comm.rank)
        broadcast_parameters(model.named_parameters(), root)
        assert torch.equal(model[0].weight, make_model(root)[0].weight)


def test_all_kinds_of_tensors(comm: Communicator) -> None:
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.uint8, torch.bool]
    params = {str(dtype): torch.full((3, 2), comm.rank + 1, dtype=dtype) for dtype in kinds}
    params["scalar"] = torch.tensor(float(comm.rank))
    params["empty"] = torch.empty(0)
    params["strided"] = torch.full((4, 4), float(comm.rank)).t()[::2]
    params["no tensor"] = "passed over"
    broadcast_parameters(params, comm.size - 1)
    assert all(torch.equal(params[str(each)], torch.full((3, 2), comm.size, dtype=each)) for each in kinds)
    assert float(params["scalar"]) == comm.size - 1
    assert params["strided"].tolist() == [[comm.size - 1] * 4] * 2


def test_parameters_that_require_gradients_keep_their_storage(comm: Communicator) -> None:
    model = make_model(comm.rank)
    pointers = [param.data_ptr() for param in model.parameters()]
    broadcast_parameters(model.state_dict(), 0)
    assert [param.data_ptr() for param in model.parameters()] == pointers
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), Data(comm.rank), 1)


@pytest.mark.parametrize("difference", ["name", "shape", "dtype", "count"])
def test_parameters_that_differ_are_refused_on_every_rank(comm: Communicator, difference: str) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    params = {"a": torch.zeros(2), "b": torch.full((3,), float(comm.rank))}
    if comm.rank == comm.size - 1:
        other = {"name": {"c": torch.zeros(3)}, "shape": {"b": torch.zeros(4)}, "count": {}}
        other["dtype"] = {"b": torch.zeros(3, dtype=torch.float64)}
        params = {"a": torch.zeros(2), **other[difference]}
    with pytest.raises(ReplicaMismatchError, match=r"differ"):
        broadcast_parameters(params, 0)
    if comm.rank < comm.size - 1:
        assert params["b"].tolist() == [comm.rank] * 3


def test_a_root_that_is_no_rank(comm: Communicator) -> None:
    for root in (comm.size, -1, "0"):
        with pytest.raises(ValueError, match="root_rank"):
            broadcast_parameters({}, root)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_optimizer_state_travels_without_a_step(comm: Communicator, wrapped: bool) -> None:
    """Only the last rank has state; nobody's weights move."""
    root = comm.size - 1
    model = make_model(1, batch_norm=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (1 + comm.rank), weight_decay=0.3)
    if comm.rank == root:
        train(model, optimizer, Data(0), 3)
    sync = None
    before = content(model)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("step() was called"))
    if wrapped:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        sync = ShadowSync(optimizer, initial_weights="broadcast")
        before = content(model)
    broadcast_optimizer_state(optimizer, root)
    assert same(content(model), before)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 if wrapped else 0.1 * comm.size)
    states = comm.allgather_object([dict(optimizer.state[param]) for param in model.parameters()])
    assert all(int(each["step"]) == 3 for state in states for each in state)
    for state in states:
        for ours, theirs in zip(state, states[root], strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    if sync is not None:
        sync.close()


def test_optimizer_state_of_a_rank_that_has_none(comm: Communicator) -> None:
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if comm.rank:
        train(model, optimizer, Data(0), 2)
    broadcast_optimizer_state(optimizer, 0)
    assert not any(optimizer.state.values())


def test_optimizers_with_other_groups_are_refused_on_every_rank(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    params = list(make_model(1).parameters())
    groups = [{"params": params}] if comm.rank else [{"params": params[:1]}, {"params": params[1:]}]
    with pytest.raises(ReplicaMismatchError, match="parameters per group differ"):
        broadcast_optimizer_state(torch.optim.SGD(groups, lr=0.1), 0)
