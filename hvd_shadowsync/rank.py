"""What `shadowrun --fault-tolerant` starts for each rank: runs the program, and sees to it that its end is noticed.

Open MPI's launcher takes no notice there of a rank that ends with a code, and nobody notices one that ends before
MPI_Init is through on all ranks: the others would wait for ever. So a rank that is gone too early ends by a signal, and
is reported to shadowrun where MPI may not have been initialised yet. Runs as a file: who imports the package is a
rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

DESCRIPTOR = "SHADOWRUN_RANK_DESCRIPTOR"
"""Where the program writes `STARTED` once MPI is initialised, and `ENDED` when the interpreter ends as it should: the
number of a descriptor, a colon, and the inode that it is of."""
STARTED, ENDED = b"s", b"e"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
PR_SET_PDEATHSIG = 1
LOOK_S = 0.5
"""After so long at the latest a signal is passed on that has come right before a call that waits."""


def main(program: list[str]) -> int:
    """Run `program`; return its exit code, or die as others can see."""
    reading, writing = os.pipe()
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    environ = {**os.environ, DESCRIPTOR: f"{writing}:{os.fstat(writing).st_ino}"}
    child = subprocess.Popen(program, env=environ, pass_fds=[writing], preexec_fn=_die_with_parent)
    for each in received:
        child.send_signal(each)
    code = _wait(child)
    os.set_blocking(reading, False)
    os.close(writing)
    try:
        said = os.read(reading, 64)
    except BlockingIOError:  # a process that the program left behind holds the other end
        said = b""
    return _end(code, said)


def _wait(child: subprocess.Popen[bytes]) -> int:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(LOOK_S)


def _end(code: int, said: bytes) -> int:
    if code == 0 and STARTED not in said:
        return 0  # a program without MPI
    if STARTED not in said:
        rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
        print(f"hvd_shadowsync: rank {rank} ended before it had begun; code: {code}", file=sys.stderr)
        sys.stderr.flush()
    elif ENDED in said and code >= 0:
        return code
    os.kill(os.getpid(), signal.SIGKILL)
    return 1


def _die_with_parent() -> None:
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
