"""The embedding tables of "dlrm-criteo" for the contenders of MPI jobs: this project's, divided over the ranks."""

from __future__ import annotations

import functools

import torch
from torch import nn
from workloads import DLRM_LR, EMBEDDING_DIM, criteo_table_sizes


def sharded() -> nn.Module:
    """Return the tables, placed by the planner and trained by row-wise Adagrad as torchrec's are (collective).

    Lookups are not made ahead: no row is stale, as with torchrec.
    """
    from hvd_shadowsync.embedding import EmbeddingTable, RowWiseAdagrad, ShardedEmbeddingBag

    init = functools.partial(torch.nn.init.uniform_, a=-0.01, b=0.01)
    tables = [
        EmbeddingTable(f"table{index}", rows, EMBEDDING_DIM, init=init)
        for index, rows in enumerate(criteo_table_sizes())
    ]
    return ShardedEmbeddingBag(tables, optimizer=RowWiseAdagrad(lr=DLRM_LR))
