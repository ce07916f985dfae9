"""The simulation: equal to the closed form where nothing is drawn, near it where steps are, and small."""

from __future__ import annotations

import tracemalloc
from dataclasses import astuple, replace

import numpy as np
import pytest
from settings import PLAIN, on

from hvd_shadowsync.capacity.setting import Cluster, Costs, Job, Setting, Unevenness
from hvd_shadowsync.capacity.simulation import Ranks, simulate
from hvd_shadowsync.capacity.ways import WAYS, predict
from hvd_shadowsync.pacing import Pacing

UNEVEN = Unevenness(jitter=0.2, slow_share=0.05, slow_factor=1.5, stall_share=0.01, stall_ms=30.0)
HUNDRED = Setting(Job(20e6, 40.0), Cluster(hosts=100))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slow_share", [0.0, 0.1])
@pytest.mark.parametrize("pacing", [Pacing(), Pacing(sync_interval_ms=900.0), Pacing(sync_every=30)])
@pytest.mark.parametrize("hosts", [1, 2, 100])
def test_without_jitter_it_is_the_closed_form(way: str, slow_share: float, pacing: Pacing, hosts: int) -> None:
    asked = replace(on(PLAIN, hosts=hosts), pacing=pacing, costs=Costs(), unevenness=Unevenness(slow_share=slow_share))
    assert astuple(simulate(asked, way, seed=3)) == pytest.approx(astuple(predict(asked, way)), rel=1e-3)


@pytest.mark.parametrize("hosts", [2, 10, 300])
def test_rounds_back_to_back_are_within_a_step_of_it(hosts: int) -> None:
    asked = on(PLAIN, hosts=hosts)
    simulated, predicted = simulate(asked, "shadow"), predict(asked, "shadow")
    assert abs(simulated.period_ms - predicted.period_ms) <= 50
    assert simulated.period_ms >= predicted.reduction_ms
    assert simulated.sync_gap_steps == pytest.approx(simulated.period_ms / 50, rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_with_jitter_slow_ranks_and_stalls_it_is_near_the_closed_form(way: str) -> None:
    asked = replace(HUNDRED, unevenness=UNEVEN)
    assert simulate(asked, way).examples_per_s == pytest.approx(predict(asked, way).examples_per_s, rel=0.1)
    assert simulate(asked, way).sync_gap_steps == pytest.approx(predict(asked, way).sync_gap_steps, rel=0.1)


def test_the_seed_decides_what_is_drawn() -> None:
    asked = replace(HUNDRED, unevenness=UNEVEN)
    for way in ("allreduce", "fixed", "shadow"):
        assert simulate(asked, way, seed=1) == simulate(asked, way, seed=1)
        assert simulate(asked, way, seed=1) != simulate(asked, way, seed=2)


def test_slow_ranks_hold_up_lockstep_but_not_shadow() -> None:
    asked = replace(HUNDRED, unevenness=Unevenness(jitter=0.1, slow_share=0.01, slow_factor=4.0))
    assert simulate(asked, "allreduce").efficiency < 0.26
    assert simulate(asked, "shadow").efficiency > 0.97


def test_a_jump_over_many_steps_is_like_single_ones() -> None:
    asked = replace(on(PLAIN, hosts=2000), unevenness=UNEVEN)
    ranks, singly = Ranks(asked, seed=1), Ranks(asked, seed=2)
    ranks.run_until(20.0)
    while (behind := singly.boundary_s < 20.0).any():
        singly._step(1.0, behind)
    assert (ranks.boundary_s >= 20.0 - 1e-6).all()
    assert ranks.steps.mean() == pytest.approx(singly.steps.mean(), rel=0.005)
    assert ranks.steps.std() == pytest.approx(singly.steps.std(), rel=0.1)
    late, late_singly = ranks.boundary_s.mean() - 20.0, singly.boundary_s.mean() - 20.0
    assert late == pytest.approx(late_singly, rel=0.15), "each stands at its first boundary, not at a later one"


def test_ranks_make_the_steps_that_are_asked_for() -> None:
    ranks = Ranks(replace(PLAIN, unevenness=UNEVEN), seed=1)
    ranks.run_steps(np.array([3.0, 0.0, 7.0, 1.0]))
    ranks.run_steps(np.array([2.0, 2.0, 2.0, 2.0]))
    assert ranks.steps.tolist() == [3.0, 2.0, 7.0, 2.0]


def test_ten_thousand_hosts_take_little_memory() -> None:
    asked = replace(HUNDRED, cluster=Cluster(hosts=10_000, algorithm="halving"), unevenness=UNEVEN)
    tracemalloc.start()
    try:
        for way in WAYS:
            assert simulate(asked, way, rounds=3).examples_per_s > 0
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 32e6


def test_arguments_that_are_wrong_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"way='gossip' is unknown; give one of 'none', 'allreduce', 'fixed', 'shadow'"
    ):
        simulate(PLAIN, "gossip")
    with pytest.raises(ValueError, match="rounds=0 is below 1"):
        simulate(PLAIN, "shadow", rounds=0)
