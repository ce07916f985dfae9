"""What each way of synchronisation comes to, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_shadowsync.capacity.reduction import NOTHING, Reduction, background, foreground, per_step, vote
from hvd_shadowsync.capacity.setting import Setting
from hvd_shadowsync.capacity.unevenness import slowest_s, steps_per_s
from hvd_shadowsync.checks import choice

WAYS = ("none", "allreduce", "fixed", "shadow")
MOST_TAKEN = 0.5
"""Of a core, by communicator threads: the scheduler leaves training its half."""
ITERATIONS = 8


@dataclass(frozen=True)
class Prediction:
    """What a way comes to. Without synchronisation the first three are 0.

    Attributes:
        reduction_ms: of gradients, or of a round from snapshot to result, milliseconds.
        period_ms: from round to round; of per-step allreduce, the step.
        sync_gap_steps: training steps of a rank from round to round, on average over ranks.
        examples_per_s: of all ranks.
        efficiency: examples/s over those without synchronisation.
    """

    reduction_ms: float
    period_ms: float
    sync_gap_steps: float
    examples_per_s: float
    efficiency: float


def predict(setting: Setting, way: str) -> Prediction:
    """Return the prediction for one of `WAYS`."""
    choice("way", way, WAYS)
    if way == "none":
        return outcome(setting, NOTHING, 0.0, 0.0, steps_per_s(setting))
    if way == "allreduce":
        return _allreduce(setting)
    return _fixed(setting) if way == "fixed" else _shadow(setting)


def outcome(
    setting: Setting, reduction: Reduction, period_s: float, sync_gap_steps: float, all_steps_per_s: float
) -> Prediction:
    """Return a prediction for all ranks making `all_steps_per_s` steps a second together."""
    return Prediction(
        1000 * reduction.seconds,
        1000 * period_s,
        sync_gap_steps,
        setting.job.batch * all_steps_per_s,
        all_steps_per_s / steps_per_s(setting),
    )


# --- in lockstep ------------------------------------------------------------------------------------------------------


def exposed_s(setting: Setting, reduction: Reduction) -> float:
    """Return what is left of an allreduce of gradients when backward is over, seconds.

    max(0, reduction - overlap x step). Where ranks have no core to spare all of it is: a thread that waits without
    pauses takes from backward what it would hide.
    """
    if setting.cluster.ranks_per_core >= 1:
        return reduction.seconds
    return max(reduction.seconds - setting.overlap * setting.job.step_ms / 1000, 0.0)


def fixed_s(setting: Setting, reduction: Reduction) -> float:
    """Return what a round in the foreground adds, seconds: all of it, and the merge."""
    return reduction.seconds + merge_s(setting) * setting.cluster.crowding


def _allreduce(setting: Setting) -> Prediction:
    """Return step = slowest of P ranks + exposed reduction."""
    reduction = per_step(setting)
    step_s = slowest_s(setting) + exposed_s(setting, reduction)
    return outcome(setting, reduction, step_s, 1.0, setting.cluster.ranks / step_s)


def _fixed(setting: Setting) -> Prediction:
    """Return period = slowest of P ranks in k steps + reduction."""
    reduction = foreground(setting)
    steps = setting.fixed_every
    period_s = slowest_s(setting, steps=steps) + fixed_s(setting, reduction)
    return outcome(setting, reduction, period_s, steps, setting.cluster.ranks * steps / period_s)


# --- in the background ------------------------------------------------------------------------------------------------


def merge_s(setting: Setting) -> float:
    """Return the training thread's part of a round, seconds."""
    return 1e-9 * setting.job.dense_bytes * setting.costs.merge_cpu_s_per_gb if setting.cluster.ranks > 1 else 0.0


def spent_s(setting: Setting, reduction: Reduction) -> float:
    """Return the CPU seconds that a round costs the rank that spends most: vote, reduction, merge."""
    return vote(setting).cpu_s + reduction.cpu_s + merge_s(setting)


def slowdown(setting: Setting, reduction: Reduction, period_s: float) -> float:
    """Return how many times longer steps take beside rounds every `period_s`.

    The training thread merges; and where cores are shared, r ranks to a core, it has what is left of the core after
    r x CPU / period.
    """
    crowd = setting.cluster.ranks_per_core
    busy_s = vote(setting).cpu_s + reduction.cpu_s
    taken = min(MOST_TAKEN, crowd * busy_s / period_s)
    return max(1.0, min(crowd, 1.0) / (1 - taken)) / (1 - min(MOST_TAKEN, merge_s(setting) / period_s))


def waits_s(setting: Setting, reduction: Reduction, slower: float) -> dict[str, float]:
    """Return what a round's period is the longest of, seconds, while steps take `slower` times as long.

    A round is over when every rank has merged it, at its next step boundary: the last of P ranks with steps out of step
    comes to that after P / (P + 1) of one.
    """
    ranks, step_s, pacing = setting.cluster.ranks, slower * setting.job.step_ms / 1000, setting.pacing
    boundary_s = slowest_s(setting, step_s=step_s) * ranks / (ranks + 1) if ranks > 1 else 0.0
    budget_s = spent_s(setting, reduction) / pacing.cpu_budget if pacing.cpu_budget is not None else 0.0
    return {
        "its own time and the merge": vote(setting).seconds + reduction.seconds + boundary_s,
        "the CPU budget": budget_s,
        "the interval": (pacing.sync_interval_ms or 0.0) / 1000,
        "the slowest rank's steps": slowest_s(setting, steps=pacing.steps, step_s=step_s),
    }


def _steady(setting: Setting) -> tuple[Reduction, dict[str, float], float]:
    reduction, slower = background(setting), 1.0
    for _ in range(ITERATIONS):
        waits = waits_s(setting, reduction, slower)
        slower = slowdown(setting, reduction, max(waits.values()))
    return reduction, waits, slower


def paced_by(setting: Setting) -> str:
    """Return what shadow rounds wait for."""
    _, waits, _ = _steady(setting)
    return max(waits, key=lambda name: waits[name])


def _shadow(setting: Setting) -> Prediction:
    """Return period = max(round, CPU / budget, interval, k steps of the slowest); no step waits for it.

    Zheng et al., 2020, "ShadowSync: performing synchronization in the background for highly scalable distributed
    training", arXiv 2003.03477; pacing as in `hvd_shadowsync.pacing`. Who is slow delays rounds, not training.
    """
    reduction, waits, slower = _steady(setting)
    period_s, all_steps_per_s = max(waits.values()), steps_per_s(setting) / slower
    return outcome(setting, reduction, period_s, period_s * all_steps_per_s / setting.cluster.ranks, all_steps_per_s)
