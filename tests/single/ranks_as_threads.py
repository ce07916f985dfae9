"""A small regression problem on ranks that are threads: models, data, training, and waiting for rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvd_shadowsync import ShadowSync
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.reducers import Reducer

T = TypeVar("T")
TIMEOUT_S = 60.0
Content = dict[str, Tensor]


def on_ranks(size: int, program: Callable[[Communicator], T]) -> list[T]:
    """Run `program` on `size` ranks; the error of a time-out names the ranks that hang."""
    return local.run(size, program, timeout_s=TIMEOUT_S)


def make_model(seed: int = 0, *, batch_norm: bool = True) -> torch.nn.Sequential:
    """Return a small network whose weights depend on `seed`."""
    generator = torch.Generator().manual_seed(seed)
    norm = [torch.nn.BatchNorm1d(5)] if batch_norm else []
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), *norm, torch.nn.Tanh(), torch.nn.Linear(5, 1))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.4)
    return model


def batch(stream: int, step: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Return batch `step` of data stream `stream`, by a formula: the same on every machine."""
    index = torch.arange(size * 3, dtype=torch.float32).view(size, 3)
    inputs = torch.sin(index * 1.7 + step * 0.9 + stream * 2.3)
    return inputs, inputs.sum(1, keepdim=True).cos()


def loss_of(model: torch.nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).square().mean()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    stream: int = 0,
    first: int = 0,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Take `steps` steps on data stream `stream`, and call `after` after each."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, batch(stream, step)).backward()
        optimizer.step()
        after()


def await_rounds(sync: ShadowSync, rounds: int) -> None:
    """Wait until `rounds` rounds have reached the weights, without taking a step."""
    while sync.metrics()["rounds"] < rounds:
        sync.pause()  # merges what is there
        sync.resume()
        time.sleep(0.0002)


class Lockstep:
    """Called after each step: waits until the step's round is merged, so that nothing is ever in flight.

    With `in_turn` ranks make their rounds one after the other, for algorithms in which they do not meet.
    """

    def __init__(self, sync: ShadowSync, *, in_turn: bool = False) -> None:
        self._sync, self._in_turn, self._rounds = sync, in_turn, 0

    def __call__(self) -> None:
        self._rounds += 1
        if not self._in_turn:
            await_rounds(self._sync, self._rounds)
            return
        for rank in range(self._sync.size):
            if rank == self._sync.rank:
                self._sync.resume()
                await_rounds(self._sync, self._rounds)
                self._sync.pause()
            self._sync.gather(None)


def content(model: torch.nn.Module) -> Content:
    """Return a copy of all that `model.state_dict()` holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: Content, right: Content) -> bool:
    """Tell whether two contents are bit-identical."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def identical_everywhere(sync: ShadowSync, model: torch.nn.Module) -> bool:
    """Tell whether `model` is bit-identical on all ranks (collective)."""
    everyone = sync.gather(content(model))
    return all(same(each, everyone[0]) for each in everyone)


def flat(model: torch.nn.Module) -> Tensor:
    """Return all weights as one vector (a copy)."""
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def sgd(model: torch.nn.Module, lr: float = 0.1, **more: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **more)


def reduced_in_place(
    reducer: Reducer, live: Tensor, snapshot: Tensor, weights: Sequence[float], pause_s: float = 0.0
) -> Tensor:
    """Return the mean; the snapshot is filled slice by slice, and spoilt as soon as its slice is reduced."""
    out, times = torch.full_like(live, float("nan")), torch.zeros(live.numel())
    for part, values in reducer.reduce(snapshot, weights, lambda part: snapshot[part].copy_(live[part])):
        time.sleep(pause_s)
        out[part] = values
        times[part] += 1
        snapshot[part] = float("nan")
    assert (times == 1).all()
    return out


class Slopes:
    """A vector whose gradient is a constant of the rank; a step of rank r moves it by `lr * (r + 1) * direction`."""

    lr = 0.125

    def __init__(self, rank: int, numel: int = 12) -> None:
        self.rank = rank
        self.start = torch.arange(numel, dtype=torch.float32) / 8
        self.direction = torch.linspace(-1, 1, numel)
        self.weights = torch.nn.Parameter(self.start.clone())
        self.optimizer = torch.optim.SGD([self.weights], lr=self.lr)

    def set_gradient(self, factor: float = 1.0) -> None:
        self.weights.grad = -factor * (self.rank + 1) * self.direction

    def step(self, factor: float = 1.0) -> None:
        self.set_gradient(factor)
        self.optimizer.step()

    def moved(self, total: float) -> Tensor:
        """Return the weights after `total` steps of rank 0."""
        return self.start + self.lr * total * self.direction
