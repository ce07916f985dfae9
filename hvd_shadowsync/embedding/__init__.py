"""Model-parallel embeddings: tables that are divided over the ranks, exchanged by alltoall, updated by their owners."""

from hvd_shadowsync.embedding.inputs import Jagged, Padded
from hvd_shadowsync.embedding.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad
from hvd_shadowsync.embedding.placement import Placement, Plan
from hvd_shadowsync.embedding.planner import TableCost, plan
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag
from hvd_shadowsync.embedding.tables import EmbeddingTable

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "EmbeddingTable",
    "Jagged",
    "Padded",
    "Placement",
    "Plan",
    "RowWiseAdagrad",
    "ShardedEmbeddingBag",
    "TableCost",
    "plan",
]
