"""The same ways played through step by step: every rank draws its own steps; seeded, vectorised over ranks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hvd_shadowsync.capacity.reduction import background, foreground, per_step, vote
from hvd_shadowsync.capacity.setting import Setting
from hvd_shadowsync.capacity.ways import WAYS, Prediction, exposed_s, fixed_s, outcome, predict, slowdown, waits_s
from hvd_shadowsync.checks import check_count, choice

Floats = NDArray[np.float64]

LOCKSTEPS = 200
MOST_DRAWS = 4_000_000
ROUNDS = 10
FIRST_ROUNDS = 2  # in which ranks that began together drift apart
MARGIN = 4.0  # deviations of a sum of steps that are left to be drawn one by one
ON_TIME_S = 1e-9


class Ranks:
    """The steps of all ranks.

    Args:
        setting: what is asked about.
        seed: of all draws.
        slower: how many times longer steps take than those of the job.
    """

    def __init__(self, setting: Setting, seed: int, *, slower: float = 1.0) -> None:
        self._uneven, self._random = setting.unevenness, np.random.default_rng(seed)
        ranks = setting.cluster.ranks
        self._step_s = np.full(ranks, slower * setting.job.step_ms / 1000)
        self._step_s[: self._uneven.slow_ranks(ranks)] *= self._uneven.slow_factor
        self.mean_s: Floats = self._step_s + self._uneven.stall_share * self._uneven.stall_ms / 1000
        self.boundary_s: Floats = self.mean_s * self._random.random(ranks)
        """When each rank's step ends; they begin out of step with one another."""
        self.steps: Floats = np.zeros(ranks)

    def draw_s(self, steps: Floats | float) -> Floats:
        """Return how long each rank takes for its next `steps` steps, seconds."""
        uneven, count = self._uneven, np.broadcast_to(steps, self._step_s.shape)
        seconds: Floats = self._step_s * count
        if uneven.jitter:
            sigma = np.sqrt(np.log1p(uneven.jitter**2 / np.maximum(count, 1.0)))
            seconds = seconds * np.exp(sigma * self._random.standard_normal(count.size) - sigma**2 / 2)
        if uneven.stall_share and uneven.stall_ms:
            seconds = seconds + self._stalls(count) * uneven.stall_ms / 1000
        return seconds

    def _stalls(self, count: Floats) -> Floats:
        if (count == 1).all():
            return (self._random.random(count.size) < self._uneven.stall_share).astype(np.float64)
        return self._random.binomial(count.astype(np.int64), self._uneven.stall_share).astype(np.float64)

    def run_until(self, time_s: float | Floats) -> None:
        """Make steps until each rank stands at its first boundary at `time_s` or later."""
        time_s = np.broadcast_to(np.asarray(time_s) - ON_TIME_S, self.boundary_s.shape)
        while (many := self._certain_steps(time_s)).any():
            self._step(many, many > 0)
        while (behind := self.boundary_s < time_s).any():
            self._step(1.0, behind)

    def progress(self, time_s: float) -> float:
        """Return the steps that ranks have made by `time_s`, on average, those under way in part."""
        return float((self.steps - (self.boundary_s - time_s) / self.mean_s).mean())

    def run_steps(self, target: Floats) -> None:
        """Make steps until each rank has made `target` of them."""
        left = target - self.steps
        self._step(np.maximum(left, 0.0), left > 0)

    def _step(self, steps: Floats | float, who: NDArray[np.bool_]) -> None:
        if who.any():
            self.boundary_s = np.where(who, self.boundary_s + self.draw_s(steps), self.boundary_s)
            self.steps = np.where(who, self.steps + steps, self.steps)

    def _certain_steps(self, time_s: Floats) -> Floats:
        """Return how many steps each rank surely makes before `time_s`: they are drawn as one sum."""
        left = np.maximum(time_s - self.boundary_s, 0.0) / self.mean_s
        stall_steps = self._uneven.stall_share and self._uneven.stall_ms / 1000 / self.mean_s
        spread = self._uneven.jitter + stall_steps * math.sqrt(self._uneven.stall_share)
        return np.floor(np.maximum(left - MARGIN * spread * np.sqrt(left) - stall_steps - 1, 0.0))


def simulate(setting: Setting, way: str, *, seed: int = 0, rounds: int = ROUNDS) -> Prediction:
    """Play `rounds` rounds of one of `WAYS` through; 200 steps where ranks wait for one another, fewer of very many.

    Reductions take the time of the closed form: what is drawn are the ranks' steps. Memory goes by the number of ranks.
    """
    choice("way", way, WAYS)
    check_count("rounds", rounds, least=1)
    if way == "none":
        return predict(setting, "none")
    if way == "shadow":
        return _shadow(setting, seed, rounds)
    steps = 1 if way == "allreduce" else setting.fixed_every
    enough = min(LOCKSTEPS, MOST_DRAWS // setting.cluster.ranks) // steps
    return _lockstep(setting, seed, steps=steps, rounds=max(rounds, enough))


def _lockstep(setting: Setting, seed: int, *, steps: int, rounds: int) -> Prediction:
    """Every `steps` steps all ranks wait for the last one, and for the reduction."""
    ranks = Ranks(setting, seed)
    if setting.cluster.ranks == 1:
        return predict(setting, "allreduce" if steps == 1 else "fixed")
    reduction = per_step(setting) if steps == 1 else foreground(setting)
    waits_s = exposed_s(setting, reduction) if steps == 1 else fixed_s(setting, reduction)
    period_s = sum(float(ranks.draw_s(steps).max()) for _ in range(rounds)) / rounds + waits_s
    return outcome(setting, reduction, period_s, steps, setting.cluster.ranks * steps / period_s)


def _shadow(setting: Setting, seed: int, rounds: int) -> Prediction:
    """Each rank goes its own way; a round begins with the last vote, and ranks vote when theirs is due and merged."""
    expected = predict(setting, "shadow")
    if setting.cluster.ranks == 1:
        return expected
    reduction = background(setting)
    slower = slowdown(setting, reduction, expected.period_ms / 1000)
    ranks = Ranks(setting, seed, slower=slower)
    vote_s = vote(setting).seconds
    waits = waits_s(setting, reduction, slower)
    earliest = max(waits["the CPU budget"], waits["the interval"])
    began_s, voted_s = 0.0, np.zeros(setting.cluster.ranks)
    marks: list[tuple[float, float]] = []
    for _ in range(FIRST_ROUNDS + rounds + 1):
        ranks.run_until(began_s + vote_s + 2 * ON_TIME_S)  # the snapshot: what was a boundary at the vote is before it
        marks.append((began_s, ranks.progress(began_s)))
        target = ranks.steps + (setting.pacing.steps - 1)
        ranks.run_until(began_s + vote_s + reduction.seconds)
        ranks.run_steps(target)
        voted_s = np.maximum(ranks.boundary_s, voted_s + earliest)
        began_s = float(voted_s.max())
    period_s, gap = ((last - first) / rounds for first, last in zip(marks[FIRST_ROUNDS], marks[-1], strict=True))
    return outcome(setting, reduction, period_s, gap, gap * setting.cluster.ranks / period_s)
