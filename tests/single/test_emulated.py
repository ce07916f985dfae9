"""Emulated hosts: what is refused, the commands that build their network, and the file of those that stay."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hvd_shadowsync import emulated, run
from hvd_shadowsync.emulated import Network, cluster, job
from hvd_shadowsync.emulated.__main__ import main
from hvd_shadowsync.emulated.network import Cut, link_commands
from hvd_shadowsync.launcher import finding
from hvd_shadowsync.launcher.command import Host, LaunchError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hosts": 0}, "--emulated 0: give 1 to 64 hosts"),
        ({"hosts": 65}, "--emulated 65: give 1 to 64 hosts"),
        ({"rate": "fast"}, "--rate 'fast' is no rate; give one such as 1gbit"),
        ({"rate": ""}, "--rate '' is no rate"),
        ({"rate": "1gbit; reboot"}, "--rate '1gbit; reboot' is no rate"),
        ({"latency": "3"}, "--latency '3' is no latency; give one such as 0.2ms"),
        ({"loss": "0.1"}, "--loss '0.1' is no loss; give one such as 0.1%"),
        ({"loss": "100%"}, "--loss 100%: give less than 100%"),
        ({"rate": "0gbit"}, "--rate 0gbit: give one from 1kbit to 1000gbit"),
        ({"rate": "1bit"}, "--rate 1bit: give one from 1kbit"),
        ({"rate": "\u0661gbit"}, "is no rate"),
        ({"latency": "11s"}, "--latency 11s: give at most 10s"),
        ({"rack_rate": "1gbit"}, "--rack-rate 1gbit is between racks; give --racks 2"),
        ({"racks": 5}, "--racks 5: give 1 to 4, the number of hosts"),
        ({"rack_rate": "1Gb/s"}, "--rack-rate '1Gb/s' is no rack-rate"),
        ({"cut": "host2"}, "--cut 'host2': 'host2' is no LINK@START or LINK@START.SECONDS; give such as host2@20.10"),
        ({"cut": "host2@5+0"}, "'host2@5.0' is no LINK@START"),
        ({"cut": "host0@5"}, "'host0@5' is no LINK@START"),
        ({"cut": "host2@5, host3@6"}, "' host3@6' is no LINK@START"),
        ({"cut": "host5@5"}, "--cut host5@5: there is no host5; give host1 to host4"),
        ({"cut": "rack2@5"}, "--cut rack2@5: rack2 has no link to another; there is one rack"),
        ({"cut": "rack1@5", "racks": 2}, "--cut rack1@5: rack1 has no link to another; give rack2 to rack2"),
    ],
)
def test_what_is_no_network(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message.replace("'", ".")):
        Network(**{"hosts": 4, **wrong})


def test_a_link_of_each_host_to_the_switch_of_its_rack() -> None:
    network = Network(4, "100mbit", "5ms", "0.1%", racks=2, rack_rate="10mbit")
    lines = [" ".join(line) for line in emulated.commands(network, [11, 12, 13, 14])]
    assert [line.split()[3] for line in lines if line.endswith("type bridge")] == ["rack0", "rack1"]
    masters = [line.split()[3::2][:2] for line in lines if " master " in line]
    of_hosts = [["host0", "rack0"], ["host1", "rack0"], ["host2", "rack1"], ["host3", "rack1"]]
    assert masters == [["up1", "rack0"], ["down1", "rack1"], *of_hosts]
    assert sum("tbf rate 100mbit" in line for line in lines) == 8, "both ends of each host's link"
    assert sum("tbf rate 10mbit" in line for line in lines) == 2
    assert sum("netem delay 5ms loss 0.1%" in line for line in lines) == 8
    assert "nsenter --target 13 --net ip addr add 10.77.0.3/24 dev eth0" in lines
    assert not any("netem" in " ".join(line) for line in emulated.commands(Network(2), [1, 2]))


def test_links_that_are_cut() -> None:
    network = Network(4, racks=2, cut="host2@20+10,rack2@30.5")
    assert network.cuts == [Cut("host2", 20.0, 10.0), Cut("rack2", 30.5, None)]
    assert Network(4).cuts == []
    assert emulated.wrapped(network, ["true"]).count("--cut=host2@20+10,rack2@30.5") == 1


@pytest.mark.parametrize(("link", "end", "switch"), [("host2", "host1", "rack0"), ("host3", "host2", "rack1")])
def test_the_end_of_a_link_that_is_cut_leaves_its_switch(link: str, end: str, switch: str) -> None:
    network = Network(4, racks=2)
    assert link_commands(network, link, whole=False) == [["ip", "link", "set", end, "nomaster"]]
    assert link_commands(network, link, whole=True) == [["ip", "link", "set", end, "master", switch]]


def test_the_link_of_a_rack_is_that_of_its_switch_to_the_first() -> None:
    assert link_commands(Network(4, racks=2), "rack2", whole=True) == [["ip", "link", "set", "up1", "master", "rack0"]]


def test_where_there_is_no_netem_a_link_is_left_open_for_a_delay_line() -> None:
    network = Network(2, latency="5ms")
    lines = [" ".join(line) for line in emulated.commands(network, [11, 12], netem=False)]
    assert "ip link add near1 type veth peer name eth0 netns 12" in lines
    assert "ip link add host1 type veth peer name far1" in lines
    assert sum("tbf rate 1gbit" in line for line in lines) == 4, "the rate is the kernel's all the same"
    assert not any("netem" in line for line in lines)
    without = Network(2)
    assert emulated.commands(without, [1, 2], netem=False) == emulated.commands(without, [1, 2])


@pytest.mark.parametrize(("latency", "ns"), [("", 0), ("20us", 20_000), ("0.2ms", 200_000), ("1.5s", 1_500_000_000)])
def test_latency_in_nanoseconds(latency: str, ns: int) -> None:
    assert Network(1, latency=latency).latency_ns == ns


def test_loss_as_a_share() -> None:
    assert Network(1, loss="0.1%").loss_share == pytest.approx(0.001)
    assert Network(1).loss_share == 0


def test_the_environment_of_a_command_on_each_host() -> None:
    each = job.Job(["true"], {"HOME": "/here", "RANK": "7"}, 2, each=True).processes(Network(2).address)
    assert [one["RANK"] for one in each] == ["0", "1"]
    assert {one["MASTER_ADDR"] for one in each} == {"10.77.0.1"}
    wanted = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HOME": "/here",
    }
    assert all(wanted.items() <= one.items() for one in each)
    named = job.Job(["true"], {"MASTER_PORT": "1234"}, 2, each=True).processes(Network(2).address)
    assert named[0]["MASTER_PORT"] == "1234"
    (first,) = job.Job(["true"], {}, 2).processes(Network(2).address)
    assert "RANK" not in first
    assert first["SHADOW_EMULATED"].startswith("10.77.0.1=")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    return cluster.state_file()


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe", b'{"holder": 1}', b'{"holder": 1, "first": 1, "begun": 3, "network": {}}']
)
def test_a_file_that_says_nothing_is_removed(text: bytes, state: Path) -> None:
    state.write_bytes(text)
    assert cluster.find() is None
    assert not state.exists()


def test_a_file_of_processes_that_are_others_by_now_is_removed(state: Path) -> None:
    now = {"holder": os.getpid(), "first": os.getppid(), "begun": [1, 1], "network": {"hosts": 2}}
    state.write_text(json.dumps(now))
    assert cluster.find() is None
    assert not state.exists()


def test_a_link_in_place_of_the_file_is_not_followed(state: Path, tmp_path: Path) -> None:
    """Anybody may make one in a folder for temporary files."""
    (tmp_path / "elsewhere").write_text("{}")
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match=r"cannot be read .*; remove it"):
        cluster.find()
    assert (tmp_path / "elsewhere").read_text() == "{}"


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_the_file_is_not_waited_for(state: Path) -> None:
    os.mkfifo(state)
    assert cluster.find() is None
    assert not state.exists()


def test_nobody_else_reads_or_writes_the_file(state: Path) -> None:
    mask = os.umask(0)
    try:
        cluster._write(cluster.Cluster(1, 2, (3, 4), Network(2)))
    finally:
        os.umask(mask)
    assert state.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "2", "true"], "no hosts are up; make some with `up N`"),
        (["run", "2"], "no command given; put it last"),
        (["cut", "host2"], "no hosts are up; make some with `up N`"),
        (["cut", "host2", "0"], "cut host2 0: give more than 0 seconds, or leave them out and `mend host2` later"),
        (["cut", "host2", "nan"], "cut host2 nan: give more than 0 seconds"),
        (["mend", "host2"], "no hosts are up; make some with `up N`"),
        (["up", "2", "--cut", "host2@5"], "--cut host2@5 is for one command; cut links of hosts that stay with `cut"),
        (["up", "0"], "--emulated 0: give 1 to 64 hosts"),
        (["up", "2", "--loss", "1"], "--loss '1' is no loss"),
        (["--hosts", "2"], "no command given; put it last"),
    ],
)
def test_commands_that_cannot_be(
    arguments: list[str], message: str, state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "require_tools", lambda: None)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"emulated: {message}")


@pytest.mark.parametrize("arguments", [["up", "2"], ["run", "2", "true"], ["--hosts", "2", "true"]])
def test_what_this_machine_lacks_is_said(
    arguments: list[str], state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.shutil, "which", lambda tool: None if tool == "tc" else tool)
    monkeypatch.setattr(job.sys, "platform", "linux")
    assert main(arguments) == 2
    assert "emulated hosts need tc; install it" in capsys.readouterr().err
    monkeypatch.setattr(job.sys, "platform", "darwin")
    assert main(arguments) == 2
    assert "emulated hosts are Linux namespaces" in capsys.readouterr().err


def test_nothing_to_take_away(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down"]) == 0
    assert capsys.readouterr().out == "no hosts were up\n"


def test_hosts_as_launchers_take_them() -> None:
    assert Network(2).as_hosts() == (Host("10.77.0.1"), Host("10.77.0.2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "1%"], "--loss belongs to --emulated; say on how many hosts"),
        (["--rate", "1gbit"], "--rate belongs to --emulated; say on how many hosts"),
        (["--emulated", "2", "--hosts", "h0"], "--emulated goes with none of --hosts, --hostfile, --horovod"),
        (["--emulated", "2", "--horovod"], "--emulated goes with none of"),
        (["--emulated", "2", "--rate", "1"], "--rate '1' is no rate"),
    ],
)
def test_options_of_shadowrun_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*arguments, "-np", "2", "python", "train.py"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_shows_what_makes_the_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        mpi = finding.detect_mpi()
    except LaunchError as error:
        pytest.skip(str(error))
    if mpi.kind != "openmpi":
        pytest.skip("needs Open MPI")
    assert run.main(["--emulated", "2", "--rate", "100mbit", "-np", "2", "--dry-run", "python", "train.py"]) == 0
    shown = capsys.readouterr().out
    assert "-m hvd_shadowsync.emulated --hosts=2 --rate=100mbit " in shown
    assert shown.index(" -- ") < shown.index(mpi.mpirun) < shown.index("train.py")


def test_the_command_of_a_job_on_emulated_hosts() -> None:
    given = ["--emulated", "2", "-np", "4", "--mpirun-args=--tag-output", "python", "train.py"]
    options = run.parser().parse_args(given)
    launch = run.launch_from(options, run.this_machine({}))
    assert launch.hosts == (Host("10.77.0.1"), Host("10.77.0.2"))
    assert launch.mpirun_args[:3] == ("--prtemca", "plm_ssh_agent", "/proc/1/fd/200")
    assert launch.mpirun_args[-1] == "--tag-output"
