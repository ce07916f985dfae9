"""Trains one configuration after the other on all ranks, each as examples/ctr.py would; quality.py starts it.

    shadowrun -np 2 python benchmarks/quality_training.py RUNS.json [EXAMPLES]

RUNS.json is a list of `quality_plan.Run`s; rank 0 writes one JSON line a run.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import flights
import torch
import torch.nn.functional as F
from dlrm import DLRM
from quality import quality
from quality_plan import BATCH_SIZE, METHODS, Method, Run, whole_steps

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync

ALGORITHMS = {"ma": ModelAveraging, "easgd": ElasticAveraging, "bmuf": BMUF}
KEPT = ("rounds", "sync_gap_steps", "in_flight_ms", "surviving_progress", "distance", "bytes_sent")


def main() -> None:
    from mpi4py import MPI

    runs = [Run(**fields) for fields in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    limit = int(sys.argv[2]) if len(sys.argv) > 2 else None
    if METHODS[runs[0].method].library == "horovod":
        import horovod.torch as hvd

        hvd.init()
    data = flights.load()
    for run in runs:
        MPI.COMM_WORLD.Barrier()
        result = train(run, data, limit, MPI.COMM_WORLD)
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps({"run": asdict(run), **result}), flush=True)


def train(run: Run, data: flights.Flights, limit: int | None, world: Any) -> dict[str, Any]:
    """Return what became of one training; figures that are not finite are None."""
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    model = DLRM(data.num_dense, data.table_sizes)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=run.learning_rate)
    optimizer = wrapped(method, run, model, optimizer)
    num_steps = whole_steps(data.num_train_rows, limit, world.size)
    begun = time.perf_counter()
    for batch in islice(data.train_batches(BATCH_SIZE, rank=world.rank, size=world.size), num_steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch.dense, batch.ids), batch.labels).backward()
        optimizer.step()
    figures = finished(method, model, optimizer, num_steps, world)
    trained_s = time.perf_counter() - begun
    tested = test(model, data) if world.rank == 0 else {}
    figures |= {"steps": num_steps, "examples": num_steps * world.size * BATCH_SIZE, "seconds": trained_s, **tested}
    return {name: value if value is None or math.isfinite(value) else None for name, value in figures.items()}


def wrapped(method: Method, run: Run, model: DLRM, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer with what keeps the replicas together; equal seeds give them equal weights."""
    if method.library == "horovod":
        import horovod.torch as hvd

        hvd.broadcast_parameters(dict(model.named_parameters()), root_rank=0)
        return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    if method.library == "ours":
        algorithm = ALGORITHMS[method.rule](**({} if method.alpha is None else {"alpha": method.alpha}))
        options = {**method.options, **({} if run.sync_every is None else {"sync_every": run.sync_every})}
        ShadowSync(optimizer, named_parameters=model.named_parameters(), algorithm=algorithm, **options)
    return optimizer


def finished(
    method: Method, model: DLRM, optimizer: torch.optim.Optimizer, num_steps: int, world: Any
) -> dict[str, float | None]:
    """Make all replicas the same; return what synchronisation counted."""
    if method.library == "ours":
        rounds = optimizer.shadow.metrics()["rounds"]
        optimizer.shadow.synchronize()
        metrics = optimizer.shadow.metrics(merged=True)
        optimizer.shadow.close()
        in_training = world.allreduce(rounds) / world.size
        return {**{name: metrics[name] for name in KEPT}, "rounds_in_training": in_training}
    if method.library == "horovod":
        return {"rounds": num_steps, "sync_gap_steps": 1.0}
    for parameter in model.parameters():
        mean = torch.from_numpy(world.allreduce(parameter.detach().numpy())) / world.size
        parameter.data.copy_(mean)
    return {"rounds": 0, "sync_gap_steps": None}


def test(model: DLRM, data: flights.Flights) -> dict[str, float | None]:
    """Return AUC and normalised entropy on the test rows; None where the training diverged."""
    model.eval()
    with torch.inference_mode():
        tested = [(batch.labels, model(batch.dense, batch.ids).sigmoid()) for batch in data.test_batches(4096)]
    labels, probabilities = (torch.cat(column).numpy() for column in zip(*tested, strict=True))
    if not math.isfinite(probabilities.sum()):
        return {"auc": None, "normalised_entropy": None}
    found = quality(labels, probabilities)
    return {"auc": found.auc, "normalised_entropy": found.normalised_entropy}


if __name__ == "__main__":
    main()
