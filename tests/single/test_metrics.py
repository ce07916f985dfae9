"""Metrics: what is in the dict, how ranks are merged, JSON lines, TensorBoard scalars."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
from ranks_as_threads import Lockstep, make_model, on_ranks, sgd, train

from hvd_shadowsync import JsonLinesWriter, ShadowSync, TensorBoardWriter
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.metrics import RoundMetrics, merge

KEYS = [
    "steps",
    "rounds",
    "sync_gap_steps",
    "in_flight_ms",
    "merge_ms",
    "bytes_sent",
    "cpu_share",
    "distance",
    "surviving_progress",
    "chunk_bytes",
    "chunks_in_flight",
    "pause_ms",
    "searching",
    "times_healed",
    "ranks_lost",
    "ranks_replaced",
    "gap_wait_ms",
    "recovery_ms",
]


def counted(**values: float) -> RoundMetrics:
    metrics = RoundMetrics()
    for name, value in values.items():
        setattr(metrics, name, value)
    return metrics


# --- the dict ---------------------------------------------------------------------------------------------------------


def test_keys_are_the_documented_ones() -> None:
    documented = re.findall(r"^ *\| (\w+) \|", RoundMetrics.__doc__ or "", re.MULTILINE)
    assert list(RoundMetrics().snapshot()) == KEYS
    assert [key for key in documented if key != "key"] == KEYS


def test_before_the_first_round() -> None:
    figures = counted(steps=3).snapshot()
    assert {key for key, value in figures.items() if math.isnan(value)} == {
        "sync_gap_steps",
        "in_flight_ms",
        "merge_ms",
        "distance",
        "surviving_progress",
        "chunk_bytes",
        "chunks_in_flight",
        "pause_ms",
    }
    assert (figures["steps"], figures["rounds"], figures["bytes_sent"], figures["cpu_share"]) == (3, 0, 0, 0)


def test_averages_over_rounds() -> None:
    figures = counted(
        steps=25, rounds=4, steps_at_last_round=20, in_flight_s=0.2, merge_s=0.01, distance=0.5, surviving_progress=0.9
    ).snapshot()
    assert figures["sync_gap_steps"] == 5
    assert figures["in_flight_ms"] == pytest.approx(50)
    assert figures["merge_ms"] == pytest.approx(2.5)
    assert (figures["distance"], figures["surviving_progress"]) == (0.5, 0.9)


def test_the_share_of_a_core_counts_both_threads() -> None:
    metrics = counted(cpu_s=1.5, merge_s=0.5, started=time.monotonic() - 40)
    assert metrics.snapshot()["cpu_share"] == pytest.approx(2 / 40, rel=0.05)


def test_counters_go_through_a_checkpoint() -> None:
    counters = counted(steps=25, rounds=4, steps_at_last_round=20).counters()
    assert counters == {"steps": 25, "rounds": 4, "steps_at_last_round": 20}
    metrics = RoundMetrics()
    metrics.restore(counters)
    assert metrics.counters() == counters
    assert metrics.snapshot()["sync_gap_steps"] == 5


def test_the_lock_is_not_in_the_way() -> None:
    metrics = RoundMetrics()
    metrics.snapshot()
    metrics.counters()
    assert metrics.lock.acquire(blocking=False)
    assert "lock" not in repr(metrics)


# --- all ranks --------------------------------------------------------------------------------------------------------


def test_merged_over_ranks() -> None:
    ranks = [
        {"bytes_sent": 10.0, "rounds": 3.0, "steps": 100.0, "distance": 0.2, "cpu_share": 0.1},
        {"bytes_sent": 30.0, "rounds": 4.0, "steps": 50.0, "distance": math.nan, "cpu_share": 0.3},
    ]
    merged = merge(ranks)
    assert list(merged) == list(ranks[0])
    assert merged == pytest.approx({"bytes_sent": 40, "rounds": 4, "steps": 75, "distance": 0.2, "cpu_share": 0.2})


def test_what_no_rank_knows_is_not_known() -> None:
    assert math.isnan(merge([{"distance": math.nan}, {"distance": math.nan}])["distance"])


def test_one_rank_is_its_own_merger() -> None:
    figures = counted(steps=25, rounds=4, distance=0.5, surviving_progress=0.5).snapshot()
    assert merge([figures]) == figures


def test_figures_of_a_run() -> None:
    """Two ranks, foreground rounds every 3 of 8 steps: 2 rounds, 16 numbers each, there and back."""

    def program(comm: Communicator) -> tuple[dict[str, float], dict[str, float]]:
        model = make_model(batch_norm=False)
        with ShadowSync(optimizer := sgd(model), foreground=True, sync_every=3, communicator=comm) as sync:
            train(model, optimizer, 8, stream=comm.rank)
            return sync.metrics(), sync.metrics(merged=True)

    numbers = sum(param.numel() for param in make_model(batch_norm=False).parameters())
    for own, merged in on_ranks(2, program):
        assert list(own) == list(merged) == KEYS
        assert (own["steps"], own["rounds"], own["sync_gap_steps"]) == (8, 2, 3)
        assert own["bytes_sent"] == 2 * 2 * 4 * math.ceil(numbers / 2)
        assert merged["bytes_sent"] == 2 * own["bytes_sent"]
        assert (merged["steps"], merged["rounds"], merged["sync_gap_steps"]) == (8, 2, 3)
        assert own["in_flight_ms"] > 0
        assert own["merge_ms"] > 0
        assert 0 < own["distance"] < 10
        assert math.isnan(own["surviving_progress"]), "nothing is in flight in the foreground"


def test_figures_of_background_rounds() -> None:
    def program(comm: Communicator) -> dict[str, float]:
        model = make_model(batch_norm=False)
        with ShadowSync(optimizer := sgd(model), sync_every=2, communicator=comm) as sync:
            lockstep = Lockstep(sync)
            for first in range(0, 8, 2):
                train(model, optimizer, 2, stream=comm.rank, first=first)
                lockstep()
            return sync.metrics()

    for figures in on_ranks(2, program):
        assert (figures["steps"], figures["rounds"], figures["sync_gap_steps"]) == (8, 4, 2)
        assert figures["cpu_share"] > 0


# --- writers ----------------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with JsonLinesWriter(file) as writer:
        writer.write({"rounds": 2, "distance": math.nan}, step=10)
        assert len(file.read_text().splitlines()) == 1, "each line is there at once"
        writer.write({"rounds": 3, "distance": 0.25, "other": math.inf}, step=20)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [
        {"step": 10, "rounds": 2, "distance": None},
        {"step": 20, "rounds": 3, "distance": 0.25, "other": None},
    ]


def test_json_lines_are_appended(tmp_path: Path) -> None:
    for step in range(3):
        with JsonLinesWriter(str(tmp_path / "metrics.jsonl")) as writer:
            writer.write({}, step)
        writer.close()  # a second time
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_a_writer_closes_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), JsonLinesWriter(tmp_path / "metrics.jsonl") as writer:
        raise KeyError
    with pytest.raises(ValueError, match="closed file"):
        writer.write({}, 1)


def test_tensorboard_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoardWriter(tmp_path) as writer:
        for step in (10, 20):
            writer.write({"rounds": step / 10, "distance": math.nan if step == 10 else 0.25, "gone": math.inf}, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"shadowsync/rounds": [(10, 1.0), (20, 2.0)], "shadowsync/distance": [(20, 0.25)]}


def test_without_tensorboard_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoardWriter needs tensorboard .*; pip install tensorboard"):
        TensorBoardWriter(tmp_path)
