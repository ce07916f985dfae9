"""The closed form of each way against hand calculations; who waits for whom."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from settings import FREE, PLAIN, on

from hvd_shadowsync.capacity.setting import Cluster, Costs, Job, Setting, Unevenness
from hvd_shadowsync.capacity.unevenness import slowest_s, steps_per_s
from hvd_shadowsync.capacity.ways import WAYS, paced_by, predict
from hvd_shadowsync.pacing import Pacing

SLOW = Unevenness(slow_share=0.01, slow_factor=3.0)


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_trains_as_if_alone(way: str) -> None:
    alone = Setting(Job(100e6, 50.0, batch=10.0), Cluster(hosts=1))
    predicted = predict(alone, way)
    assert (predicted.efficiency, predicted.examples_per_s, predicted.reduction_ms) == (1.0, 200.0, 0.0)


@pytest.mark.parametrize(("overlap", "step_ms"), [(0.0, 200.0), (0.5, 175.0), (1.0, 150.0)])
def test_per_step_allreduce_adds_what_backward_does_not_hide(overlap: float, step_ms: float) -> None:
    predicted = predict(replace(PLAIN, overlap=overlap), "allreduce")  # a step of 50 ms, 150 ms on the link
    assert predicted.period_ms == pytest.approx(step_ms)
    assert predicted.examples_per_s == pytest.approx(4 * 10 / step_ms * 1000)
    assert predicted.efficiency == pytest.approx(50 / step_ms)
    assert predicted.sync_gap_steps == 1


def test_a_reduction_that_is_hidden_costs_nothing() -> None:
    assert predict(replace(PLAIN, job=Job(10e6, 50.0), overlap=0.5), "allreduce").efficiency == 1.0


def test_a_fixed_rate_adds_the_reduction_every_k_steps() -> None:
    predicted = predict(replace(PLAIN, fixed_every=10), "fixed")
    assert (predicted.period_ms, predicted.sync_gap_steps) == (pytest.approx(500 + 150), 10)
    assert predicted.efficiency == pytest.approx(500 / 650)


# --- shadow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pacing", "period_ms", "by"),
    [
        (Pacing(sync_every=1), 150 + 50 * 4 / 5, "its own time and the merge"),
        (Pacing(sync_every=20), 1000, "the slowest rank's steps"),
        (Pacing(sync_interval_ms=700.0), 700, "the interval"),
        (Pacing(cpu_budget=0.02), 0.1 * 1.5 * 0.4 / 0.02 * 1000, "the CPU budget"),
    ],
)
def test_a_round_begins_when_all_that_paces_it_has_passed(pacing: Pacing, period_ms: float, by: str) -> None:
    costs = replace(FREE, cpu_s_per_gb=0.4)  # of 0.15 GB on the wire: 60 ms, less than the link takes
    asked = replace(PLAIN, pacing=pacing, costs=costs)
    predicted = predict(asked, "shadow")
    assert predicted.period_ms == pytest.approx(period_ms, rel=1e-6)
    assert predicted.sync_gap_steps == pytest.approx(period_ms / 50, rel=1e-6)
    assert predicted.efficiency == pytest.approx(1.0)
    assert paced_by(asked) == by


def test_the_budget_is_2_percent_by_default_and_counts_merges() -> None:
    assert Setting(PLAIN.job, PLAIN.cluster).pacing.cpu_budget == 0.02
    asked = replace(PLAIN, pacing=Pacing(), costs=replace(FREE, merge_cpu_s_per_gb=0.1))
    predicted = predict(asked, "shadow")
    assert predicted.period_ms == pytest.approx(0.1 * 0.1 / 0.02 * 1000)
    assert predicted.efficiency == pytest.approx(0.98), "the training thread merges for 10 of 500 ms"


def test_training_makes_way_for_communicator_threads_where_cores_are_shared() -> None:
    asked = replace(PLAIN, costs=replace(FREE, round_cpu_s_per_gb=1.0), pacing=Pacing(cpu_budget=0.05))
    assert predict(asked, "shadow").efficiency == 1.0
    assert predict(on(asked, cores_per_host=1), "shadow").efficiency == pytest.approx(0.95)
    assert predict(on(asked, ranks_per_host=4, cores_per_host=2), "shadow").efficiency == pytest.approx(0.9)
    assert predict(on(asked, cores_per_host=2), "shadow").efficiency == 1.0, "there is a core to spare"


def test_a_reduction_hides_behind_backward_only_on_a_core_of_its_own() -> None:
    asked = replace(PLAIN, overlap=1.0, job=Job(10e6, 50.0))
    assert predict(on(asked, cores_per_host=2), "allreduce").period_ms == pytest.approx(50)
    assert predict(on(asked, cores_per_host=1), "allreduce").period_ms == pytest.approx(50 + 15)


# --- who waits --------------------------------------------------------------------------------------------------------


def test_the_slowest_rank_sets_the_pace_of_lockstep_but_not_of_shadow() -> None:
    even = Setting(Job(1e6, 50.0), Cluster(hosts=100))
    uneven = replace(even, unevenness=SLOW)
    for way in ("allreduce", "fixed"):
        assert predict(uneven, way).efficiency < 0.35, way
    assert predict(uneven, "shadow").examples_per_s / predict(even, "shadow").examples_per_s > 0.99
    assert predict(uneven, "shadow").efficiency > 0.99


def test_all_ranks_together_without_waiting() -> None:
    uneven = replace(on(PLAIN, hosts=200), unevenness=SLOW)
    assert steps_per_s(uneven) == pytest.approx((198 + 2 / 3) / 0.05)


def test_at_least_one_rank_is_slow_where_some_are() -> None:
    assert [SLOW.slow_ranks(ranks) for ranks in (1, 10, 1000)] == [1, 1, 10]
    assert Unevenness().slow_ranks(1000) == 0


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("ranks", [2, 10, 1000])
def test_the_slowest_of_many_is_that_of_draws(ranks: int, steps: int) -> None:
    uneven = Unevenness(jitter=0.3)
    random, sigma = np.random.default_rng(1), uneven.sigma()
    draws = random.lognormal(-(sigma**2) / 2, sigma, size=(500, steps, ranks)).sum(axis=1).max(axis=1).mean()
    predicted = slowest_s(replace(on(PLAIN, hosts=ranks), unevenness=uneven), steps=steps, step_s=1.0)
    assert predicted == pytest.approx(draws, rel=0.04)


def test_a_stall_of_any_rank_is_waited_for() -> None:
    stalls = replace(on(PLAIN, hosts=1000), unevenness=Unevenness(stall_share=0.001, stall_ms=100.0))
    assert slowest_s(stalls) == pytest.approx(0.05 + (1 - 0.999**1000) * 0.1)
    assert steps_per_s(stalls) == pytest.approx(1000 / 0.0501)


def test_more_jitter_makes_lockstep_slower_and_shadow_not() -> None:
    settings = [
        replace(on(PLAIN, hosts=50), unevenness=Unevenness(jitter), pacing=Pacing(sync_every=40), costs=Costs())
        for jitter in (0.0, 0.1, 0.5)
    ]
    lockstep = [predict(setting, "allreduce").efficiency for setting in settings]
    assert lockstep == sorted(lockstep, reverse=True) and lockstep[0] > lockstep[-1]
    assert all(predict(setting, "shadow").efficiency > 0.99 for setting in settings)
