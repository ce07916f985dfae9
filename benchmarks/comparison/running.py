"""One run: the processes of a contender on a case, from their start to what they saw or how they failed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Case, Network
from .catalogue import Contender

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parent
CURVE_POINTS = 25
LAST_LINES = 12
FOREIGN = ("OMPI_", "PMI", "PRTE_", "HOROVOD_", "GLOO_", "TORCHFT_", "RANK", "WORLD_SIZE", "MASTER_")
"""Of an outer job, or settings that would make runs incomparable."""
SAME_FOR_ALL = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RUST_LOG": "error",  # torchft's lighthouse writes ten lines a round otherwise
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),  # freed memory is kept, as PyTorch's tuning guide has it with jemalloc
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


@dataclass(frozen=True)
class Settings:
    """How each run is made.

    Attributes:
        seconds: of training that are measured; those in lockstep take whole periods, one at least.
        warmup_s: of training before that, more where a contender needs more.
        timeout_s: of a run, from its start.
        flights: the flights as tensors.
        peers: Python of the peers' environment.
    """

    seconds: float
    warmup_s: float
    timeout_s: float
    flights: Path
    peers: Path


def command(case: Case, contender: Contender, settings: Settings, folder: Path) -> list[str]:
    """Return what starts the run's ranks (pure)."""
    python = str(settings.peers) if contender.peers else sys.executable
    train = [python, "-W", "ignore", str(HERE / "contenders/train.py")]
    every = contender.every or round(contender.every_s / case.workload.step_s)
    train += [f"--module={contender.module}", f"--variant={contender.variant}", f"--every={every}"]
    train += [f"--workload={case.workload.base}", f"--batch={case.workload.batch}", f"--folder={folder}"]
    train += [f"--flights={settings.flights}", f"--seconds={max(settings.seconds, contender.least_s)}"]
    train += [f"--warmup={max(settings.warmup_s, contender.warm_s)}"]
    train += [f"--slow={case.hosts - 1 if case.workload.slow else -1}", f"--timeout={settings.timeout_s}"]
    links = links_of(case.network)
    if contender.launcher == "mpi":
        emulated = [f"--emulated={case.hosts}", *links] if links else []
        return [sys.executable, "-m", "hvd_shadowsync.run", *emulated, "-np", str(case.hosts), *train]
    start = [sys.executable, str(HERE / "contenders/start.py"), "--ranks", str(case.hosts), "--", *train]
    if not links:
        return start
    return [sys.executable, "-m", "hvd_shadowsync.emulated", f"--hosts={case.hosts}", *links, "--", *start]


def links_of(network: Network) -> list[str]:
    """Return the options that describe the links; none for loopback."""
    latency = [f"--latency={network.latency_ms:g}ms"] if network.latency_ms else []
    return [f"--rate={network.rate}", *latency] if network.rate else []


def why_no_network(case: Case) -> str:
    """Return why this machine cannot emulate a case's hosts; empty where it can."""
    links = links_of(case.network)
    if not links:
        return ""
    line = [sys.executable, "-m", "hvd_shadowsync.emulated", f"--hosts={case.hosts}", *links, "--", "true"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    said = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (said[-1] if said else f"exit code {done.returncode}")


def run_once(case: Case, contender: Contender, settings: Settings) -> dict[str, Any]:
    """Run it to its end or its time-out; return what was measured, or under "failed" why nothing was."""
    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    try:
        (folder / "meeting").write_bytes(bytes(8 * (case.hosts + 1)))  # see contenders/meeting.py
        begun, load = time.monotonic(), os.getloadavg()[0]
        code = execute(command(case, contender, settings, folder), folder / "output", settings.timeout_s)
        files = [folder / f"rank{rank}.json" for rank in range(case.hosts)]
        if code != 0 or not all(file.exists() for file in files):
            return {"failed": why_failed(code, folder / "output", settings.timeout_s)}
        ranks = [json.loads(file.read_text()) for file in files]
        # The load before the run, of this program's last one and of whatever else there is, to judge outliers by.
        return {**merged(ranks, case), "wall_s": round(time.monotonic() - begun, 1), "load": round(load, 1)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment() -> dict[str, str]:
    """Return the same environment for all contenders."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)])
    return {**own, **SAME_FOR_ALL, "PATH": path, "PYTHONPATH": str(ROOT)}


def execute(line: list[str], output: Path, timeout_s: float) -> int | None:
    """Run a command in a process group of its own, of which nothing is left; None: it did not end in time."""
    with output.open("wb") as file:
        job = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return job.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(job)


def end_group(job: subprocess.Popen[bytes], grace_s: float = 10.0) -> None:
    """End a job's processes: asked first, so that mpirun takes its ranks along, and then killed."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def why_failed(code: int | None, output: Path, timeout_s: float) -> str:
    how = f"no end after {timeout_s:g} s" if code is None else f"exit code {code}"
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join([how, *lines[-LAST_LINES:]])


def merged(ranks: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    """Return a run's figures from its ranks': those of the slow one, the last, do not count."""
    counted = ranks[:-1] if case.workload.slow else ranks
    batch = case.workload.batch
    return {
        "dense_bytes": ranks[0]["dense_bytes"],
        "examples_per_s": round(sum(batch * each["steps"] / each["seconds"] for each in counted), 1),
        **in_turns(counted),
        "step_ms": round(float(np.mean([1000 * each["seconds"] / each["steps"] for each in counted])), 3),
        "steps": sum(each["steps"] for each in counted),
        "sync_gap_steps": mean_of(counted, "sync_gap_steps"),
        "in_flight_ms": mean_of(counted, "in_flight_ms"),
        "curve": curve_of(ranks, batch),
    }


def in_turns(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Return the ranks' steps/s with synchronisation over those of the same processes while it was paused."""
    if not all("paused_steps_per_s" in each for each in ranks):
        return {}
    with_it, without = (sum(each[f"{name}_steps_per_s"] for each in ranks) for name in ("resumed", "paused"))
    return {"to_paused": round(with_it / without, 4)}


def mean_of(ranks: list[dict[str, Any]], key: str) -> float | None:
    """Return the mean over the ranks that have a value."""
    known = [each[key] for each in ranks if each.get(key) is not None]
    return round(float(np.mean(known)), 3) if known else None


def curve_of(ranks: list[dict[str, Any]], batch: int) -> list[list[float]]:
    """Return [seconds, examples of all ranks, training loss averaged over ranks and the interval] on one time axis."""
    curves = [np.array(each["curve"], dtype=float) for each in ranks if each["curve"]]
    if len(curves) < len(ranks):
        return []
    first, last = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    last = max(first, last)  # ranks at different paces may have no time in common
    times = np.linspace(first, last, min(CURVE_POINTS, *(len(curve) for curve in curves)))
    examples = sum(batch * np.interp(times, curve[:, 0], curve[:, 1]) for curve in curves)
    loss = np.mean([np.interp(times, curve[:, 0], curve[:, 2]) for curve in curves], axis=0)
    return [
        [round(float(a), 3), round(float(b)), round(float(c), 5)] for a, b, c in zip(times, examples, loss, strict=True)
    ]
