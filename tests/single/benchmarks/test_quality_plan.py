"""What the benchmark of quality runs, and the tables of made-up results."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

pytest.importorskip("scipy")
from quality_plan import (
    AT_THE_END,
    HOROVOD,
    METHODS,
    ONE,
    Choice,
    Result,
    Run,
    jobs,
    stages,
    whole_steps,
)
from quality_report import grouped, report

CHOICE = Choice(trainers=(2,), seeds=3, algorithms=("S-MA", "S-EASGD", AT_THE_END), learning_rate=0.1, other_rates=())
ABOUT = {"machine": "a machine", "settings": {"batch_size": 256, "examples": None}}


def result(run: Run, auc: float | None, gap: float | None = None) -> Result:
    steps = 100 // run.trainers
    return {
        "run": asdict(run), "auc": auc, "normalised_entropy": 0.95, "sync_gap_steps": gap, "steps": steps,
        "examples": 25600, "seconds": 1.0,
    }  # fmt: skip


def measured(aucs: dict[str, list[float]]) -> list[Result]:
    runs = [run for runs in stages(CHOICE).values() for run in runs]
    return [result(run, aucs[run.method][run.seed - 1], gap=4.0) for run in runs if run.method in aucs]


@pytest.mark.parametrize("rows", [273_259, 2_048, 40_960])
@pytest.mark.parametrize("limit", [None, 20_000, 10**9])
def test_any_number_of_trainers_sees_the_same_examples(rows: int, limit: int | None) -> None:
    assert len({whole_steps(rows, limit, trainers) * trainers for trainers in (1, 2, 4, 8)}) == 1
    assert whole_steps(rows, limit, 1) * 256 <= min(rows, limit or rows)


def test_horovod_has_jobs_of_its_own_and_nothing_is_lost() -> None:
    runs = [run for runs in stages(CHOICE).values() for run in runs]
    made = list(jobs(runs))
    assert sorted(run.method for job in made for run in job) == sorted(run.method for run in runs)
    for job in made:
        assert len({(run.trainers, METHODS[run.method].library == "horovod") for run in job}) == 1


def test_tables_say_what_the_differences_are() -> None:
    found = measured({
        ONE: [0.70, 0.71, 0.72], HOROVOD: [0.70, 0.72, 0.71], "S-MA": [0.7005, 0.7206, 0.7104],
        "S-EASGD": [0.69, 0.708, 0.70],
    })  # fmt: skip
    lines = [
        line.strip("| ").split(" | ") for line in report(CHOICE, found, ABOUT).splitlines() if line.startswith("|")
    ]
    goal = {line[1]: line for line in lines if len(line) == 8 and line[-1].startswith("**")}
    assert goal["S-MA"][2:4] == ["3", "0.7105 ± 0.0250"]
    assert goal["S-MA"][5:] == ["+0.0005 (+0.0003 to +0.0007)", "met", "**met**"]
    assert goal["S-EASGD"][5:] == ["-0.0107 (-0.0135 to -0.0078)", "not met", "**not met**"]
    swept = [line for line in lines if line[:3] == ["2", "S-MA", "30"]]
    assert [line[3] for line in swept] == ["4.0 (4.0 to 4.0)"]


def test_nothing_is_said_of_the_goal_before_horovod_ran() -> None:
    rows = report(CHOICE, measured({"S-MA": [0.7, 0.71, 0.72]}), ABOUT).splitlines()
    assert "| 2 | S-MA | 3 | 0.7100 ± 0.0248 |  |  |  |  |" in rows


def test_the_goal_at_other_rates() -> None:
    choice = replace(CHOICE, other_rates=(0.3, 0.4))
    runs = stages(choice)["other rates"]
    tried = {rate: {(run.method, run.trainers) for run in runs if run.learning_rate == rate} for rate in (0.3, 0.4)}
    assert tried[0.3] == tried[0.4] == {(ONE, 1), (HOROVOD, 2), ("S-MA", 2), ("S-EASGD", 2)}
    found = [
        result(run, 0.7 + run.seed / 100 + 0.002 * (run.method == "S-MA")) for run in runs if run.learning_rate < 0.4
    ]
    rows = [line for line in report(choice, found, ABOUT).splitlines() if line.startswith("| 2 | 0.3 |")]
    assert rows == ["| 2 | 0.3 | 0.7200 ± 0.0248 | +0.0020 (+0.0020 to +0.0020) | +0.0000 (+0.0000 to +0.0000) |  |"]


def test_results_at_other_rates_do_not_count() -> None:
    stray = result(Run("S-MA", 2, 1, 0.2), 0.9)
    assert ("S-MA", 2, None) not in grouped(CHOICE, [stray])


def test_a_run_that_diverged_shows() -> None:
    found = [result(Run(HOROVOD, 2, seed, 0.1), auc) for seed, auc in ((1, 0.7), (2, None))]
    assert "diverged" in report(CHOICE, found, ABOUT)
