"""What `faults.py` draws, and what it makes of what came of the jobs; the jobs themselves are integration tests."""

from __future__ import annotations

import random
from pathlib import Path

import faults


def test_a_seed_draws_the_same_job_again() -> None:
    for seed in range(20):
        assert faults.drawn(random.Random(seed), list(faults.WEIGHTS)) == faults.drawn(
            random.Random(seed), list(faults.WEIGHTS)
        )


def test_what_is_drawn_fits_together() -> None:
    drawn = [faults.drawn(random.Random(seed), list(faults.WEIGHTS)) for seed in range(400)]
    assert {each["fault"]["kind"] for each in drawn} == set(faults.WEIGHTS)
    for each in drawn:
        fault = each["fault"]
        assert 0 <= fault["rank"] < each["size"] <= 4
        assert each["checkpoints"] or fault["kind"] not in faults.WITH_CHECKPOINTS
        assert each["wire_dtype"] is None or each["algorithm"] != "S-EASGD"
        assert not each["foreground"] or {"sync_interval_ms", "cpu_budget"}.isdisjoint(each)
        if fault["kind"] == "kill two":
            assert fault["second"] != fault["rank"]
            assert each["size"] > 2


def record(seed: int, kind: str, wrong: list[str]) -> faults.Record:
    settings = faults.drawn(random.Random(seed), [kind])
    return {"seed": seed, "settings": settings, "code": 0, "seconds": 1.0, "wrong": wrong}


def test_jobs_are_counted_by_what_is_wrong_with_them() -> None:
    records = [
        record(1, "kill", []),
        record(2, "kill", ["hang\nrank 0 ..."]),
        record(3, "stop", ["exit code 1 instead of 0", "ranks [1] did not come to their end"]),
        record(4, "stop", ["the replicas differ after synchronize(): ..."]),
        record(5, "corrupt", ["no checkpoint is left"]),
    ]
    assert faults.counts(records) == {
        "kill": {"jobs": 2, "hangs": 1},
        "stop": {"jobs": 2, "wrong codes": 1, "other weights": 1},
        "corrupt": {"jobs": 1, "lost checkpoints": 1},
    }
    assert faults.table(records).splitlines()[-1] == "| **all** | 5 | 1 | 1 | 1 | 1 |"
    assert faults.line(records[0]).endswith("code 0, 1.0 s: ok")
    assert "seed 5: " in faults.line(records[4])


def test_damage(tmp_path: Path) -> None:
    assert faults.damage(tmp_path, "flip") is None
