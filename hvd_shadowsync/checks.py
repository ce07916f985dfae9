"""What numbers and words may be passed for an argument: messages name the argument, the value and the remedy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def check_interval(
    name: str, value: float, *, low: float, high: float, low_included: bool = True, high_included: bool = True
) -> None:
    """Raise unless the number `value` of the argument `name` lies between `low` and `high`."""
    shape = f"{'[' if low_included else '('}{low:g}, {high:g}{']' if high_included else ')'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is not a number; give one in {shape}")
    above = value >= low if low_included else value > low
    below = value <= high if high_included else value < high
    if not (above and below):
        raise ValueError(f"{name}={value!r} is outside {shape}; give a number in that interval")


def check_count(name: str, value: int, *, least: int) -> None:
    """Raise unless the argument `name` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not a whole number; give one of at least {least}")
    if value < least:
        raise ValueError(f"{name}={value!r} is below {least}; give a whole number of at least {least}")


def check_flag(name: str, value: bool) -> None:
    """Raise unless the argument `name` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is neither True nor False; give one of them")


def choice(name: str, value: str, known: Sequence[str]) -> str:
    """Return `value` of the argument `name` if it is among the `known` ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; give one of {', '.join(map(repr, known))}")
    return value


def check_folder(name: str, value: Any) -> None:
    """Raise unless `value` of the argument `name` can be the path of a folder, there or not."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(f"{name}={value!r} is no path; give a str or a pathlib.Path")
    if not path:
        raise ValueError(f"{name}={value!r} is empty; give the path of a folder, '.' for the current one")
    if "\0" in path:
        raise ValueError(f"{name}={value!r} has a zero byte, as no path has; give the path of a folder")
