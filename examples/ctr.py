"""One pass over time-ordered binary events with a DLRM: Horovod's wrapper, or the swap, or no synchronisation at all.

    shadowrun --horovod -np 2 python examples/ctr.py --sync horovod --report runs/horovod.json
    shadowrun --horovod -np 2 python examples/ctr.py --sync shadow --report runs/shadow.json
    mpirun -np 2 --bind-to none --map-by slot:OVERSUBSCRIBE python examples/ctr.py --sync shadow --algorithm easgd
    python examples/ctr.py --sync none                     # one plain process
    python examples/ctr.py --sync none --data criteo day_0.gz
    shadowrun -np 4 python examples/ctr.py --embedding sharded --synthetic-criteo rows=10000000,examples=1000000
    python examples/report.py runs/*.json --output runs    # table, picture and page

With --embedding sharded every row of the embedding tables exists once, on one rank, and is updated there by all ranks'
gradients; --sync is about the rest of the model then. The rows of --synthetic-criteo are made up.

Where shadowrun does not start it, set OMP_NUM_THREADS to the cores that each rank may use.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import criteo
import flights
import torch
import torch.nn.functional as F
from dlrm import DLRM, sharded_tables
from quality import quality
from synthetic import Synthetic
from tqdm import tqdm

PLACEMENTS = ["auto", "table-wise", "row-wise", "row-wise hashed", "column-wise"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sync", choices=["shadow", "horovod", "none"], default="shadow", help="none: replicas that never meet")
    add("--algorithm", choices=["ma", "easgd", "bmuf"], default="ma", help="of --sync shadow")
    add("--sync-every", type=int, metavar="STEPS", help="of --sync shadow: start a round every so many steps")
    add("--sync-interval-ms", type=float, metavar="MS", help="of --sync shadow: start a round every so many ms")
    add("--cpu-budget", type=float, metavar="SHARE", help="of --sync shadow: core share of the communicator thread")
    add("--embedding", choices=["replicated", "sharded"], default="replicated", help="tables on every rank, or divided")
    add("--prefetch", type=int, choices=[0, 1, 2], help="of --embedding sharded: batches looked up ahead; default 0")
    add("--placement", choices=PLACEMENTS, help="of --embedding sharded: where each table lies; default auto")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument(
        "--data", nargs="+", default=["flights"], metavar="NAME", help="flights, or criteo PATH [TEST_PATH]"
    )
    one_of.add_argument(
        "--synthetic-criteo",
        type=rows_and_examples,
        metavar="rows=N,examples=M",
        help="made-up rows in the shape of Criteo's: N in all 26 tables, M to train on (default 4000000)",
    )
    add("--validate", action="store_true", help="flights: train nine months, test on October (to choose settings)")
    add("--test-fraction", type=float, default=0.1, help="criteo: the last rows held out where there is no TEST_PATH")
    add("--buckets", type=int, default=10_000, help="criteo: rows of each hashed embedding table")
    add("--batch-size", type=int, default=256, help="rows per rank and step")
    add("--lr", type=float, default=0.02, help="learning rate of Adagrad")
    add("--embedding-dim", type=int, default=16)
    add("--seed", type=int, default=1)
    add("--steps", type=int, help="stop after so many steps")
    add("--log-every", type=int, default=10, metavar="STEPS", help="steps between two entries of the record's history")
    add("--report", type=Path, metavar="FILE.json", help="where rank 0 writes the record of this run")
    args = parser.parse_args(argv)
    if args.data[0] not in ("flights", "criteo") or len(args.data) > (1 if args.data[0] == "flights" else 3):
        parser.error(f"--data {' '.join(args.data)}: expected flights, or criteo PATH [TEST_PATH]")
    if args.synthetic_criteo:
        args.data = ["synthetic-criteo"]
    if args.validate and args.data[0] != "flights":
        parser.error("--validate belongs to --data flights; with criteo give TEST_PATH or --test-fraction")
    if args.data == ["criteo"]:
        parser.error("--data criteo: expected the path of a Criteo file or folder after it")
    if args.embedding == "replicated":
        for name in ("prefetch", "placement"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} belongs to --embedding sharded")
    else:
        args.prefetch, args.placement = args.prefetch or 0, args.placement or "auto"
    for name in (
        "batch_size",
        "lr",
        "embedding_dim",
        "log_every",
        "steps",
        "sync_every",
        "sync_interval_ms",
        "cpu_budget",
    ):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a value above 0")
    return args


def rows_and_examples(text: str) -> dict[str, int]:
    """rows=N[,examples=M] as a dict."""
    try:
        found = {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        found = {}
    if "rows" not in found or not found.keys() <= {"rows", "examples"}:
        raise argparse.ArgumentTypeError(f"{text!r}: expected rows=N or rows=N,examples=M, such as rows=10000000")
    return found


def open_data(args: argparse.Namespace) -> flights.Flights | criteo.Criteo | Synthetic:
    if args.data[0] == "flights":
        return flights.load(validate=args.validate)
    if args.synthetic_criteo:
        given = args.synthetic_criteo
        return Synthetic(given["rows"], num_train_rows=given.get("examples", Synthetic.num_train_rows))
    paths = [Path(path) for path in args.data[1:]]
    return criteo.Criteo.open(*paths, test_fraction=args.test_fraction, num_buckets=args.buckets)


def shadow_options(args: argparse.Namespace) -> dict[str, Any]:
    """What this command says about rounds, as arguments of the wrapper; the rest keeps its default."""
    from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging

    algorithm = {"ma": ModelAveraging, "easgd": ElasticAveraging, "bmuf": BMUF}[args.algorithm]()
    given = {name: getattr(args, name) for name in ("sync_every", "sync_interval_ms", "cpu_budget")}
    return {"algorithm": algorithm, **{name: value for name, value in given.items() if value is not None}}


args = parse()
try:
    data = open_data(args)
except (FileNotFoundError, ValueError) as error:
    sys.exit(f"ctr.py: {error}")

# ---- the swap: one of these two imports ------------------------------------------------------------------------------
if args.sync == "shadow":
    import hvd_shadowsync.torch as hvd
elif args.sync == "horovod":
    import horovod.torch as hvd
if args.embedding == "sharded":
    import hvd_shadowsync.embedding  # noqa: F401
# ----------------------------------------------------------------------------------------------------------------------
from mpi4py import MPI  # noqa: E402  (initialises MPI, which the swap tunes before)

if args.sync == "none":
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
else:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()

torch.manual_seed(args.seed)
embedding = None
if args.embedding == "sharded":
    embedding = sharded_tables(data.table_sizes, args.embedding_dim, lr=args.lr, placement=args.placement)
model = DLRM(data.num_dense, data.table_sizes, embedding_dim=args.embedding_dim, embedding=embedding)
optimizer = torch.optim.Adagrad(model.parameters(), lr=args.lr)

# The first pass sets up thread pools and caches; it is no part of what is measured.
model(
    torch.zeros(args.batch_size, data.num_dense), torch.zeros(args.batch_size, len(data.table_sizes), dtype=torch.long)
)

if args.sync != "none":
    hvd.broadcast_parameters(dict(model.named_parameters()), root_rank=0)  # sharded tables are no parameters
    options = shadow_options(args) if args.sync == "shadow" else {}
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **options)

chunk = args.batch_size * size  # examples of one step of the whole job
num_steps = args.steps
if data.num_train_rows is not None:
    num_steps = min(num_steps or sys.maxsize, data.num_train_rows // chunk)
often = 0.5 if sys.stderr.isatty() else 10.0  # seconds; in a file each is a line, or makes one longer
bar = tqdm(total=num_steps and num_steps * chunk, unit="ex", unit_scale=True, mininterval=often, disable=rank != 0)
history: list[dict[str, float | None]] = []
losses = torch.zeros(())
step = seen_steps = seen_rounds = 0
shown_gap = "-"


def everyones(value: Any) -> list[Any]:
    """The value of every rank, by rank; with --sync shadow of those that are left."""
    return optimizer.shadow.gather(value) if args.sync == "shadow" else MPI.COMM_WORLD.allgather(value)


MPI.COMM_WORLD.Barrier()
started = ended = time.perf_counter()
longest = 0.0  # seconds from the end of a step to the end of the next, once the first two are over
batches = islice(data.train_batches(args.batch_size, rank=rank, size=size), num_steps)
if embedding is not None:
    batches = embedding.prefetch(batches, inputs=lambda batch: batch.ids, depth=args.prefetch)
for step, batch in enumerate(batches, start=1):
    optimizer.zero_grad()
    logits = model(batch.dense, batch.ids)  # [B]
    loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
    loss.backward()
    optimizer.step()
    losses += loss.detach()
    before, ended = ended, time.perf_counter()
    longest = max(longest, ended - before) if step > 2 else longest
    if step % args.log_every == 0:
        gap = 1.0 if args.sync == "horovod" else None  # steps per round since the last entry; None: no round since
        if args.sync == "shadow" and (rounds := optimizer.shadow.metrics()["rounds"]) > seen_rounds:
            gap = (step - seen_steps) / (rounds - seen_rounds)
            seen_steps, seen_rounds = step, rounds
        mean_loss = losses.item() / args.log_every  # of this rank's rows
        losses.zero_()
        elapsed = time.perf_counter() - started
        history.append({"examples": step * chunk, "seconds": elapsed, "loss": mean_loss, "sync_gap": gap})
        shown_gap = shown_gap if gap is None else f"{gap:.1f} steps"
        bar.set_postfix(loss=f"{mean_loss:.4f}", sync_gap=shown_gap, refresh=False)
        bar.update(step * chunk - bar.n)
if args.sync == "shadow":
    optimizer.shadow.synchronize()  # all replicas are the same from here on
if embedding is not None:
    embedding.wait()  # the last updates of rows are done
seconds = max(everyones(time.perf_counter() - started))
longest = max(everyones(longest))
bar.update(step * chunk - bar.n)
bar.close()
if step == 0:
    sys.exit(f"ctr.py: no step taken: the training rows do not fill a batch of {args.batch_size} on {size} rank(s)")

dense_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
if args.sync == "shadow":
    sync = optimizer.shadow.metrics(merged=True)
    rank = optimizer.shadow.rank  # 0 is there even where ranks were lost
elif args.sync == "horovod":  # the bytes of a ring, all ranks together: Horovod does not count its own
    sync = {"rounds": step, "sync_gap_steps": 1.0, "bytes_sent": step * 2 * (size - 1) * dense_bytes}
else:
    sync = {"rounds": 0, "sync_gap_steps": None, "bytes_sent": 0}
tables = {"rows": sum(data.table_sizes)}
if embedding is not None:  # bytes that all ranks sent for the tables, which are no part of the replicas
    counters = everyones(embedding.metrics())
    tables |= {name: sum(each[name] for each in counters) for name in counters[0] if "bytes" in name}
    sync["bytes_sent"] += sum(tables[name] for name in ("id_bytes", "vector_bytes", "gradient_bytes"))
if args.sync == "shadow":
    optimizer.shadow.close()

if rank == 0:
    model.eval()
    with torch.inference_mode():
        tested = [(batch.labels, model(batch.dense, batch.ids).sigmoid()) for batch in data.test_batches(4096)]
    labels, probabilities = (torch.cat(column).numpy() for column in zip(*tested, strict=True))
    test = quality(labels, probabilities)
    name = f"shadow {args.algorithm}" if args.sync == "shadow" else args.sync
    record = {
        "name": name if embedding is None else f"{name} sharded",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "world_size": size,
        "threads": torch.get_num_threads(),
        "dense_bytes": dense_bytes,
        "steps": step,
        "examples": step * chunk,
        "seconds": seconds,
        "examples_per_second": step * chunk / seconds,
        "longest_step_ms": 1000 * longest,
        "test": test._asdict(),
        "embedding": tables,
        "sync": {name: value if value is None or math.isfinite(value) else None for name, value in sync.items()},
        "history": history,
    }
    auc, entropy = (math.nan if value is None else value for value in (test.auc, test.normalised_entropy))
    print(
        f"{record['name']}: {step * chunk} examples in {seconds:.1f} s, {step * chunk / seconds:.0f} examples/s; "
        f"{test.rows} test rows, {test.base_rate:.1%} positive: AUC {auc:.4f}, normalised entropy {entropy:.4f}"
    )
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
if embedding is not None:
    embedding.close()  # ranks other than 0 come here at once, and serve the look-ups of its test
