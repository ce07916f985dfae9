"""Latency and loss where the kernel has no netem: a process per host's link that carries its frames (`delay.cpp`).

Loss is drawn for every packet that a wire would carry, also where the kernel hands over many at once (of TCP over
IPv4; anything else is one packet). A latency is kept to about 0.1 ms, or to 10 % where that is less. On a virtual
machine each line took about 1.5 s of CPU time for a GB at 1 Gbit/s, half of it for timers; one with nothing to
carry takes none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
from pathlib import Path

from hvd_shadowsync.emulated.namespaces import call, forked, ignore_signals
from hvd_shadowsync.emulated.network import Network
from hvd_shadowsync.launcher.command import LaunchError

EVERY_PROTOCOL = 3
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_TIMESTAMPNS = 32, 33, 35
PR_SET_TIMERSLACK = 29
SOCKET_BYTES = 64 << 20
CAPACITY_BYTES = 256 << 20
"""Most bytes under way in one direction: 10 Gbit/s times 200 ms."""


def load() -> ctypes.CDLL:
    """Return the compiled delay line.

    Raises:
        LaunchError: it was not built.
    """
    for file in sorted(Path(__file__).parent.glob("_delay.*so")):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(file))
            library.shadow_delay_line.restype = ctypes.c_int
            library.shadow_delay_line.argtypes = [
                ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_uint64, ctypes.c_int64
            ]  # fmt: skip
            return library
    raise LaunchError(
        "this kernel has no netem, and the delay line that takes its place was not built; install the package with a "
        "C++ compiler on the machine, or leave --latency and --loss out"
    )


def start(network: Network) -> dict[int, str]:
    """Start the delay lines of all hosts' links in this network; return the address of the host by pid."""
    library = load()
    return {_start(library, network, host): network.address(host) for host in range(network.hosts)}


def _start(library: ctypes.CDLL, network: Network, host: int) -> int:
    with _end(f"near{host}") as near, _end(f"far{host}") as far:
        ends = (near.fileno(), far.fileno())

        def body() -> int:
            ignore_signals()
            call("prctl", PR_SET_TIMERSLACK, 1, 0, 0, 0)
            with contextlib.suppress(OSError):  # before the ranks, as a kernel's queue would be; only root may
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            seed = random.SystemRandom().getrandbits(64)
            error = library.shadow_delay_line(*ends, network.latency_ns, network.loss_share, seed, CAPACITY_BYTES)
            raise OSError(error, f"the link of {network.address(host)}: {os.strerror(error)}")

        return forked(body, keep=ends)


def _end(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    for option in (PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING):
        end.setsockopt(SOL_PACKET, option, 1)
    end.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    for by_root, option in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            end.setsockopt(socket.SOL_SOCKET, by_root, SOCKET_BYTES)
        except PermissionError:  # as much as the machine allows
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
    end.bind((device, EVERY_PROTOCOL))
    return end
