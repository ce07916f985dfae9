"""Pure simulations of rounds back to back with one step of +1 in flight in each, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_shadowsync.algorithms import Algorithm, ElasticAveraging

ROUNDS = 600
MEASURED = 200


def merged(live: Tensor, snapshot: Tensor, anchor: Tensor, alpha: float, merge: str) -> Tensor:
    """The two merges, as ALGORITHMS.md has them."""
    return live + alpha * (anchor - snapshot) if merge == "delta" else (1 - alpha) * live + alpha * anchor


def surviving_share(algorithm: Algorithm, merge: str, size: int) -> float:
    """Return how far a replica gets in a round, where each round has one step of +1 in flight."""
    replicas = [torch.zeros(1, dtype=torch.float64) for _ in range(size)]
    state, center = algorithm.init(replicas[0]), replicas[0].clone()
    for number in range(ROUNDS):
        if number == ROUNDS - MEASURED:
            begun = float(sum(replicas))
        if isinstance(algorithm, ElasticAveraging):
            for rank, snapshot in enumerate(replicas):
                center, anchor = algorithm.elastic(center, snapshot)
                replicas[rank] = merged(snapshot + 1, snapshot, anchor, algorithm.alpha, merge)
            continue
        anchor, state = algorithm.update(sum(replicas) / size, state)
        replicas = [merged(each + 1, each, anchor, algorithm.alpha, merge) for each in replicas]
    return (float(sum(replicas)) - begun) / (size * MEASURED)
