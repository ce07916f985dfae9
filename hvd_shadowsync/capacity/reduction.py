"""How long a reduction of the dense weights takes: messages, bytes, chunks, CPU; flat or by way of shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hvd_shadowsync.capacity.setting import MIB, Chunking, Cluster, Setting

NEAR_LATENCY_S = 2e-6  # a message between ranks of a host
FLAT_PASSES = 4  # a byte from rank to rank of a host is read, written into shared memory, and read and written there
VOTE_BYTES = 40
FUSED = Chunking(128 * MIB, in_flight=1, pause_ms=0.0)
"""Horovod's fusion buffer, waited for without pauses."""


@dataclass(frozen=True)
class Collective:
    """What a reduction asks of the network; bytes in units of what is reduced.

    Attributes:
        far, near: messages between hosts, and inside a host, each of which waits for the one before.
        messages: messages that a rank sends.
        share: bytes on a host's link in each direction.
        passes: bytes that a rank moves in shared memory.
    """

    far: float
    near: float
    messages: float
    share: float
    passes: float


@dataclass(frozen=True)
class Reduction:
    """The time of a reduction, and the CPU time of the rank that spends most, seconds."""

    seconds: float
    cpu_s: float


Algorithm = Callable[[Cluster], Collective]
NOTHING = Reduction(0.0, 0.0)


# --- algorithms -------------------------------------------------------------------------------------------------------


def ring(cluster: Cluster) -> Collective:
    """Return what a ring over all P ranks asks for, in which a host has one link in and one out.

    Reduce-scatter, then allgather: 2 (P - 1) steps, in each of which a rank sends 1/P of the bytes, the least there is
    (Patarasuk and Yuan, 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). Of a piece's
    hops H in P are between hosts.
    """
    ranks, hosts = cluster.ranks, cluster.hosts
    steps, share = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    far = steps * hosts / ranks if hosts > 1 else 0.0
    inside = cluster.ranks_per_host > 1
    return Collective(far, steps - far, steps, share if hosts > 1 else 0.0, FLAT_PASSES * share if inside else 0.0)


def halving(cluster: Cluster) -> Collective:
    """Return what recursive halving, then doubling asks for, nearest ranks first: large pieces stay inside a host.

    2 log2 P steps, 2 (P - 1) / P of the bytes (Rabenseifner's algorithm in Thakur, Rabenseifner and Gropp, 2005,
    "Optimization of collective communication operations in MPICH"). Where there are more than a power of two, those
    beyond it exchange halves with a neighbour first, hand their sum over, and get the result in the end: 3 steps and
    twice the bytes in addition.
    """
    far, share = _halving(cluster.hosts)
    near, inside = _halving(cluster.ranks_per_host)
    return Collective(far, near, far + near, share, FLAT_PASSES * inside)


def _halving(size: int) -> tuple[int, float]:
    levels = size.bit_length() - 1
    power = 1 << levels
    rest = size != power
    return 2 * levels + 3 * rest, 2 * (power - 1) / power + 2 * rest


def owners(cluster: Cluster) -> Collective:
    """Return what `reducers.mean.OwnerMean` asks for: each rank sums a slice; an alltoall before, an allgather after.

    2 (P - 1) messages of 1/P of the bytes, all those of a kind at once; with R ranks a host, R times the ring's
    bytes go over its link.
    """
    ranks, per_host = cluster.ranks, cluster.ranks_per_host
    messages = 2 * (ranks - 1)
    share = 2 * per_host * (ranks - per_host) / ranks
    inside = FLAT_PASSES * 2 * (per_host - 1) / ranks
    return Collective(2.0 if cluster.hosts > 1 else 0.0, 2.0 if per_host > 1 else 0.0, messages, share, inside)


def hierarchical(algorithm: Algorithm, cluster: Cluster) -> Collective:
    """Return what `algorithm` asks for among one rank a host, after and before sums in shared memory.

    Each rank sums a shard of what all ranks of its host have, and reads the sums of the others: 2 + 1/R passes, two
    waits (`reducers.host.HostMean`, and between hosts `reducers.hierarchical.HierarchicalMean`).
    """
    if cluster.ranks_per_host == 1:
        return algorithm(cluster)
    leaders = algorithm(replace(cluster, ranks_per_host=1))
    return replace(leaders, near=2.0, passes=2 + 1 / cluster.ranks_per_host)


# --- times ------------------------------------------------------------------------------------------------------------


def per_step(setting: Setting) -> Reduction:
    """Return the time of one allreduce of gradients in Horovod's buffers; its CPU time is that of the wire alone.

    That is what the algorithm allows. Horovod over Open MPI, which chooses another one by itself, took 2 to 4 times as
    long on 2 and 4 emulated hosts of 1 Gbit/s; Gloo's ring took as long as this.
    """
    costs = replace(setting.costs, round_cpu_s_per_gb=0.0)
    return _best(replace(setting, costs=costs, chunking=FUSED))


def background(setting: Setting) -> Reduction:
    """Return the time of a shadow round from snapshot to staged result, and its CPU time without vote and merge."""
    return _best(setting)


def foreground(setting: Setting) -> Reduction:
    """Return the same of a round in the foreground, which is summed by owners."""
    return NOTHING if setting.cluster.ranks == 1 else _reduction(setting, owners)


def vote(setting: Setting) -> Reduction:
    """Return the time of a vote, with what a round costs however few its bytes are.

    Each of P ranks sends 40 bytes to each other one (`MPI_Iallgather` in Open MPI).
    """
    cluster = setting.cluster
    if cluster.ranks == 1:
        return NOTHING
    costs = setting.costs
    cpu_s = 1e-6 * (costs.cpu_us_per_round + (cluster.ranks - 1) * costs.cpu_us_per_message)
    far_bytes = VOTE_BYTES * cluster.ranks_per_host * (cluster.ranks - cluster.ranks_per_host)
    latency_s = cluster.latency_us * 1e-6 if cluster.hosts > 1 else NEAR_LATENCY_S
    return Reduction(latency_s + max(far_bytes / cluster.bytes_per_s, cpu_s * cluster.crowding), cpu_s)


def _best(setting: Setting) -> Reduction:
    if setting.cluster.ranks == 1:
        return NOTHING
    options = {"ring": [ring], "halving": [halving], "best": [ring, halving]}[setting.cluster.algorithm]
    return min((_reduction(setting, option) for option in options), key=lambda option: option.seconds)


def _reduction(setting: Setting, algorithm: Algorithm) -> Reduction:
    """Return T + (K - 1) max(wire, cpu, T / w) for K chunks, w of them in flight, where one takes T by itself.

    T = latency + max(wire, cpu): the link and the thread each serve one chunk at a time, a packet after the other; and
    in T no more than w chunks are done. Each message that others wait for is found half a pause late, on average.
    """
    cluster, costs, chunking = setting.cluster, setting.costs, setting.chunking
    asked = hierarchical(algorithm, cluster) if cluster.hierarchical else algorithm(cluster)
    members = cluster.hosts if cluster.hierarchical else cluster.ranks
    chunk = min(chunking.bytes_among(members), setting.job.dense_bytes)
    wire_s = chunk * asked.share / cluster.bytes_per_s
    work_s = chunk * (costs.round_cpu_s_per_gb + costs.cpu_s_per_gb * asked.share) * 1e-9
    messages_s = asked.messages * costs.cpu_us_per_message * 1e-6
    cpu_s = max(work_s, chunk * asked.passes / cluster.memory_gbs * 1e-9) + messages_s
    busy_s = max(wire_s, cpu_s * cluster.crowding)
    travel_s = asked.far * cluster.latency_us * 1e-6 + asked.near * NEAR_LATENCY_S
    longest_s = chunking.pause_ms / 1000
    pause_s = min(longest_s, longest_s / 4 + chunking.growth * (busy_s + travel_s))
    alone_s = busy_s + travel_s + (asked.far + asked.near) * pause_s / 2
    chunks = setting.job.dense_bytes / chunk
    seconds = alone_s + (chunks - 1) * max(busy_s, alone_s / chunking.in_flight)
    looks = seconds / pause_s if pause_s else 0.0
    return Reduction(seconds, chunks * cpu_s + looks * costs.cpu_us_per_look * 1e-6)
