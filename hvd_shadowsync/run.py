"""`shadowrun`: finds the MPI at hand, builds the `mpirun` or `horovodrun` command for it, and runs that."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from hvd_shadowsync import agent, emulated
from hvd_shadowsync.ending import END_SIGNAL_VARIABLE, Endings
from hvd_shadowsync.launcher.command import Host, Launch, LaunchError, Machine, Mpi, build_command
from hvd_shadowsync.launcher.finding import detect_mpi, find_horovodrun
from hvd_shadowsync.launcher.hosts import parse_hostfile, parse_hosts
from hvd_shadowsync.launcher.shown import shell_line
from hvd_shadowsync.launcher.supervision import LOST_CODE, judge, supervise
from hvd_shadowsync.restarts import VARIABLE as RESTARTS_VARIABLE
from hvd_shadowsync.restarts import End, run_with_restarts

PYTHONS = ("python", "python3")
MPI_ON_EMULATED = (
    "--prtemca", "plm_ssh_agent", emulated.AGENT, "--prtemca", "prte_if_include", f"{emulated.SUBNET}.0/24",
    "--mca", "pml", "ob1", "--mca", "btl", "tcp,self,sm", "--mca", "btl_tcp_if_include", f"{emulated.SUBNET}.0/24",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message}; see shadowrun --help")


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shadowrun`."""
    result = _Parser(
        prog="shadowrun",
        allow_abbrev=False,
        description="Start a training script on several ranks with the MPI at hand (Open MPI, MPICH, Intel MPI).",
        epilog="example: shadowrun -np 4 python train.py --epochs 3. A bare "
        "'python' is the one that shadowrun is installed for. SHADOWRUN_MPIRUN names another mpirun.",
    )
    add = result.add_argument
    add("-np", "-n", "--num-proc", dest="size", type=int, metavar="N", help="number of ranks (needed)")
    add("-H", "--hosts", metavar="H0:2,H1:2", help="hosts with their slots; without slots the ranks are spread evenly")
    add("--hostfile", metavar="FILE", help="a file with a host per line: 'h0 slots=2' or 'h0:2'")
    add("--emulated", type=int, metavar="HOSTS", help="on so many emulated hosts of this machine (Linux, Open MPI)")
    emulated.add_options(result)
    add("--horovod", action="store_true", help="launch through horovodrun --mpi instead of mpirun")
    add("--fault-tolerant", action="store_true", help="go on without ranks that are lost (Open MPI 5)")
    add(
        "--respawn", type=int, default=0, metavar="N", help="with --fault-tolerant: replace lost ranks, up to N of them"
    )
    add("--strict", action="store_true", help=f"with --fault-tolerant: exit with {LOST_CODE} where ranks were lost")
    add("--restarts", type=int, metavar="N", help="start the job again where it fails in training, up to N times")
    add("--mpirun-args", default="", metavar="ARGS", help="more arguments for mpirun, quoted as one")
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="an environment variable for every rank")
    add("--threads", type=int, metavar="T", help="OMP_NUM_THREADS (default: cores of this machine / ranks per host)")
    add("--dry-run", action="store_true", help="print the command and the variables it adds (but secrets), and end")
    add("--verbose", action="store_true", help="print the command before it runs")
    add("program", nargs=argparse.REMAINDER, metavar="PROGRAM ...", help="the program and its arguments")
    return result


def launch_from(options: argparse.Namespace, machine: Machine) -> Launch:
    """Check the command line and turn it into a `Launch`.

    Raises:
        LaunchError: an option is missing or wrong.
    """
    if options.size is None or options.size < 1:
        asked = "is missing" if options.size is None else f"{options.size} is less than 1"
        raise LaunchError(f"-np {asked}; say how many ranks to start, for example: shadowrun -np 2 python train.py")
    if options.threads is not None and options.threads < 1:
        raise LaunchError(f"--threads {options.threads} is less than 1; leave it out for cores / ranks per host")
    if options.strict and not options.fault_tolerant:
        raise LaunchError("--strict says how a job with --fault-tolerant exits; give both, or neither")
    if options.respawn and options.size == 1:
        raise LaunchError("--respawn needs another rank that takes the new one in; start at least 2 with -np")
    if options.respawn < 0 or (options.respawn and not options.fault_tolerant):
        raise LaunchError(
            f"--respawn {options.respawn} says how many lost ranks of a job with --fault-tolerant are replaced; give "
            "both, or neither"
        )
    if options.restarts is not None and options.restarts < 0:
        raise LaunchError(f"--restarts {options.restarts} is less than 0; say how often the job may be started again")
    network = _network(options)
    if network is not None:
        machine = replace(machine, root=True)  # whoever the user is outside
    return Launch(
        program=_program(options.program, machine.environ),
        size=options.size,
        machine=machine,
        hosts=_hosts(options) if network is None else network.as_hosts(),
        env=dict(_variables(options.env, machine.environ)),
        mpirun_args=(*(MPI_ON_EMULATED if network is not None else ()), *_split(options.mpirun_args)),
        threads=options.threads,
        horovodrun=find_horovodrun(machine.environ) if options.horovod else None,
        outlives_ranks=options.fault_tolerant,
        spares=options.respawn,
        restarts=0 if options.restarts else None,
    )


def _network(options: argparse.Namespace) -> emulated.Network | None:
    asked = [name for name in emulated.OPTIONS if getattr(options, name) is not None]
    if options.emulated is None:
        if asked:
            raise LaunchError(f"--{asked[0].replace('_', '-')} belongs to --emulated; say on how many hosts")
        return None
    if options.hosts is not None or options.hostfile is not None or options.horovod:
        raise LaunchError("--emulated goes with none of --hosts, --hostfile, --horovod (mpirun starts Horovod as well)")
    return emulated.network_from(options.emulated, options)


def _split(arguments: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(arguments))
    except ValueError as error:
        raise LaunchError(f"--mpirun-args {arguments!r} is no list of words ({error}); check the quotes") from None


def _hosts(options: argparse.Namespace) -> tuple[Host, ...]:
    if options.hosts is not None and options.hostfile is not None:
        raise LaunchError("--hosts and --hostfile exclude each other; give one of them")
    if options.hosts is not None:
        return parse_hosts(options.hosts)
    if options.hostfile is None:
        return ()
    try:
        return parse_hostfile(Path(options.hostfile).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LaunchError(f"--hostfile {options.hostfile} cannot be read ({reason}); check its path") from error


def _variables(entries: Sequence[str], environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or (not equals and name not in environ):
            raise LaunchError(f"--env {entry}: no variable of that name is set here; write --env NAME=VALUE")
        yield name, value if equals else environ[name]


def _program(words: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Resolve the program here, so that it does not depend on the PATH that a launcher makes.

    A bare `python` is the one that this package is installed for, even where its environment is not activated.
    """
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise LaunchError("no program given; put it last, for example: shadowrun -np 2 python train.py")
    if words[0].endswith(".py") and not os.access(words[0], os.X_OK):
        words = [sys.executable, *words]
    found = sys.executable if words[0] in PYTHONS else shutil.which(words[0], path=environ.get("PATH"))
    if found is None:
        raise LaunchError(f"no program {words[0]!r} here or on PATH; check its name, a script needs: python {words[0]}")
    return (os.path.abspath(found), *words[1:])


def this_machine(environ: Mapping[str, str] = os.environ) -> Machine:
    """Describe the machine and the allocation that this process runs in."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return Machine(cores, root, int(nodes) if nodes.isdigit() else 1, dict(environ))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `shadowrun`: the job's exit code, 0 after --dry-run, 2 where the job cannot be started.

    The launcher is supervised (see `supervise`); from a terminal a plain job with Open MPI is not, but this process
    becomes mpirun, which can read from it then.
    """
    try:
        options = parser().parse_args(arguments)
        launch = launch_from(options, this_machine())
        mpi = detect_mpi()
        if passes_on := _passes_sigterm_on(options, launch, mpi):
            launch = replace(launch, env={**launch.env, END_SIGNAL_VARIABLE: "1"})
        command, additions = _command_of(options, launch, mpi)
    except LaunchError as error:
        print(f"shadowrun: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(shell_line(command, additions))
        return 0
    if options.verbose:
        print(f"shadowrun: {shell_line(command, additions)}", file=sys.stderr, flush=True)
    environ = {**os.environ, **additions}
    if launch.outlives_ranks or launch.restarts is not None:
        attempt = partial(_attempt, command, environ, launch, strict=options.strict, kills=mpi.kind == "openmpi")
        return attempt(0).code if launch.restarts is None else run_with_restarts(attempt, options.restarts)
    if launch.horovodrun is not None or mpi.kind != "openmpi":
        return supervise(command, environ)
    if passes_on or launch.num_hosts > 1:
        return supervise(command, environ, Endings(size=launch.size), kills_at_once=True)
    os.execvpe(command[0], command, environ)


def _passes_sigterm_on(options: argparse.Namespace, launch: Launch, mpi: Mpi) -> bool:
    """Tell whether ranks get SIGTERM as another signal, at which mpirun does not kill them (see `ending`)."""
    is_plain = launch.num_hosts == 1 and not launch.outlives_ranks and launch.restarts is None
    if is_plain and sys.stdin is not None and sys.stdin.isatty():
        return False
    return mpi.kind == "openmpi" and launch.horovodrun is None and options.emulated is None and not options.dry_run


def _command_of(options: argparse.Namespace, launch: Launch, mpi: Mpi) -> tuple[list[str], dict[str, str]]:
    command, additions = build_command(launch, mpi)
    if (network := _network(options)) is not None:
        if mpi.kind != "openmpi":
            raise LaunchError(f"--emulated needs Open MPI, {mpi.mpirun} is of {mpi.kind}; see SHADOWRUN_MPIRUN")
        command = emulated.wrapped(network, command)
    return command, additions


def _attempt(
    command: Sequence[str], environ: Mapping[str, str], launch: Launch, number: int, *, strict: bool, kills: bool
) -> End:
    """Run the job, for the `number`-th time after the first, to its end."""
    received: list[int] = []
    if launch.restarts is not None:
        environ = {**environ, RESTARTS_VARIABLE: str(number)}
    with tempfile.TemporaryDirectory(prefix="shadowrun") as folder:
        endings = Endings(size=launch.size, spares=launch.spares, begun_file=str(Path(folder, "begun")))
        told = {**environ, agent.BEGUN: endings.begun_file}
        code = supervise(command, told, endings, received, kills_at_once=kills and launch.horovodrun is None)
    if not launch.outlives_ranks:
        return End(code, bool(received), endings.trains)
    code = judge(code, launch.size, endings, strict=strict, told=bool(received))
    return End(code, bool(received), endings.trains, complete=code == LOST_CODE and strict and bool(endings.ended))


if __name__ == "__main__":
    sys.exit(main())
