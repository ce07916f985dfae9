"""Names of files that are on disk, not in memory alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

UNABLE = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EISDIR}
"""What file systems say that cannot do it, or to who may not."""


def flush(folder: Path) -> None:
    """Have the names in `folder` on disk, where the file system can do that.

    Raises:
        OSError: it can, and has failed (EIO, ENOSPC, EDQUOT).
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
