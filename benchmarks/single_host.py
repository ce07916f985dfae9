"""What synchronisation costs on one machine: throughput, the training thread's share, memory, the time of a round.

    shadowrun -np 2 python benchmarks/single_host.py            # writes its figures as JSON with --json FILE

Every figure is measured against its reference in the same run, in turns; medians of --repeats with best and worst.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mpi4py import MPI

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync

WORLD = MPI.COMM_WORLD
WIDTH = 1448  # two square layers of this width are 16 MiB of float32 weights
MIB = 1 << 20
HEAD_START_S = 6.0  # of training; the first rounds follow one another without a pause


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of training per measurement")
    parser.add_argument("--batch", type=int, default=0, help="examples a step; default: what makes a step of 50 ms")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, {len(__import__('os').sched_getaffinity(0))} cores, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads a rank, {WORLD.size} ranks",
        "mpi": MPI.Get_library_version().split(",")[0].strip(),
    }
    batch = arguments.batch or batch_of_50_ms()
    figures["batch"] = batch
    figures["throughput"] = throughput(batch, arguments.seconds, arguments.repeats)
    figures["hook"] = hook_cost(arguments.repeats)
    figures["memory"] = {name: memory(algorithm) for name, algorithm in ALGORITHMS.items()}
    figures["round"] = round_against_allreduce(arguments.repeats)
    if WORLD.rank == 0:
        report(figures)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


ALGORITHMS = {
    "S-MA": ModelAveraging(),
    "S-BMUF": BMUF(),
    "S-BMUF, block momentum": BMUF(block_momentum=0.5),
    "S-EASGD": ElasticAveraging(),
}


def make_model(width: int = WIDTH) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(width, width, bias=False), torch.nn.ReLU(), torch.nn.Linear(width, width, bias=False)
    )


class Trainer:
    """One rank's training loop on random data."""

    def __init__(self, batch: int) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.inputs = torch.randn(batch, WIDTH)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()

    def steps_per_second(self, seconds: float) -> float:
        WORLD.Barrier()
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            self.step()
            steps += 1
        rate = steps / (time.perf_counter() - begun)
        return sum(WORLD.allgather(rate))


def batch_of_50_ms() -> int:
    """Return the batch size that makes a step of about 50 ms, the same on every rank."""
    trainer = Trainer(64)
    trainer.steps_per_second(1.0)
    rate = trainer.steps_per_second(2.0) / WORLD.size
    return max(8, 8 * round(64 * 0.05 * rate / 8))


def throughput(batch: int, seconds: float, repeats: int) -> dict[str, object]:
    """Examples/s of the whole job with the default budget, against the same while rounds are paused, in turns."""
    trainer = Trainer(batch)
    trainer.steps_per_second(1.0)
    paused, shadow, ratios, rounds = [], [], [], []
    with ShadowSync(trainer.optimizer, model=trainer.model) as sync:
        begun = time.monotonic()
        trainer.steps_per_second(HEAD_START_S)
        for _ in range(repeats):
            sync.pause()
            before = trainer.steps_per_second(seconds / 2)
            sync.resume()
            first = counted(sync, begun)
            rate = trainer.steps_per_second(seconds)
            last = counted(sync, begun)
            rounds.append({key: last[key] - first[key] for key in first})
            sync.pause()
            after = trainer.steps_per_second(seconds / 2)
            paused.append(batch * (before + after) / 2)
            shadow.append(batch * rate)
            ratios.append(shadow[-1] / paused[-1])
    step_s = batch * WORLD.size / statistics.median(shadow)
    return {
        "rounds paused, examples/s": spread(paused),
        "default budget, examples/s": spread(shadow),
        "ratio": spread(ratios),
        "step_ms": 1000 * step_s,
        "sync_gap_steps": spread([each["steps"] / each["rounds"] for each in rounds]),
        "merge_ms": spread([1000 * each["merge_s"] / each["rounds"] for each in rounds]),
        "merges, share of the training thread": spread([each["merge_s"] / each["elapsed_s"] for each in rounds]),
        "cpu_share": spread([each["cpu_s"] / each["elapsed_s"] for each in rounds]),
    }


def counted(sync: ShadowSync, begun: float) -> dict[str, float]:
    """Return what this rank's rounds have come to since the handle was made."""
    metrics, elapsed_s = sync.metrics(), time.monotonic() - begun
    merge_s = metrics["merge_ms"] / 1000 * metrics["rounds"] if metrics["rounds"] else 0.0
    return {
        "steps": metrics["steps"],
        "rounds": metrics["rounds"],
        "merge_s": merge_s,
        "cpu_s": metrics["cpu_share"] * elapsed_s,
        "elapsed_s": elapsed_s,
    }


def hook_cost(repeats: int) -> dict[str, object]:
    """Microseconds that a step's hooks cost, with a handle over all ranks and over one, beside a step without."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.1)

    def microseconds_a_step(count: int = 20_000) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            optimizer.step()
        return 1e6 * (time.perf_counter() - begun) / count

    plain, alone, many = [], [], []
    microseconds_a_step()
    for _ in range(repeats):
        WORLD.Barrier()
        plain.append(microseconds_a_step())
        with ShadowSync(optimizer, communicator=one_rank()):
            alone.append(microseconds_a_step())
        with ShadowSync(optimizer, sync_interval_ms=1e6) as sync:
            many.append(microseconds_a_step())
            sync.synchronize()
    return {"plain step, us": spread(plain), "world size 1, us": spread(alone), f"{WORLD.size} ranks, us": spread(many)}


def one_rank() -> object:
    from hvd_shadowsync.comm.mpi import MpiCommunicator

    return MpiCommunicator(MPI.COMM_SELF.Dup())


def memory(algorithm: object, rounds: int = 40) -> dict[str, float]:
    """Resident memory beyond the weights, in units of the weights, after some rounds and after many more."""
    model = make_model(4096)  # 128 MiB
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    WORLD.Barrier()
    before = resident()
    with ShadowSync(optimizer, algorithm=algorithm, cpu_budget=1.0) as sync:  # type: ignore[arg-type]
        make_rounds(optimizer, sync, rounds)
        extra = resident() - before
        make_rounds(optimizer, sync, 3 * rounds)
        growth = resident() - before - extra
    return {
        "extra / weights": extra / weights,
        "growth over 3 x the rounds / weights": growth / weights,
    }


def make_rounds(optimizer: torch.optim.Optimizer, sync: ShadowSync, count: int) -> None:
    """Take steps without gradients, which leave the weights alone, until `count` more rounds were merged."""
    target = sync.metrics()["rounds"] + count
    while sync.metrics()["rounds"] < target:
        optimizer.step()
        time.sleep(0.01)
    sync.synchronize()


def resident() -> int:
    """Bytes of memory in use by this process; what ranks share is divided among them."""
    return _rollup("Pss")


def _rollup(key: str) -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def round_against_allreduce(repeats: int) -> dict[str, object]:
    """Milliseconds of a 16 MiB round, the training threads idle, against MPI_Allreduce of the same bytes."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numel = sum(p.numel() for p in model.parameters())
    source, target = torch.ones(numel), torch.empty(numel)
    rounds, blocking, in_place, ratios = [], [], [], []
    with ShadowSync(optimizer, cpu_budget=1.0) as sync:
        make_rounds(optimizer, sync, 10)
        for _ in range(repeats):
            blocking.append(median_ms(lambda: WORLD.Allreduce(source.numpy(), target.numpy())))
            in_place.append(median_ms(lambda: WORLD.Allreduce(MPI.IN_PLACE, target.numpy())))
            before = sync.metrics()
            make_rounds(optimizer, sync, 20)
            after = sync.metrics()
            total_ms = [m["in_flight_ms"] * m["rounds"] for m in (before, after)]
            rounds.append((total_ms[1] - total_ms[0]) / (after["rounds"] - before["rounds"]))
            ratios.append(rounds[-1] / blocking[-1])
    return {
        "MPI_Allreduce, ms": spread(blocking),
        "MPI_Allreduce in place, ms": spread(in_place),
        "round (snapshot to staged), ms": spread(rounds),
        "round / MPI_Allreduce": spread(ratios),
    }


def median_ms(call: Callable[[], object], count: int = 20) -> float:
    times = []
    for _ in range(count):
        WORLD.Barrier()
        with timed(times):
            call()
    return 1000 * statistics.median(times)


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    times.append(time.perf_counter() - begun)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def report(figures: dict[str, object], indent: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict) and set(value) == {"median", "least", "most"}:
            print(f"{indent}{name}: {value['median']:.4g}  ({value['least']:.4g} to {value['most']:.4g})")
        elif isinstance(value, dict):
            print(f"{indent}{name}:")
            report(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value:.4g}" if isinstance(value, float) else f"{indent}{name}: {value}")


if __name__ == "__main__":
    main()
