"""What background rounds take from training on GPUs: each process against itself, with rounds and while they pause.

    shadowrun -np 2 python benchmarks/gpus.py --json benchmarks/raw/gpus.json

All ranks of a host use its first GPU unless there is one for each. An MLP of --mb MB, SGD, random data; steps/s with
rounds over steps/s while they are paused, in turns, each turn --seconds long; medians of --repeats, worst and best.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from comparison.records import spread
from mpi4py import MPI

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm

WORLD = MPI.COMM_WORLD
DEPTH = 6
WARMUP_S = 5.0  # the head start of the budget is over by then
CASES: dict[str, tuple[Algorithm, dict[str, object]]] = {
    "S-MA": (ModelAveraging(), {}),
    "S-MA, a round after the other": (ModelAveraging(), {"cpu_budget": 1.0}),
    "S-EASGD": (ElasticAveraging(), {}),
    "S-BMUF": (BMUF(), {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, nargs="+", default=[5.0, 100.0], help="of dense float32 weights")
    parser.add_argument("--batch", type=int, default=4096, help="examples a step and rank")
    parser.add_argument("--seconds", type=float, default=1.5, help="of training in a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpus.py: torch sees no GPU here; run it where one is\n")
    torch.cuda.set_device(WORLD.rank % torch.cuda.device_count())
    figures: list[dict[str, object]] = []
    for mb in arguments.mb:
        for name in CASES:
            figures.append({"mb": mb, "case": name, **measure(name, mb, arguments)})
            if WORLD.rank == 0:
                print(figures[-1], flush=True)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ranks": WORLD.size}
    if WORLD.rank == 0 and arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")


def measure(name: str, mb: float, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the ratios of one case, and what the rounds were like (collective)."""
    algorithm, options = CASES[name]
    width = max(8, round((mb * 1e6 / 4 / DEPTH) ** 0.5))
    model = torch.nn.Sequential(
        *(layer for _ in range(DEPTH) for layer in (torch.nn.Linear(width, width, bias=False), torch.nn.ReLU()))
    ).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    inputs = torch.randn(arguments.batch, width, device="cuda")

    def steps_per_s(seconds: float) -> float:
        """Return all ranks' steps/s; the GPU's queue is kept short, as by a script that reads its loss now and then."""
        WORLD.Barrier()
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            for _ in range(10):
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
            torch.cuda.synchronize()
            steps += 10
        return float(WORLD.allreduce(steps / (time.perf_counter() - begun)))

    ratios, rates = [], []
    with ShadowSync(optimizer, model=model, algorithm=algorithm, **options) as sync:  # type: ignore[arg-type]
        steps_per_s(WARMUP_S)
        for _ in range(arguments.repeats):
            with_rounds = steps_per_s(arguments.seconds)
            sync.pause()
            steps_per_s(0.2)
            rates.append(steps_per_s(arguments.seconds))
            sync.resume()
            ratios.append(with_rounds / rates[-1])
        metrics = sync.metrics(merged=True)
        sync.synchronize()
        own = torch.cat([each.detach().reshape(-1)[:1000].cpu() for each in model.parameters()])
        everyone = WORLD.allgather(own.numpy().tobytes())
        assert all(each == everyone[0] for each in everyone), "the replicas differ after synchronize()"
    kept = ("rounds", "sync_gap_steps", "in_flight_ms", "merge_ms", "cpu_share")
    return {
        "ratio": spread(ratios),
        "paused, steps/s": spread(rates),
        **{key: metrics[key] for key in kept},
    }


if __name__ == "__main__":
    main()
