"""The command that shadowrun builds, and the hosts that it is for."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from hvd_shadowsync import agent, ending, rank, restarts
from hvd_shadowsync.comm import spares
from hvd_shadowsync.launcher.command import Host, Launch, LaunchError, Machine, Mpi, allocate, build_command, with_slots
from hvd_shadowsync.launcher.hosts import parse_hostfile, parse_hosts

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
    assert allocate(with_slots(parse_hosts(hosts), size), size) == placed


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
    assert parse_hostfile(text) == (Host("h0", 2), Host("h1", 3), Host("h2", 1), Host("h3"))


@pytest.mark.parametrize("hosts", ["", "h0:0", "h0:x", "h0,,h1", "h0:1,h0:2", "h0:1:2"])
def test_wrong_hosts(hosts: str) -> None:
    with pytest.raises(LaunchError):
        parse_hosts(hosts)
