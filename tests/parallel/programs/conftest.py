"""What the programs share: small models, training loops, and collecting what all ranks see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hvd_shadowsync import ShadowSync
from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator


@pytest.fixture
def comm() -> Iterator[Communicator]:
    """A communicator over all ranks; all of them are here before the next test begins."""
    communicator = mpi.world()
    yield communicator
    communicator.allgather_object("end of test")
    communicator.free()


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
    """An endless stream of batches of a regression problem; each rank has its own."""

    def __init__(self, rank: int) -> None:
        self._generator = torch.Generator().manual_seed(1000 + rank)
        self._slope = torch.linspace(-1, 1, 6)

    def batch(self, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs of shape (size, 6) and targets of shape (size, 1)."""
        inputs = torch.randn(size, 6, generator=self._generator)
        return inputs, (inputs @ self._slope).sin().unsqueeze(1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int) -> list[float]:
    """Train; return the losses."""
    losses = []
    for _ in range(steps):
        inputs, targets = data.batch()
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def content(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all that `model.state_dict()` holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Tell whether two contents are bit-identical."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def identical_everywhere(sync: ShadowSync, value: dict[str, torch.Tensor]) -> bool:
    """Tell whether `value` is bit-identical on all ranks (collective)."""
    values = sync.gather(value)
    return all(same(each, values[0]) for each in values)


def gathered(comm: Communicator, value: Any) -> list[Any]:
    """Return every rank's `value` (collective)."""
    return comm.allgather_object(value)
