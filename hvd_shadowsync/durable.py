"""Names of files that are on disk, not in memory alone."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def flush(folder: Path) -> None:
    """Have the names in `folder` on disk, where the file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
