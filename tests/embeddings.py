"""Sharded embeddings against plain `nn.EmbeddingBag`s in one process that has the whole batch: problems and references.

Everything is a function of seeds, so each rank can make every rank's batch, and the reference, by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import (
    SGD,
    Adagrad,
    Adam,
    EmbeddingTable,
    Placement,
    Plan,
    RowWiseAdagrad,
    ShardedEmbeddingBag,
)
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.embedding.placement import COLUMN_WISE, REPLICATED, ROW_HASHED, ROW_WISE, STRATEGIES, TABLE_WISE
from hvd_shadowsync.embedding.shards import table_seed, whole_blocks

DIVIDED = (TABLE_WISE, ROW_WISE, ROW_HASHED, COLUMN_WISE)
Bag = tuple[Tensor, Tensor, Tensor | None]


def eighths(rows: Tensor, *, generator: torch.Generator) -> None:
    """Fill with multiples of 1/8, whose sums are exact in float64."""
    rows.copy_(torch.randint(-16, 17, rows.shape, generator=generator) / 8)


TABLES = (
    EmbeddingTable("users", 50, 8, features=["user", "friend"], init=eighths),
    EmbeddingTable("ads", 11, 5, "mean", features=["ad"], init=eighths),
    EmbeddingTable("words", 120, 32, features=["title", "text", "query"], init=eighths),
    EmbeddingTable("unused", 7, 4, "mean", features=["nothing"], init=eighths),
)
"""Shared tables, unequal dims, both poolings, one that no bag touches."""


@dataclass(frozen=True)
class Problem:
    """Tables and batches.

    Attributes:
        tables: the tables.
        sizes: samples of each rank's batch; exact arithmetic wants equal powers of 2.
        exact: means over 1, 2 or 4 ids only, and losses that are linear with coefficients in quarters.
        weighted: features with per-sample weights.
        seed: of the batches.
    """

    tables: Sequence[EmbeddingTable] = TABLES
    sizes: Sequence[int] = (8,)
    exact: bool = True
    weighted: frozenset[str] = frozenset()
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def features(self) -> list[tuple[str, EmbeddingTable]]:
        return [(name, table) for table in self.tables for name in table.features]

    def bags(self, rank: int, step: int) -> dict[str, Bag]:
        """Return (ids, offsets, weights) of each feature of `rank`'s batch `step`."""
        size = self.sizes[rank % len(self.sizes)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank * 1009 + step)
        found = {}
        for name, table in self.features:
            lengths = torch.randint(0, 5, (size,), generator=generator)
            if self.exact and table.pooling == "mean":
                lengths = 2 ** torch.randint(0, 3, (size,), generator=generator)
            if name == "nothing":
                lengths = torch.zeros_like(lengths)
            ids = torch.randint(0, table.num_embeddings, (int(lengths.sum()),), generator=generator)
            weights = torch.randint(1, 5, ids.shape, generator=generator).to(self.dtype) / 4
            found[name] = (ids, lengths.cumsum(0) - lengths, weights if name in self.weighted else None)
        return found

    def loss(self, vectors: Tensor, rank: int, step: int) -> Tensor:
        """Return the mean loss of the samples that `rank` has in batch `step`, given their vectors."""
        if not len(vectors):
            return vectors.sum()
        generator = torch.Generator().manual_seed(self.seed * 7919 + rank * 31 + step)
        shape = vectors.shape
        slope = torch.randint(-4, 5, shape, generator=generator).to(vectors.dtype) / 4
        linear = (vectors * slope).sum(1)
        return (linear if self.exact else linear + (vectors.square().sum(1) + 1).log()).mean()


@dataclass
class Trained:
    """What training leaves: each rank's outputs by step, whole tables, gradients of weights by rank and step."""

    outputs: list[list[Tensor]]
    tables: dict[str, Tensor]
    weight_gradients: list[list[dict[str, Tensor]]]


def plain_modules(problem: Problem) -> dict[str, nn.EmbeddingBag]:
    """Return a plain module for each table, with the values that the sharded one begins with."""
    modules = {}
    for index, table in enumerate(problem.tables):
        bag = nn.EmbeddingBag(table.num_embeddings, table.embedding_dim, mode=table.pooling, dtype=problem.dtype)
        with torch.no_grad():
            for first, block in whole_blocks(table, table_seed(0, index), problem.dtype):
                bag.weight[first : first + len(block)] = block
        modules[table.name] = bag
    return modules


def train_plain(
    problem: Problem, world: int, rule: SparseOptimizer, steps: int, *, sums: bool = False, plan: Plan | None = None
) -> Trained:
    """Train in one process: at each step the whole batch, of all ranks.

    With `plan`, row-wise Adagrad has a sum for each part of the columns.
    """
    modules = plain_modules(problem)
    columns = [sorted({s.columns for s in plan.shards if s.table == i}) for i in range(len(modules))] if plan else None
    step_all = plain_optimizer(rule, [module.weight for module in modules.values()], columns)
    outputs: list[list[Tensor]] = [[] for _ in range(world)]
    gradients: list[list[dict[str, Tensor]]] = [[] for _ in range(world)]
    total = sum(problem.sizes[rank % len(problem.sizes)] for rank in range(world))
    for step in range(steps):
        for module in modules.values():
            module.weight.grad = None
        for rank in range(world):
            bags = problem.bags(rank, step)
            weights = {name: w.clone().requires_grad_() for name, (_, _, w) in bags.items() if w is not None}
            vectors = torch.cat(
                [
                    modules[table.name](bags[name][0], bags[name][1], per_sample_weights=weights.get(name))
                    for name, table in problem.features
                ],
                1,
            )
            outputs[rank].append(vectors.detach().clone())
            share = 1.0 if sums else len(vectors) / total if total else 0.0
            (problem.loss(vectors, rank, step) * share).backward()
            # Weights are each rank's own: their gradient is that of the rank's own loss.
            gradients[rank].append(
                {name: w.grad / share for name, w in weights.items() if share and w.grad is not None}
            )
        step_all()
    return Trained(outputs, {name: module.weight.detach() for name, module in modules.items()}, gradients)


def plain_optimizer(
    rule: SparseOptimizer, weights: list[nn.Parameter], columns: list[list[tuple[int, int]]] | None
) -> Callable[[], None]:
    """Return a function that takes a step as `rule` says, from dense gradients."""
    if isinstance(rule, SGD):
        return torch.optim.SGD(weights, lr=rule.lr).step
    if isinstance(rule, Adagrad):
        return torch.optim.Adagrad(weights, lr=rule.lr, eps=rule.eps).step
    if isinstance(rule, RowWiseAdagrad):
        return _RowWise(rule, weights, columns or [[(0, weight.shape[1])] for weight in weights])
    assert isinstance(rule, Adam)
    optimizer = torch.optim.SparseAdam(weights, lr=rule.lr, betas=rule.betas, eps=rule.eps)

    def step() -> None:
        for weight in weights:
            grad = weight.grad
            assert grad is not None
            weight.grad = grad.to_sparse(1)
        optimizer.step()

    return step


class _RowWise:
    def __init__(self, rule: RowWiseAdagrad, weights: list[nn.Parameter], columns: list[list[tuple[int, int]]]) -> None:
        self._rule = rule
        self._parts = [
            (weight, slice(*part), torch.full((len(weight),), rule.initial_accumulator, dtype=weight.dtype))
            for weight, parts in zip(weights, columns, strict=True)
            for part in parts
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        for weight, part, sums in self._parts:
            assert weight.grad is not None
            grad = weight.grad[:, part]
            sums += grad.square().mean(1)
            factor = self._rule.lr / (sums.sqrt() + self._rule.eps)
            weight[:, part] -= torch.where(grad != 0, factor.unsqueeze(1) * grad, 0)


def placements(problem: Problem, strategy: str, world: int) -> Plan:
    """Return a plan of one strategy for all tables, or a mixture of all."""
    names = [table.name for table in problem.tables]
    if strategy != "mixed":
        return Plan.of(problem.tables, world, dict.fromkeys(names, strategy))
    chosen: dict[str, Placement | str] = {n: DIVIDED[i % len(DIVIDED)] for i, n in enumerate(names)}
    chosen[names[0]] = Placement(ROW_HASHED, tuple(reversed(range(world))))
    return Plan.of(problem.tables, world, chosen)


def make(comm: Communicator, problem: Problem, plan: Plan, rule: SparseOptimizer, **more: Any) -> ShardedEmbeddingBag:
    options = {"dtype": problem.dtype, "debug": True, **more}
    return ShardedEmbeddingBag(problem.tables, plan, rule, communicator=comm, **options)


def train_sharded(
    comm: Communicator,
    problem: Problem,
    plan: Plan,
    rule: SparseOptimizer,
    steps: int,
    *,
    learn_weights: bool = True,
    **more: Any,
) -> Trained:
    """Train with all ranks; `outputs` and `weight_gradients` are this rank's, `tables` are whole (collective)."""
    module = make(comm, problem, plan, rule, **more)
    dense = torch.optim.SGD(module.parameters(), lr=rule.lr) if list(module.parameters()) else None
    outputs, gradients = [], []
    for step in range(steps):
        bags = problem.bags(comm.rank, step)
        weights = {name: w.clone().requires_grad_(learn_weights) for name, (_, _, w) in bags.items() if w is not None}
        inputs = {
            name: (ids, at, weights[name]) if name in weights else (ids, at) for name, (ids, at, _) in bags.items()
        }
        vectors = module(inputs)
        outputs.append(vectors.detach().clone())
        problem.loss(vectors, comm.rank, step).backward()
        gradients.append({name: w.grad for name, w in weights.items() if w.grad is not None})
        if dense is not None:
            dense.step()
            dense.zero_grad()
    tables = whole_tables(comm, module)
    module.close()
    return Trained([outputs], tables, [gradients])


def whole_tables(comm: Communicator, module: ShardedEmbeddingBag) -> dict[str, Tensor]:
    """Return all tables that are divided, whole, on every rank (collective)."""
    module.wait()
    mine = []
    for index, shard in enumerate(module.shards.owned):
        table = module.tables[shard.table]
        ids, rows = shard.rows.within(0, table.num_embeddings)
        mine.append((table.name, ids, shard.columns, module.shards[index].weight[rows].clone()))
    whole = {
        table.name: torch.full((table.num_embeddings, table.embedding_dim), torch.nan, dtype=torch.float64)
        for index, table in enumerate(module.tables)
        if index not in module.plan.replicated
    }
    for parts in comm.allgather_object(mine):
        for name, ids, columns, rows in parts:
            whole[name][ids, columns[0] : columns[1]] = rows.double()
    return whole


__all__ = [
    "DIVIDED",
    "REPLICATED",
    "STRATEGIES",
    "TABLES",
    "Problem",
    "Trained",
    "make",
    "placements",
    "plain_modules",
    "replace",
    "train_plain",
    "train_sharded",
    "whole_tables",
]
