"""What `shadowrun --fault-tolerant` puts before ssh: starts a daemon of Open MPI on another host, as ssh does.

mpirun ends the job where ssh ends with an error, which it also does when its connection breaks, or when the daemon ends
on a host that nobody reaches any more: the job has gone on without that host by then. So once the ranks have begun,
errors are kept from mpirun. It hears of daemons by its own connections. Runs as a file, which begins sooner than the
package.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

BEGUN = "SHADOWRUN_BEGUN"
"""The file that is there once ranks have begun."""
PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run `command`, which is ssh and its arguments; return its exit code, or 0 where it ends after the beginning."""
    try:
        code = subprocess.call(command, preexec_fn=_die_with_parent)
    except OSError as error:
        print(f"hvd_shadowsync: {command[0]} does not start ({error.strerror})", file=sys.stderr)
        return 127
    if os.path.exists(os.environ.get(BEGUN, "")):
        return 0
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
