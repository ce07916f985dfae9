"""A compact DLRM (Naumov et al. 2019, arXiv 1906.00091): embeddings, two MLPs, the dots of all pairs of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """Rows as the model reads them; the data modules yield these."""

    dense: Tensor  # [rows, num_dense] float32
    ids: Tensor  # [rows, num_tables] int64, each below its table's size
    labels: Tensor  # [rows] float32, 0 or 1


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths, each followed by a ReLU."""
    layers = [(nn.Linear(fan_in, fan_out), nn.ReLU()) for fan_in, fan_out in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in layer))


class DLRM(nn.Module):
    """Logits of a binary label from dense features and one id per table.

    All tables lie in one embedding matrix, one after the other: one look-up and one gradient instead of one per table.
    Row 0 of a table stands for an unknown or missing value and starts at zero: until it is trained it says nothing.

    Args:
        num_dense: dense features of a row.
        table_sizes: rows of each embedding table.
        embedding_dim: length of every vector that takes part in the interaction.
        bottom: hidden widths of the MLP on the dense features; its output has ``embedding_dim``.
        top: hidden widths of the MLP on the dots; its output is the logit.
    """

    def __init__(
        self,
        num_dense: int,
        table_sizes: Sequence[int],
        *,
        embedding_dim: int = 16,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__()
        num_vectors = 1 + len(table_sizes)
        sizes = torch.tensor(table_sizes)
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1)  # [2, num_pairs]
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)  # [num_tables]
        self.register_buffer("pairs", pairs[0] * num_vectors + pairs[1], persistent=False)  # [num_pairs]
        self.embedding = nn.Embedding(int(sizes.sum()), embedding_dim)
        self.bottom = mlp([num_dense, *bottom, embedding_dim])
        self.top = nn.Sequential(mlp([embedding_dim + pairs.shape[1], *top]), nn.Linear(top[-1], 1))
        with torch.no_grad():
            for weight, size in zip(self.embedding.weight.split(list(table_sizes)), table_sizes, strict=True):
                weight.uniform_(-(size**-0.5), size**-0.5)
                weight[0] = 0

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        bottom = self.bottom(dense)  # [B, D]
        vectors = torch.cat([bottom.unsqueeze(1), self.embedding(ids + self.offsets)], dim=1)  # [B, T+1, D]
        dots = vectors @ vectors.transpose(1, 2)  # [B, T+1, T+1]
        pairs = dots.flatten(1).index_select(1, self.pairs)  # [B, (T+1)T/2]
        return self.top(torch.cat([bottom, pairs], dim=1)).squeeze(1)  # [B]
