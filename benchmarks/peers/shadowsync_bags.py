"""`ShardedEmbeddingBag` in the same shape as the peers beside it.

    shadowrun -np 2 python benchmarks/peers/shadowsync_bags.py --ids 20 [--kernel plain] [--alone]

`--alone`: no communication; each rank looks up and updates its own tables for all ranks' samples, with our kernel.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mpi4py import MPI

from hvd_shadowsync.embedding import EmbeddingTable, Jagged, RowWiseAdagrad, ShardedEmbeddingBag
from hvd_shadowsync.embedding.kernels import choose
from hvd_shadowsync.embedding.kernels.base import Bags, Gradient, Pooling
from hvd_shadowsync.embedding.placement import Plan
from hvd_shadowsync.embedding.shards import Shards

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from synthetic import Synthetic

DIM = 32
RULE = RowWiseAdagrad(lr=0.02, eps=1e-8)
GRADIENT = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=1, help="of each bag")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of all tables together")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples per rank")
    parser.add_argument("--steps", type=int, default=50, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ring", type=int, default=8, help="different batches, over and over")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--alone", action="store_true", help="without communication: the limit")
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD
    data = Synthetic(arguments.rows, arguments.ids)
    init = functools.partial(torch.nn.init.uniform_, a=-0.01, b=0.01)
    names = [f"c{index}" for index in range(len(data.table_sizes))]
    tables = [EmbeddingTable(name, rows, DIM, init=init) for name, rows in zip(names, data.table_sizes, strict=True)]
    make = alone if arguments.alone else together
    kernel = choose(arguments.kernel)
    measure(f"{kernel.name}{' alone' * arguments.alone}", arguments, make(data, tables, arguments), comm)


def together(data: Synthetic, tables: list[EmbeddingTable], arguments: argparse.Namespace) -> Callable[[int], None]:
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    module = ShardedEmbeddingBag(tables, {t.name: "table-wise" for t in tables}, RULE, kernel=arguments.kernel)
    lengths = torch.full((len(tables) * arguments.batch_size,), arguments.ids, dtype=torch.int32)
    keys = [table.name for table in tables]
    ring = []
    for step in range(arguments.ring):
        bags = data.bags(arguments.batch_size, step, rank=rank, size=size)  # [samples, tables, ids]
        ring.append(Jagged(keys, bags.transpose(0, 1).flatten(), lengths))
    gradient = torch.full((arguments.batch_size, len(tables) * DIM), GRADIENT)

    def step(index: int) -> None:
        module(ring[index]).backward(gradient)

    return step


def alone(data: Synthetic, tables: list[EmbeddingTable], arguments: argparse.Namespace) -> Callable[[int], None]:
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    plan = Plan.of(tables, size, {table.name: "table-wise" for table in tables})
    shards, kernel = Shards(plan, rank, RULE, torch.float32, 0), choose(arguments.kernel)
    samples = arguments.batch_size * size
    lengths = None if arguments.ids == 1 else torch.full((samples,), arguments.ids, dtype=torch.int32)
    ring = []
    for step in range(arguments.ring):
        bags = torch.cat([data.bags(arguments.batch_size, step, rank=other, size=size) for other in range(size)])
        ring.append([Bags(bags[:, shard.table].reshape(-1).contiguous(), lengths) for shard in shards.owned])
    out = torch.empty(samples, len(shards) * DIM)
    gradient = torch.full_like(out, GRADIENT)
    columns = [slice(DIM * index, DIM * (index + 1)) for index in range(len(shards))]

    def step(index: int) -> None:
        bags = ring[index]
        kernel.pool([Pooling(shards[i].weight, bags[i], out[:, c]) for i, c in enumerate(columns)])
        shards.update(kernel, [[Gradient(bags[i], gradient[:, c], 0.5)] for i, c in enumerate(columns)])

    return step


def measure(name: str, arguments: argparse.Namespace, step: Callable[[int], None], comm: MPI.Comm) -> None:
    """Time the steps, each rank until its own end and the slowest rank counting; rank 0 prints."""
    for index in range(arguments.ring):
        step(index)
    step_ms = []
    for _ in range(arguments.repeats):
        comm.Barrier()
        begun = time.perf_counter()
        for index in range(arguments.steps):
            step(index % arguments.ring)
        step_ms.append(1000 * comm.allreduce(time.perf_counter() - begun, MPI.MAX) / arguments.steps)
    samples = arguments.batch_size * comm.size
    rates = [round(1000 * samples / value, 1) for value in step_ms]
    figures = {"name": name, "ids": arguments.ids, "samples_per_s": rates, "step_ms": [round(ms, 3) for ms in step_ms]}
    if comm.rank == 0:
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
