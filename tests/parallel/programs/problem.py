"""A small regression problem: a network, a stream of data for each rank, a training loop, and comparing ranks."""

from __future__ import annotations

import torch

from hvd_shadowsync import ShadowSync

Content = dict[str, torch.Tensor]


def make_model(seed: int, *, batch_norm: bool = True) -> torch.nn.Sequential:
    """Return a small network whose weights depend on `seed`."""
    generator = torch.Generator().manual_seed(seed)
    norm = [torch.nn.BatchNorm1d(12)] if batch_norm else []
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), *norm, torch.nn.Tanh(), torch.nn.Linear(12, 1))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model


class Data:
    """An endless stream of batches; each rank has its own."""

    def __init__(self, rank: int) -> None:
        self._generator = torch.Generator().manual_seed(1000 + rank)
        self._slope = torch.linspace(-1, 1, 6)

    def batch(self, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs of shape (size, 6) and targets of shape (size, 1)."""
        inputs = torch.randn(size, 6, generator=self._generator)
        return inputs, (inputs @ self._slope).sin().unsqueeze(1)


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error on `batch`."""
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int) -> list[float]:
    """Train; return the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, data.batch())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


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


class Slopes:
    """One vector whose gradient is a constant of the rank, so that what synchronisation does can be said in advance.

    The weights start at `start` on every rank; a step of rank r moves them by `lr * (r + 1) * direction`.
    """

    lr = 0.125

    def __init__(self, rank: int, size: int, numel: int = 40) -> None:
        self.rank, self.size = rank, size
        self.start = torch.arange(numel, dtype=torch.float32) / 8
        self.direction = torch.linspace(-1, 1, numel)
        self.weights = torch.nn.Parameter(self.start.clone())
        self.optimizer = torch.optim.SGD([self.weights], lr=self.lr)

    def step(self, *, moving: bool = True) -> None:
        """Take a step, or one that moves nothing."""
        self.weights.grad = -(self.rank + 1) * self.direction if moving else torch.zeros_like(self.direction)
        self.optimizer.step()

    def moved(self, total: float) -> torch.Tensor:
        """Return the weights after `total` steps of rank 0."""
        return self.start + self.lr * total * self.direction

    @property
    def all_slopes(self) -> float:
        """The sum over ranks of r + 1."""
        return self.size * (self.size + 1) / 2
