"""One rank of one run: trains a workload with a contender, after a warm-up and between barriers; writes what it saw.

`compare.py` starts this under mpirun or `start.py`, in the environment that has the contender, with all arguments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from contender import Asked, Contender, Place
from meeting import Meeting
from workloads import Task, make_task

CURVE_S = 0.2
TURNS = 2
LEAST_WARM_STEPS = 3


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    place = Place.of_environment()
    meeting = Meeting(options.folder / "meeting", place.rank, place.size, options.timeout)
    framework = importlib.import_module(options.module)
    embedding = framework.tables() if options.workload == "dlrm-criteo" else None
    task = make_task(options.workload, place.rank, place.size, options.batch, options.flights, embedding)
    dense_bytes = task.dense_bytes
    contender = framework.make(Asked(task, place, options.variant, options.every, options.batch, options.folder))
    period = contender.period_steps
    if embedding is not None:
        period = period or 1  # lookups are collective
    loop = Loop(task, contender, slow=options.slow == place.rank)
    record = {"rank": place.rank, "dense_bytes": dense_bytes, "sync_gap_steps": contender.sync_gap_steps}
    record |= measure(loop, meeting, period, options.warmup, options.seconds)
    (options.folder / f"rank{place.rank}.json").write_text(json.dumps(record))
    meeting.wait()
    contender.close()
    meeting.wait()
    if embedding is not None and hasattr(embedding, "close"):
        embedding.close()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--module", required=True, help="the framework's file")
    result.add_argument("--variant", default="")
    result.add_argument("--every", type=int, default=0, help="steps between two synchronisations, where there are such")
    result.add_argument("--workload", required=True)
    result.add_argument("--batch", type=int, required=True, help="examples a step and rank")
    result.add_argument("--folder", type=Path, required=True, help="of this run")
    result.add_argument("--flights", type=Path, required=True, help="the flights as tensors")
    result.add_argument("--seconds", type=float, required=True)
    result.add_argument("--warmup", type=float, required=True, help="seconds")
    result.add_argument("--slow", type=int, default=-1, help="the rank that sleeps as long as it works")
    result.add_argument("--timeout", type=float, required=True, help="seconds that a rank waits for the others")
    return result


class Loop:
    """The training loop, step by step, with its clock running only inside `train`.

    Args:
        task: gives batches and the loss.
        contender: gives the model that is called and the optimizer that steps.
        slow: sleep after each step for as long as this thread has computed in it: a host of half the speed.
    """

    def __init__(self, task: Task, contender: Contender, *, slow: bool) -> None:
        self.contender = contender
        self.curve: list[tuple[float, int, float]] = []
        self._task, self._slow = task, slow
        self._steps = count()
        self._seconds = 0.0

    def train(self, *, steps: int = 0, seconds: float = 0.0) -> tuple[int, float]:
        """Take so many steps, or steps for so many seconds; return how many, and in how many seconds."""
        begun, taken, elapsed = time.perf_counter(), 0, 0.0
        losses, marked = [], 0.0
        while taken < steps or elapsed < seconds:
            index = next(self._steps)
            losses.append(self._step(index))
            taken, elapsed = taken + 1, time.perf_counter() - begun
            if elapsed - marked >= CURVE_S:
                self.curve.append((self._seconds + elapsed, index + 1, math.fsum(losses) / len(losses)))
                losses, marked = [], elapsed
        if losses:  # the last interval, however short: every run has a curve
            self.curve.append((self._seconds + elapsed, index + 1, math.fsum(losses) / len(losses)))
        self._seconds += elapsed
        return taken, elapsed

    def _step(self, index: int) -> float:
        inputs, labels = self._task.batches[index % len(self._task.batches)]
        worked = time.thread_time()
        self.contender.optimizer.zero_grad()
        loss = self._task.criterion(self.contender.model(*inputs), labels)
        loss.backward()
        self.contender.optimizer.step()
        if self._slow:
            time.sleep(time.thread_time() - worked)
        return float(loss.detach())


def measure(loop: Loop, meeting: Meeting, period: int | None, warmup_s: float, seconds: float) -> dict[str, Any]:
    """Warm up, then train for about `seconds` (ranks in lockstep: a whole number of periods, one at least)."""
    meeting.wait()
    least = period or 1
    steps, elapsed = loop.train(steps=least * math.ceil(LEAST_WARM_STEPS / least))
    if period is None:
        loop.train(seconds=max(warmup_s - elapsed, 0.0))
    elif more := meeting.agree(periods(warmup_s - elapsed, elapsed / steps, period, least=0)):
        steps, elapsed = loop.train(steps=more)
    before = loop.contender.metrics()
    agreed = meeting.agree(periods(seconds, elapsed / steps, period or 1, least=1))
    taken, elapsed = loop.train(seconds=seconds) if period is None else loop.train(steps=agreed)
    after = loop.contender.metrics()
    found = {"steps": taken, "seconds": elapsed, "curve": list(loop.curve), **rounds(before, after, taken)}
    return found | (in_turns(loop, seconds) if period is None else {})


def in_turns(loop: Loop, seconds: float) -> dict[str, float]:
    """Train for `seconds`, half of them while synchronisation is paused, in turns; nothing where it cannot be."""
    contender = loop.contender
    if contender.pause is None:
        return {}
    steps = {"paused": 0, "resumed": 0}
    elapsed = {"paused": 0.0, "resumed": 0.0}
    for _ in range(TURNS):
        for name, change in (("paused", contender.pause), ("resumed", contender.resume)):
            change()
            taken, seconds_taken = loop.train(seconds=seconds / (2 * TURNS))
            steps[name] += taken
            elapsed[name] += seconds_taken
    return {f"{name}_steps_per_s": steps[name] / elapsed[name] for name in steps}


def periods(seconds: float, step_s: float, period: int, *, least: int) -> int:
    """Return the steps that fit into `seconds`, as a multiple of `period`."""
    return period * max(least, round(seconds / (step_s * period)))


def rounds(before: dict[str, float], after: dict[str, float], steps: int) -> dict[str, float]:
    """Return the sync gap and the time of a round between two readings of the counters; nothing without a round."""
    merged = after.get("rounds", 0) - before.get("rounds", 0)
    if not merged:
        return {}
    found = {"sync_gap_steps": steps / merged}
    if "in_flight_ms" in after:
        total_ms = [each["in_flight_ms"] * each["rounds"] if each["rounds"] else 0.0 for each in (before, after)]
        found["in_flight_ms"] = (total_ms[1] - total_ms[0]) / merged
    return found


if __name__ == "__main__":
    sys.exit(main())
