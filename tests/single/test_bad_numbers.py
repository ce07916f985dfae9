"""Replicas with NaN or infinity: left out of the mean, healed from the others', reported; and when all are bad."""

from __future__ import annotations

import itertools
import logging
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks_as_threads import TIMEOUT_S, batch, flat, identical_everywhere, loss_of, make_model, on_ranks, sgd
from torch import Tensor

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync, ShadowSyncError
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.ballot import Intent, weights_of
from hvd_shadowsync.captured import Capture
from hvd_shadowsync.checkpointing import Checkpointer
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.finite import all_finite, has_nan, within
from hvd_shadowsync.health import Health, forget_bad_state
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.reduction import RoundOptions
from hvd_shadowsync.replica import Merge, NamedTensor, Replica
from hvd_shadowsync.rounds import Rounds
from hvd_shadowsync.staged import Staged

INF, NAN = math.inf, math.nan
TRAIN, MEET, CONSOLIDATE, LEAVE, END = Intent
MEANS: list[Algorithm] = [
    ModelAveraging(),
    ModelAveraging(alpha=0.5),
    BMUF(alpha=0.6, block_lr=0.9),
    BMUF(alpha=0.5, block_momentum=0.5, nesterov=True),
]
ELASTIC: list[Algorithm] = [ElasticAveraging(), ElasticAveraging(alpha=0.3, symmetric=True)]
bad_values = pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
GOOD_IN_HALVES = 2e-2


class Rank:
    """One rank with two parameters, a mask of infinities and a statistic, which takes rounds one by one."""

    def __init__(self, comm: Communicator, algorithm: Algorithm, numel: int = 4, **options: Any) -> None:
        self.comm = comm
        self.first, self.second = torch.zeros(numel), torch.zeros(3)
        self.mask, self.statistic = torch.tensor([0.0, -INF, 0.0]), torch.ones(2)
        self.metrics = RoundMetrics()
        params = [NamedTensor("first", self.first), NamedTensor("second", self.second)]
        self.replica = Replica(params, [NamedTensor("mask", self.mask), NamedTensor("statistic", self.statistic)])
        options = {"hierarchical": "auto", **options}
        self.rounds = Rounds(
            Survivors(comm.dup()), self.replica, RoundOptions(algorithm, **options), self.metrics, Poller()
        )

    @property
    def weights(self) -> Tensor:
        return torch.cat([self.first, self.second])

    def move(self, by: float) -> None:
        self.first += by
        self.second += 2 * by

    def round(self, intent: Intent = TRAIN) -> Staged:
        """Take a step, then part in a round, and merge its result at once; in turn where ranks do not meet."""
        self.metrics.steps += 1
        if not self.rounds.serves or intent is not TRAIN:
            return self._merged(intent)
        for rank in range(self.comm.size):
            if rank == self.comm.rank:
                staged = self._merged(intent)
            Poller().wait([self.comm.iallreduce(torch.zeros(1))], meanwhile=self.rounds.serve)
        return staged

    def _merged(self, intent: Intent) -> Staged:
        staged = self.rounds.run(intent, 1)
        assert isinstance(staged, Staged)
        staged.merge()
        return staged

    @property
    def state(self) -> list[Tensor]:
        return list(self.rounds._state)


def run(size: int, program: Callable[[Rank], Any], algorithm: Algorithm, **options: Any) -> list[Any]:
    return on_ranks(size, lambda comm: program(Rank(comm, algorithm, **options)))


WAYS = [
    pytest.param(algorithm, {"merge": merge, "foreground": foreground, "wire_dtype": wire}, id=f"{algorithm}-{merge}-{foreground}-{wire}")  # noqa: E501
    for algorithm, merge, foreground, wire in itertools.product(
        MEANS, ["delta", "interpolate"], [False, True], [None, torch.float16, torch.bfloat16]
    )
    if merge == "delta" or algorithm.alpha < 1
]  # fmt: skip


class Expected:
    """What rounds of a mean make of the weights of all ranks, reckoned without slices, threads or messages."""

    def __init__(self, algorithm: Algorithm, start: Tensor, ranks: int) -> None:
        self.algorithm, self.state = algorithm, algorithm.init(start)
        self.weights = [start.clone() for _ in range(ranks)]

    def round(self, good: list[int], healed: int | None = None) -> None:
        anchor, self.state = self.algorithm.update(torch.stack([self.weights[r] for r in good]).mean(0), self.state)
        for rank, each in enumerate(self.weights):
            self.weights[rank] = anchor.clone() if rank == healed else torch.lerp(each, anchor, self.algorithm.alpha)


# --- one bad replica of three -----------------------------------------------------------------------------------------


@bad_values
@pytest.mark.parametrize(("algorithm", "options"), WAYS)
def test_the_others_go_on_as_if_it_was_not_there_and_it_takes_their_anchor(
    algorithm: Algorithm, options: dict[str, Any], value: float, caplog: pytest.LogCaptureFixture
) -> None:
    def program(rank: Rank) -> list[tuple[Tensor, list[Tensor]]]:
        seen = []
        for turn in range(5):
            rank.move(1.0 + rank.comm.rank)
            if turn == 1 and rank.comm.rank == 1:
                rank.second[1] = value
            staged = rank.round()
            assert staged.heals == (turn == 2 and rank.comm.rank == 1)
            assert all(bool(each.isfinite().all()) for each in rank.state)
            assert rank.mask.tolist() == [0.0, -INF, 0.0]
            assert rank.statistic.tolist() == [1.0, 1.0]
            seen.append((rank.weights, [each.clone() for each in rank.state]))
        return seen

    with caplog.at_level(logging.WARNING):
        results = run(3, program, algorithm, **options)
    expected = Expected(algorithm, torch.zeros(7), 3)
    scale = torch.tensor([1.0] * 4 + [2.0] * 3)
    tolerance = 1e-5 if options["wire_dtype"] is None else GOOD_IN_HALVES
    for turn in range(5):
        for rank in range(3):
            expected.weights[rank] += scale * (1.0 + rank)
        if turn != 1:  # in that round nobody knows yet whose numbers are bad, so nobody moves
            expected.round([0, 2] if turn == 2 else [0, 1, 2], healed=1 if turn == 2 else None)
        for rank in range(3):
            if (turn, rank) != (1, 1):
                weights, state = results[rank][turn]
                torch.testing.assert_close(weights, expected.weights[rank], rtol=tolerance, atol=tolerance)
                for one, other in zip(state, expected.state, strict=True):
                    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    what = "NaN" if math.isnan(value) else "(infinity|NaN)"
    assert len(caplog.messages) == 1
    assert re.fullmatch(
        rf"rank 1: second has {what} at step 2 \(still good at step 1\); its replica was left out of the mean and is "
        "healed from the others'",
        caplog.messages[0],
    )


@bad_values
@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("merge", ["delta", "interpolate"])
@pytest.mark.parametrize("algorithm", ELASTIC, ids=str)
def test_an_elastic_center_refuses_it_and_heals_it_at_once(
    algorithm: ElasticAveraging, merge: str, foreground: bool, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    def program(rank: Rank) -> list[Tensor]:
        seen = []
        for turn in range(3):
            rank.move(1.0 + rank.comm.rank)
            if turn == 1 and rank.comm.rank == 1:
                rank.second[1] = value
            assert rank.round().heals == (turn == 1 and rank.comm.rank == 1)
            assert rank.mask.tolist() == [0.0, -INF, 0.0]
            seen.append(rank.weights)
        return seen

    with caplog.at_level(logging.WARNING):
        results = run(3, program, algorithm, merge=merge, foreground=foreground)
    center, weights = torch.zeros(7), [torch.zeros(7) for _ in range(3)]
    for turn in range(3):
        for rank in range(3):
            weights[rank] += torch.tensor([1.0] * 4 + [2.0] * 3) * (1.0 + rank)
            if (turn, rank) == (1, 1):
                weights[rank] = center.clone()
            else:
                center, answer = algorithm.elastic(center, weights[rank])
                weights[rank] = torch.lerp(weights[rank], answer, algorithm.alpha)
            torch.testing.assert_close(results[rank][turn], weights[rank])
    assert [message.startswith("rank 1: second has") for message in caplog.messages] == [True]


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("wire_dtype", [None, torch.float16], ids=str)
def test_over_several_hosts(hosts: list[int], wire_dtype: torch.dtype | None) -> None:
    """Two of four are bad, in the second case all of a host."""

    def program(comm: Communicator) -> list[float]:
        rank = Rank(comm, ModelAveraging(), numel=300_000, wire_dtype=wire_dtype)
        seen = []
        for turn in range(4):
            rank.move(1.0 + comm.rank)
            if turn == 1 and comm.rank < 2:
                (rank.first if comm.rank else rank.second)[-1] = NAN
            rank.round()
            seen.append(rank.first[0].item())
        assert rank.mask.tolist() == [0.0, -INF, 0.0]
        return seen

    results = local.run(4, program, hosts=hosts, timeout_s=TIMEOUT_S)
    for _, _, healed, after in results:
        assert healed == pytest.approx(results[3][2], abs=1e-2)
        assert after == pytest.approx(healed + 2.5, abs=1e-2)


def test_only_slices_with_bad_numbers_stand_still() -> None:
    """What is sent before and after the bad place is averaged as ever."""
    numel = 1_200_000

    def program(rank: Rank) -> list[tuple[float, float]]:
        seen = []
        for turn in range(3):
            rank.first.fill_(float(turn + rank.comm.rank))
            if turn > 0 and rank.comm.rank == 1:
                rank.first[0] = NAN
            rank.round()
            seen.append((rank.first[1].item(), rank.first[-1].item()))
        return seen

    results = run(2, program, ModelAveraging(), numel=numel)
    assert results[0] == [(0.5, 0.5), (1.0, 1.5), (2.0, 2.0)]
    assert results[1] == [(0.5, 0.5), (2.0, 1.5), (2.0, 2.0)]


@pytest.mark.parametrize("algorithm", [ModelAveraging(), ElasticAveraging(), BMUF()], ids=str)
@pytest.mark.parametrize("foreground", [False, True])
def test_consolidation_leaves_it_out(algorithm: Algorithm, foreground: bool, caplog: pytest.LogCaptureFixture) -> None:
    def program(rank: Rank) -> tuple[list[float], bool]:
        rank.move(3.0 * rank.comm.rank)
        if rank.comm.rank == 1:
            rank.first[2] = NAN
        staged = rank.round(CONSOLIDATE)
        assert staged.how is Merge.ASSIGN
        return rank.weights.tolist(), staged.heals

    expected = [3.0] * 4 + [6.0] * 3
    with caplog.at_level(logging.WARNING):
        results = run(3, program, algorithm, foreground=foreground)
    assert results == [(expected, False), (expected, True), (expected, False)]
    (message,) = caplog.messages
    assert message.startswith("rank 1: first has NaN at step 1 (still good at step 0)")


def test_a_rank_without_data_heals_those_that_train_when_all_of_them_are_bad() -> None:
    assert weights_of([1, 0, 1], [True, False, True]) == (0.0, 1.0, 0.0)
    assert weights_of([0, 0, 1], [False, True, False]) == (0.0, 0.0, 1.0)
    assert weights_of([0, 0], [True, False]) == (0.0, 1.0)
    assert weights_of([1, 1], [True, True]) == (1.0, 1.0)


# --- buffers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["delta", "interpolate"])
@pytest.mark.parametrize("wire_dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", [ModelAveraging(alpha=0.5), ElasticAveraging()], ids=str)
def test_a_mask_of_infinities_stays_and_is_not_bad(
    algorithm: Algorithm, merge: str, wire_dtype: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    if algorithm.asynchronous and wire_dtype is not None:
        pytest.skip("refused")

    def program(rank: Rank) -> list[float]:
        for turn in range(3):
            rank.statistic.fill_(1.0 + turn + rank.comm.rank)
            rank.move(1.0 + rank.comm.rank)
            rank.round()
        rank.round(CONSOLIDATE)
        assert rank.metrics.times_healed == 0
        return rank.mask.tolist()

    with caplog.at_level(logging.WARNING):
        assert run(2, program, algorithm, merge=merge, wire_dtype=wire_dtype) == [[0.0, -INF, 0.0]] * 2
    assert not caplog.messages


@pytest.mark.parametrize("merge", ["delta", "interpolate"])
@pytest.mark.parametrize("foreground", [False, True])
def test_nan_in_a_statistic_is_bad_and_does_not_spread(
    merge: str, foreground: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def program(rank: Rank) -> list[list[float]]:
        seen = []
        for turn in range(3):
            rank.statistic.fill_(float(rank.comm.rank))
            if turn == 0 and rank.comm.rank == 1:
                rank.statistic[0] = NAN
            if turn == 1 and rank.comm.rank == 1:
                rank.statistic[0] = NAN
            rank.round()
            seen.append(rank.statistic.tolist())
        return seen

    with caplog.at_level(logging.WARNING):
        zero, one, two = run(3, program, ModelAveraging(alpha=0.5), merge=merge, foreground=foreground)
    assert all(math.isfinite(value) for values in (*zero, *two, *one[1:]) for value in values)
    assert one[1] == [1.0, 1.0]
    assert "rank 1: statistic has NaN at step 1" in caplog.text


def test_masks_survive_added_parameters() -> None:
    def program(rank: Rank) -> list[float]:
        added = torch.full((2,), float(rank.comm.rank))
        params = [*rank.replica.params, NamedTensor("third", added)]
        buffers = [NamedTensor("mask", rank.mask), NamedTensor("statistic", rank.statistic)]
        rank.move(float(rank.comm.rank))
        if rank.comm.rank == 1:
            rank.first[0] = NAN
        rank.rounds.wanted_replica = Replica(params, buffers)
        rank.round()
        for _ in range(2):
            rank.round()
        assert bool(rank.weights.isfinite().all())
        assert added.tolist() == [0.0, 0.0]
        return rank.mask.tolist()

    assert run(3, program, BMUF(block_momentum=0.3)) == [[0.0, -INF, 0.0]] * 3


# --- lost ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.leaves_threads
def test_a_bad_replica_is_left_out_when_the_others_begin_again_without_a_lost_rank() -> None:
    from hvd_shadowsync.errors import RankLostError

    def program(comm: Communicator) -> Any:
        rank = Rank(comm, BMUF(), foreground=True)
        rank.move(1.0 + comm.rank)
        rank.round()
        rank.move(1.0 + comm.rank)
        if comm.rank == 1:
            rank.first[0] = NAN
        if comm.rank == 3:
            assert isinstance(comm, local.LocalCommunicator)
            comm.die()
        with pytest.raises(RankLostError) as lost:
            rank.rounds.run(TRAIN, 1)
        rank.rounds.go_on(lost.value)
        state = rank.state[0].clone()
        assert rank.round().heals == (comm.rank == 1)
        return state, rank.weights

    ended = [each for each in local.run(4, program, timeout_s=TIMEOUT_S, kill={}) if each is not None]
    assert len(ended) == 3
    for state, weights in ended:
        torch.testing.assert_close(state, torch.tensor([4.5] * 4 + [9.0] * 3))
        assert bool(weights.isfinite().all())


# --- all replicas are bad ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("intents", [(TRAIN, TRAIN, TRAIN), (TRAIN, MEET, CONSOLIDATE), (LEAVE, TRAIN, END)], ids=str)
@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF(block_momentum=0.5)], ids=str)
def test_all_bad_is_an_error_on_every_rank_whatever_they_are_about(
    algorithm: Algorithm, intents: tuple[Intent, ...], foreground: bool
) -> None:
    def program(rank: Rank) -> str:
        rank.move(1.0)
        rank.round()
        rank.second[rank.comm.rank] = NAN
        with pytest.raises(ShadowSyncError) as error:
            for _ in range(3):
                rank.round(intents[rank.comm.rank])
        assert all(bool(each.isfinite().all()) for each in rank.state)
        return str(error.value)

    for rank, message in enumerate(run(3, program, algorithm, foreground=foreground)):
        assert message == (
            f"all replicas hold NaN or infinity: here (rank {rank}) second has NaN at step 2 (still good at step 1); "
            "go on from the last checkpoint, with a lower learning rate"
        )


@pytest.mark.parametrize("foreground", [False, True])
def test_one_that_is_bad_beside_others_is_no_reason_to_end_when_they_have_no_more_data(foreground: bool) -> None:
    """They wait for it with good replicas; that it goes on spoiling its own is known."""

    def program(rank: Rank) -> list[bool]:
        waits, healed = rank.comm.rank != 1, []
        for turn in range(12):
            intent = CONSOLIDATE if waits and turn >= 4 else TRAIN
            if intent is TRAIN:
                rank.move(1.0)
            if not waits:
                rank.first[0] = NAN
            rank.metrics.steps += 1
            staged = rank.rounds.run(intent, int(intent is TRAIN))
            assert isinstance(staged, Staged)
            staged.merge()
            healed.append(staged.heals)
            assert not waits or bool(rank.weights.isfinite().all())
        return healed

    healed = run(3, program, ModelAveraging(), foreground=foreground)
    assert healed[0] == healed[2] == [False] * 12
    assert healed[1] == [False] + [True] * 11


@pytest.mark.parametrize("later", [0, 1])
def test_those_that_train_are_all_bad_again_and_again_and_one_without_data_is_good(later: int) -> None:
    """The last of them that turned bad is the one that tells; it makes no difference whether all did so at once."""

    def program(rank: Rank) -> int:
        rounds = 0
        with pytest.raises(ShadowSyncError, match="all replicas hold NaN or infinity"):
            for rounds in range(12):
                intent = CONSOLIDATE if rank.comm.rank == 0 and rounds >= 1 else TRAIN
                if intent is TRAIN:
                    rank.move(1.0)
                if rank.comm.rank and rounds >= 2 + later * (rank.comm.rank - 1):
                    rank.first[0] = NAN
                rank.metrics.steps += 1
                staged = rank.rounds.run(intent, int(intent is TRAIN))
                assert isinstance(staged, Staged)
                staged.merge()
        return rounds

    assert run(3, program, ModelAveraging()) == [5 + later] * 3


@pytest.mark.parametrize("algorithm", [ModelAveraging(), ElasticAveraging(), BMUF()], ids=str)
def test_all_bad_in_a_consolidation(algorithm: Algorithm) -> None:
    def program(rank: Rank) -> None:
        rank.first[0] = INF
        with pytest.raises(ShadowSyncError, match=r"all replicas hold .* first has infinity at step 1 "):
            rank.round(CONSOLIDATE)

    run(2, program, algorithm)


@pytest.mark.parametrize("foreground", [False, True])
def test_replicas_of_a_center_that_get_bad_again_and_again_are_the_end(foreground: bool) -> None:
    """One bad round of all is healed from the center; in the foreground the next one is the end, else the third."""

    def program(rank: Rank) -> int:
        rank.move(1.0)
        rank.round()
        turns = 0
        with pytest.raises(ShadowSyncError, match="all replicas hold NaN or infinity"):
            for turns in range(4):  # noqa: B007
                rank.first[0] = NAN
                if foreground:
                    rank.round()
                else:
                    rank.metrics.steps += 1
                    rank.rounds.run(TRAIN, 1).merge()  # type: ignore[union-attr]
                    Poller().wait([rank.comm.iallreduce(torch.zeros(1))], meanwhile=rank.rounds.serve)
                assert bool(rank.weights.isfinite().all())
        return turns

    turns = (
        run(2, program, ElasticAveraging(), foreground=foreground)
        if foreground
        else run(1, program, ElasticAveraging())
    )
    assert turns == ([1, 1] if foreground else [2])


def test_weights_that_are_bad_from_the_start_are_an_error() -> None:
    def program(comm: Communicator) -> None:
        replica = Replica([NamedTensor("weights", torch.tensor([1.0, NAN]))])
        with pytest.raises(ShadowSyncError, match="weights has NaN at step 0"):
            Rounds(Survivors(comm.dup()), replica, RoundOptions(ModelAveraging()), RoundMetrics(), Poller())

    on_ranks(2, program)


def test_a_copy_for_a_checkpoint_is_taken_from_the_next_good_round() -> None:
    def program(rank: Rank) -> list[bool]:
        capture, done = Capture(), []
        rank.rounds.capture(capture)
        for turn in range(3):
            rank.move(1.0)
            if turn == 0 and rank.comm.rank == 1:
                rank.first[0] = NAN
            rank.round()
            done.append(capture.done)
        assert all(bool(each.isfinite().all()) for each in capture.weights().values())
        return done

    assert run(2, program, ModelAveraging()) == [[False, True, True]] * 2


# --- jobs -------------------------------------------------------------------------------------------------------------

DRIVERS: dict[str, dict[str, Any]] = {
    "background": {"sync_every": 1},
    "hogwild": {"sync_every": 1, "apply": "hogwild"},
    "foreground": {"sync_every": 2, "foreground": True},
}
JOBS = [
    pytest.param(algorithm, driver, merge, wire, id=f"{algorithm}-{driver}-{merge}-{wire}")
    for algorithm, driver, merge, wire in itertools.product(
        [ModelAveraging(), ModelAveraging(alpha=0.5), BMUF(block_momentum=0.3), ElasticAveraging()],
        DRIVERS,
        ["delta", "interpolate"],
        [None, torch.float16, torch.bfloat16],
    )
    if (merge == "delta" or algorithm.alpha < 1) and not (algorithm.asynchronous and wire is not None)
]


class Training:
    """A model, its optimizer, and steps of which some have bad gradients."""

    def __init__(self, comm: Communicator, kind: str = "Adam", **options: Any) -> None:
        self.comm, self.model = comm, make_model(seed=comm.rank, batch_norm=False)
        self.optimizer = (
            torch.optim.Adam(self.model.parameters(), lr=0.01) if kind == "Adam" else sgd(self.model, momentum=0.9)
        )
        self.sync = ShadowSync(self.optimizer, model=self.model, communicator=comm, **{"sync_every": 1, **options})
        self.taken = 0

    def step(self, *, spoil: float | None = None) -> None:
        """Take a step; with `spoil` one gradient, of the second layer's bias, is that."""
        self.optimizer.zero_grad()
        loss_of(self.model, batch(self.comm.rank, self.taken)).backward()
        if spoil is not None:
            bias = self.model[-1].bias
            assert isinstance(bias, Tensor) and bias.grad is not None
            bias.grad.fill_(spoil)
        self.optimizer.step()
        self.taken += 1

    def until_rounds(self, more: int) -> None:
        """Train until so many more rounds have reached the weights."""
        goal = self.sync.metrics()["rounds"] + more
        while self.sync.metrics()["rounds"] < goal:
            self.step()


@pytest.mark.parametrize(("algorithm", "driver", "merge", "wire"), JOBS)
def test_a_bad_gradient_is_healed_with_the_state_of_the_optimizer(
    algorithm: Algorithm, driver: str, merge: str, wire: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    def program(comm: Communicator) -> float:
        job = Training(comm, algorithm=algorithm, merge=merge, wire_dtype=wire, **DRIVERS[driver])
        with job.sync as sync:
            for _ in range(4):
                job.step()
            job.step(spoil=NAN if comm.rank == 1 else None)
            for _ in range(20):
                job.step()
            sync.synchronize()
            assert identical_everywhere(sync, job.model)
            assert bool(flat(job.model).isfinite().all())
            for _ in range(4):
                job.step()
            sync.synchronize()
            assert identical_everywhere(sync, job.model)
            for state in job.optimizer.state.values():
                assert all(bool(each.isfinite().all()) for each in state.values())
            return sync.metrics()["times_healed"]

    with caplog.at_level(logging.WARNING):
        assert on_ranks(3, program) == [0, 1, 0]
    assert len(caplog.messages) == 1
    assert re.match(r"rank 1: \S+ has NaN at step \d+ \(still good at step \d\)", caplog.messages[0])


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("algorithm", [ModelAveraging(), ElasticAveraging()], ids=str)
def test_a_rank_with_broken_data_is_healed_again_and_again_and_the_others_learn(
    algorithm: Algorithm, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained = threading.Event()

    def program(comm: Communicator) -> tuple[float, bool]:
        job = Training(comm, "SGD", algorithm=algorithm, **DRIVERS[driver])
        with job.sync as sync:
            while job.taken < 60 or not (comm.rank == 1 or driver == "foreground" or trained.is_set()):
                job.step(spoil=NAN if comm.rank == 1 else None)
                assert comm.rank == 1 or bool(flat(job.model).isfinite().all())
            if comm.rank == 1:
                trained.set()
            sync.synchronize()
            assert identical_everywhere(sync, job.model)
            assert bool(flat(job.model).isfinite().all())
            return sync.metrics(merged=True)["times_healed"], bool(sync.metrics()["times_healed"])

    with caplog.at_level(logging.WARNING):
        results = on_ranks(3, program)
    assert [had for _, had in results] == [False, True, False]
    times = results[0][0]
    reports = [message for message in caplog.messages if re.match(r"rank 1: \S+ has NaN at step", message)]
    assert len(reports) == int(times).bit_length()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF()], ids=str)
def test_a_job_whose_replicas_are_all_bad_ends_with_an_error_on_every_rank(algorithm: Algorithm, driver: str) -> None:
    def program(comm: Communicator) -> str:
        job = Training(comm, algorithm=algorithm, **DRIVERS[driver])
        with pytest.raises(ShadowSyncError) as error:
            for turn in range(1000):
                job.step(spoil=None if turn < 3 else NAN)
            job.sync.synchronize()
        job.sync._detach()
        return str(error.value)

    for rank, message in enumerate(on_ranks(2, program)):
        assert re.search(rf"all replicas hold NaN or infinity: here \(rank {rank}\) \S+ has NaN at step \d+", message)


@pytest.mark.parametrize("driver", ["background", "foreground"])
def test_it_is_an_error_as_well_for_those_that_wait(driver: str) -> None:
    calls: list[Callable[[ShadowSync], Any]] = [
        lambda sync: sync.synchronize(),
        lambda sync: sync.gather(None),
        lambda sync: sync.close(),
    ]

    def program(comm: Communicator) -> None:
        job = Training(comm, **DRIVERS[driver])
        with pytest.raises(ShadowSyncError, match="all replicas hold NaN or infinity"):
            for _ in range(2 * (2 if driver == "foreground" else 1)):
                job.step(spoil=NAN)
            if comm.rank:
                calls[comm.rank - 1](job.sync)
            for _ in range(1000):
                job.step(spoil=NAN)
            job.sync.synchronize()
        job.sync._detach()

    on_ranks(4, program)


def test_a_bad_gradient_of_the_warmup_is_in_all_replicas_and_an_error() -> None:
    def program(comm: Communicator) -> None:
        job = Training(comm, warmup_steps=3)
        with pytest.raises(ShadowSyncError, match=r"all replicas hold NaN or infinity: .* has NaN at step 3"):
            for turn in range(5):
                job.step(spoil=NAN if (turn, comm.rank) == (1, 1) else None)
        job.sync._detach()

    on_ranks(2, program)


@pytest.mark.leaves_threads
def test_the_last_good_checkpoint_stays(tmp_path: Any) -> None:
    def program(comm: Communicator) -> int:
        job = Training(comm)
        checkpointer = Checkpointer(tmp_path, job.model, job.sync, every_steps=1, end_signals=())
        for _ in range(5):
            job.step()
        assert checkpointer.save_now() is not None
        with pytest.raises(ShadowSyncError, match="all replicas hold NaN"):
            for _ in range(1000):
                job.step(spoil=NAN)
            checkpointer.save_now()
        job.sync._detach()
        checkpointer.close()
        latest = Checkpointer.latest(tmp_path)
        assert latest is not None
        saved = torch.load(latest / "model.pt", weights_only=True)
        assert all(bool(each.isfinite().all()) for each in saved["model"].values())
        return int(latest.name.split("-")[1].split(".")[0])  # step-5.1 is another one of step 5

    assert min(on_ranks(2, program)) >= 5


def test_at_world_size_1_nobody_looks() -> None:
    def program(comm: Communicator) -> float:
        job = Training(comm)
        with job.sync:
            job.step(spoil=NAN)
            job.sync.synchronize()
            return job.sync.metrics()["times_healed"]

    assert on_ranks(1, program) == [0]


# --- replicas that go far away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [False, True])
def test_a_replica_that_goes_too_far_is_reported_once_each_time(
    foreground: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def program(rank: Rank) -> None:
        for away in (0.0, 5.0, 5.0, 0.0, 5.0):
            rank.first.fill_(10.0 + (away if rank.comm.rank == 1 else 0.0))
            rank.round()

    with caplog.at_level(logging.WARNING):
        run(3, program, ModelAveraging(), max_distance=0.2, foreground=foreground)
    assert [re.sub(r"0\.\d+ away", "far away", each) for each in caplog.messages] == [
        f"rank 1: at step {step} the replica is far away from the anchor, in units of its norm, which is more than "
        "max_distance=0.2"
        for step in (2, 5)
    ]


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_distances_that_make_no_sense_are_refused(value: float) -> None:
    def program(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=r"max_distance=.* is outside \(0, inf\]"):
            Training(comm, max_distance=value)

    on_ranks(1, program)


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([], dtype=dtype))
    assert all_finite(torch.full((1000,), largest, dtype=dtype)), "though their sum is not"
    for value in (NAN, INF, -INF):
        for place in (0, 17, 999):
            values = torch.zeros(1000, dtype=dtype)
            values[place] = value
            assert not all_finite(values)
            assert has_nan(values) == math.isnan(value)
    assert not all_finite(torch.tensor([INF, -INF], dtype=dtype))
    assert within(torch.tensor([-1.0, 1.0], dtype=dtype), 1.0)
    assert not within(torch.tensor([-1.5], dtype=dtype), 1.0)


def test_weights_whose_sum_could_overflow_are_bad() -> None:
    replica = Replica([NamedTensor("small", torch.ones(2)), NamedTensor("large", torch.ones(2))])
    metrics = RoundMetrics(steps=7)
    health = Health(0, 4, metrics)
    assert not health.examine(replica, torch.tensor([1e30, 1.0, 1.0, -1e37]), 1)
    assert health.examine(replica, torch.tensor([1e30, 1.0, 1.0, -1e38]), 2)
    assert str(health.bad) == "large has 1e+38 at step 7 (still good at step 1)"


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
        lambda params: torch.optim.Adagrad(params, lr=0.1),
        lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5, centered=True),
        lambda params: torch.optim.NAdam(params, lr=0.1),
        lambda params: torch.optim.ASGD(params, lr=0.1),
        lambda params: torch.optim.Rprop(params, lr=0.1),
    ],
    ids=["SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "ASGD", "Rprop"],
)
@pytest.mark.parametrize("shape", [(3,), ()], ids=str)
def test_an_optimizer_trains_on_after_its_bad_state_is_forgotten(make: Any, shape: tuple[int, ...]) -> None:
    good, bad = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizer = make([good, bad])
    for turn in range(6):
        for param in (good, bad):
            param.grad = torch.full(shape, 0.5 + turn)
        if turn == 2:
            assert bad.grad is not None
            bad.grad.view(-1)[0] = NAN
        optimizer.step()
        if turn == 2:
            kept = {key: each.clone() for key, each in optimizer.state[good].items() if isinstance(each, Tensor)}
            forget_bad_state(optimizer)
            assert all(torch.equal(kept[key], optimizer.state[good][key]) for key in kept), "the good one's stays"
            with torch.no_grad():
                bad.copy_(good)
    assert bool(bad.isfinite().all())
    if not shape or "step" in optimizer.state[bad]:
        assert int(optimizer.state[bad].get("step", 6)) == 6
