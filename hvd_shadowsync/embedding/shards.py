"""The rows that a rank holds, with their optimizer state beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvd_shadowsync.embedding import pages
from hvd_shadowsync.embedding.kernels.base import Gradient, Kernel, Update
from hvd_shadowsync.embedding.optimizers import Adagrad, RowWiseAdagrad, SparseOptimizer
from hvd_shadowsync.embedding.placement import Extent, Plan, RowRange, Shard
from hvd_shadowsync.embedding.tables import EmbeddingTable
from hvd_shadowsync.owned import mark_owned

BLOCK_ROWS = 1 << 16
ROW_DTYPES = (torch.float32, torch.float64)


class Rows(NamedTuple):
    """One shard's memory.

    Attributes:
        weight: [rows, dim].
        state: by slot of the optimizer, [rows, dim] or [rows].
        steps: [1] int64, updates so far.
    """

    weight: Tensor
    state: dict[str, Tensor]
    steps: Tensor


class Shards(nn.Module):
    """All shards of one rank. Weights and state are buffers: no dense optimizer sees them, `state_dict` has them.

    They stay in host memory wherever the module goes; `.double()` and `.float()` convert them.

    Args:
        seed: of the initial values; None: rows that are not in `kept` have none yet.
        kept: rows that there are already, by part.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        rule: SparseOptimizer,
        dtype: torch.dtype,
        seed: int | None,
        kept: Mapping[Extent, Rows] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.owned = plan.of_rank(rank)
        self.rule, self.dtype = rule, dtype
        self.was_set = False
        """Whether rows were set by other means than updates; whoever has copies takes it back."""
        self._keys: list[str] = []
        for shard in self.owned:
            table = plan.tables[shard.table]
            holder = nn.Module()
            self._keys.append(f"{table.name}/{_place_of(shard)}")
            self.add_module(self._keys[-1], holder)
            if (rows := kept.get(shard.extent)) is not None:
                for name, tensor in {"weight": rows.weight, **rows.state, "steps": rows.steps}.items():
                    holder.register_buffer(name, tensor)
                continue
            holder.register_buffer("weight", pages.empty((shard.rows.num_rows, shard.dim), dtype))
            for name, per_weight in rule.slots.items():
                shape = (shard.rows.num_rows, shard.dim) if per_weight else (shard.rows.num_rows,)
                start = rule.initial_accumulator if isinstance(rule, (Adagrad, RowWiseAdagrad)) else 0.0
                holder.register_buffer(name, pages.empty(shape, dtype).fill_(start))
            holder.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        for index, shard in enumerate(self.owned):
            if seed is not None and shard.extent not in kept:
                initialise(self[index].weight, shard, plan.tables[shard.table], table_seed(seed, shard.table))
        self._mark()
        self.register_load_state_dict_post_hook(_make_usable)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.owned)

    def by_extent(self) -> dict[Extent, Rows]:
        """Return all that is here."""
        return {shard.extent: self[index] for index, shard in enumerate(self.owned)}

    def __getitem__(self, index: int) -> Rows:
        buffers = self._modules[self._keys[index]]._buffers  # type: ignore[union-attr]
        return Rows(buffers["weight"], {name: buffers[name] for name in self.rule.slots}, buffers["steps"])  # type: ignore[arg-type, misc]

    def update(self, kernel: Kernel, gradients: Sequence[Sequence[Gradient]]) -> None:
        """Take one step on every shard: `gradients` has a list for each."""
        by_step: dict[int, list[Update]] = {}
        for index, found in enumerate(gradients):
            weight, state, steps = self[index]
            steps += 1
            by_step.setdefault(int(steps), []).append(Update(weight, tuple(state.values()), list(found)))
        for step, updates in by_step.items():
            kernel.update(self.rule, step, updates)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Shards:
        wanted = fn(torch.empty(0, dtype=self.dtype)).dtype
        if wanted in ROW_DTYPES:
            self.dtype = wanted
            for index in range(len(self)):
                holder: Any = self._modules[self._keys[index]]
                for name in ("weight", *self.rule.slots):
                    holder._buffers[name] = pages.converted(holder._buffers[name], wanted)
            self._mark()
        return self

    def make_usable(self) -> None:
        """Bring buffers that were assigned into the dtype and layout that kernels read."""
        for index in range(len(self)):
            holder: Any = self._modules[self._keys[index]]
            for name in ("weight", *self.rule.slots):
                holder._buffers[name] = pages.converted(holder._buffers[name].detach(), self.dtype)
        self.was_set = True
        self._mark()

    def _mark(self) -> None:
        for buffer in self.buffers():
            mark_owned(buffer)


def _place_of(shard: Shard) -> str:
    """Say which rows and columns a shard has, so that no other's state loads into it."""
    rows, (start, stop) = shard.rows, shard.columns
    which = f"rows_{rows.start}_{rows.stop}" if isinstance(rows, RowRange) else f"hash_{rows.part}_of_{rows.parts}"
    return f"{which}/columns_{start}_{stop}"


def _make_usable(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, Shards)
    module.make_usable()


def table_seed(seed: int, index: int) -> int:
    """Return the seed of table `index` of a module whose seed is `seed`."""
    return hash((seed, index)) & (2**63 - 1)


def initialise(weight: Tensor, shard: Shard, table: EmbeddingTable, seed: int) -> None:
    """Fill `weight`, what `shard` holds of `table`, with values that depend on `seed` and the row alone."""
    for first, block in whole_blocks(table, seed, weight.dtype):
        ids, rows = shard.rows.within(first, first + len(block))
        weight[rows] = block[ids - first, shard.columns[0] : shard.columns[1]]


def whole_blocks(table: EmbeddingTable, seed: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the initial values of a table in blocks of whole rows: (first row, [rows, dim])."""
    for first in range(0, table.num_embeddings, BLOCK_ROWS):
        shape = min(BLOCK_ROWS, table.num_embeddings - first), table.embedding_dim
        block = torch.full(shape, torch.nan, dtype=dtype)
        generator = torch.Generator().manual_seed(hash((seed, first)) & (2**63 - 1))
        with torch.no_grad():
            table.init(block, generator=generator)
        if block.isnan().any():
            raise ValueError(
                f"init of table {table.name!r} leaves rows without a value; it has to fill the tensor that it is "
                "given, in place, as torch.nn.init.normal_ does"
            )
        yield first, block
