"""Sharded embeddings: speed beside the peers, a slow rank, two hosts with a slow link, memory, copies.

launch/peers                                                        # torchrec and FBGEMM, in an environment of theirs
python benchmarks/embedding.py speed                                # starts all contenders itself, in turns
shadowrun -np 2 python benchmarks/embedding.py slow                 # one rank sleeps half of its time
launch/emulated-cluster up 2 --rate 1gbit
launch/emulated-cluster run 2 python benchmarks/embedding.py hosts --rate-mbit 1000
launch/emulated-cluster down
shadowrun -np 2 python benchmarks/embedding.py memory --rows 40000000
shadowrun -np 2 python benchmarks/embedding.py copies               # replication=2 beside none
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
DIM = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, more in VERBS.items():
        each = verbs.add_parser(verb, help=more.__doc__)
        each.add_argument("--rows", type=int, default=10_000_000, help="of all tables together")
        each.add_argument("--ids", type=int, nargs="+", default=[1, 20] if verb == "speed" else [1], help="of each bag")
        each.add_argument("--batch-size", type=int, default=2048, help="samples per rank")
        each.add_argument("--steps", type=int, default=40, help="of each repeat")
        each.add_argument("--repeats", type=int, default=5)
        each.add_argument("--rate-mbit", type=float, default=1000.0, help="hosts: of the link")
        each.add_argument("--peers", default=str(HERE.parent / ".venv-peers/bin/python"), help="speed: their Python")
    arguments = parser.parse_args()
    VERBS[arguments.verb](arguments)


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> None:
    """samples/s of forward + backward + update: ours, torchrec, and the limits without communication"""
    ours = ["shadowrun", "-np", "2", sys.executable, str(HERE / "peers/shadowsync_bags.py")]
    contenders = {
        "torchrec": [arguments.peers, str(HERE / "peers/torchrec_bags.py")],
        "ours": ours,
        "ours, plain torch": [*ours, "--kernel", "plain"],
        "limit: FBGEMM alone": [arguments.peers, str(HERE / "peers/fbgemm_alone.py")],
        "limit: our kernel alone": [*ours, "--alone"],
    }
    for ids in arguments.ids:
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.repeats):
            for name, command in contenders.items():
                steps = max(arguments.steps // (2 if ids > 4 else 1), 5)
                options = ["--ids", ids, "--rows", arguments.rows, "--steps", steps, "--repeats", 1]
                options += ["--batch-size", arguments.batch_size]
                rates[name] += figures_of([*command, *map(str, options)])
        print(f"\n{ids} ids a feature, {arguments.rows} rows, batch {arguments.batch_size} a rank; samples/s\n")
        print("| | median | worst | best | / torchrec |\n|---|---|---|---|---|")
        peer = statistics.median(rates["torchrec"])
        for name, found in rates.items():
            middle = statistics.median(found)
            print(f"| {name} | {middle:.0f} | {min(found):.0f} | {max(found):.0f} | {middle / peer:.2f} |", flush=True)


def figures_of(command: list[str]) -> list[float]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **KEEP_FREED_MEMORY}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=600, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            rates: list[float] = json.loads(line)["samples_per_s"]
            return rates
    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""For all contenders alike: else torchrec spends much of its time in page faults."""


# --- under a launcher -------------------------------------------------------------------------------------------------


def tables_and_batches(arguments: argparse.Namespace, ids: int, rank: int, size: int) -> tuple[list[Any], list[Any]]:
    import torch
    from synthetic import Synthetic

    from hvd_shadowsync.embedding import EmbeddingTable, Jagged

    data = Synthetic(arguments.rows, ids)
    init = functools.partial(torch.nn.init.uniform_, a=-0.01, b=0.01)
    tables = [EmbeddingTable(f"c{index}", rows, DIM, init=init) for index, rows in enumerate(data.table_sizes)]
    lengths = torch.full((len(tables) * arguments.batch_size,), ids, dtype=torch.int32)
    batches = []
    for step in range(8):
        bags = data.bags(arguments.batch_size, step, rank=rank, size=size)
        batches.append(Jagged([table.name for table in tables], bags.transpose(0, 1).flatten(), lengths))
    return tables, batches


def ring(batches: list[Any], steps: int) -> Iterator[Any]:
    from dataclasses import replace

    for step in range(steps):
        yield replace(batches[step % len(batches)])  # an object of its own


def slow(arguments: argparse.Namespace) -> None:
    """samples/s where rank 1 sleeps half of its time: alltoall and served, side by side"""
    import torch
    from mpi4py import MPI

    from hvd_shadowsync.embedding import RowWiseAdagrad, ShardedEmbeddingBag

    comm = MPI.COMM_WORLD
    found: dict[str, list[list[float]]] = {}
    tables, batches = tables_and_batches(arguments, arguments.ids[0], comm.rank, comm.size)
    plan = {table.name: "table-wise" for table in tables}
    modules = {
        mode: ShardedEmbeddingBag(tables, plan, RowWiseAdagrad(0.02, eps=1e-8), mode=mode)
        for mode in ("alltoall", "served")
    }
    top = torch.nn.Sequential(torch.nn.Linear(len(tables) * DIM, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1))

    def step(module: Any, batch: Any, sleeps: bool) -> None:
        begun = time.perf_counter()
        top(module(batch)).mean().backward()
        if sleeps:
            time.sleep(time.perf_counter() - begun)

    seconds = 4.0
    for _ in range(arguments.repeats):
        for mode, module in modules.items():
            for sleeps in (False, True):
                for batch in ring(batches, 4):
                    step(module, batch, False)
                module.wait()
                comm.Barrier()
                steps = steps_within(
                    lambda batch, module=module, sleeps=sleeps: step(module, batch, sleeps and comm.rank == 1),
                    batches, seconds, lockstep=mode == "alltoall",
                )  # fmt: skip
                rates = comm.allgather(steps * arguments.batch_size / seconds)
                found.setdefault(f"{mode}{', rank 1 sleeps half of its time' * sleeps}", []).append(rates)
                module.wait()
                comm.Barrier()
    if comm.rank == 0:
        print("| | rank 0, samples/s | rank 1 | all: median | worst | best |\n|---|---|---|---|---|---|")
        for name, rates in found.items():
            each = [statistics.median(column) for column in zip(*rates, strict=True)]
            sums = [sum(row) for row in rates]
            middle = statistics.median(sums)
            print(f"| {name} | {each[0]:.0f} | {each[1]:.0f} | {middle:.0f} | {min(sums):.0f} | {max(sums):.0f} |")
    for module in modules.values():
        module.close()


def copies(arguments: argparse.Namespace) -> None:
    """samples/s with a copy of each rank's rows on the next rank, side by side with none"""
    from mpi4py import MPI

    from hvd_shadowsync.embedding import RowWiseAdagrad, ShardedEmbeddingBag

    comm = MPI.COMM_WORLD
    for ids in arguments.ids:
        tables, batches = tables_and_batches(arguments, ids, comm.rank, comm.size)
        plan = {table.name: "table-wise" for table in tables}
        rule = RowWiseAdagrad(0.02, eps=1e-8)
        modules = {
            "none": ShardedEmbeddingBag(tables, plan, rule),
            "a copy": ShardedEmbeddingBag(tables, plan, rule, replication=2),
        }
        found: dict[str, list[float]] = {name: [] for name in modules}
        for _ in range(arguments.repeats):
            for name, module in modules.items():
                for batch in ring(batches, 4):
                    module(batch).mean().backward()
                comm.Barrier()
                begun = time.perf_counter()
                for batch in ring(batches, arguments.steps):
                    module(batch).mean().backward()
                seconds = comm.allreduce(time.perf_counter() - begun, MPI.MAX)
                found[name].append(arguments.steps * arguments.batch_size * comm.size / seconds)
        if comm.rank == 0:
            sent = modules["a copy"].metrics()
            print(f"{ids} ids a feature; rank 0 sends {sent['replica_bytes'] / sent['updates'] / 1e6:.2f} MB a step\n")
            print("| copies | samples/s, median | worst | best | / none |\n|---|---|---|---|---|")
            for name, rates in found.items():
                share = statistics.median(a / b for a, b in zip(rates, found["none"], strict=True))
                middle = statistics.median(rates)
                print(f"| {name} | {middle:.0f} | {min(rates):.0f} | {max(rates):.0f} | {share:.2f} |", flush=True)
        for module in modules.values():
            module.close()


def steps_within(step: Callable[[Any], None], batches: list[Any], seconds: float, *, lockstep: bool) -> int:
    """Take steps for so many seconds; in lockstep all ranks take equally many."""
    from mpi4py import MPI

    begun, steps = time.perf_counter(), 0
    going = True
    while going:
        for batch in ring(batches, 4):
            step(batch)
            steps += 1
        going = time.perf_counter() - begun < seconds
        if lockstep:
            going = MPI.COMM_WORLD.bcast(going)
    return int(steps * seconds / (time.perf_counter() - begun))


def hosts(arguments: argparse.Namespace) -> None:
    """a step on two hosts with a link of known rate, with lookups ahead: against compute and the link's time"""
    import torch
    from mpi4py import MPI

    from hvd_shadowsync.comm import local
    from hvd_shadowsync.embedding import RowWiseAdagrad, ShardedEmbeddingBag

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    tables, batches = tables_and_batches(arguments, arguments.ids[0], comm.rank, comm.size)
    plan = {table.name: "table-wise" for table in tables}
    widths = [len(tables) * DIM, 256, 128, 1]
    layers = [torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.ReLU()) for a, b in pairwise(widths)]
    top = torch.nn.Sequential(*layers)
    vectors = torch.randn(arguments.batch_size, widths[0], requires_grad=True)
    rule = RowWiseAdagrad(0.02, eps=1e-8)
    # What a rank computes: its samples in all tables are as many lookups as all ranks' samples in its own tables.
    alone = ShardedEmbeddingBag(tables, plan, rule, communicator=local.world(1)[0])
    module = ShardedEmbeddingBag(tables, plan, rule)
    half = ShardedEmbeddingBag(tables, plan, rule, wire_dtype=torch.bfloat16)

    def dense(batch: Any) -> None:
        top(vectors).mean().backward()

    def train(batch: Any, embedding: Any = module) -> None:
        top(embedding(batch)).mean().backward()

    rows: dict[str, list[tuple[float, float]]] = {}
    before = module.metrics()
    for _ in range(arguments.repeats):
        given = list(ring(batches, arguments.steps))
        rows.setdefault("dense alone", []).append(timed(dense, given, comm))
        rows.setdefault("dense, own lookups and updates", []).append(
            timed(lambda batch: train(batch, alone), given, comm)
        )
        for depth in (0, 1, 2):
            rows.setdefault(f"prefetch {depth}", []).append(timed(train, module.prefetch(given, depth=depth), comm))
            module.wait()
        loop = half.prefetch(given, depth=1)
        rows.setdefault("prefetch 1, bfloat16 on the wire", []).append(
            timed(lambda batch: train(batch, half), loop, comm)
        )
        half.wait()
    after = module.metrics()
    steps = after["lookups"] - before["lookups"]
    sent = sum(after[key] - before[key] for key in ("id_bytes", "vector_bytes", "gradient_bytes")) / steps
    link_ms = 8000 * comm.allreduce(sent, MPI.MAX) / (arguments.rate_mbit * 1e6)
    if comm.rank == 0:
        compute = statistics.median(wall for wall, _ in rows["dense, own lookups and updates"])
        bound = max(compute, link_ms)
        print(f"{sent / 1e6:.2f} MB a step and rank each way: {link_ms:.1f} ms on the link; bound {bound:.1f} ms\n")
        print("| | step, ms: median | best | worst | / bound | CPU of a rank, ms |\n|---|---|---|---|---|---|")
        for name, found in rows.items():
            steps_ms, cpu_ms = zip(*found, strict=True)
            middle = statistics.median(steps_ms)
            print(
                f"| {name} | {middle:.1f} | {min(steps_ms):.1f} | {max(steps_ms):.1f} | {middle / bound:.2f} | "
                f"{statistics.median(cpu_ms):.1f} |"
            )
    module.close()
    half.close()
    alone.close()


def timed(step: Callable[[Any], None], loop: Any, comm: Any) -> tuple[float, float]:
    """Milliseconds of a step of the slowest rank, and CPU milliseconds of this one, all its threads."""
    comm.Barrier()
    begun, cpu, count = time.perf_counter(), time.process_time(), 0
    for batch in loop:
        step(batch)
        count += 1
    from mpi4py import MPI

    cpu = time.process_time() - cpu
    return 1000 * comm.allreduce(time.perf_counter() - begun, MPI.MAX) / count, 1000 * cpu / count


def memory(arguments: argparse.Namespace) -> None:
    """what the ranks take in all, at most, while they train"""
    import torch
    from mpi4py import MPI

    from hvd_shadowsync.embedding import RowWiseAdagrad, ShardedEmbeddingBag

    comm = MPI.COMM_WORLD
    empty = peak_bytes()
    tables, batches = tables_and_batches(arguments, arguments.ids[0], comm.rank, comm.size)
    module = ShardedEmbeddingBag(tables, None, RowWiseAdagrad(0.02, eps=1e-8))
    made = peak_bytes()
    for batch in module.prefetch(list(ring(batches, arguments.steps)), depth=1):
        module(batch).backward(torch.full((arguments.batch_size, len(tables) * DIM), 1e-3))
    module.wait()
    own = sum(buffer.nbytes for buffer in module.shards.buffers())
    everyone = comm.gather((empty, made, peak_bytes(), own))
    if comm.rank == 0:
        print(module.plan)
        for rank, (first, second, third, shards) in enumerate(everyone):
            gib = [round(value / 2**30, 2) for value in (first, shards, second, third)]
            print(
                f"rank {rank}: before {gib[0]} GiB, its rows and their state {gib[1]}, made {gib[2]}, trained {gib[3]}"
            )
        print(f"all ranks: {sum(each[2] for each in everyone) / 2**30:.2f} GiB at most")
    module.close()


def peak_bytes() -> int:
    from mpi4py import MPI  # noqa: F401  (what MPI takes is there from the beginning)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "speed": speed,
    "slow": slow,
    "hosts": hosts,
    "memory": memory,
    "copies": copies,
}

if __name__ == "__main__":
    main()
