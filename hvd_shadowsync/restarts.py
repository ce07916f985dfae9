"""`shadowrun --restarts N`: a job that failed is started again, and its script goes on from its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hvd_shadowsync.ending import tell

MOST_SIGNALS = 64
VARIABLE = "SHADOWRUN_RESTARTS"
"""How often the job was started again so far, for its ranks."""


@dataclass(frozen=True)
class End:
    """How one attempt ended.

    Attributes:
        code: what `shadowrun` exits with if it is the last one.
        told: whether `shadowrun` got a signal to end.
        trained: whether a rank had come to its first training step.
        complete: whether the ranks that were left came to their end.
    """

    code: int
    told: bool = False
    trained: bool = False
    complete: bool = False

    @property
    def why_not_again(self) -> str | None:
        """Why another attempt would be wrong, or in vain; "" where nobody needs to be told, None for an attempt."""
        if self.told or self.complete or self.code == 0:
            return ""
        if not self.trained and not 128 < self.code <= 128 + MOST_SIGNALS:
            return "no rank had come to its first training step, so it would end the same way again"
        return None


def run_with_restarts(attempt: Callable[[int], End], most: int) -> int:
    """Call `attempt(0)`, then `attempt(1)` up to `attempt(most)` while they fail; return the last one's code.

    Says each time on stderr what came of it.
    """
    for number in range(most + 1):
        end = attempt(number)
        why_not = end.why_not_again
        if why_not == "":
            break
        if why_not is not None:
            _say(f"the job ended with code {end.code} and is not started again: {why_not}")
            break
        if number == most:
            _say(f"the job ended with code {end.code}, and was started again {number} of {most} times: it ends")
            break
        _say(f"the job ended with code {end.code}; it is started again ({number + 1} of {most})")
    return end.code


def _say(what: str) -> None:
    tell(f"shadowrun: {what}")
