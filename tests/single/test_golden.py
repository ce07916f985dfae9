"""Golden trajectories: fifty steps of every algorithm and merge on three ranks, as they were recorded.

A change of trajectory is a change of behaviour: it belongs in the CHANGELOG. To record anew:

    python tests/single/test_golden.py

Data, gradients and updates are element-wise formulas in double precision, so that neither the machine nor its number of
threads matters beyond the last digits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks_as_threads import on_ranks
from torch import Tensor

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm.base import Communicator

FOLDER = Path(__file__).parents[1] / "golden"
RANKS, STEPS, SYNC_EVERY, RECORDED_EVERY = 3, 50, 4, 10
TOLERANCE = 1e-9
DIGITS = 13

CASES: dict[str, tuple[Algorithm, str]] = {
    "ma-1-delta": (ModelAveraging(), "delta"),
    "ma-delta": (ModelAveraging(alpha=0.6), "delta"),
    "ma-interpolate": (ModelAveraging(alpha=0.6), "interpolate"),
    "easgd-delta": (ElasticAveraging(alpha=0.4), "delta"),
    "easgd-interpolate": (ElasticAveraging(alpha=0.4), "interpolate"),
    "easgd-symmetric-delta": (ElasticAveraging(alpha=0.4, symmetric=True), "delta"),
    "easgd-symmetric-interpolate": (ElasticAveraging(alpha=0.4, symmetric=True), "interpolate"),
    "bmuf-delta": (BMUF(alpha=0.7, block_lr=0.8), "delta"),
    "bmuf-interpolate": (BMUF(alpha=0.7, block_lr=0.8), "interpolate"),
    "bmuf-momentum-1-delta": (BMUF(block_momentum=2 / 3), "delta"),
    "bmuf-momentum-delta": (BMUF(alpha=0.7, block_lr=0.8, block_momentum=0.5), "delta"),
    "bmuf-momentum-interpolate": (BMUF(alpha=0.7, block_lr=0.8, block_momentum=0.5), "interpolate"),
    "bmuf-nesterov-delta": (BMUF(alpha=0.7, block_lr=0.5, block_momentum=0.6, nesterov=True), "delta"),
    "bmuf-nesterov-interpolate": (BMUF(alpha=0.7, block_lr=0.5, block_momentum=0.6, nesterov=True), "interpolate"),
}


class Problem(torch.nn.Module):
    """Two tensors of weights, each pulled to a place that differs by rank and moves; a buffer that follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = torch.nn.Parameter(formula(7, 1.3))
        self.right = torch.nn.Parameter(formula(6, 0.4).view(2, 3))
        self.register_buffer("followed", torch.zeros(7, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def set_gradients(self, rank: int, step: int) -> None:
        """Gradients of a quartic bowl around a place of this rank's at this step."""
        for phase, param in enumerate(self.parameters()):
            away = param.detach() - formula(param.numel(), 0.7 * rank + 0.11 * step + phase).view(param.shape)
            param.grad = 0.2 * away + 0.1 * away * away * away
        self.followed += 0.25 * (self.left.detach() - self.followed)
        self.steps += rank + 1


def formula(numel: int, phase: float) -> Tensor:
    return torch.sin(torch.arange(numel, dtype=torch.float64) * 1.7 + phase)


def trajectory(algorithm: Algorithm, merge: str) -> list[list[list[float]]]:
    """Return the weights, then the buffers, of every rank at every recorded step."""

    def program(comm: Communicator) -> list[list[float]]:
        problem = Problem()
        optimizer = torch.optim.SGD(problem.parameters(), lr=0.3, momentum=0.5, foreach=False)
        options = {"algorithm": algorithm, "merge": merge, "foreground": True, "sync_every": SYNC_EVERY}
        recorded = []
        with ShadowSync(optimizer, model=problem, communicator=comm, **options):
            for step in range(1, STEPS + 1):
                problem.set_gradients(comm.rank, step)
                optimizer.step()
                if step % RECORDED_EVERY == 0:
                    recorded.append([float(value) for each in problem.state_dict().values() for value in each.view(-1)])
        return recorded

    return list(zip(*on_ranks(RANKS, program), strict=True))


def path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def record(name: str) -> None:
    """Write what the case `name` gives now."""
    algorithm, merge = CASES[name]
    steps = range(RECORDED_EVERY, STEPS + 1, RECORDED_EVERY)
    rows = {
        f"step {step}, rank {rank}": [float(f"{value:.{DIGITS}g}") for value in values]
        for step, ranks in zip(steps, trajectory(algorithm, merge), strict=True)
        for rank, values in enumerate(ranks)
    }
    lines = ",\n".join(f"    {json.dumps(where)}: {json.dumps(values)}" for where, values in rows.items())
    head = f'{{\n  "algorithm": {json.dumps(repr(algorithm))},\n  "merge": {json.dumps(merge)},\n  "trajectory": {{\n'
    path(name).write_text(head + lines + "\n  }\n}\n", encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_is_the_recorded_one(name: str) -> None:
    algorithm, merge = CASES[name]
    golden = json.loads(path(name).read_text(encoding="utf-8"))
    assert (golden["algorithm"], golden["merge"]) == (repr(algorithm), merge)
    values = [values for ranks in trajectory(algorithm, merge) for values in ranks]
    assert len(values) == RANKS * STEPS // RECORDED_EVERY
    for (where, expected), found in zip(golden["trajectory"].items(), values, strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE, rel=0), where


def test_every_file_belongs_to_a_case() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("name", [n.removesuffix("-interpolate") for n in CASES if n.endswith("-interpolate")])
def test_with_nothing_in_flight_both_merges_are_one(name: str) -> None:
    delta, interpolate = (json.loads(path(f"{name}-{merge}").read_text()) for merge in ("delta", "interpolate"))
    for where, values in delta["trajectory"].items():
        assert values == pytest.approx(interpolate["trajectory"][where], abs=TOLERANCE, rel=0), where


def test_the_cases_differ_from_one_another() -> None:
    """A trajectory that another algorithm has as well would not show a change."""
    ends = [tuple(json.loads(path(n).read_text())["trajectory"]["step 50, rank 0"]) for n in CASES if "interp" not in n]
    for index, end in enumerate(ends):
        for other in ends[:index]:
            assert max(abs(a - b) for a, b in zip(end, other, strict=True)) > 1e-4


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for file in FOLDER.glob("*.json"):
        file.unlink()
    for name in CASES:
        record(name)
    sys.stdout.write(f"{len(CASES)} trajectories written to {FOLDER}\n")


if __name__ == "__main__":
    main()
