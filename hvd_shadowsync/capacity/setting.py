"""What the model is asked about: the job, the hosts and their network, costs, and how unevenly ranks run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from hvd_shadowsync.checks import check_count, check_flag, check_interval, choice
from hvd_shadowsync.comm.transfer import Transfer
from hvd_shadowsync.pacing import Pacing

MIB = float(1 << 20)
ALGORITHMS = ("ring", "halving", "best")
MOST_RANKS = 1_000_000
LEAST, MOST = 1e-9, 1e18  # of any quantity


@dataclass(frozen=True)
class Job:
    """What every rank trains.

    Attributes:
        dense_bytes: weights that are synchronised (sharded embeddings are not among them), bytes.
        step_ms: a training step of an even rank without synchronisation, on average, milliseconds.
        batch: examples in a step of one rank.
    """

    dense_bytes: float
    step_ms: float
    batch: float = 256.0

    def __post_init__(self) -> None:
        _positive("dense_bytes", self.dense_bytes)
        _positive("step_ms", self.step_ms)
        _positive("batch", self.batch)


@dataclass(frozen=True)
class Cluster:
    """Hosts that are alike, each with one full-duplex link into a switch that is never the bottleneck.

    Attributes:
        hosts: number of hosts.
        ranks_per_host: ranks of each, numbered host by host.
        gbps: rate of a host's link in each direction, 10^9 bits a second; what embeddings take is to be left out.
        latency_us: a small message from a host to another, one way, through both systems, microseconds.
        goodput: share of the rate that payload gets; default 0.94: 1448 of the 1538 bytes of a TCP packet on Ethernet.
        memory_gbs: 10^9 bytes a second that one rank's thread moves in memory; default 10.
        cores_per_host: cores that the ranks of a host share with their communicator threads; default None: each thread
            has a core to itself, and takes nothing from training (or training is on a GPU). May be a fraction, where
            one machine stands for several hosts.
        algorithm: of allreduces: "ring", the default, which shadow rounds set for Open MPI (`comm.tuning`); "halving";
            "best", whichever takes less time.
        hierarchical: whether the ranks of a host reduce in shared memory, and one of them goes on the network.
    """

    hosts: int
    ranks_per_host: int = 1
    gbps: float = 25.0
    latency_us: float = 30.0
    goodput: float = 0.94
    memory_gbs: float = 10.0
    cores_per_host: float | None = None
    algorithm: str = "ring"
    hierarchical: bool = False

    def __post_init__(self) -> None:
        check_count("hosts", self.hosts, least=1)
        check_count("ranks_per_host", self.ranks_per_host, least=1)
        if self.ranks > MOST_RANKS:
            raise ValueError(
                f"hosts={self.hosts} with {self.ranks_per_host} ranks each are more than {MOST_RANKS} ranks; give fewer"
            )
        _positive("gbps", self.gbps)
        _not_negative("latency_us", self.latency_us)
        check_interval("goodput", self.goodput, low=0.0, high=1.0, low_included=False)
        _positive("memory_gbs", self.memory_gbs)
        if self.cores_per_host is not None:
            _positive("cores_per_host", self.cores_per_host)
        choice("algorithm", self.algorithm, ALGORITHMS)
        check_flag("hierarchical", self.hierarchical)

    @property
    def ranks(self) -> int:
        """Ranks of all hosts."""
        return self.hosts * self.ranks_per_host

    @property
    def bytes_per_s(self) -> float:
        """Payload that a host's link carries in each direction, bytes a second."""
        return self.gbps * 1e9 / 8 * self.goodput

    @property
    def ranks_per_core(self) -> float:
        """Ranks that share a core; 0 where cores are not short."""
        return 0.0 if self.cores_per_host is None else self.ranks_per_host / self.cores_per_host

    @property
    def crowding(self) -> float:
        """How many times longer a communicator thread computes because threads of other ranks want its core."""
        return max(1.0, self.ranks_per_core)


@dataclass(frozen=True)
class Chunking:
    """How a program feeds its weights into reductions, and looks whether they are through.

    The defaults are what rounds start with (`reducers.transfer.Transfer`), before they search for something better.

    Attributes:
        chunk_bytes: bytes of one reduction; default None: what rounds begin with, `comm.transfer.Transfer.between`.
        in_flight: reductions under way at a time; default 4.
        pause_ms: the longest pause between two looks, milliseconds; default 1; 0: it never sleeps.
        growth: how pauses grow from a quarter of that on, over the time waited; default 0.3 (`comm.poll.Poller`).
    """

    chunk_bytes: float | None = None
    in_flight: int = 4
    pause_ms: float = 1.0
    growth: float = 0.3

    def __post_init__(self) -> None:
        if self.chunk_bytes is not None:
            _positive("chunk_bytes", self.chunk_bytes)
        check_count("in_flight", self.in_flight, least=1)
        _not_negative("pause_ms", self.pause_ms)
        _not_negative("growth", self.growth)

    def bytes_among(self, members: int) -> float:
        """Return the bytes of a reduction among so many ranks."""
        return Transfer.between(members).chunk_bytes if self.chunk_bytes is None else self.chunk_bytes


@dataclass(frozen=True)
class Costs:
    """CPU time of one rank, measured on virtual cores of an Intel Xeon (family 6, model 207). GB are 10^9 bytes.

    Attributes:
        cpu_s_per_gb: seconds for a GB put on the wire: TCP on both sides, and its sum; default 1.2: with the looks,
            reductions of 16 and 64 MB between 2, 4 and 8 hosts of 1 Gbit/s took 1.2 to 1.6. (0.6 on an AMD EPYC.)
        round_cpu_s_per_gb: seconds for a GB of weights in a round: snapshot, update, staging, sums; default 0.4.
        merge_cpu_s_per_gb: seconds for a GB of weights that the training thread merges; default 0.1. With the former
            0.5: rounds of 16 MiB on one host took 8.7 ms, of which 1.7 to merge.
        cpu_us_per_round: microseconds of a round, however few its bytes: the vote, waking up, Python; default 1500:
            rounds of 0.1 MB between 2 hosts take 1.4 to 2.4 ms.
        cpu_us_per_look: microseconds to wake and look whether a reduction is through; default 30: rings of 1 kB over 8
            and 16 hosts, waited for with pauses of a millisecond, took 27 to 40 a look.
        cpu_us_per_message: microseconds to send a message and take one in; default 10, an assumption.
    """

    cpu_s_per_gb: float = 1.2
    round_cpu_s_per_gb: float = 0.4
    merge_cpu_s_per_gb: float = 0.1
    cpu_us_per_look: float = 30.0
    cpu_us_per_message: float = 10.0
    cpu_us_per_round: float = 1500.0

    def __post_init__(self) -> None:
        for field_ in fields(self):
            _not_negative(field_.name, getattr(self, field_.name))


@dataclass(frozen=True)
class Unevenness:
    """How the times of steps differ.

    Attributes:
        jitter: coefficient of variation of a rank's steps, which are lognormal around `Job.step_ms`; default 0.
        slow_share: share of the ranks that are slower; default 0; any share above 0 means at least one rank.
        slow_factor: how many times longer their steps take; default 2.
        stall_share: share of a rank's steps that stall (a page fault, a neighbour, a late input); default 0.
        stall_ms: milliseconds that such a step takes in addition; default 0.
    """

    jitter: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 2.0
    stall_share: float = 0.0
    stall_ms: float = 0.0

    def __post_init__(self) -> None:
        check_interval("jitter", self.jitter, low=0.0, high=10.0)
        check_interval("slow_share", self.slow_share, low=0.0, high=1.0)
        check_interval("slow_factor", self.slow_factor, low=1.0, high=math.inf, high_included=False)
        check_interval("stall_share", self.stall_share, low=0.0, high=1.0)
        _not_negative("stall_ms", self.stall_ms)

    def slow_ranks(self, ranks: int) -> int:
        """Return how many of `ranks` are slow."""
        return min(ranks, max(1, round(self.slow_share * ranks))) if self.slow_share else 0

    def sigma(self, steps: float = 1.0) -> float:
        """Return the deviation of the logarithm of a sum of `steps` steps.

        Sums of lognormals are taken as lognormal, with the mean and variance of the sum (Fenton and Wilkinson).
        """
        return math.sqrt(math.log1p(self.jitter**2 / steps))


@dataclass(frozen=True)
class Setting:
    """All that a prediction depends on.

    Attributes:
        job, cluster, costs, unevenness: see there.
        chunking: of rounds.
        pacing: of shadow rounds; default: 2 % of a core.
        overlap: share of a step, in [0, 1], in which backward goes on while gradients of per-step allreduce are
            reduced; default 0.5: backward is about two thirds of a step; the first layers' gradients come last.
        fixed_every: steps from round to round at a fixed rate; default 5.
    """

    job: Job
    cluster: Cluster
    costs: Costs = field(default_factory=Costs)
    chunking: Chunking = field(default_factory=Chunking)
    unevenness: Unevenness = field(default_factory=Unevenness)
    pacing: Pacing = field(default_factory=Pacing)
    overlap: float = 0.5
    fixed_every: int = 5

    def __post_init__(self) -> None:
        check_interval("overlap", self.overlap, low=0.0, high=1.0)
        check_count("fixed_every", self.fixed_every, least=1)


def _positive(name: str, value: float) -> None:
    check_interval(name, value, low=LEAST, high=MOST)


def _not_negative(name: str, value: float) -> None:
    check_interval(name, value, low=0.0, high=MOST)
