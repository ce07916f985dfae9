"""Puts the example programs on the path, as running one of them does."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))
