"""Model-parallel embeddings: tables that are divided over the ranks, exchanged by alltoall, updated by their owners."""

from hvd_shadowsync.embedding import files
from hvd_shadowsync.embedding.costs import TableCost
from hvd_shadowsync.embedding.inputs import Jagged, Padded
from hvd_shadowsync.embedding.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad
from hvd_shadowsync.embedding.placement import Placement, Plan
from hvd_shadowsync.embedding.planner import plan
from hvd_shadowsync.embedding.profile import profile
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag
from hvd_shadowsync.embedding.tables import EmbeddingTable
from hvd_shadowsync.embedding.whole import Block

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "Block",
    "EmbeddingTable",
    "Jagged",
    "Padded",
    "Placement",
    "Plan",
    "RowWiseAdagrad",
    "ShardedEmbeddingBag",
    "TableCost",
    "files",
    "plan",
    "profile",
]
