"""Ranks that are lost at any moment: the others go on, and end with the same weights."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from ranks_as_threads import TIMEOUT_S, batch, flat, loss_of, make_model, sgd
from recording import Recorded
from torch import Tensor

from hvd_shadowsync import (
    BMUF,
    ElasticAveraging,
    EmbeddingError,
    EmbeddingTable,
    ModelAveraging,
    RankLostError,
    ShadowSync,
    ShardedEmbeddingBag,
)
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.ballot import Intent
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.embedding import SGD
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.replica import NamedTensor, Replica
from hvd_shadowsync.rounds import RoundOptions, Rounds
from hvd_shadowsync.staged import Staged

ALGORITHMS = [ModelAveraging(), ElasticAveraging(), BMUF(block_momentum=0.2, nesterov=True)]
DRIVERS: list[dict[str, Any]] = [{"sync_every": 1}, {"sync_every": 1, "foreground": True}]
STEPS = 6
Outcome = tuple[int, int, Tensor]
"""How many ranks are left, how many were lost, the weights."""


def job(comm: Communicator, **options: Any) -> Outcome:
    """Train with every call that a training makes, and end."""
    model = make_model(seed=comm.rank)
    optimizer = sgd(model, momentum=0.9)
    with ShadowSync(optimizer, model=model, communicator=comm, **options) as sync:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step)).backward()
            optimizer.step()
            time.sleep(0.001)
            if step == STEPS // 2:
                gathered = sync.gather(comm.rank)
                assert gathered == sorted(gathered)
                assert comm.rank in gathered
                sync.average_optimizer_state()
        sync.synchronize()
        left, lost = -1, 0
        while left != sync.size:  # a rank may be lost in between
            left, lost = sync.size, int(sync.metrics()["ranks_lost"])
        return left, lost, flat(model)


def run(size: int, kill: Mapping[int, int], *, hosts: Sequence[int] | None = None, **options: Any) -> list[Outcome]:
    """Return what became of those that are left."""
    ended = local.run(size, lambda comm: job(comm, **options), timeout_s=TIMEOUT_S, kill=kill, hosts=hosts)
    return [each for each in ended if each is not None]


def require_alike(ended: Sequence[Outcome], size: int) -> None:
    left = min(count for count, _, _ in ended)
    alike = [weights for count, _, weights in ended if count == left]
    for count, lost, weights in ended:
        assert torch.isfinite(weights).all()
        assert count + lost == size
    assert all(torch.equal(alike[0], weights) for weights in alike)


@pytest.mark.parametrize("driver", DRIVERS, ids=["background", "foreground"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.leaves_threads
def test_whenever_a_rank_is_lost_the_others_end_with_the_same_weights(
    victim: int, algorithm: Algorithm, driver: dict[str, Any]
) -> None:
    """In each of its first calls, and then in every seventh: from construction to the last call of close()."""
    for call in [*range(1, 40), *range(40, 300, 7)]:
        ended = run(3, {victim: call}, algorithm=algorithm, **driver)
        assert len(ended) >= 2, f"call {call}"
        require_alike(ended, 3)


@pytest.mark.parametrize("size", [4])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.leaves_threads
def test_ranks_of_several_hosts_are_lost_one_after_the_other_down_to_one(size: int, algorithm: Algorithm) -> None:
    for call in range(5, 95, 6):
        kill = {0: call, 3: call + 7, 2: call + 15}
        ended = run(size, kill, hosts=[0, 0, 1, 1], algorithm=algorithm, sync_every=1)
        assert ended
        require_alike(ended, size)


@pytest.mark.leaves_threads
def test_training_goes_on_while_the_others_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes."""
    may_go_on, shrink = threading.Event(), Survivors._shrink

    def wait_and_shrink(self: Survivors) -> None:
        assert may_go_on.wait(TIMEOUT_S)
        shrink(self)

    monkeypatch.setattr(Survivors, "_shrink", wait_and_shrink)

    def program(comm: Communicator) -> int:
        assert isinstance(comm, local.LocalCommunicator)
        model = make_model(seed=comm.rank)
        optimizer = sgd(model)

        def train(steps: int) -> None:
            for step in range(steps):
                optimizer.zero_grad()
                loss_of(model, batch(comm.rank, step)).backward()
                optimizer.step()

        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1) as sync:
            train(5)
            if comm.rank == 2:
                comm.die()
            while comm.rank == 2:
                train(1)
            train(100)
            assert sync.metrics()["ranks_lost"] == 0, "nobody could go on yet"
            both.wait(TIMEOUT_S)
            may_go_on.set()
            deadline = time.monotonic() + TIMEOUT_S
            while sync.metrics()["ranks_lost"] == 0:
                assert time.monotonic() < deadline
                train(1)
            return sync.size

    both = threading.Barrier(2)
    assert local.run(3, program, timeout_s=TIMEOUT_S, kill={})[:2] == [2, 2]


# --- what rounds remember ---------------------------------------------------------------------------------------------


class Rank:
    """One rank that takes rounds one by one."""

    def __init__(self, comm: Communicator, algorithm: Algorithm, weights: Tensor) -> None:
        self.weights, self.metrics = weights.clone(), RoundMetrics()
        options = RoundOptions(algorithm, foreground=True)
        replica = Replica([NamedTensor("weights", self.weights)])
        self.rounds = Rounds(Survivors(comm, self.metrics.note_lost), replica, options, self.metrics, Poller())

    def round(self, intent: Intent = Intent.TRAIN) -> None:
        result = self.rounds.run(intent, 1)
        assert isinstance(result, Staged)
        result.merge()

    def lose(self) -> None:
        with pytest.raises(RankLostError) as lost:
            self.rounds.run(Intent.TRAIN, 1)
        self.rounds.go_on(lost.value)

    def state(self) -> dict[str, Tensor]:
        return {name: each["weights"] for name, each in self.rounds.state_dict()["state"].items()}


def lose_last(algorithm: Algorithm, begin: Tensor, moves: Tensor) -> list[Any]:
    """Begin at `begin`, move each rank by its row of `moves`, take a round, move again, lose the last rank."""

    def program(comm: Communicator) -> Any:
        rank = Rank(comm, algorithm, begin)
        rank.weights += moves[comm.rank]
        rank.round()
        rank.weights += moves[comm.rank]
        before = rank.state(), rank.weights.clone()
        if comm.rank == comm.size - 1:
            assert isinstance(comm, local.LocalCommunicator)
            comm.die()
        rank.lose()
        assert torch.equal(rank.weights, before[1]), "live weights are the training thread's"
        after = rank.state()
        rank.round(Intent.CONSOLIDATE)
        return before, after, rank.rounds.state_dict()["state"], rank.weights, rank.metrics.snapshot()

    ended = local.run(len(moves), program, timeout_s=TIMEOUT_S, kill={})
    assert ended[-1] is None
    return ended[:-1]


MOVES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]])


def test_the_global_model_becomes_the_mean_of_those_left_and_the_momentum_is_kept() -> None:
    ended = lose_last(BMUF(block_momentum=0.5), torch.zeros(4), MOVES)
    mean = torch.stack([live for (_, live), *_ in ended]).mean(0)
    for (before, _), after, consolidated, weights, metrics in ended:
        assert torch.equal(after["velocity"], before["velocity"])
        assert torch.allclose(after["global_model"], mean)
        assert torch.equal(consolidated["global_model"]["weights"], weights)
        assert (metrics["ranks_lost"], metrics["recovery_ms"] > 0) == (1, True)


def test_only_the_lost_shard_of_a_center_is_made_anew() -> None:
    """Elements 0 to 3 of the center are with ranks 0 and 1, of 6 in all; the last two become the replicas' mean."""

    def program(comm: Communicator) -> Any:
        rank = Rank(comm, ElasticAveraging(), torch.zeros(6))
        rank.weights += 1.0 + comm.rank
        rank.round()
        own = rank.rounds._reducer.center.clone()  # type: ignore[attr-defined]
        rank.weights += 10.0
        lives = comm.allgather_object(rank.weights)
        centers = comm.allgather_object(own)
        if comm.rank == 2:
            assert isinstance(comm, local.LocalCommunicator)
            comm.die()
        rank.lose()
        return centers, lives, rank.rounds._reducer.center.clone()  # type: ignore[attr-defined]

    first, second, _ = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    (centers, lives, left), (_, _, right) = first, second
    mean = torch.stack(lives[:2]).mean(0)
    assert torch.equal(torch.cat([left, right]), torch.cat([centers[0], centers[1], mean[4:]]))


def test_a_call_counts_only_where_all_come_through_it() -> None:
    """Rank 1 finds a rank lost in a call that the others have come through: all call again."""

    def program(comm: Communicator) -> tuple[int, list[int]]:
        calls: list[int] = []

        def call(comm: Communicator) -> int:
            calls.append(comm.size)
            if comm.rank == 1 and len(calls) == 1:
                raise RankLostError("for a test")
            return len(calls)

        return Survivors(comm).together(call), calls

    assert local.run(3, program, timeout_s=TIMEOUT_S, kill={}) == [(2, [3, 3])] * 3


# --- a job that does not outlive its ranks ----------------------------------------------------------------------------


def test_without_fault_tolerance_agreement_costs_nothing_and_a_lost_rank_is_an_error() -> None:
    def program(comm: Communicator) -> list[tuple[str, int]]:
        watched = Recorded(comm)
        ranks = Survivors(watched)
        assert ranks.together(lambda _: "done") == "done"
        with pytest.raises(RankLostError, match="for a test"):
            ranks.together(_raise_lost)
        return watched.record.calls

    assert local.run(2, program, timeout_s=TIMEOUT_S) == [[], []]


def _raise_lost(_: Communicator) -> None:
    raise RankLostError("for a test")


# --- sharded tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["alltoall", "served"])
@pytest.mark.leaves_threads
def test_rows_of_a_lost_rank_are_an_error_everywhere(hosts: str, mode: str) -> None:
    def program(comm: Communicator) -> str:
        tables = [EmbeddingTable("users", 50, 4, pooling="sum")]
        try:
            module = ShardedEmbeddingBag(tables, {"users": "row-wise"}, SGD(lr=0.1), mode=mode, communicator=comm)
            for step in range(4):
                ids = torch.arange(comm.rank + step, 50, 7)
                module({"users": ids}).square().sum().backward()
            module.close()
        except RankLostError:
            return "at construction"
        except EmbeddingError as error:
            assert re.search("rows of the sharded tables|rank 1 failed while it looked rows up", str(error))
            return "lost"
        return "all done"

    seen: set[str] = set()
    for call in [*range(1, 30), *range(30, 90, 5), 10**9]:
        ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={1: call})
        seen |= {each for each in (ended[0], ended[2]) if each is not None}
        assert ended[0] is not None
        assert ended[2] is not None
    assert "lost" in seen
    assert "all done" in seen
