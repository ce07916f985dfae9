"""FBGEMM's table-batched embedding on the CPU without communication: the limit of what a job of this shape can reach.

    launch/peers
    .venv-peers/bin/python benchmarks/peers/fbgemm_alone.py --ids 20          # starts its two ranks itself
    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 .venv-peers/bin/python benchmarks/peers/fbgemm_alone.py

26 tables of 32 floats, sum pooling, exact row-wise Adagrad. Every feature has equally many ids, so that half of the
tables are half of the look-ups: each rank holds every second table, looks the bags of all ranks' samples up in them and
updates them, as under table-wise sharding. All ranks work at the same time; what they would have to send to each other
is there already.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from synthetic import Synthetic

DIM = 32
LR, EPS = 0.02, 1e-8
GRADIENT = 1e-3
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def parse(doc: str | None, *extra: str) -> argparse.Namespace:
    """Options of all peers; `extra` adds a choice `--sharding`, the first of which is the default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=1, help="of each bag")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of all tables together")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples per rank")
    parser.add_argument("--steps", type=int, default=50, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ring", type=int, default=8, help="different batches, over and over")
    parser.add_argument("--processes", type=int, default=2, help="ranks to start, where RANK is not set")
    parser.add_argument("--no-bounds-check", action="store_true", help="trust the ids, which FBGEMM checks by default")
    parser.add_argument("--plain-malloc", action="store_true", help="glibc as it is, which returns each large block")
    if extra:
        parser.add_argument("--sharding", choices=extra, default=extra[0])
    return parser.parse_args()


def start_ranks(processes: int) -> int:
    """Start this program once for each rank, one thread each; return the first exit code that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    environ = {"OMP_NUM_THREADS": "1", **os.environ, **job}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        while codes := [rank.poll() for rank in ranks]:
            if any(codes) or None not in codes:
                return next((code for code in codes if code), 0)
            time.sleep(0.05)
        return 0
    finally:
        for rank in ranks:
            rank.terminate()


def join(arguments: argparse.Namespace) -> None:
    """Set up this rank: threads, memory that malloc keeps for the next step, the process group."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if sys.platform == "linux" and not arguments.plain_malloc:
        set_malloc = ctypes.CDLL(None).mallopt
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            set_malloc(name, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group("gloo")


def measure(name: str, arguments: argparse.Namespace, step: Callable[[int], None]) -> None:
    """Time the steps, each rank until its own end and the slowest rank counting; rank 0 prints."""
    for index in range(arguments.ring):
        step(index)
    step_ms = []
    for _ in range(arguments.repeats):
        dist.barrier()
        begun = time.perf_counter()
        for index in range(arguments.steps):
            step(index % arguments.ring)
        elapsed = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        step_ms.append(1000 * elapsed.item() / arguments.steps)
    samples = arguments.batch_size * dist.get_world_size()
    name += " unchecked" * arguments.no_bounds_check + " plain malloc" * arguments.plain_malloc
    rates = [round(1000 * samples / value, 1) for value in step_ms]
    figures = {"name": name, "ids": arguments.ids, "samples_per_s": rates, "step_ms": [round(ms, 3) for ms in step_ms]}
    if dist.get_rank() == 0:
        print(json.dumps(figures), flush=True)


def main() -> None:
    arguments = parse(__doc__)
    if "RANK" not in os.environ:
        sys.exit(start_ranks(arguments.processes))
    join(arguments)
    rank, size = dist.get_rank(), dist.get_world_size()
    data = Synthetic(arguments.rows, arguments.ids)
    tables = list(range(rank, len(data.table_sizes), size))
    embedding = SplitTableBatchedEmbeddingBagsCodegen(
        [(data.table_sizes[table], DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for table in tables],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE if arguments.no_bounds_check else BoundsCheckMode.WARNING,
        device=torch.device("cpu"),
    )
    embedding.init_embedding_weights_uniform(-0.01, 0.01)

    ring = []  # all ranks' samples of a step, of this rank's tables: feature after feature, as FBGEMM reads them
    for step in range(arguments.ring):
        bags = torch.cat([data.bags(arguments.batch_size, step, rank=other, size=size) for other in range(size)])
        ring.append(bags[:, tables].transpose(0, 1).flatten())
    samples = arguments.batch_size * size
    offsets = torch.arange(len(tables) * samples + 1) * arguments.ids
    gradient = torch.full((samples, len(tables) * DIM), GRADIENT)

    def step(index: int) -> None:
        embedding(ring[index], offsets).backward(gradient)

    measure("fbgemm alone", arguments, step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
