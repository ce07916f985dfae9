"""What the benchmark of quality runs, which learning rates it takes, and the tables of made-up results."""

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
    best_rates,
    jobs,
    stages,
    tuning,
    whole_steps,
)
from quality_report import grouped, report

CHOICE = Choice(
    trainers=(2,), seeds=3, algorithms=("S-MA", "S-EASGD", AT_THE_END), learning_rates=(0.1, 0.2), equal_rates=()
)
ABOUT = {"machine": "a machine", "settings": {"batch_size": 256, "examples": None}}


def result(run: Run, auc: float | None, gap: float | None = None) -> Result:
    steps = 100 // run.trainers
    return {
        "run": asdict(run), "auc": auc, "normalised_entropy": 0.95, "sync_gap_steps": gap, "steps": steps,
        "examples": 25600, "seconds": 1.0,
    }  # fmt: skip


def tuned(best: dict[str, float]) -> list[Result]:
    """Results on the validation split in which each method is best at the rate that is given for it."""
    return [result(run, 0.6 - abs(run.learning_rate - best.get(run.method, 0.1)) + run.seed) for run in tuning(CHOICE)]


def measured(aucs: dict[str, list[float]]) -> list[Result]:
    runs = [run for runs in stages(CHOICE, best_rates(CHOICE, tuned({}))).values() for run in runs]
    return [result(run, aucs[run.method][run.seed - 1], gap=4.0) for run in runs if run.method in aucs]


@pytest.mark.parametrize("rows", [273_259, 2_048, 40_960])
@pytest.mark.parametrize("limit", [None, 20_000, 10**9])
def test_any_number_of_trainers_sees_the_same_examples(rows: int, limit: int | None) -> None:
    assert len({whole_steps(rows, limit, trainers) * trainers for trainers in (1, 2, 4, 8)}) == 1
    assert whole_steps(rows, limit, 1) * 256 <= min(rows, limit or rows)


def test_each_side_is_tuned_on_the_same_grid() -> None:
    runs = tuning(CHOICE)
    assert all(run.validate for run in runs)
    tried = {(run.method, run.trainers): set() for run in runs}
    for run in runs:
        tried[run.method, run.trainers].add((run.learning_rate, run.seed))
    assert sorted(tried) == sorted([(ONE, 1), (HOROVOD, 2), ("S-MA", 2), (AT_THE_END, 2)])
    assert {frozenset(each) for each in tried.values()} == {frozenset({(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)})}
    assert tuning(replace(CHOICE, learning_rates=(0.1,))) == []


def test_the_rate_that_is_best_in_validation_is_taken() -> None:
    rates = best_rates(CHOICE, tuned({HOROVOD: 0.2}))
    assert rates == {(ONE, 1): 0.1, (HOROVOD, 2): 0.2, ("S-MA", 2): 0.1, (AT_THE_END, 2): 0.1}
    goal = stages(CHOICE, rates)["goal"]
    assert {(run.method, run.learning_rate) for run in goal} == {
        (ONE, 0.1), (HOROVOD, 0.2), ("S-MA", 0.1), ("S-EASGD", 0.1),
    }  # fmt: skip


def test_no_rate_is_taken_before_all_were_tried_and_none_that_diverged() -> None:
    results = tuned({})
    assert (HOROVOD, 2) not in best_rates(CHOICE, [each for each in results if each["run"]["method"] != HOROVOD])
    assert (ONE, 1) not in best_rates(CHOICE, results[1:])
    diverged = [result(Run(**each["run"]), None) if each["run"]["learning_rate"] == 0.1 else each for each in results]
    assert set(best_rates(CHOICE, diverged).values()) == {0.2}


def test_horovod_has_jobs_of_its_own_and_nothing_is_lost() -> None:
    runs = [run for runs in stages(CHOICE, best_rates(CHOICE, tuned({}))).values() for run in runs]
    made = list(jobs(runs))
    assert sorted(run.method for job in made for run in job) == sorted(run.method for run in runs)
    for job in made:
        assert len({(run.trainers, METHODS[run.method].library == "horovod") for run in job}) == 1


def test_tables_say_what_the_differences_are() -> None:
    found = tuned({}) + measured({
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
    rows = report(CHOICE, tuned({}) + measured({"S-MA": [0.7, 0.71, 0.72]}), ABOUT).splitlines()
    assert "| 2 | S-MA | 3 | 0.7100 ± 0.0248 |  |  |  |  |" in rows


def test_the_goal_at_equal_rates() -> None:
    choice = replace(CHOICE, equal_rates=(0.3, 0.4))
    runs = stages(choice, best_rates(choice, tuned({})))["equal rates"]
    tried = {rate: {(run.method, run.trainers) for run in runs if run.learning_rate == rate} for rate in (0.3, 0.4)}
    assert tried[0.3] == tried[0.4] == {(ONE, 1), (HOROVOD, 2), ("S-MA", 2), ("S-EASGD", 2)}
    found = [
        result(run, 0.7 + run.seed / 100 + 0.002 * (run.method == "S-MA")) for run in runs if run.learning_rate < 0.4
    ]
    rows = [line for line in report(choice, found, ABOUT).splitlines() if line.startswith("| 2 | 0.3 |")]
    assert rows == ["| 2 | 0.3 | 0.7200 ± 0.0248 | +0.0020 (+0.0020 to +0.0020) | +0.0000 (+0.0000 to +0.0000) |  |"]


def test_results_with_rates_that_are_not_chosen_do_not_count() -> None:
    stray = result(Run("S-MA", 2, 1, 0.2), 0.9)
    assert ("S-MA", 2, None) not in grouped(CHOICE, [*tuned({}), stray])


def test_a_run_that_diverged_shows() -> None:
    found = tuned({}) + [result(Run(HOROVOD, 2, seed, 0.1), auc) for seed, auc in ((1, 0.7), (2, None))]
    assert "diverged" in report(CHOICE, found, ABOUT)
