"""Tests on several ranks: `test_*.py` here start jobs, `programs/` are what runs in them.

By hand: mpirun -n 2 python -m pytest tests/parallel/programs
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for launching and ranks

LAUNCHED = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ)
collect_ignore = [] if LAUNCHED else ["programs"]
