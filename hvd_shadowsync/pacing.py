"""When the next round starts: after steps, after milliseconds, within a CPU budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_shadowsync.checks import check_count, check_interval

DEFAULT_CPU_BUDGET = 0.02
HEAD_START_S = 10.0


@dataclass(frozen=True)
class Pacing:
    """When a rank is ready for its next round; every condition that is set has to hold.

    Attributes:
        sync_every: training steps from round to round, at least 1; None for no such condition (one step is needed
            in any case: without one there is nothing to synchronise).
        sync_interval_ms: milliseconds from the start of a round to the start of the next; None for no such condition.
        cpu_budget: share of one core that rounds may take, in (0, 1]: CPU time of the communicator thread and of the
            training thread's part. None for no such condition; by default 0.02 where neither of the others is set. The
            first rounds have ten seconds' worth more (`head_start_s`).
    """

    sync_every: int | None = None
    sync_interval_ms: float | None = None
    cpu_budget: float | None = None

    def __post_init__(self) -> None:
        if self.sync_every is not None:
            check_count("sync_every", self.sync_every, least=1)
        if self.sync_interval_ms is not None:
            check_interval("sync_interval_ms", self.sync_interval_ms, low=0.0, high=math.inf, high_included=False)
        if self.cpu_budget is not None:
            check_interval("cpu_budget", self.cpu_budget, low=0.0, high=1.0, low_included=False)
        elif self.sync_every is None and self.sync_interval_ms is None:
            object.__setattr__(self, "cpu_budget", DEFAULT_CPU_BUDGET)

    @property
    def steps(self) -> int:
        """Training steps that a round waits for."""
        return self.sync_every or 1

    @property
    def head_start_s(self) -> float:
        """CPU seconds that the first rounds may spend without a pause, beyond the budget.

        Weights move most, and apart most, in the first steps, and how to send is found out in the first rounds.
        """
        return HEAD_START_S * (self.cpu_budget or 0.0)

    def wait_s(self, *, steps: int, elapsed_s: float, spent_s: float) -> float:
        """Return how many seconds are left until a round may start: 0 for now, inf if it waits for steps.

        Args:
            steps: training steps since the last round's snapshot.
            elapsed_s: seconds since the last round's start.
            spent_s: CPU seconds spent on rounds since then, beyond the head start.
        """
        if steps < self.steps:
            return math.inf
        interval_s = (self.sync_interval_ms or 0.0) / 1000
        budget_s = spent_s / self.cpu_budget if self.cpu_budget is not None else 0.0
        return max(0.0, interval_s - elapsed_s, budget_s - elapsed_s)
