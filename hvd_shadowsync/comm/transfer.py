"""How a round's bytes are sent, and the search for what suits this network and machine, made in the first rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.tuning import EAGER_BYTES

KIB = 1 << 10
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 1024 * KIB, 4096 * KIB
LEAST_SHARE_BYTES = 64 * KIB
ROUNDS_OF_A_TRIAL = 3
WARM_UP_ROUNDS = 2
WORTH_IT = 0.95
HOPELESS = 1.25


@dataclass(frozen=True)
class Transfer:
    """How a reduction's bytes are sent.

    Attributes:
        chunk_bytes: what goes into one collective call.
        in_flight: chunks under way at a time.
        pause_s: longest pause between two looks at them, seconds.
    """

    chunk_bytes: int = LEAST_CHUNK_BYTES
    in_flight: int = 4
    pause_s: float = 0.001

    @classmethod
    def between(cls, size: int) -> Transfer:
        """Return what `size` ranks start with.

        A rank's share of a chunk is what MPI sends without asking first; less where chunks would outgrow a core's
        cache, but never so little that messages cost more than what is in them.
        """
        most = max(MOST_CHUNK_BYTES, size * LEAST_SHARE_BYTES)
        return cls(min(max(size * EAGER_BYTES, LEAST_CHUNK_BYTES), most))

    def poller(self, poller: Poller) -> Poller:
        """Return `poller` with these pauses; it never spins, which would use up the thread's turn of a shared core."""
        return replace(poller, spin_s=0.0, eager=0, shortest_s=self.pause_s / 4, longest_s=self.pause_s)


class Search:
    """Tries one setting after the other, each in a few rounds, and keeps the one whose rounds could follow fastest.

    First the size of the chunks, then how many are under way, then the pauses. What is better by less than a twentieth
    is not; what is worse by a quarter in two rounds gets no third. At last what it began with and the best are tried
    once more, side by side: the first rounds of a job are slow by themselves, and the best may have been lucky. All
    ranks observe the same costs, so they choose the same without a word about it.

    Args:
        start: what to begin with.
        num_bytes: of the vector that is reduced: settings that are the same for so few bytes are not tried.
    """

    def __init__(self, start: Transfer, num_bytes: int) -> None:
        self._start = self.best = start
        self._num_bytes = num_bytes
        self._costs: list[int] = []
        self._cost = self._least = math.inf
        self._to_skip = WARM_UP_ROUNDS
        self._trials: Iterator[Transfer] | None = self._try_all()
        self.transfer = next(self._trials)

    @property
    def is_over(self) -> bool:
        """Whether `transfer` is the choice."""
        return self._trials is None

    def observe(self, cost_us: int) -> None:
        """Take note of what the last round with `transfer` cost: the time until the next could begin, microseconds."""
        if self._trials is None:
            return
        if self._to_skip:
            self._to_skip -= 1
            return
        self._costs.append(cost_us)
        hopeless = min(self._costs) > HOPELESS * self._least
        if len(self._costs) == ROUNDS_OF_A_TRIAL or (hopeless and len(self._costs) > 1):
            self._cost, self._costs = statistics.median(self._costs), []
            following = next(self._trials, None)
            if following is None:
                self._trials = None
            self.transfer = following or self.best

    def _try_all(self) -> Iterator[Transfer]:
        """Iterate over what to try; `_cost` is that of the last one when the next is asked for."""
        yield self._start
        self._least = self._cost
        for change in self._changes():
            candidate = replace(self.best, **change)
            if self._amounts_to(candidate) != self._amounts_to(self.best):
                yield candidate
                if self._cost < WORTH_IT * self._least:
                    self.best, self._least = candidate, self._cost
        if self.best != self._start:
            self._least = math.inf
            yield self._start
            begun_with = self._cost
            yield self.best
            if self._cost > WORTH_IT * begun_with:
                self.best = self._start

    def _changes(self) -> list[dict[str, Any]]:
        start = self._start
        return [
            *({"chunk_bytes": chunk_bytes} for chunk_bytes in (start.chunk_bytes // 4, start.chunk_bytes * 4)),
            *({"in_flight": in_flight} for in_flight in (start.in_flight // 2, start.in_flight * 2)),
            *({"pause_s": pause_s} for pause_s in (start.pause_s / 4, start.pause_s * 3, start.pause_s * 10)),
        ]

    def _amounts_to(self, transfer: Transfer) -> tuple[int, int, float]:
        chunk = max(1, min(transfer.chunk_bytes, self._num_bytes))
        return chunk, min(transfer.in_flight, -(-self._num_bytes // chunk)), transfer.pause_s
