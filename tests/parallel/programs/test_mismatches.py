"""Replicas that do not match are refused on every rank, with the first difference named; the job goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problem import Data, content, make_model, same, train

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ReplicaMismatchError, ShadowSync
from hvd_shadowsync.comm.base import Communicator


def construct(
    model: torch.nn.Module | None = None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    lr: float = 0.1,
    **options: Any,
) -> ShadowSync:
    model = make_model(0) if model is None else model
    return ShadowSync(make(model.parameters(), lr=lr), model=model, **options)


def wider() -> torch.nn.Module:
    layers = [torch.nn.Linear(6, 13), torch.nn.BatchNorm1d(13), torch.nn.Tanh(), torch.nn.Linear(13, 1)]
    return torch.nn.Sequential(*layers)


def double() -> torch.nn.Module:
    return make_model(0).double()


class Renamed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model(0)


def frozen() -> torch.nn.Module:
    return torch.nn.Sequential(*make_model(0), torch.nn.Linear(1, 1))


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"model": wider}, r"parameter 0\.weight: shape \(12, 6\)"),
    "dtype": ({"model": double}, r"torch\.float64"),
    "name": ({"model": Renamed}, r"inner\.0\.weight"),
    "more parameters": ({"model": frozen}, r"4\.weight"),
    "no batch norm": ({"model": lambda: make_model(0, batch_norm=False)}, r"1\.weight"),
    "lr": ({"lr": 0.2}, r"optimizer group 0, lr: 0\.1 on rank 0, 0\.2 on rank"),
    "optimizer": ({"make": torch.optim.Adagrad}, r"optimizer: SGD on rank 0, Adagrad on rank"),
    "algorithm": ({"algorithm": BMUF()}, r"BMUF"),
    "alpha": ({"algorithm": ModelAveraging(alpha=0.25)}, r"alpha=0\.25"),
    "asynchronous": ({"algorithm": ElasticAveraging()}, r"ElasticAveraging"),
    "sync_every": ({"sync_every": 7}, r"pacing.*sync_every=7"),
    "foreground": ({"foreground": True, "sync_every": 3}, r"foreground=True|sync_every=3"),
    "warmup_steps": ({"warmup_steps": 5}, r"warmup_steps: 0 on rank 0, 5 on rank"),
    "wire_dtype": ({"wire_dtype": torch.float16}, r"torch\.float16"),
    "apply": ({"apply": "hogwild"}, r"argument apply: 'boundary' on rank 0, 'hogwild'"),
    "initial_weights": ({"initial_weights": "check"}, r"argument initial_weights"),
    "sync_buffers": ({"sync_buffers": False}, r"sync_buffers|running_mean"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_one_rank_differs(comm: Communicator, name: str) -> None:
    options, message = DIFFERENCES[name]
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    mine: dict[str, Any] = {}
    if comm.rank == comm.size - 1:
        mine = {key: value() if key == "model" else value for key, value in options.items()}
    with pytest.raises(ReplicaMismatchError, match=message) as refused:
        construct(**mine)
    messages = comm.allgather_object(str(refused.value))
    assert len(set(messages)) == 1
    assert f"rank {comm.size - 1}" in messages[0]


def test_initial_weights_that_differ_are_refused_on_request(comm: Communicator) -> None:
    same_everywhere = construct(make_model(1), initial_weights="check")
    same_everywhere.close()
    if comm.size > 1:
        with pytest.raises(ReplicaMismatchError, match=r"initial value of 0\.weight.*rank 0.*rank 1"):
            construct(make_model(comm.rank), initial_weights="check")


def test_equal_initial_weights_with_batch_norm_train(comm: Communicator) -> None:
    """The first forward pass moves the statistics of each rank its own way, before the first step."""
    model = make_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ShadowSync(optimizer, model=model, initial_weights="check", sync_every=1) as sync:
        train(model, optimizer, Data(comm.rank), 5)
        sync.synchronize()


def test_a_refused_optimizer_is_as_before(comm: Communicator) -> None:
    """It can be wrapped again, and trains."""
    model = make_model(comm.rank)
    before = content(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if comm.size > 1:
        with pytest.raises(ReplicaMismatchError):
            ShadowSync(optimizer, model=model, algorithm=BMUF(block_lr=0.5 + 0.1 * comm.rank))
        assert same(content(model), before)
    assert not hasattr(optimizer, "shadow")
    with ShadowSync(optimizer, model=model, sync_every=1) as sync:
        train(model, optimizer, Data(comm.rank), 3)
        sync.synchronize()
        everyone = sync.gather(content(model))
    assert all(same(each, everyone[0]) for each in everyone)


def test_state_that_was_loaded_on_one_rank_only(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    model, data = make_model(0), Data(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ShadowSync(optimizer, model=model, algorithm=BMUF(block_momentum=0.1), sync_every=1) as sync:
        train(model, optimizer, data, 5)
        sync.synchronize()
        state = optimizer.state_dict()
    with ShadowSync(optimizer, model=model, algorithm=BMUF(block_momentum=0.1), sync_every=1) as sync:
        if comm.rank == 0:
            optimizer.load_state_dict(state)
        with pytest.raises(ReplicaMismatchError, match=r"loaded on ranks \[0\] only"):
            train(model, optimizer, data, 1)
        if comm.rank:
            optimizer.load_state_dict(state)
        train(model, optimizer, data, 5)
        sync.synchronize()
