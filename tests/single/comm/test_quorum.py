"""Which side goes on."""

from __future__ import annotations

import itertools

import pytest

from hvd_shadowsync.comm.quorum import goes_on


@pytest.mark.parametrize(
    ("side", "everyone", "goes"),
    [
        ({0, 1}, {0, 1, 2}, True),
        ({2}, {0, 1, 2}, False),
        ({1, 2}, {0, 1, 2}, True),
        ({0}, {0, 1}, True),
        ({1}, {0, 1}, False),
        ({3, 4}, {3, 4, 5, 6}, True),
        ({5, 6}, {3, 4, 5, 6}, False),
        ({7}, {7}, True),
    ],
)
def test_more_than_half_or_the_half_with_the_lowest(side: set[int], everyone: set[int], goes: bool) -> None:
    assert goes_on(side, everyone) is goes


def test_not_without_those_beside_the_launcher() -> None:
    assert goes_on({0, 1}, {0, 1, 2}, {0})
    assert not goes_on({1, 2}, {0, 1, 2}, {0})
    assert not goes_on({0}, {0, 1, 2}, {0})
    assert goes_on({0, 1, 2}, set(range(5)), {1, 2})
    assert not goes_on({0, 1, 2}, set(range(5)), {2, 3})


@pytest.mark.parametrize("size", range(1, 6))
def test_never_two_sides_at_once(size: int) -> None:
    everyone = set(range(size))
    for number in range(size + 1):
        for launcher in (set(), {0}, {size - 1}):
            for chosen in itertools.combinations(range(size), number):
                side = set(chosen)
                assert not (goes_on(side, everyone, launcher) and goes_on(everyone - side, everyone, launcher))
