"""Reductions against hand calculations, and in their limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings import FREE, PLAIN, WHOLE, on

from hvd_shadowsync.capacity.reduction import (
    NEAR_LATENCY_S,
    NOTHING,
    Reduction,
    background,
    foreground,
    halving,
    hierarchical,
    owners,
    per_step,
    ring,
    vote,
)
from hvd_shadowsync.capacity.setting import Chunking, Cluster, Job, Setting

REDUCTIONS = [per_step, background, foreground]


def of_bytes(setting: Setting, num_bytes: float) -> Setting:
    return replace(setting, job=replace(setting.job, dense_bytes=num_bytes))


@pytest.mark.parametrize("reduction", [*REDUCTIONS, vote])
@pytest.mark.parametrize("algorithm", ["ring", "halving", "best"])
def test_one_rank_costs_nothing(reduction: Callable[[Setting], Reduction], algorithm: str) -> None:
    alone = Setting(Job(100e6, 50.0), Cluster(hosts=1, algorithm=algorithm))
    assert reduction(alone) == NOTHING


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("hosts", "seconds"), [(2, 0.1), (4, 0.15), (100, 0.198)])
def test_without_latency_it_takes_the_bytes_of_a_ring(
    reduction: Callable[[Setting], Reduction], hosts: int, seconds: float
) -> None:
    assert reduction(on(PLAIN, hosts=hosts)).seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("algorithm", "hosts", "messages"),
    [("ring", 2, 2), ("ring", 1000, 1998), ("halving", 8, 6), ("halving", 1024, 20), ("halving", 5, 7)],
)
def test_a_few_bytes_take_the_latencies(algorithm: str, hosts: int, messages: int) -> None:
    tiny = of_bytes(on(PLAIN, hosts=hosts, algorithm=algorithm, latency_us=100.0), 4.0)
    assert per_step(tiny).seconds == pytest.approx(messages * 100e-6, rel=1e-3)


def test_large_messages_are_bound_by_the_link() -> None:
    far = on(PLAIN, hosts=64, latency_us=100.0)
    assert background(of_bytes(far, 1e12)).seconds == pytest.approx(2 * 63 / 64 * 1e12 / 1e9, rel=1e-3)


def test_the_best_is_the_faster_of_both() -> None:
    far = on(PLAIN, hosts=100, latency_us=100.0)  # no power of two: halving sends twice the bytes in addition
    for num_bytes, winner in ((4.0, "halving"), (1e9, "ring")):
        times = {name: per_step(of_bytes(on(far, algorithm=name), num_bytes)).seconds for name in ("ring", "halving")}
        assert min(times, key=lambda name: times[name]) == winner
        assert per_step(of_bytes(on(far, algorithm="best"), num_bytes)).seconds == times[winner]


def test_halving_of_no_power_of_two_sends_more() -> None:
    assert halving(Cluster(hosts=4)).share == pytest.approx(1.5)
    assert halving(Cluster(hosts=5)).share == pytest.approx(3.5)
    assert halving(Cluster(hosts=4, ranks_per_host=8)).near == 6


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_flight", "latency_us", "seconds"),
    [
        (1, 1000.0, 10 * (0.010 + 2 * 0.001)),  # one after the other
        (2, 1000.0, 0.012 + 9 * 0.010),  # the link is never idle
        (2, 10_000.0, 0.030 + 9 * 0.015),  # two in 30 ms
        (9, 0.0, 0.1),
    ],
)
def test_ten_chunks_between_two_hosts(in_flight: int, latency_us: float, seconds: float) -> None:
    chunking = Chunking(10e6, in_flight, pause_ms=0.0)
    asked = replace(on(PLAIN, hosts=2, latency_us=latency_us), chunking=chunking)
    assert background(asked).seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("hosts", "mib"), [(2, 1), (5, 2.5), (8, 4), (10_000, 625)])
def test_chunks_are_larger_among_more_ranks(hosts: int, mib: float) -> None:
    assert Chunking().bytes_among(hosts) == mib * 2**20
    assert Chunking(1e6).bytes_among(hosts) == 1e6
    chosen = replace(PLAIN.chunking, chunk_bytes=mib * 2**20, in_flight=4, pause_ms=1.0)
    asked = on(PLAIN, hosts=hosts, ranks_per_host=2, hierarchical=True)
    assert background(replace(asked, chunking=Chunking())) == background(replace(asked, chunking=chosen))


def test_each_message_is_found_half_a_pause_late() -> None:
    late = replace(on(PLAIN, hosts=2), chunking=replace(WHOLE, pause_ms=1.0, growth=0.3))
    assert background(late).seconds == pytest.approx(0.1 + 2 * 0.0005)
    short = of_bytes(late, 1e6)  # pauses have grown from 0.25 by 0.3 milliseconds
    assert background(short).seconds == pytest.approx(0.001 + 2 * 0.000275)


def test_horovod_waits_without_pauses_in_whole_buffers() -> None:
    slow = replace(on(PLAIN, hosts=2, latency_us=1000.0), chunking=Chunking(1e5, 1, pause_ms=9.0))
    assert per_step(of_bytes(slow, 100e6)).seconds == pytest.approx(0.102)


# --- CPU --------------------------------------------------------------------------------------------------------------


def test_the_cpu_is_the_bound_where_it_is_slower_than_the_link() -> None:
    costs = replace(FREE, cpu_s_per_gb=2.0, round_cpu_s_per_gb=1.0)
    asked = replace(on(PLAIN, hosts=2), costs=costs)  # 0.1 GB on the wire
    assert background(asked) == Reduction(pytest.approx(0.3), pytest.approx(0.3))
    assert per_step(asked) == Reduction(pytest.approx(0.2), pytest.approx(0.2)), "the wire's alone"


def test_ranks_that_share_a_core_wait_for_it_and_spend_no_more() -> None:
    asked = replace(on(PLAIN, hosts=2, cores_per_host=0.5), costs=replace(FREE, cpu_s_per_gb=2.0))
    assert background(asked) == Reduction(pytest.approx(0.4), pytest.approx(0.2))


def test_looks_cost_cpu_for_as_long_as_the_round_is_in_flight() -> None:
    asked = replace(on(PLAIN, hosts=2), costs=replace(FREE, cpu_us_per_look=30.0))
    assert background(asked).cpu_s == 0.0, "it does not sleep"
    late = replace(asked, chunking=replace(WHOLE, pause_ms=1.0))
    assert background(late).cpu_s == pytest.approx(101 * 30e-6), "100 ms on the link, and half a pause for each of 2"


def test_messages_cost_cpu_in_each_chunk() -> None:
    asked = replace(on(PLAIN, hosts=101), costs=replace(FREE, cpu_us_per_message=10.0), chunking=Chunking(1e6, 2))
    assert background(asked).cpu_s == pytest.approx(100 * 200 * 10e-6)


def test_a_vote_is_a_message_to_each_other_rank() -> None:
    asked = replace(on(PLAIN, hosts=1001, latency_us=50.0), costs=replace(FREE, cpu_us_per_message=10.0))
    assert vote(asked) == Reduction(pytest.approx(50e-6 + 0.01), pytest.approx(0.01))


# --- several ranks a host ---------------------------------------------------------------------------------------------


def test_bytes_on_a_hosts_link() -> None:
    cluster = Cluster(hosts=4, ranks_per_host=8)
    assert ring(cluster).share == pytest.approx(2 * 31 / 32), "one link in, one out"
    assert hierarchical(ring, cluster).share == halving(cluster).share == pytest.approx(2 * 3 / 4)
    assert owners(cluster).share == pytest.approx(8 * 2 * 3 / 4), "each rank sends to all ranks elsewhere"


def test_one_rank_a_host_goes_on_the_network() -> None:
    cluster = Cluster(hosts=100, ranks_per_host=8)
    assert (ring(cluster).far, ring(cluster).near) == pytest.approx((2 * 799 / 8, 2 * 799 * 7 / 8))
    assert (hierarchical(ring, cluster).far, hierarchical(ring, cluster).messages) == (198, 198)


def test_one_host_reduces_at_the_rate_of_its_memory() -> None:
    asked = on(PLAIN, hosts=1, ranks_per_host=2, memory_gbs=10.0)
    shared = background(on(asked, hierarchical=True)).seconds
    assert shared == pytest.approx(2.5 * 100e6 / 10e9 + 2 * NEAR_LATENCY_S)
    assert background(asked).seconds == pytest.approx(4 * 100e6 / 10e9 + 2 * NEAR_LATENCY_S), "copied in and out"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hierarchical_with_one_rank_a_host_is_flat(reduction: Callable[[Setting], Reduction]) -> None:
    assert reduction(on(PLAIN, hierarchical=True)) == reduction(PLAIN)


@given(
    hosts=st.integers(2, 10_000),
    ranks=st.integers(1, 16),
    algorithm=st.sampled_from(["ring", "halving", "best"]),
    shared=st.booleans(),
    rates=st.tuples(st.floats(0.01, 400), st.floats(0.01, 400)).map(sorted),
    mb=st.floats(0.001, 10_000),
)
def test_a_faster_network_never_takes_longer(
    hosts: int, ranks: int, algorithm: str, shared: bool, rates: list[float], mb: float
) -> None:
    cluster = Cluster(hosts, ranks, algorithm=algorithm, hierarchical=shared)
    slow, fast = (Setting(Job(1e6 * mb, 40.0), replace(cluster, gbps=gbps)) for gbps in rates)
    for reduction in REDUCTIONS:
        assert reduction(fast).seconds <= reduction(slow).seconds * (1 + 1e-9)
        assert reduction(slow).seconds > 0 and reduction(slow).cpu_s > 0
