"""A compact DLRM (Naumov et al. 2019, arXiv 1906.00091): embeddings, two MLPs, the dots of all pairs of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from hvd_shadowsync.comm.base import Communicator
    from hvd_shadowsync.embedding import ShardedEmbeddingBag


class Batch(NamedTuple):
    """Rows as the model reads them; the data modules yield these."""

    dense: Tensor  # [rows, num_dense] float32
    ids: Tensor  # [rows, num_tables] int64, each below its table's size
    labels: Tensor  # [rows] float32, 0 or 1


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths, each followed by a ReLU."""
    layers = [(nn.Linear(fan_in, fan_out), nn.ReLU()) for fan_in, fan_out in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def initialise(rows: Tensor) -> Tensor:
    """Fill a table in place: uniform within n^-0.5 of zero; row 0, which stands for unknown values, is zero."""
    rows.uniform_(-(len(rows) ** -0.5), len(rows) ** -0.5)
    rows[0] = 0
    return rows


class EmbeddingMatrix(nn.Module):
    """All tables in one matrix, one after the other: one look-up and one gradient instead of one per table."""

    def __init__(self, table_sizes: Sequence[int], embedding_dim: int) -> None:
        super().__init__()
        sizes, weight = torch.tensor(table_sizes), torch.empty(sum(table_sizes), embedding_dim)
        for rows in weight.split(list(table_sizes)):
            initialise(rows)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)  # [num_tables]
        self.weight = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids + self.offsets, self.weight)  # [B, T, D]


def sharded_tables(
    table_sizes: Sequence[int],
    embedding_dim: int,
    *,
    lr: float,
    placement: str = "auto",
    communicator: Communicator | None = None,
) -> ShardedEmbeddingBag:
    """The tables of an `EmbeddingMatrix`, divided over all ranks and trained by Adagrad where they lie (collective).

    Args:
        table_sizes: rows of each table.
        embedding_dim: length of a row.
        lr: learning rate of the rows.
        placement: a strategy of `hvd_shadowsync.embedding.Placement` for all tables; "auto": what the planner finds.
        communicator: over which ranks; None: all.
    """
    from hvd_shadowsync.embedding import Adagrad, Block, EmbeddingTable, ShardedEmbeddingBag

    tables = [
        EmbeddingTable(f"table{index}", size, embedding_dim, init=lambda rows, generator: rows.zero_())  # filled below
        for index, size in enumerate(table_sizes)
    ]
    plan = None if placement == "auto" else {table.name: placement for table in tables}
    embedding = ShardedEmbeddingBag(tables, plan, Adagrad(lr=lr), communicator=communicator)
    embedding.load_global_state_dict(
        Block(table.name, "weight", 0, initialise(torch.empty(table.num_embeddings, embedding_dim))) for table in tables
    )
    return embedding


class DLRM(nn.Module):
    """Logits of a binary label from dense features and one id per table.

    Row 0 of a table stands for an unknown or missing value and starts at zero: until it is trained it says nothing.
    The tables lie in one matrix, or in an `embedding` that is given, such as `sharded_tables`.

    Args:
        num_dense: dense features of a row.
        table_sizes: rows of each embedding table.
        embedding_dim: length of every vector that takes part in the interaction.
        bottom: hidden widths of the MLP on the dense features; its output has ``embedding_dim``.
        top: hidden widths of the MLP on the dots; its output is the logit.
        embedding: the tables, which look ids [B, T] up as [B, T, D] or [B, T*D]; None: a new `EmbeddingMatrix`.
    """

    def __init__(
        self,
        num_dense: int,
        table_sizes: Sequence[int],
        *,
        embedding_dim: int = 16,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (64, 32),
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embedding = EmbeddingMatrix(table_sizes, embedding_dim) if embedding is None else embedding
        num_vectors = 1 + len(table_sizes)
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1)  # [2, num_pairs]
        self.register_buffer("pairs", pairs[0] * num_vectors + pairs[1], persistent=False)  # [num_pairs]
        self.bottom = mlp([num_dense, *bottom, embedding_dim])
        self.top = nn.Sequential(mlp([embedding_dim + pairs.shape[1], *top]), nn.Linear(top[-1], 1))

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        bottom = self.bottom(dense)  # [B, D]
        looked_up = self.embedding(ids).view(*ids.shape, bottom.shape[1])  # [B, T, D]
        vectors = torch.cat([bottom.unsqueeze(1), looked_up], dim=1)  # [B, T+1, D]
        dots = vectors @ vectors.transpose(1, 2)  # [B, T+1, T+1]
        pairs = dots.flatten(1).index_select(1, self.pairs)  # [B, (T+1)T/2]
        return self.top(torch.cat([bottom, pairs], dim=1)).squeeze(1)  # [B]
