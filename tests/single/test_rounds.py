"""Rounds: the vote, what is staged and merged, idle ranks, consolidation, added parameters, checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks_as_threads import on_ranks
from recording import Apart
from torch import Tensor

from hvd_shadowsync import rounds as rounds_module
from hvd_shadowsync.algorithms import BMUF, Algorithm, ElasticAveraging, ModelAveraging
from hvd_shadowsync.ballot import Intent, Verdict
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.errors import ReplicaMismatchError
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.reduction import RoundOptions
from hvd_shadowsync.replica import Merge, NamedTensor, Replica
from hvd_shadowsync.rounds import Rounds
from hvd_shadowsync.staged import Staged

TRAIN, MEET, CONSOLIDATE, LEAVE, END = Intent


class Rank:
    """One rank with a weight vector, a floating-point buffer and a counter, which takes rounds one by one."""

    def __init__(self, comm: Communicator, algorithm: Algorithm, numel: int = 6, **options: Any) -> None:
        self.comm = comm
        self.weights, self.buffer = torch.zeros(numel), torch.zeros(2)
        self.counter = torch.zeros((), dtype=torch.int64)
        self.metrics = RoundMetrics()
        self.replica = self.make_replica()
        self.options = RoundOptions(algorithm, **options)
        self.rounds = Rounds(Survivors(comm.dup()), self.replica, self.options, self.metrics, Poller())

    def make_replica(self, **more: Tensor) -> Replica:
        buffers = [NamedTensor("buffer", self.buffer), NamedTensor("counter", self.counter)]
        added = [NamedTensor(name, tensor) for name, tensor in more.items()]
        return Replica([NamedTensor("weights", self.weights), *added], buffers)

    def round(self, intent: Intent = TRAIN, steps: int = 1) -> Staged | Verdict:
        """Take part in a round and merge its result at once."""
        self.metrics.steps += steps
        result = self.rounds.run(intent, steps)
        if isinstance(result, Staged):
            result.merge()
        return result

    def together(self, call: Callable[[], Any]) -> Any:
        """Call on all ranks, answering the others until all are through."""
        result = call()
        Poller().wait([self.comm.iallreduce(torch.zeros(1))], meanwhile=self.rounds.serve)
        return result


def run(size: int, program: Callable[[Rank], Any], algorithm: Algorithm | None = None, **options: Any) -> list[Any]:
    return on_ranks(size, lambda comm: program(Rank(comm, algorithm or ModelAveraging(), **options)))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [False, True])
def test_a_round_of_model_averaging_by_hand(foreground: bool) -> None:
    def program(rank: Rank) -> tuple[list[float], list[float], int]:
        rank.weights.fill_(float(rank.comm.rank))
        rank.buffer.fill_(10.0 * rank.comm.rank)
        rank.counter.fill_(7 + rank.comm.rank)
        staged = rank.round()
        assert isinstance(staged, Staged)
        assert (staged.verdict, staged.how, staged.alpha, staged.steps) == (Verdict.ROUND, Merge.ADD, 0.5, 1)
        return rank.weights.tolist(), rank.buffer.tolist(), rank.counter.item()

    algorithm = ModelAveraging(alpha=0.5)
    results = run(3, program, algorithm, foreground=foreground)
    assert results == [([0.5] * 6, [5.0] * 2, 7), ([1.0] * 6, [10.0] * 2, 7), ([1.5] * 6, [15.0] * 2, 7)]


@pytest.mark.parametrize(("merge", "how", "staged"), [("delta", Merge.ADD, 0.5), ("interpolate", Merge.PULL, 1.0)])
def test_what_is_staged(merge: str, how: Merge, staged: float) -> None:
    """alpha (anchor - snapshot), to be added; or the anchor, to be pulled to."""

    def program(rank: Rank) -> tuple[Merge, list[float]]:
        rank.weights.fill_(2.0 * rank.comm.rank)
        result = rank.rounds.run(TRAIN, 1)
        assert isinstance(result, Staged)
        return result.how, result.vector[:6].tolist()

    first, _ = run(2, program, ModelAveraging(alpha=0.5), merge=merge)
    assert first == (how, [staged] * 6)


@pytest.mark.parametrize(("merge", "moved", "share"), [("delta", 0.5 + 3, 1.0), ("interpolate", (3 + 1) / 2, 0.5)])
def test_steps_made_while_a_round_is_in_flight(merge: str, moved: float, share: float) -> None:
    """Rank 0 at 0 and rank 1 at 2 meet at 1; both move on by 3 (and by 1 at odd places) before the result is there."""

    def program(rank: Rank) -> tuple[list[float], float]:
        rank.weights.fill_(2.0 * rank.comm.rank)
        staged = rank.rounds.run(TRAIN, 1)
        assert isinstance(staged, Staged)
        rank.weights += torch.tensor([3.0, 1.0] * 3)
        progress = staged.merge()
        assert progress is not None
        return rank.weights[::2].tolist(), progress.surviving()

    first, second = run(2, program, ModelAveraging(alpha=0.5), merge=merge)
    assert first[0] == pytest.approx([moved] * 3)
    assert first[1] == pytest.approx(share, abs=1e-6)
    assert second[1] == pytest.approx(share, abs=1e-6)


def test_without_steps_in_flight_no_share_of_them_is_told() -> None:
    def program(rank: Rank) -> float:
        rank.weights.fill_(float(rank.comm.rank))
        staged = rank.rounds.run(TRAIN, 1)
        assert isinstance(staged, Staged)
        progress = staged.merge()
        assert progress is not None
        return progress.surviving()

    assert all(math.isnan(surviving) for surviving in run(2, program))


def test_block_momentum_moves_weights_and_leaves_buffers_at_their_mean() -> None:
    """A running variance must not become negative: buffers are averaged, never extrapolated."""

    def program(rank: Rank) -> list[tuple[float, float]]:
        seen = []
        for step in range(3):
            rank.weights += 1.0
            rank.buffer.fill_(4.0 + 2 * rank.comm.rank - 2 * step)
            rank.round()
            seen.append((rank.weights[0].item(), rank.buffer[0].item()))
        return seen

    # velocity 1, then .5 + 1, then .75 + 1: the global model runs ahead of the replicas
    expected = [(1.0, 5.0), (2.5, 3.0), (4.25, 1.0)]
    assert run(2, program, BMUF(block_momentum=0.5)) == [expected] * 2


@pytest.mark.parametrize("algorithm", [ModelAveraging(alpha=0.5), BMUF(alpha=0.5, block_lr=0.7, block_momentum=0.3)])
@pytest.mark.parametrize("merge", ["delta", "interpolate"])
def test_slices_do_not_show(algorithm: Algorithm, merge: str) -> None:
    """Vectors of several chunks, with the border of weights and buffers inside one, are as small ones put together."""
    numel = 300_000

    def program(rank: Rank) -> tuple[Tensor, Tensor]:
        pattern = torch.arange(6.0).repeat(rank.weights.numel() // 6)
        for step in range(3):
            rank.weights += pattern * (rank.comm.rank + 1) + step
            rank.buffer += rank.comm.rank
            rank.round()
        return rank.weights, rank.buffer

    large = run(2, program, algorithm, numel=numel, merge=merge)
    small = run(2, program, algorithm, numel=6, merge=merge)
    for (weights, buffer), (few, few_buffers) in zip(large, small, strict=True):
        torch.testing.assert_close(weights, few.repeat(numel // 6))
        torch.testing.assert_close(buffer, few_buffers)


@pytest.mark.parametrize("foreground", [False, True])
def test_rounds_reckon_from_the_buffers_of_rank_0(foreground: bool) -> None:
    """What half precision takes distances from is the same everywhere, though buffers differ at the first step."""

    def program(comm: Communicator) -> Tensor:
        rank = Rank(comm, ModelAveraging(), foreground=foreground)
        rank.buffer.fill_(1000.0 * (1 + comm.rank))
        options = RoundOptions(ModelAveraging(), wire_dtype=torch.float16, foreground=foreground)
        rank.rounds = Rounds(Survivors(comm.dup()), rank.replica, options, rank.metrics, Poller())
        rank.round()
        return rank.buffer

    assert [buffer.tolist() for buffer in on_ranks(2, program)] == [[1500.0] * 2] * 2


def test_the_elastic_center_starts_from_the_weights_and_is_met_without_a_vote() -> None:
    """One rank makes round after round while the other only answers."""

    def program(rank: Rank) -> list[float]:
        rank.weights.fill_(8.0)
        assert rank.rounds.serves
        if rank.comm.rank == 0:
            rank.together(lambda: [rank.round() for _ in range(2)])
        else:
            rank.together(lambda: None)
        return rank.weights.tolist()

    # center 0 -> 4 -> 5, replica 8 -> 6 -> 5.5
    assert run(2, program, ElasticAveraging(alpha=0.5)) == [[5.5] * 6, [8.0] * 6]


def test_the_elastic_center_in_turn_needs_no_answers() -> None:
    def program(rank: Rank) -> list[float]:
        rank.weights.fill_(8.0)
        assert not rank.rounds.serves
        assert rank.rounds.serve() is False
        rank.round()
        return rank.weights.tolist()

    # center 0 -> 4 -> 6
    assert run(2, program, ElasticAveraging(alpha=0.5), foreground=True) == [[6.0] * 6, [7.0] * 6]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_the_distance_from_the_anchor_over_its_norm() -> None:
    def program(rank: Rank) -> float:
        rank.weights.fill_(1.0 + 2 * rank.comm.rank)  # the anchor is 2, all are 1 away
        rank.rounds.run(TRAIN, 1)
        return rank.metrics.distance

    assert run(2, program) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("foreground", [False, True])
def test_bytes_on_the_wire_are_counted(foreground: bool) -> None:
    def program(rank: Rank) -> list[int]:
        sent = []
        for intent in (TRAIN, TRAIN, CONSOLIDATE):
            rank.round(intent)
            sent.append(rank.metrics.bytes_sent)
        return sent

    assert run(2, program, foreground=foreground) == [[32, 64, 96]] * 2  # 8 numbers of 4 bytes on 2 ranks


def test_time_in_flight_is_counted() -> None:
    def program(rank: Rank) -> tuple[float, float]:
        rank.round()
        first = rank.metrics.in_flight_s
        rank.round()
        return first, rank.metrics.in_flight_s

    assert all(0 < first < then < 20 for first, then in run(2, program))


# --- ranks without data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "rounds"), [(1.0, 1), (0.5, 7), (0.9, 2)])
def test_a_waiting_rank_counts_until_its_contribution_has_settled(alpha: float, rounds: int) -> None:
    """Until less than 1 % of it is left to come: (1 - alpha) ** rounds."""

    def program(rank: Rank) -> int:
        counted = 0
        for _ in range(rounds + 3):
            weights = []
            reduce = rank.rounds._reducer.reduce

            def watched(snapshot: Tensor, given: Any, fill: Any, reduce: Any = reduce, weights: Any = weights) -> Any:
                weights.append(given)
                return reduce(snapshot, given, fill)

            rank.rounds._reducer.reduce = watched
            rank.round(TRAIN if rank.comm.rank == 0 else CONSOLIDATE, steps=1 - rank.comm.rank)
            rank.rounds._reducer.reduce = reduce
            counted += weights[0] == (1.0, 1.0)
            assert weights[0][0] == 1.0
        return counted

    assert run(2, program, ModelAveraging(alpha=alpha)) == [rounds - 1] * 2


def test_steps_make_a_waiting_rank_count_again() -> None:
    def program(rank: Rank) -> list[float]:
        seen = []
        for steps in (0, 0, 0, 1):  # steps of rank 1, which waits in synchronize()
            rank.weights.fill_(float(rank.comm.rank))
            rank.round(TRAIN if rank.comm.rank == 0 else CONSOLIDATE, steps=1 if rank.comm.rank == 0 else steps)
            seen.append(rank.weights[0].item())
        return seen

    assert run(2, program)[0] == [0.0, 0.0, 0.0, 0.5]


def test_all_leave_together() -> None:
    def program(rank: Rank) -> list[Any]:
        outcomes = [rank.round(LEAVE if rank.comm.rank == 1 else TRAIN), rank.round(LEAVE)]
        rank.rounds.free()
        return [each.verdict if isinstance(each, Staged) else each for each in outcomes]

    assert run(3, program) == [[Verdict.ROUND, Verdict.STOP]] * 3


# --- consolidation ----------------------------------------------------------------------------------------------------

EVERY = [
    ModelAveraging(),
    BMUF(alpha=0.5, block_lr=0.7),
    BMUF(block_momentum=0.6, nesterov=True),
    ElasticAveraging(),
    ElasticAveraging(symmetric=True),
]
every = pytest.mark.parametrize("algorithm", EVERY, ids=str)


@every
@pytest.mark.parametrize("foreground", [False, True])
def test_consolidation_gives_the_mean_bit_for_bit(algorithm: Algorithm, foreground: bool) -> None:
    def program(rank: Rank) -> tuple[Tensor, Tensor, int, Verdict, Merge]:
        rank.weights.copy_(torch.linspace(0.1, 0.7, 6) * (rank.comm.rank + 1) ** 2)
        rank.buffer.fill_(0.3 * rank.comm.rank)
        rank.counter.fill_(rank.comm.rank + 5)
        staged = rank.round(CONSOLIDATE)
        assert isinstance(staged, Staged)
        return rank.weights, rank.buffer, rank.counter.item(), staged.verdict, staged.how

    results = run(3, program, algorithm, foreground=foreground)
    for weights, buffer, counter, verdict, how in results:
        assert (counter, verdict, how) == (5, Verdict.CONSOLIDATE, Merge.ASSIGN)
        torch.testing.assert_close(weights, torch.linspace(0.1, 0.7, 6) * (1 + 4 + 9) / 3)
        torch.testing.assert_close(buffer, torch.full((2,), 0.3))
        assert torch.equal(weights, results[0][0])
        assert torch.equal(buffer, results[0][1])


@pytest.mark.parametrize("algorithm", [each for each in EVERY if not getattr(each, "block_momentum", 0)], ids=str)
def test_after_a_consolidation_rounds_go_on_from_the_mean(algorithm: Algorithm) -> None:
    """At rest a round after it changes nothing: anchor and center stand at the mean (a velocity would go on)."""

    def program(rank: Rank) -> tuple[Tensor, Tensor]:
        rank.weights.copy_(torch.linspace(1, 3, 6) * (rank.comm.rank + 1))
        rank.together(rank.round)
        rank.together(lambda: rank.round(CONSOLIDATE))
        mean = rank.weights.clone()
        rank.together(rank.round)
        return mean, rank.weights

    for mean, weights in run(2, program, algorithm):
        torch.testing.assert_close(weights, mean, rtol=1e-6, atol=1e-6)


def test_a_rank_without_data_does_not_count_in_the_consolidation() -> None:
    def program(rank: Rank) -> list[float]:
        for number in range(3):
            rank.round(TRAIN if rank.comm.rank == 0 else CONSOLIDATE, steps=1 - rank.comm.rank)
            rank.weights.fill_(100.0 if rank.comm.rank else float(number))
        rank.round(CONSOLIDATE, steps=1 - rank.comm.rank)
        return rank.weights.tolist()

    assert run(2, program) == [[2.0] * 6] * 2


def test_where_nobody_counts_all_do() -> None:
    def program(rank: Rank) -> list[float]:
        for _ in range(3):
            rank.weights.fill_(float(rank.comm.rank))
            rank.round(CONSOLIDATE, steps=0)
        return rank.weights.tolist()

    assert run(2, program) == [[0.5] * 6] * 2


# --- parameters that were added later ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", [ModelAveraging(alpha=0.5), BMUF(block_momentum=0.5), ElasticAveraging()], ids=str
)
def test_added_parameters_start_from_rank_0_and_known_ones_stay(algorithm: Algorithm) -> None:
    def program(rank: Rank) -> tuple[Tensor, Tensor, Verdict, int]:
        rank.weights.fill_(1.0 + rank.comm.rank)
        added = torch.full((3,), 5.0 + rank.comm.rank)
        rank.rounds.wanted_replica = rank.make_replica(added=added)
        staged = rank.together(rank.round)
        assert isinstance(staged, Staged)
        return rank.weights, added, staged.verdict, rank.metrics.rounds

    for index, (weights, added, verdict, rounds) in enumerate(run(2, program, algorithm)):
        assert (verdict, rounds) == (Verdict.REGROUP, 0)
        assert weights.tolist() == [1.0 + index] * 6
        assert added.tolist() == [5.0] * 3


def test_known_parameters_keep_their_state_and_new_ones_take_part() -> None:
    def program(rank: Rank) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rank.weights += 1.0
        rank.round()  # velocity 1
        before = rank.rounds.state_dict()["state"]["velocity"]["weights"].clone()
        added = torch.zeros(3)
        rank.rounds.wanted_replica = rank.make_replica(added=added)
        rank.round()
        velocity = rank.rounds.state_dict()["state"]["velocity"]
        assert torch.equal(velocity["weights"], before)
        added += 2.0 * rank.comm.rank
        rank.weights += 1.0
        rank.round()
        return rank.weights, added, velocity

    for weights, added, velocity in run(2, program, BMUF(block_momentum=0.5)):
        assert velocity["added"].tolist() == [0.0] * 3
        assert weights.tolist() == [2.5] * 6
        assert added.tolist() == [1.0] * 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that rounds see, as the one element of a list."""
    now = [1.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(rounds_module, "time", fake)
    return now


def test_ranks_that_never_add_the_same_parameters_are_told(clock: list[float]) -> None:
    def program(rank: Rank) -> str:
        if rank.comm.rank == 1:
            rank.rounds.wanted_replica = rank.make_replica(added=torch.zeros(3))
        assert rank.round() is Verdict.MISMATCH
        rank.comm.allgather_object(None)
        clock[0] = 32.0
        with pytest.raises(ReplicaMismatchError) as caught:
            rank.round()
        return str(caught.value)

    first, second = run(2, program)
    assert first == (
        "for 30 s the ranks have optimised different parameters (here: 1); "
        "call add_param_group with the same parameters on every rank"
    )
    assert "(here: 2)" in second


def test_the_time_is_taken_from_the_last_mismatch_that_did_not_pass(clock: list[float]) -> None:
    def program(rank: Rank) -> Any:
        for names in (["a"], ["a", "b"]):
            added = {name: torch.zeros(3) for name in names}
            if rank.comm.rank == 0:
                rank.rounds.wanted_replica = rank.make_replica(**added)
            assert rank.round() is Verdict.MISMATCH
            rank.rounds.wanted_replica = rank.make_replica(**added)
            assert isinstance(rank.round(), Staged)
            rank.comm.allgather_object(None)
            clock[0] = 100.0

    run(2, program)


def test_a_mismatch_that_passes_is_forgotten() -> None:
    def program(rank: Rank) -> list[Verdict]:
        outcomes = []
        for number in range(3):
            if number == rank.comm.rank:  # rank 1 adds its parameters a round later
                rank.rounds.wanted_replica = rank.make_replica(added=torch.zeros(3))
            result = rank.round()
            outcomes.append(result.verdict if isinstance(result, Staged) else result)
        return outcomes

    assert run(2, program) == [[Verdict.MISMATCH, Verdict.REGROUP, Verdict.ROUND]] * 2


# --- checkpoints ------------------------------------------------------------------------------------------------------


@every
def test_what_rounds_remember_goes_through_a_state_dict(algorithm: Algorithm) -> None:
    """Saved after a consolidation and loaded by others, rounds go on as if nothing had happened."""

    def some_rounds(rank: Rank, first: int) -> None:
        for number in range(first, first + 3):
            rank.weights += torch.cos(torch.arange(6.0) * (number + 1) + rank.comm.rank)
            rank.round()
        rank.round(CONSOLIDATE)

    def program(comm: Communicator) -> tuple[Tensor, Tensor, dict[str, int]]:
        rank = Rank(comm, algorithm, foreground=True)
        some_rounds(rank, 0)
        saved = {"rounds": rank.rounds.state_dict(), "weights": rank.weights.clone(), "buffer": rank.buffer.clone()}
        some_rounds(rank, 3)
        other = Rank(comm, algorithm, foreground=True)
        other.weights.copy_(saved["weights"])
        other.buffer.copy_(saved["buffer"])
        other.rounds.begin(other.replica)
        other.rounds.load_state(saved["rounds"])
        some_rounds(other, 3)
        return rank.weights, other.weights, other.metrics.counters()

    for weights, again, counters in on_ranks(2, program):
        torch.testing.assert_close(again, weights, rtol=0, atol=1e-6)
        assert counters["steps"] == 8


def test_the_state_dict_by_hand() -> None:
    def program(rank: Rank) -> dict[str, Any]:
        rank.weights += 1.0
        rank.round()
        rank.metrics.rounds, rank.metrics.steps_at_last_round = 1, 1
        return rank.rounds.state_dict()

    saved = run(2, program, BMUF(block_lr=0.5, block_momentum=0.5))[1]
    assert saved["algorithm"] == {
        "name": "BMUF",
        "alpha": 1.0,
        "block_lr": 0.5,
        "block_momentum": 0.5,
        "nesterov": False,
    }
    assert saved["counters"] == {"steps": 1, "rounds": 1, "steps_at_last_round": 1}
    assert {key: {n: t.tolist() for n, t in part.items()} for key, part in saved["state"].items()} == {
        "global_model": {"weights": [0.5] * 6},
        "velocity": {"weights": [0.5] * 6},
    }


def test_the_state_dict_is_a_copy() -> None:
    def program(rank: Rank) -> bool:
        saved = rank.rounds.state_dict()["state"]["global_model"]["weights"]
        rank.weights += 1.0
        rank.round()
        return saved.tolist() == [0.0] * 6

    assert run(2, program, BMUF()) == [True, True]


def test_the_center_is_in_the_state_dict_after_a_consolidation_alone() -> None:
    def program(rank: Rank) -> list[Any]:
        seen = []
        for intent in (TRAIN, CONSOLIDATE, TRAIN):
            rank.weights += 1.0 + rank.comm.rank
            rank.together(lambda intent=intent: rank.round(intent))
            seen.append(rank.rounds.state_dict()["state"].get("center"))
            if seen[-1] is not None:
                assert torch.equal(seen[-1]["weights"], rank.weights)
        return [center is not None for center in seen]

    assert run(2, program, ElasticAveraging()) == [[False, True, False]] * 2


def test_a_loaded_center_is_where_rounds_go_on() -> None:
    def program(rank: Rank) -> list[float]:
        saved = rank.rounds.state_dict()
        saved["state"]["center"] = {"weights": torch.full((6,), 4.0)}
        rank.rounds.load_state(saved)
        rank.round()
        return rank.weights.tolist()

    # center 4 -> 2 -> 1
    assert run(2, program, ElasticAveraging(alpha=0.5), foreground=True) == [[1.0] * 6, [0.5] * 6]


def test_the_state_of_another_algorithm_gives_counters_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    saved = {
        "algorithm": {"name": "BMUF", "alpha": 1.0},
        "state": {"global_model": {"weights": torch.ones(6)}},
        "counters": {"steps": 40, "rounds": 9, "steps_at_last_round": 38},
    }

    def program(rank: Rank) -> tuple[dict[str, int], list[float]]:
        rank.rounds.load_state(saved)
        rank.round(steps=2)
        return rank.metrics.counters(), rank.weights.tolist()

    with caplog.at_level(logging.WARNING):
        results = run(2, program)
    assert results == [({"steps": 42, "rounds": 9, "steps_at_last_round": 38}, [0.0] * 6)] * 2
    assert "the checkpoint's rounds were BMUF; ModelAveraging goes on from the loaded weights" in caplog.text


# --- which reducer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "options", "expected"),
    [
        (ModelAveraging(), {}, "HostMean"),
        (BMUF(), {}, "HostMean"),
        (ModelAveraging(), {"wire_dtype": torch.bfloat16}, "OwnerMean"),
        (ModelAveraging(), {"foreground": True}, "OwnerMean"),
        (ElasticAveraging(), {}, "ElasticCenter"),
        (ElasticAveraging(), {"foreground": True}, "ElasticInTurn"),
    ],
)
def test_the_reducer_of_one_host(algorithm: Algorithm, options: dict[str, Any], expected: str) -> None:
    assert on_ranks(2, lambda comm: type(Rank(comm, algorithm, **options).rounds._reducer).__name__) == [expected] * 2


def test_hosts_apart_and_new_layouts_reduce_by_messages() -> None:
    def program(comm: Communicator) -> list[str]:
        apart = Rank(Apart(comm), ModelAveraging())
        rank = Rank(comm, ModelAveraging())
        names = [type(each.rounds._reducer).__name__ for each in (apart, rank)]
        rank.rounds.wanted_replica = rank.make_replica(more=torch.full((3,), float(comm.rank)))
        assert rank.round() is not Verdict.ROUND
        rank.weights += comm.rank
        rank.round()
        assert rank.weights.tolist() == [0.5] * 6
        return [*names, type(rank.rounds._reducer).__name__]

    assert on_ranks(2, program) == [["AllReduceMean", "HostMean", "AllReduceMean"]] * 2


@pytest.mark.parametrize(
    ("algorithm", "options", "expected"),
    [
        (ModelAveraging(), {}, "HierarchicalMean"),
        (BMUF(), {"hierarchical": True}, "HierarchicalMean"),
        (ModelAveraging(), {"wire_dtype": torch.float16}, "HierarchicalMean"),
        (ModelAveraging(), {"hierarchical": False}, "AllReduceMean"),
        (ModelAveraging(), {"foreground": True}, "OwnerMean"),
        (ElasticAveraging(), {}, "ElasticCenter"),
    ],
)
@pytest.mark.parametrize("hosts", [[0, 0, 1], [0, 1, 0, 1]], ids=str)
def test_the_reducer_of_several_hosts(
    hosts: list[int], algorithm: Algorithm, options: dict[str, Any], expected: str
) -> None:
    def program(comm: Communicator) -> str:
        return type(Rank(comm, algorithm, **options).rounds._reducer).__name__

    assert local.run(len(hosts), program, hosts=hosts) == [expected] * len(hosts)


def test_a_round_over_several_hosts_by_hand() -> None:
    def program(comm: Communicator) -> tuple[list[float], list[float], int]:
        rank = Rank(comm, ModelAveraging(alpha=0.5))
        rank.weights.fill_(float(comm.rank))
        rank.buffer.fill_(10.0 * comm.rank)
        rank.counter.fill_(7 + comm.rank)
        rank.round()
        found = rank.weights.tolist(), rank.buffer.tolist(), int(rank.counter)
        rank.rounds.free()
        return found

    results = local.run(3, program, hosts=[0, 0, 1])
    assert results == [([0.5] * 6, [5.0] * 2, 7), ([1.0] * 6, [10.0] * 2, 7), ([1.5] * 6, [15.0] * 2, 7)]


# --- how bytes are sent -----------------------------------------------------------------------------------------------


def test_the_search_goes_by_the_rank_whose_rounds_cost_most() -> None:
    """Rank 1 finds eight chunks in flight cheaper, rank 0, which has a shorter way, something else: rank 1's counts."""

    def program(comm: Communicator) -> tuple[list[float], dict[str, float]]:
        rank = Rank(comm, ModelAveraging(), numel=4 << 20, hierarchical=False)
        costs = {0: lambda in_flight: 0.001 * in_flight, 1: lambda in_flight: 0.1 / in_flight}
        rank.rounds._cost_s = lambda *_: costs[comm.rank](rank.metrics.chunks_in_flight)  # type: ignore[method-assign]
        searching = []
        while not searching or searching[-1]:
            rank.round()
            searching.append(rank.metrics.snapshot()["searching"])
        return searching, rank.metrics.snapshot()

    for searching, metrics in local.run(2, program, hosts=[0, 1]):
        assert 20 < len(searching) < 40
        assert (metrics["chunks_in_flight"], metrics["chunk_bytes"], metrics["pause_ms"]) == (8, 1 << 20, 1)


def test_a_rounds_cost_is_its_time_or_its_share_of_the_budget() -> None:
    def program(comm: Communicator) -> list[float]:
        replica = Replica([NamedTensor("weights", torch.zeros(6))])
        plain, paced = (
            Rounds(
                Survivors(comm.dup()),
                replica,
                RoundOptions(ModelAveraging()),
                RoundMetrics(),
                Poller(),
                cpu_budget=budget,
            )
            for budget in (None, 0.02)
        )
        return [plain._cost_s(0.3, 0.01), paced._cost_s(0.3, 0.01), paced._cost_s(0.3, 0.001)]

    assert local.run(2, program, hosts=[0, 1]) == [[0.3, 0.5, 0.3]] * 2


def test_a_new_layout_is_searched_for_anew_and_ends_hierarchical_rounds(caplog: pytest.LogCaptureFixture) -> None:
    def program(comm: Communicator) -> tuple[float, str, list[float], float]:
        rank = Rank(comm, ModelAveraging(), hierarchical=True)
        while not rank.metrics.rounds or rank.metrics.searching:
            rank.round()
            rank.metrics.rounds += 1
        before = rank.metrics.chunk_bytes
        rank.rounds.wanted_replica = rank.make_replica(more=torch.full((3,), float(comm.rank)))
        assert rank.round() is not Verdict.ROUND
        assert rank.metrics.searching
        rank.weights += comm.rank
        rank.round()
        return before, type(rank.rounds._reducer).__name__, rank.weights.tolist(), rank.metrics.chunk_bytes

    with caplog.at_level(logging.WARNING):
        results = local.run(8, program, hosts=[0] * 4 + [1] * 4)
    assert results == [(1 << 20, "AllReduceMean", [3.5] * 6, 4 << 20)] * 8
    assert "hierarchical=True: parameters were added, from here on every rank sends its own" in caplog.text


@pytest.mark.parametrize("hosts", [[0, 0, 1], [0, 1, 0, 1]], ids=str)
def test_what_follows_a_round_over_several_hosts(hosts: list[int]) -> None:
    """Consolidation, another beginning in the same memory, and a rank that does not count any more."""
    size = len(hosts)

    def program(comm: Communicator) -> list[list[float]]:
        rank = Rank(comm, ModelAveraging())
        seen = []
        for turn in range(3):
            rank.weights.fill_(float(comm.rank + turn))
            rank.round()
            seen.append(rank.weights.tolist())
            rank.weights += comm.rank
            assert isinstance(rank.round(CONSOLIDATE, steps=0), Staged)
            seen.append(rank.weights.tolist())
            rank.rounds.begin(rank.replica)
        return seen

    mean = (size - 1) / 2
    expected = [[value] * 6 for turn in range(3) for value in (mean + turn, 2 * mean + turn)]
    for seen in local.run(size, program, hosts=hosts):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))


@pytest.mark.parametrize(("wire_dtype", "width"), [(None, 4), (torch.float16, 2)], ids=str)
def test_bytes_between_hosts_follow_the_wire(wire_dtype: torch.dtype | None, width: int) -> None:
    def program(comm: Communicator) -> float:
        rank = Rank(comm, ModelAveraging(), numel=998, wire_dtype=wire_dtype)  # and two of a buffer
        rank.round()
        return rank.metrics.bytes_sent

    assert local.run(4, program, hosts=[0, 0, 1, 1]) == [1000 * width, 0] * 2


def test_one_host_without_shared_memory_is_enough_for_messages() -> None:
    def program(comm: Communicator) -> str:
        split = comm.split
        if comm.rank > 1:
            comm.split = lambda color: Apart(split(color)) if color else split(color)  # type: ignore
        rank = Rank(comm, ModelAveraging())
        rank.weights.fill_(float(comm.rank))
        rank.round()
        assert rank.weights.tolist() == [1.5] * 6
        return type(rank.rounds._reducer).__name__

    def undisturbed(comm: Communicator) -> str:
        comm.dup = lambda: comm  # type: ignore[method-assign]
        return program(comm)

    assert local.run(4, undisturbed, hosts=[0, 0, 1, 1]) == ["AllReduceMean"] * 4


@pytest.mark.parametrize("options", [{"foreground": True}, {"wire_dtype": torch.float16}], ids=str)
def test_rounds_in_inference_mode_leave_nothing_that_disturbs_later_ones(options: dict[str, Any]) -> None:
    def program(rank: Rank) -> list[float]:
        rank.weights.fill_(float(rank.comm.rank))
        with torch.inference_mode():
            rank.round(CONSOLIDATE, steps=0)
            rank.round()
        rank.weights += rank.comm.rank
        rank.round()
        rank.round(CONSOLIDATE, steps=0)
        return rank.weights.tolist()

    for weights in run(2, program, **options):
        assert weights == pytest.approx([1.0] * 6, abs=1e-2)


def test_foreground_rounds_do_not_search() -> None:
    def program(rank: Rank) -> float:
        rank.round()
        return rank.metrics.snapshot()["searching"]

    assert run(2, program, foreground=True) == [0.0] * 2


def test_rounds_that_are_not_sent_in_chunks_choose_nothing() -> None:
    def program(rank: Rank) -> dict[str, float]:
        rank.round()
        return rank.metrics.snapshot()

    for metrics in run(2, program):
        assert math.isnan(metrics["chunk_bytes"])
        assert metrics["searching"] == 0
