"""A compact DLRM (Naumov et al. 2019, arXiv 1906.00091): embeddings, two MLPs, the dots of all pairs of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
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


class EmbeddingMatrix(nn.Embedding):
    """All tables in one matrix, one after the other: one look-up and one gradient instead of one per table."""

    def __init__(self, table_sizes: Sequence[int], embedding_dim: int) -> None:
        super().__init__(sum(table_sizes), embedding_dim)
        sizes = torch.tensor(table_sizes)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)  # [num_tables]
        with torch.no_grad():
            for weight in self.weight.split(list(table_sizes)):
                weight.uniform_(-bound(len(weight)), bound(len(weight)))
                weight[0] = 0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + self.offsets)


def sharded_tables(
    table_sizes: Sequence[int], embedding_dim: int, *, lr: float, placement: str = "auto", seed: int = 0
) -> ShardedEmbeddingBag:
    """The same tables, divided over all ranks and updated by Adagrad where they lie (collective).

    Args:
        table_sizes: rows of each table.
        embedding_dim: length of a row.
        lr: learning rate of the rows.
        placement: a strategy of `hvd_shadowsync.embedding.Placement` for all tables; "auto": what the planner finds.
        seed: of the initial rows.
    """
    from hvd_shadowsync.embedding import Adagrad, EmbeddingTable, ShardedEmbeddingBag

    tables = [
        EmbeddingTable(f"table{i}", size, embedding_dim, init=partial(nn.init.uniform_, a=-bound(size), b=bound(size)))
        for i, size in enumerate(table_sizes)
    ]
    plan = None if placement == "auto" else {table.name: placement for table in tables}
    embedding = ShardedEmbeddingBag(tables, plan, Adagrad(lr=lr), seed=seed)
    for shard, rows in zip(embedding.shards.owned, embedding.shards, strict=True):
        _, places = shard.rows.within(0, 1)  # where row 0 of the table is, if this rank has it
        rows.weight[places] = 0
    return embedding


def bound(table_size: int) -> float:
    """Initial weights lie between this and its negative."""
    return table_size**-0.5


class DLRM(nn.Module):
    """Logits of a binary label from dense features and one id per table.

    Row 0 of a table stands for an unknown or missing value and starts at zero: until it is trained it says nothing.

    Args:
        num_dense: dense features of a row.
        table_sizes: rows of each embedding table.
        embedding_dim: length of every vector that takes part in the interaction.
        bottom: hidden widths of the MLP on the dense features; its output has ``embedding_dim``.
        top: hidden widths of the MLP on the dots; its output is the logit.
        embedding: looks ids [B, T] up: [B, T, D] or [B, T*D]; None: an `EmbeddingMatrix` of the model's own.
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
        num_vectors = 1 + len(table_sizes)
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1)  # [2, num_pairs]
        self.register_buffer("pairs", pairs[0] * num_vectors + pairs[1], persistent=False)  # [num_pairs]
        self.bottom = mlp([num_dense, *bottom, embedding_dim])
        self.top = nn.Sequential(mlp([embedding_dim + pairs.shape[1], *top]), nn.Linear(top[-1], 1))
        self.embedding = EmbeddingMatrix(table_sizes, embedding_dim) if embedding is None else embedding

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        bottom = self.bottom(dense)  # [B, D]
        looked_up = self.embedding(ids).view(*ids.shape, bottom.shape[1])  # [B, T, D]
        vectors = torch.cat([bottom.unsqueeze(1), looked_up], dim=1)  # [B, T+1, D]
        dots = vectors @ vectors.transpose(1, 2)  # [B, T+1, T+1]
        pairs = dots.flatten(1).index_select(1, self.pairs)  # [B, (T+1)T/2]
        return self.top(torch.cat([bottom, pairs], dim=1)).squeeze(1)  # [B]
