"""Which side goes on where the network has come apart."""

from __future__ import annotations

from collections.abc import Collection


def goes_on(side: Collection[int], everyone: Collection[int], beside_launcher: Collection[int] = ()) -> bool:
    """Tell whether the ranks `side`, which reach one another, go on without the rest of `everyone` (pure).

    More than half do, and of two halves the one with the lowest rank: never two sides at once. But not without those
    that are on the launcher's host, where any are: it would end them, or they it.
    """
    if not set(beside_launcher) <= set(side):
        return False
    twice = 2 * len(side)
    return twice > len(everyone) or (twice == len(everyone) and min(everyone) in side)
