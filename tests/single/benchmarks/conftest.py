"""Puts the benchmarks on the path, behind everything else: examples has a module `quality` of its own."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "contenders")]
