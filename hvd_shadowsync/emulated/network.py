"""What joins emulated hosts: a description, and the commands that build it (both pure)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from hvd_shadowsync.launcher.command import Host, LaunchError

SUBNET = "10.77.0"
MOST_HOSTS = 64
NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
RATE, TIME, SHARE = rf"{NUMBER}([kmg]?bit)", rf"{NUMBER}(us|ms|s)", rf"{NUMBER}(%)"
LINK = r"(host|rack)([1-9][0-9]*)"
CUT = rf"({LINK})@{NUMBER}(?:\+{NUMBER})?"
UNITS = {
    "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9,
    "us": 1e-6, "ms": 1e-3, "s": 1.0,
    "%": 0.01,
}  # fmt: skip
LEAST_RATE, MOST_RATE, MOST_LATENCY_S = 1e3, 1e12, 10.0


@dataclass(frozen=True)
class Cut:
    """A link that carries nothing from `start_s` on, for `seconds`, or for good where that is None.

    `link` is "host2", which is the one at 10.77.0.2, or "rack2", the second rack's switch to the others.
    """

    link: str
    start_s: float
    seconds: float | None


@dataclass(frozen=True)
class Network:
    """What joins the hosts: a link from each to its rack's switch, and from each switch to the others.

    Attributes:
        hosts: 1 to 64.
        rate: of each host's link in each direction, such as "1gbit".
        latency: of each host's link, one way, such as "0.2ms"; a packet passes two of them. Empty: none added.
        loss: of packets on each host's link, one way, such as "0.1%". Empty: none.
        racks: switches, over which hosts are spread evenly, the first hosts under the first.
        rack_rate: of each switch's link to the others; empty: as fast as it goes.
        cut: links that are cut while a command runs, such as "host2@20+10" for host 2 from second 20 on for ten, or
            "rack2@20" for good; several with commas. Empty: none.

    Raises:
        LaunchError: an attribute is not what it should be; names it and the remedy.
    """

    hosts: int
    rate: str = "1gbit"
    latency: str = ""
    loss: str = ""
    racks: int = 1
    rack_rate: str = ""
    cut: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= MOST_HOSTS:
            raise LaunchError(f"--emulated {self.hosts}: give 1 to {MOST_HOSTS} hosts")
        if not 1 <= self.racks <= self.hosts:
            raise LaunchError(f"--racks {self.racks}: give 1 to {self.hosts}, the number of hosts")
        for name, pattern, example in (
            ("rate", RATE, "1gbit"), ("latency", TIME, "0.2ms"), ("loss", SHARE, "0.1%"), ("rack_rate", RATE, "1gbit")
        ):  # fmt: skip
            option, value = name.replace("_", "-"), getattr(self, name)
            if not (value == "" and name != "rate") and not re.fullmatch(pattern, value):
                raise LaunchError(f"--{option} {value!r} is no {option}; give one such as {example}")
            if pattern == RATE and value and not LEAST_RATE <= _number(value) <= MOST_RATE:
                raise LaunchError(f"--{option} {value}: give one from 1kbit to 1000gbit")
        if self.latency_ns > 1e9 * MOST_LATENCY_S:
            raise LaunchError(f"--latency {self.latency}: give at most {MOST_LATENCY_S:g}s")
        if self.loss_share >= 1:
            raise LaunchError(f"--loss {self.loss}: give less than 100%, with which nothing would arrive")
        if self.rack_rate and self.racks == 1:
            raise LaunchError(f"--rack-rate {self.rack_rate} is between racks; give --racks 2 or more, or leave it out")
        for each in self.cuts:
            self.require_link(each.link, f"--cut {self.cut}")

    @property
    def cuts(self) -> list[Cut]:
        """What `cut` says.

        Raises:
            LaunchError: it says nothing of the kind.
        """
        found = []
        for text in self.cut.split(",") if self.cut else ():
            match = re.fullmatch(CUT, text)
            if match is None or (match[5] and float(match[5]) == 0):
                raise LaunchError(
                    f"--cut {self.cut!r}: {text!r} is no LINK@START or LINK@START+SECONDS; give such as host2@20+10, "
                    "from second 20 on for ten, or rack2@20, for good"
                )
            found.append(Cut(match[1], float(match[4]), float(match[5]) if match[5] else None))
        return found

    def require_link(self, link: str, said: str) -> None:
        """Raise unless there is a link of that name that can be cut; `said` is where it was named."""
        match = re.fullmatch(LINK, link)
        if match is None:
            raise LaunchError(
                f"{said}: {link!r} is no link; give host1 to host{self.hosts}, or rack2 where there are two"
            )
        if match[1] == "host" and int(match[2]) > self.hosts:
            raise LaunchError(f"{said}: there is no {link}; give host1 to host{self.hosts}")
        if match[1] == "rack" and not 2 <= int(match[2]) <= self.racks:
            known = "there is one rack" if self.racks == 1 else f"give rack2 to rack{self.racks}, which hang on rack1"
            raise LaunchError(f"{said}: {link} has no link to another; {known}")

    @property
    def latency_ns(self) -> int:
        """Latency of a host's link, one way."""
        return round(1e9 * _number(self.latency))

    @property
    def loss_share(self) -> float:
        """Share of packets that a host's link loses, one way, from 0 to 1."""
        return _number(self.loss)

    @property
    def is_disturbed(self) -> bool:
        """Whether the links have a latency or a loss."""
        return bool(self.latency or self.loss)

    def as_hosts(self) -> tuple[Host, ...]:
        """Return the hosts as launchers take them, ranks spread evenly."""
        return tuple(Host(self.address(host)) for host in range(self.hosts))

    def address(self, host: int) -> str:
        """Return the address, which is the name as well, of a host, from 0."""
        return f"{SUBNET}.{host + 1}"

    def rack(self, host: int) -> int:
        """Return the rack of a host."""
        return host * self.racks // self.hosts


def _number(text: str) -> float:
    """Return a rate in bit/s, a time in seconds, a share as a part of 1; 0 where there is none."""
    found = re.fullmatch(rf"{NUMBER}([a-z%]+)", text)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


OPTIONS: dict[str, Any] = {field.name: field.default for field in fields(Network) if field.name != "hosts"}


def network_from(hosts: int, options: argparse.Namespace) -> Network:
    """Return the network of the options that `add_options` added.

    Raises:
        LaunchError: see `Network`.
    """
    given = {name: getattr(options, name) for name in OPTIONS}
    return Network(hosts, **{name: value for name, value in given.items() if value is not None})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the links; None where they are not given."""
    add = parser.add_argument
    add("--rate", help="of each emulated host's link, each way; default 1gbit")
    add("--latency", help="of each emulated host's link, one way, such as 0.2ms; default none")
    add("--loss", help="of packets on each emulated host's link, such as 0.1%%; default none")
    add("--racks", type=int, help="switches with emulated hosts of their own; default 1")
    add(
        "--cut",
        metavar="LINK@START[+SECONDS]",
        help="have a link carry nothing from so many seconds after the start on, for a time or for good: host2@20+10",
    )
    add("--rack-rate", help="of the links between racks; default as fast as it goes")


def commands(network: Network, pids: Sequence[int], *, netem: bool = True) -> list[list[str]]:
    """Return what builds the network, given a process of each host.

    Without `netem`, a link with latency or loss is left open between `near0` (the host's side) and `far0` (the
    switch's), which a delay line is to join; the numbers are those of the hosts.
    """
    lines = [["ip", "link", "set", "lo", "up"], *_racks(network)]
    for host, pid in enumerate(pids):
        end, inside = f"host{host}", ["nsenter", "--target", str(pid), "--net"]
        if network.is_disturbed and not netem:
            lines += _open_link(host, pid)
        else:
            lines.append(["ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", str(pid)])
        lines.append(["ip", "link", "set", end, "master", f"rack{network.rack(host)}", "up"])
        lines.append([*inside, "ip", "addr", "add", f"{network.address(host)}/24", "dev", "eth0"])
        lines += [[*inside, "ip", "link", "set", device, "up"] for device in ("eth0", "lo")]
        lines += [_shaped(end, network.rate), [*inside, *_shaped("eth0", network.rate)]]
        if network.is_disturbed and netem:
            lines += [_disturbed(end, network), [*inside, *_disturbed("eth0", network)]]
    return lines


def link_commands(network: Network, link: str, *, whole: bool) -> list[list[str]]:
    """Return what cuts a link, or makes it whole again: its end at the switch leaves that, and neither end notices."""
    number = int(link[4:]) - 1
    end, switch = (link[:4] + str(number), network.rack(number)) if link.startswith("host") else (f"up{number}", 0)
    return [["ip", "link", "set", end, *(["master", f"rack{switch}"] if whole else ["nomaster"])]]


def _racks(network: Network) -> list[list[str]]:
    lines = []
    for rack in range(network.racks):
        lines += [["ip", "link", "add", f"rack{rack}", "type", "bridge"], ["ip", "link", "set", f"rack{rack}", "up"]]
    for rack in range(1, network.racks):
        up, down = f"up{rack}", f"down{rack}"
        lines.append(["ip", "link", "add", up, "type", "veth", "peer", "name", down])
        lines.append(["ip", "link", "set", up, "master", "rack0", "up"])
        lines.append(["ip", "link", "set", down, "master", f"rack{rack}", "up"])
        if network.rack_rate:
            lines += [_shaped(end, network.rack_rate) for end in (up, down)]
    return lines


def _open_link(host: int, pid: int) -> list[list[str]]:
    near, far = f"near{host}", f"far{host}"
    return [
        ["ip", "link", "add", near, "type", "veth", "peer", "name", "eth0", "netns", str(pid)],
        ["ip", "link", "add", f"host{host}", "type", "veth", "peer", "name", far],
        *(["ip", "link", "set", end, "addrgenmode", "none", "up"] for end in (near, far)),
    ]


def _shaped(device: str, rate: str) -> list[str]:
    shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
    return ["tc", "qdisc", "add", "dev", device, "root", "handle", "1:", *shape]


def _disturbed(device: str, network: Network) -> list[str]:
    wanted = {"delay": network.latency, "loss": network.loss}
    netem = [word for name, value in wanted.items() if value for word in (name, value)]
    return ["tc", "qdisc", "add", "dev", device, "parent", "1:1", "handle", "10:", "netem", *netem, "limit", "100000"]
