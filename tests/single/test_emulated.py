"""Emulated hosts: what is refused, and the commands that build their network."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_shadowsync import emulated, run
from hvd_shadowsync.command import Host, LaunchError
from hvd_shadowsync.emulated import Network


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hosts": 0}, "--emulated 0: give 1 to 64 hosts"),
        ({"hosts": 65}, "--emulated 65: give 1 to 64 hosts"),
        ({"rate": "fast"}, "--rate 'fast' is none; give one such as 1gbit"),
        ({"rate": ""}, "--rate '' is none"),
        ({"rate": "1gbit; reboot"}, "--rate '1gbit; reboot' is none"),
        ({"latency": "3"}, "--latency '3' is none; give one such as 0.2ms"),
        ({"loss": "0.1"}, "--loss '0.1' is none; give one such as 0.1%"),
        ({"racks": 5}, "--racks 5: give 1 to 4, the number of hosts"),
        ({"rack_rate": "1Gb/s"}, "--rack-rate '1Gb/s' is none"),
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


def test_hosts_as_launchers_take_them() -> None:
    assert Network(2).as_hosts() == (Host("10.77.0.1"), Host("10.77.0.2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1gbit", "--loss", "1%"], "--loss belongs to --emulated; say on how many hosts"),
        (["--emulated", "2", "--hosts", "h0"], "--emulated goes with none of --hosts, --hostfile, --horovod"),
        (["--emulated", "2", "--horovod"], "--emulated goes with none of"),
        (["--emulated", "2", "--rate", "1"], "--rate '1' is none"),
    ],
)
def test_options_of_shadowrun_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*arguments, "-np", "2", "python", "train.py"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_shows_what_makes_the_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        mpi = run.detect_mpi()
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
