"""An exchange of the elastic center over a link of known rate, against the time that its bytes need on the link.

    launch/emulated-cluster up 2 --rate 1gbit
    launch/emulated-cluster run 2 python benchmarks/exchange.py --rate-mbit 1000
    launch/emulated-cluster down

Two cases: the center as it is, half of it on each of 2 hosts, both exchanging at the same time; and rank 0 exchanging
the whole vector with a center that lies on rank 1, whose training thread computes meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time

import torch

from hvd_shadowsync.algorithms import ElasticAveraging
from hvd_shadowsync.comm import mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.service import Service
from hvd_shadowsync.comm.transfer import Transfer
from hvd_shadowsync.reducers import ElasticCenter
from hvd_shadowsync.reducers.elastic import REQUEST_BYTES

POLLER = Transfer().poller(Poller())  # as rounds wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=4.0, help="bytes exchanged, in 10^6")
    parser.add_argument("--rate-mbit", type=float, default=1000.0, help="of the link")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    comm = mpi.world()
    numel = int(arguments.mb * 1e6 / 4)
    figures = {"both exchange, half of the center each": both(comm, numel, arguments)}
    figures["one exchanges, the other answers"] = one(comm, numel, arguments)
    if comm.rank == 0:
        print(json.dumps(figures, indent=1))


def both(comm: Communicator, numel: int, arguments: argparse.Namespace) -> dict[str, float]:
    """All ranks exchange the whole vector at once: each link carries the remote shards' bytes up and down, twice."""
    center = ElasticCenter(comm.dup(), comm.dup(), POLLER, ElasticAveraging().elastic, torch.zeros(numel))
    snapshot = torch.ones(numel)
    times = []
    for _ in range(arguments.repeats):
        comm.allgather_object(None)
        begun = time.perf_counter()
        for _ in center.reduce(snapshot, ()):
            pass
        times.append(time.perf_counter() - begun)
        serve_until_all_are_done(comm, center.serve)
    remote = numel * 4 * (comm.size - 1) / comm.size
    # A host sends its own requests and its answers to the others: 2 x remote bytes each way on a full-duplex link.
    return summary(times, 2 * remote, arguments.rate_mbit)


def one(comm: Communicator, numel: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Rank 0 exchanges the whole vector with rank 1, whose training thread computes meanwhile."""
    chunk = REQUEST_BYTES // 4
    rule, center = ElasticAveraging().elastic, torch.zeros(numel)

    def answer(source: int, tag: int, buffer: torch.Tensor) -> torch.Tensor:
        part = slice(tag * chunk, min((tag + 1) * chunk, numel))
        moved, reply = rule(center[part], buffer[: part.stop - part.start])
        center[part] = moved
        return reply

    service = Service(comm.dup(), comm.dup(), answer, torch.empty(chunk), POLLER)
    snapshot = torch.ones(numel)
    starts = range(0, numel, chunk)
    times = []
    for _ in range(arguments.repeats):
        comm.allgather_object(None)
        begun = time.perf_counter()
        if comm.rank == 0:
            for _ in service.call((1, tag, snapshot[start : start + chunk]) for tag, start in enumerate(starts)):
                pass
            times.append(time.perf_counter() - begun)
        with computing(comm.rank == 1):
            serve_until_all_are_done(comm, service.serve)
    return summary(times, 4 * numel, arguments.rate_mbit) if times else {}


def serve_until_all_are_done(comm: Communicator, serve: object) -> None:
    votes = torch.empty(comm.size, dtype=torch.int64)
    Poller().wait([comm.iallgather(torch.ones(1, dtype=torch.int64), votes)], meanwhile=serve)  # type: ignore[arg-type]


class computing:
    """Inside, another thread of this process multiplies matrices."""

    def __init__(self, active: bool) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True) if active else None

    def _work(self) -> None:
        matrix = torch.randn(512, 512)
        while not self._stop.is_set():
            matrix @ matrix

    def __enter__(self) -> None:
        if self._thread:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()


def summary(times: list[float], bytes_each_way: float, rate_mbit: float) -> dict[str, float]:
    link_ms = 8000 * bytes_each_way / (rate_mbit * 1e6)
    times_ms = [1000 * value for value in times[1:]]
    median = statistics.median(times_ms)
    return {
        "median_ms": round(median, 2),
        "best_ms": round(min(times_ms), 2),
        "worst_ms": round(max(times_ms), 2),
        "link_ms (full duplex)": round(link_ms, 2),
        "median / link": round(median / link_ms, 3),
    }


if __name__ == "__main__":
    main()
