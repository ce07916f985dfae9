"""What the ranks of a run have in common: where they meet, how many steps they take, what they train."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import train
from contender import Contender, Place
from meeting import Meeting
from workloads import Task, mlp_task


def meetings(path: Path, size: int, timeout_s: float = 30.0) -> list[Meeting]:
    path.write_bytes(bytes(8 * (size + 1)))
    return [Meeting(path, rank, size, timeout_s) for rank in range(size)]


def test_ranks_meet_and_agree_on_the_number_of_rank_0(tmp_path: Path) -> None:
    agreed: dict[int, list[int]] = {}

    def run(rank: int, meeting: Meeting) -> None:
        agreed[rank] = [meeting.agree(10 * turn + rank) for turn in range(20)]

    threads = [threading.Thread(target=run, args=each) for each in enumerate(meetings(tmp_path / "meeting", 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert agreed == {rank: [10 * turn for turn in range(20)] for rank in range(3)}


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come to meeting 1"):
        meetings(tmp_path / "meeting", 3, 0.05)[0].wait()


def test_a_rank_knows_its_place() -> None:
    assert Place.of_environment({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}) == Place(1, 4)
    assert Place.of_environment({"RANK": "2", "WORLD_SIZE": "3"}) == Place(2, 3)
    assert Place.of_environment({}) == Place(0, 1)


def test_steps_are_whole_periods() -> None:
    assert train.periods(3.0, 0.05, 1, least=1) == 60
    assert train.periods(3.0, 0.05, 25, least=1) == 50
    assert train.periods(0.3, 0.05, 30, least=1) == 30
    assert train.periods(-1.0, 0.05, 30, least=0) == 0


def test_rounds_are_those_between_two_readings() -> None:
    before, after = {"rounds": 2, "in_flight_ms": 10.0}, {"rounds": 6, "in_flight_ms": 20.0}
    assert train.rounds(before, after, 12) == {"sync_gap_steps": 3.0, "in_flight_ms": 25.0}
    assert train.rounds({"rounds": 0, "in_flight_ms": float("nan")}, after, 12)["in_flight_ms"] == 20.0
    assert train.rounds({"rounds": 1}, {"rounds": 3}, 12) == {"sync_gap_steps": 6.0}
    assert train.rounds({}, {}, 12) == {}


def task() -> Task:
    torch.manual_seed(0)
    batches = [((torch.randn(8, 4),), torch.randn(8)) for _ in range(3)]
    model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0))
    return Task(model, batches, torch.nn.functional.mse_loss, lr=0.1)


@pytest.mark.parametrize("period", [1, 4])
def test_a_measurement_of_one_rank(tmp_path: Path, period: int) -> None:
    made = task()
    contender = Contender(made.model, made.optimizer(), period_steps=period, sync_gap_steps=float(period))
    [meeting] = meetings(tmp_path / "meeting", 1)
    found = train.measure(train.Loop(made, contender, slow=False), meeting, period, 0.0, 1e-9)
    assert found["steps"] == period
    assert found["seconds"] > 0
    assert "sync_gap_steps" not in found


def test_synchronisation_pauses_in_turns(tmp_path: Path) -> None:
    made, said = task(), []
    contender = Contender(
        made.model, made.optimizer(), period_steps=None, sync_gap_steps=None,
        pause=lambda: said.append("pause"), resume=lambda: said.append("on"),
    )  # fmt: skip
    [meeting] = meetings(tmp_path / "meeting", 1)
    found = train.measure(train.Loop(made, contender, slow=False), meeting, None, 0.0, 0.01)
    assert said == ["pause", "on"] * train.TURNS
    assert found["paused_steps_per_s"] > 0
    assert found["resumed_steps_per_s"] > 0
    assert found["curve"][-1][1] <= found["steps"] + train.LEAST_WARM_STEPS, "the turns are not in the curve"


def test_a_slow_rank_sleeps_as_long_as_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = iter(range(1000))
    monkeypatch.setattr(train.time, "sleep", slept.append)
    monkeypatch.setattr(train.time, "thread_time", lambda: float(next(clock)))
    made = task()
    for slow in (False, True):
        contender = Contender(made.model, made.optimizer(), period_steps=None, sync_gap_steps=None)
        loop = train.Loop(made, contender, slow=slow)
        assert loop.train(steps=5)[0] == 5
    assert slept == [1.0] * 5


@pytest.mark.parametrize(("name", "weights"), [("mlp-5mb", 1_329_537), ("mlp-40mb", 9_969_153)])
def test_the_sizes_of_the_mlps(name: str, weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workloads.NUM_BATCHES", {name: 1})
    made = [mlp_task(name, rank, batch=4) for rank in (0, 1)]
    assert made[0].dense_bytes == 4 * weights
    for one, other in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(made[0].batches[0][1], made[1].batches[0][1]), "each rank has its own examples"
    assert made[0].model(*made[0].batches[0][0]).shape == (4,)
