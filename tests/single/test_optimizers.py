"""Every optimizer of torch, synchronised: as it is without us at world size 1, and kept together on two ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks_as_threads import Lockstep, batch, content, identical_everywhere, loss_of, make_model, on_ranks, same
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm.base import Communicator

STEPS = 8
CLASSES = {
    name: each
    for name, each in sorted(vars(torch.optim).items())
    if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
}
LEAST = {"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "history_size": 4},
    "SparseAdam": {"lr": 0.05},
    "Muon": {"lr": 0.02},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD fused": ("SGD", {"lr": 0.05, "fused": True}),
    "SGD foreach": ("SGD", {"lr": 0.05, "momentum": 0.5, "foreach": True}),
    "Adam amsgrad": ("Adam", {"amsgrad": True}),
    "Adam fused": ("Adam", {"fused": True}),
    "Adam lr tensor": ("Adam", {"lr": torch.tensor(0.01), "foreach": False}),
    "AdamW maximize": ("AdamW", {"maximize": True, "lr": 1e-4}),
    "Adagrad fused": ("Adagrad", {"fused": True}),
    "RMSprop centered": ("RMSprop", {"centered": True, "momentum": 0.5}),
    "LBFGS strong_wolfe": ("LBFGS", {"line_search_fn": "strong_wolfe", "max_iter": 3}),
}
ALL = {name: (name, SETTINGS.get(name, {"lr": 0.01})) for name in CLASSES} | VARIANTS
DRIVERS: dict[str, dict[str, Any]] = {
    "background": {"sync_every": 1},
    "foreground": {"sync_every": 1, "foreground": True},
}


class Table(torch.nn.Module):
    """Sums embeddings, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 24).view(12, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        rows = (inputs.abs() * 100).long() % 12
        return torch.nn.functional.embedding(rows, self.weight, sparse=True).sum((1, 2)).unsqueeze(1)


class Problem:
    """A model that the optimizer `name` can train, the optimizer, and steps on numbered batches."""

    def __init__(self, name: str, seed: int = 0) -> None:
        kind, settings = ALL[name]
        self.model = _model(kind, seed)
        self.optimizer: Optimizer = CLASSES[kind](self.model.parameters(), **copy.deepcopy(settings))
        self._needs_closure = kind == "LBFGS"

    def step(self, stream: int, index: int) -> Any:
        data = batch(stream, index)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, data)
            loss.backward()
            return loss

        if self._needs_closure:
            return self.optimizer.step(closure)
        closure()
        return self.optimizer.step()

    def train(self, stream: int = 0, steps: int = STEPS, after: Callable[[], object] = lambda: None) -> None:
        for index in range(steps):
            self.step(stream, index)
            after()


def _model(kind: str, seed: int) -> torch.nn.Module:
    if kind == "SparseAdam":
        return Table()
    if kind == "Muon":  # matrices only
        layers = [torch.nn.Linear(3, 5, bias=False), torch.nn.Tanh(), torch.nn.Linear(5, 1, bias=False)]
        model = torch.nn.Sequential(*layers)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.arange(param.numel()).view(param.shape).add(seed).sin())
        return model
    return make_model(seed, batch_norm=kind != "LBFGS")  # its line search calls the model several times a step


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's own part of its state."""
    own = optimizer.state_dict()
    return {"state": own["state"], "param_groups": own["param_groups"]}


def test_all_classes_of_torch_are_found() -> None:
    assert set(CLASSES) >= LEAST
    assert Optimizer not in CLASSES.values()


@pytest.mark.parametrize("name", ALL)
def test_a_world_of_one_is_the_plain_optimizer(name: str) -> None:
    plain, ours = Problem(name), Problem(name)
    plain.train()

    def program(comm: Communicator) -> None:
        with ShadowSync(ours.optimizer, model=ours.model, communicator=comm):
            ours.train()

    on_ranks(1, program)
    assert not same(content(plain.model), content(Problem(name).model))
    assert same(content(ours.model), content(plain.model))
    assert_equal(ours.optimizer.state_dict(), plain.optimizer.state_dict())


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", ALL)
def test_ranks_with_the_same_data_train_as_one_process(name: str, driver: str) -> None:
    """The mean of equal replicas is each of them, so that a round after every step must change nothing."""
    plain = Problem(name)
    plain.train()

    def program(comm: Communicator) -> tuple[Problem, float]:
        ours = Problem(name, seed=comm.rank)
        with ShadowSync(ours.optimizer, model=ours.model, communicator=comm, **DRIVERS[driver]) as sync:
            ours.train(after=Lockstep(sync) if driver == "background" else lambda: None)
            return ours, sync.metrics()["rounds"]

    for ours, rounds in on_ranks(2, program):
        assert rounds == STEPS
        for key, expected in content(plain.model).items():
            torch.testing.assert_close(content(ours.model)[key], expected, rtol=1e-5, atol=1e-6)
        assert_equal(state_of(ours.optimizer), state_of(plain.optimizer), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", [ModelAveraging(), ElasticAveraging(), BMUF(block_momentum=0.2)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_replicas_are_identical_after_synchronize(name: str, algorithm: Algorithm) -> None:
    def program(comm: Communicator) -> tuple[bool, bool]:
        ours = Problem(name, seed=comm.rank)
        with ShadowSync(ours.optimizer, model=ours.model, communicator=comm, algorithm=algorithm, sync_every=2) as sync:
            start = content(ours.model)
            ours.train(stream=comm.rank)
            sync.synchronize()
            moved = not same(start, content(ours.model))
            finite = all(bool(param.isfinite().all()) for param in ours.model.parameters())
            return identical_everywhere(sync, ours.model), moved and finite

    assert on_ranks(2, program) == [(True, True)] * 2


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_a_step_with_a_closure_returns_its_loss_and_counts_once(name: str) -> None:
    def program(comm: Communicator) -> tuple[list[float], float]:
        ours, losses = Problem(name), []
        with ShadowSync(ours.optimizer, model=ours.model, communicator=comm, sync_every=1) as sync:
            for index in range(4):
                sync.pause()  # which merges; then nothing does until the step is over
                data = batch(0, index)
                expected = float(loss_of(copy.deepcopy(ours.model), data).detach())

                def closure(data: tuple[Tensor, Tensor] = data) -> Tensor:
                    ours.optimizer.zero_grad()
                    loss = loss_of(ours.model, data)
                    loss.backward()
                    return loss

                sync.pause()
                losses.append(float(ours.optimizer.step(closure).detach()) - expected)
                sync.resume()
            return losses, sync.metrics()["steps"]

    assert on_ranks(2, program) == [([0.0] * 4, 4)] * 2


class SignDescent(Optimizer):
    """An optimizer of a user's own, with state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["calls"] = self.state[param].get("calls", 0) + 1
                param.data.sub_(group["lr"] * param.grad.sign())


def test_an_optimizer_of_the_users_own() -> None:
    """Each rank moves the other way, twice as far: the mean is known."""

    def program(comm: Communicator) -> tuple[float, int]:
        weights = torch.nn.Parameter(torch.zeros(6))
        optimizer = SignDescent([weights], lr=0.25)
        with ShadowSync(optimizer, communicator=comm, sync_every=2, foreground=True) as sync:
            for _ in range(4):
                weights.grad = torch.full((6,), -1.0)
                optimizer.param_groups[0]["lr"] = 0.25 * (comm.rank + 1)
                optimizer.step()
            assert sync.metrics()["rounds"] == 2
            return weights.detach().unique().tolist(), optimizer.state[weights]["calls"]

    assert on_ranks(2, program) == [([4 * 0.375], 4)] * 2


def assert_equal(left: Any, right: Any, **tolerance: float) -> None:
    """Compare nested states, exactly without `tolerance`."""
    (lefts, left_tree), (rights, right_tree) = tree_flatten(left), tree_flatten(right)
    assert left_tree == right_tree
    for one, other in zip(lefts, rights, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}), equal_nan=True)
        else:
            assert one == other
