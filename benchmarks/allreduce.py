"""The reduction of a round between hosts, against the time that its bytes need on the link, and against others'.

    python benchmarks/allreduce.py                        # 2, 4 and 8 emulated hosts of 1 Gbit/s, 1 to 256 MB
    python benchmarks/allreduce.py --hosts 2 --mb 16 --rate-mbit 10000

The bound is 2 (P-1) / P x bytes / rate: what a reduction of P hosts' vectors has to send and to receive on each link.
Ours is what rounds use (`reducers.AllReduceMean` as it starts, before any search) and its form in half precision. The
others run without this package's settings of MPI: a blocking Allreduce, an Iallreduce that is polled every millisecond,
both as the MPI library comes, Gloo (`torch.distributed.all_reduce`) and Horovod (`hvd.allreduce`, over MPI). Each kind
has jobs of its own, which take turns. CPU is that of the whole process, averaged over the ranks, by 10^9 bytes reduced.

Prints the tables, and keeps the figures in benchmarks/raw/allreduce.json.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RAW = Path(__file__).parent / "raw" / "allreduce.json"
AS_IT_COMES = [
    "--env",
    "OMPI_MCA_coll_libnbc_iallreduce_algorithm=ignore",
    "--env",
    "OMPI_MCA_btl_tcp_eager_limit=65536",
]
JOBS = {"ours": [], "mpi": AS_IT_COMES, "gloo": AS_IT_COMES, "horovod": AS_IT_COMES}
GLOO_PORT = 29517
JOB_TIMEOUT_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--mb", type=float, nargs="+", default=[1, 4, 16, 64, 256], help="of the vector, in 10^6 bytes")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="with several, only ours, hierarchical and flat")
    parser.add_argument("--rate-mbit", type=float, default=1000.0, help="of each host's link")
    parser.add_argument("--turns", type=int, default=2, help="jobs of each kind, in turns")
    parser.add_argument("--repeats", type=int, default=5, help="reductions in each job, after one that is not counted")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument(
        "--json", type=Path, default=RAW, help="where the figures are kept, beside those of other cases"
    )
    parser.add_argument("--worker", choices=JOBS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    if arguments.ranks_per_host > 1:
        arguments.jobs = ["ours"]
    records: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    for hosts in arguments.hosts:
        runs = [run for _ in range(arguments.turns) for job in arguments.jobs for run in start(job, hosts, arguments)]
        made = summary(runs, hosts, arguments)
        print(table(made, hosts), flush=True)
        records = [each for each in records if case(each) not in set(map(case, made))] + made
        arguments.json.parent.mkdir(exist_ok=True)
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def case(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a record is about: a newer one takes its place."""
    return tuple(record[key] for key in ("contender", "mb", "hosts", "ranks_per_host", "rate_mbit"))


def start(job: str, hosts: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the contenders of `job` on emulated hosts; return what they print."""
    again = ["--worker", job, "--repeats", str(arguments.repeats), "--mb", *map(str, arguments.mb)]
    size = str(hosts * arguments.ranks_per_host)
    emulated = ["--emulated", str(hosts), "--rate", f"{arguments.rate_mbit:g}mbit", "-np", size, "--threads", "1"]
    command = [sys.executable, "-m", "hvd_shadowsync.run", *emulated, *JOBS[job], "python", __file__, *again]
    done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_TIMEOUT_S, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def summary(runs: list[dict[str, Any]], hosts: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record for each contender and size, with the figures of all its jobs."""
    records = []
    for contender, mb in dict.fromkeys((run["contender"], run["mb"]) for run in runs):
        same = [run for run in runs if (run["contender"], run["mb"]) == (contender, mb)]
        times = [each for run in same for each in run["ms"]]
        records.append(
            {
                "contender": contender,
                "mb": mb,
                "hosts": hosts,
                "ranks_per_host": arguments.ranks_per_host,
                "rate_mbit": arguments.rate_mbit,
                "bound_ms": 2 * (hosts - 1) / hosts * 8000 * mb / arguments.rate_mbit,
                "ms": {"median": statistics.median(times), "best": min(times), "worst": max(times)},
                "cpu_s_per_gb": statistics.median(each for run in same for each in run["cpu_s_per_gb"]),
                "runs": same,
            }
        )
    return records


def table(records: list[dict[str, Any]], hosts: int) -> str:
    """Return a Markdown table of the records of `hosts` hosts."""
    lines = [f"\n{hosts} hosts: time / bound (best to worst), CPU s a GB", ""]
    contenders = list(dict.fromkeys(each["contender"] for each in records))
    lines += ["| MB | bound, ms | " + " | ".join(contenders) + " |", "|---" * (len(contenders) + 2) + "|"]
    for mb, bound in sorted({(each["mb"], each["bound_ms"]) for each in records if each["hosts"] == hosts}):
        cells = []
        for contender in contenders:
            found = [r for r in records if (r["contender"], r["mb"], r["hosts"]) == (contender, mb, hosts)]
            cells += [cell(found[0]) if found else ""]
        lines.append(f"| {mb:g} | {bound:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(record: dict[str, Any]) -> str:
    ratios = {name: value / record["bound_ms"] for name, value in record["ms"].items()}
    return f"{ratios['median']:.2f} ({ratios['best']:.2f} to {ratios['worst']:.2f}), {record['cpu_s_per_gb']:.1f}"


# --- one rank of a job ------------------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Measure the contenders of this job, in turns."""
    contenders, meet = CONTENDERS[arguments.worker]()
    for mb in arguments.mb:
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for repeat in range(arguments.repeats + 1):
            for name, reduce in contenders.items():
                meet(0.0)
                begun, spent = time.perf_counter(), time.process_time()
                reduce(round(mb * 1e6 / 4))
                took, used = time.perf_counter() - begun, time.process_time() - spent
                slowest, average = max(meet(took)), statistics.mean(meet(used))
                if repeat:
                    figures[name].append((1e3 * slowest, 1e3 * average / mb))
        for name, values in figures.items():
            times, cpu = zip(*values, strict=True)
            if RANK == 0:
                print(json.dumps({"contender": name, "mb": mb, "ms": times, "cpu_s_per_gb": cpu}), flush=True)


RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
Contenders = tuple[dict[str, Callable[[int], object]], Callable[[float], list[float]]]
"""What each contender does with so many float32, and a call in which ranks meet and tell each other a number."""


class Vectors:
    """A vector to reduce and one for the result, made anew where the length changes."""

    def __init__(self) -> None:
        self._made: tuple[Any, Any] | None = None

    def __call__(self, numel: int) -> tuple[Any, Any]:
        import torch

        if self._made is None or self._made[0].numel() != numel:
            self._made = torch.ones(numel), torch.empty(numel)
        return self._made


def ours() -> Contenders:
    import torch
    from mpi4py import MPI

    from hvd_shadowsync.comm import mpi
    from hvd_shadowsync.comm.poll import Poller
    from hvd_shadowsync.comm.transfer import Transfer
    from hvd_shadowsync.reducers import (
        AllReduceMean,
        HierarchicalMean,
        HostMemory,
        Hosts,
        OwnerMean,
        Reducer,
    )

    comm, vectors = mpi.world(), Vectors()
    lengths: dict[Reducer, int] = {}
    flat = AllReduceMean(comm, Poller())
    reducers: dict[str, Reducer] = {"ours": flat, "ours, float16": OwnerMean(comm, Poller(), wire_dtype=torch.float16)}
    hosts = Hosts(comm) if Hosts.matter(comm) else None
    made: dict[int, tuple[HierarchicalMean, HostMemory]] = {}
    if hosts is not None:
        reducers = {"ours, every rank on the network": flat}

    def hierarchical(numel: int) -> None:
        assert hosts is not None
        if numel not in made:
            made.clear()
            memory = HostMemory.of(hosts.local, numel, torch.float32, room=numel)
            leaders = hosts.leaders and AllReduceMean(hosts.leaders, Poller())
            made[numel] = HierarchicalMean(hosts, memory, leaders), memory
        mean, memory = made[numel]
        vector, out = vectors(numel)
        mine = memory.snapshots[memory.rank]
        for part, values in mean.reduce(mine, (1.0,) * comm.size, lambda part: mine[part].copy_(vector[part])):
            out[part].copy_(values)

    def reduce(reducer: Reducer, numel: int) -> None:
        vector, out = vectors(numel)
        if lengths.get(reducer) != numel:
            lengths[reducer] = numel
            reducer.rebase(vector)
        for part, values in reducer.reduce(vector, (1.0,) * comm.size):
            out[part].copy_(values)

    for each in reducers.values():
        each.use(Transfer.between(comm.size))
    calls = {name: lambda numel, each=each: reduce(each, numel) for name, each in reducers.items()}
    if hosts is not None:
        calls["ours, hierarchical"] = hierarchical
    return calls, MPI.COMM_WORLD.allgather


def plain_mpi() -> Contenders:
    from mpi4py import MPI

    vectors, world = Vectors(), MPI.COMM_WORLD

    def polled(numel: int) -> None:
        vector, out = vectors(numel)
        request = world.Iallreduce(vector.numpy(), out.numpy())
        while not request.Test():
            time.sleep(0.001)

    def blocking(numel: int) -> None:
        vector, out = vectors(numel)
        world.Allreduce(vector.numpy(), out.numpy())

    return {"MPI_Allreduce": blocking, "MPI_Iallreduce, polled": polled}, world.allgather


def gloo() -> Contenders:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    first = os.environ["SHADOW_EMULATED"].split("=")[0]
    dist.init_process_group("gloo", init_method=f"tcp://{first}:{GLOO_PORT}", rank=RANK, world_size=SIZE)
    atexit.register(dist.destroy_process_group)
    vectors = Vectors()

    def meet(value: float) -> list[float]:
        everyone: list[Any] = [None] * SIZE
        dist.all_gather_object(everyone, value)
        return everyone

    return {"Gloo": lambda numel: dist.all_reduce(vectors(numel)[0])}, meet


def horovod() -> Contenders:
    import horovod.torch as hvd
    from mpi4py import MPI

    hvd.init()
    vectors = Vectors()
    return {"Horovod": lambda numel: hvd.allreduce_(vectors(numel)[0], name="vector")}, MPI.COMM_WORLD.allgather


CONTENDERS: dict[str, Callable[[], Contenders]] = {"ours": ours, "mpi": plain_mpi, "gloo": gloo, "horovod": horovod}


if __name__ == "__main__":
    main()
