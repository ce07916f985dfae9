"""Benchmarks are programs in a folder of their own; the tests import what they are made of."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
for folder in (BENCHMARKS, BENCHMARKS / "contenders"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
