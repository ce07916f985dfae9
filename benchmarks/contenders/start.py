"""Starts one rank on each host, without MPI: the environment that torch.distributed reads, here or on emulated hosts.

    python benchmarks/contenders/start.py --ranks 2 COMMAND...                                    # on this machine
    python -m hvd_shadowsync.emulated --hosts 2 -- python benchmarks/contenders/start.py --ranks 2 COMMAND...

Ends all ranks when one fails. Standard library only, so that it starts in a moment.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time

AGENT = "/proc/1/fd/200"  # hvd_shadowsync.emulated: in ssh's place
HOSTS = "SHADOW_EMULATED"
PORT = 29500
GRACE_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    hosts = [place.split("=")[0] for place in os.environ.get(HOSTS, "").split(",") if place]
    address, port = (hosts[0], PORT) if hosts else ("127.0.0.1", free_port())
    ranks = []
    for rank in range(options.ranks):
        environ = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(options.ranks),
            "LOCAL_RANK": "0" if hosts else str(rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "eth0" if hosts else "lo",
        }
        line = [AGENT, hosts[rank % len(hosts)], shlex.join(command)] if hosts else command
        ranks.append(subprocess.Popen(line, env=environ))
    return wait(ranks)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one fails, end the others after a while. Return the first code that is not 0."""
    codes: list[int] = []
    running = list(ranks)
    deadline = None
    while running:
        for rank in [each for each in running if each.poll() is not None]:
            running.remove(rank)
            codes.append(rank.returncode)
        if deadline is None and any(codes):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.kill()
        time.sleep(0.02)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
