"""What is compared on what: workloads, networks and cases, and the list that is run by default."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        name: as on the command line and in the records.
        base: its name in `contenders/workloads.py`.
        text: for tables and plots.
        step_s: of one process on one core, about; only for the estimate of how long a list takes.
        batch: examples a step and rank.
        slow: the last rank sleeps as long as it works, and examples/s are those of the others.
    """

    name: str
    base: str
    text: str
    step_s: float
    batch: int = 256
    slow: bool = False


@dataclass(frozen=True)
class Network:
    """What joins the hosts.

    Attributes:
        name: as on the command line.
        text: for tables and plots.
        rate: of each emulated host's link, as `hvd_shadowsync.emulated` takes it; empty: all ranks on this host.
        rate_mbit: the same as a number; None: loopback.
        latency_ms: of each emulated host's link, one way. A packet passes two links, a round trip four.
    """

    name: str
    text: str
    rate: str = ""
    rate_mbit: int | None = None
    latency_ms: float = 0.0


WORKLOADS = {
    each.name: each
    for each in (
        Workload("mlp-5mb", "mlp-5mb", "an MLP of 1.33 million weights, 5 MB", 0.033),
        Workload("mlp-40mb", "mlp-40mb", "an MLP of 10 million weights, 40 MB", 0.25),
        Workload("dlrm-flights", "dlrm-flights", "the demo's DLRM on the flights, all tables replicated", 0.004),
        Workload("dlrm-criteo", "dlrm-criteo", "a DLRM on rows of Criteo's shape, tables sharded", 0.02),
        Workload(
            "mlp-5mb-slow", "mlp-5mb", "an MLP of 5 MB, one host of half the speed; its own examples left out", 0.033,
            slow=True,
        ),
    )
}  # fmt: skip
NETWORKS = {
    each.name: each
    for each in (
        Network("loopback", "one host"),
        Network("10gbit", "10 Gbit/s", "10gbit", 10_000),
        Network("1gbit", "1 Gbit/s", "1gbit", 1_000),
        # 20 ms is the round trip, as ping reports it, about that between two regions of a cloud.
        Network("100mbit-20ms", "100 Mbit/s, 20 ms round trip", "100mbit", 100, latency_ms=5.0),
    )
}


@dataclass(frozen=True)
class Case:
    """A workload on some hosts of a network; on loopback all ranks are on one."""

    workload: Workload
    network: Network
    hosts: int

    @property
    def name(self) -> str:
        """As in file names."""
        return f"{self.workload.name}-{self.network.name}-{self.hosts}"

    @property
    def title(self) -> str:
        """As a heading."""
        where = f"{self.hosts} ranks on one host" if not self.network.rate else f"{self.hosts} hosts"
        network = f", {self.network.text}" if self.network.rate else ""
        return f"{self.workload.name}: {where}{network}"


DEFAULT = (
    *product(("mlp-5mb",), NETWORKS, (2,)),
    ("mlp-5mb", "1gbit", 4),
    ("mlp-40mb", "1gbit", 2),
    ("dlrm-flights", "1gbit", 2),
    ("dlrm-criteo", "1gbit", 2),
    ("mlp-5mb-slow", "1gbit", 2),
)


def chosen(workloads: list[str], networks: list[str], hosts: list[int]) -> list[Case]:
    """Return the default list where nothing was chosen; else all combinations (mlp-5mb, 1gbit, 2 for what was not)."""
    combined = product(workloads or ["mlp-5mb"], networks or ["1gbit"], hosts or [2])
    named = combined if workloads or networks or hosts else DEFAULT
    return [Case(WORKLOADS[workload], NETWORKS[network], count) for workload, network, count in named]
