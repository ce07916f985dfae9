"""Real jobs under the launchers: `test_*.py` here start them, `programs/` are what runs in them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for launching and ranks

LAUNCHED = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ)
collect_ignore = [] if LAUNCHED else ["programs"]
