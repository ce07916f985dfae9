"""Puts the benchmarks on the path, behind everything else: examples has a module `quality` of its own."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
