"""Rounds back to back for a long time: does a rank's memory grow, or the number of its descriptors and threads?

    OMP_NUM_THREADS=1 shadowrun -np 2 python benchmarks/soak.py --minutes 30

Each algorithm has its share of the time, one after the other in the same processes, with a Checkpointer that writes
all the while. Each rank looks once a second at what it has; the least of the second quarter of a share (in the first
one all memory is had once) is set against the least of the last: a checkpoint's copy, which is there at some looks and
not at others, is no growth. Raw results are kept in benchmarks/raw/soak.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from hvd_shadowsync import BMUF, Checkpointer, ElasticAveraging, ModelAveraging, ShadowSync

RAW = Path(__file__).parent / "raw" / "soak.json"
LOOK_S = 1.0
CASES: dict[str, dict[str, Any]] = {
    "S-MA": {"algorithm": ModelAveraging()},
    "S-MA fp16": {"algorithm": ModelAveraging(), "wire_dtype": torch.float16},
    "S-BMUF": {"algorithm": BMUF(block_momentum=0.2)},
    "S-EASGD": {"algorithm": ElasticAveraging()},
    "FR-MA": {"algorithm": ModelAveraging(), "foreground": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of all cases together")
    parser.add_argument("--mb", type=float, default=4.0, help="dense weights, in 10^6 bytes")
    parser.add_argument("--every-s", type=float, default=5.0, help="from one checkpoint to the next")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, default=RAW)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for name in arguments.cases:
        records.append({"case": name, "ranks": soak(CASES[name], arguments)})
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps(records[-1]), flush=True)
    if MPI.COMM_WORLD.rank == 0:
        arguments.json.parent.mkdir(exist_ok=True)
        settings = {"minutes": arguments.minutes, "mb": arguments.mb, "every_s": arguments.every_s}
        arguments.json.write_text(json.dumps({"settings": settings, "cases": records}, indent=1) + "\n")


def soak(options: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every rank's figures of one case."""
    width = round((arguments.mb * 1e6 / 4) ** 0.5)
    torch.manual_seed(MPI.COMM_WORLD.rank)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    before = usage()
    with tempfile.TemporaryDirectory() as own:
        folder = MPI.COMM_WORLD.bcast(own)
        with ShadowSync(optimizer, model=model, sync_every=1, **options) as sync:
            checkpointer = Checkpointer(folder, model, sync, every_s=arguments.every_s)
            quarter_s = 60 * arguments.minutes / len(arguments.cases) / 4
            quarters = [train(model, optimizer, quarter_s) for _ in range(4)]
            sync.synchronize()
            figures = sync.metrics()
            written = checkpointer.metrics()["checkpoints"]
            checkpointer.close()
        MPI.COMM_WORLD.Barrier()
    after = usage()
    own_figures = {
        "rounds": int(figures["rounds"]),
        "checkpoints": int(written),
        "before": before,
        "warm": quarters[1],
        "end": quarters[3],
        "growth_kib": quarters[3]["rss_kib"] - quarters[1]["rss_kib"],
        "closed": after,
    }
    return list(MPI.COMM_WORLD.allgather(own_figures))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seconds: float) -> dict[str, int]:
    """Train; return the least of what this process had at any look."""
    width = next(model.parameters()).shape[0]
    deadline, next_look, looks = time.monotonic() + seconds, 0.0, []
    while (now := time.monotonic()) < deadline:
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.step()
        if now >= next_look:
            next_look = now + LOOK_S
            looks.append(usage())
    return {name: min(look[name] for look in looks) for name in looks[0]}


def usage() -> dict[str, int]:
    """Return what this process has: memory, descriptors, threads."""
    gc.collect()
    with open("/proc/self/status") as file:
        rss_kib = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return {"rss_kib": rss_kib, "descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


if __name__ == "__main__":
    main()
