"""Ranks that take the place of lost ones, whatever is lost at any moment; ranks are threads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_as_threads import TIMEOUT_S, batch, flat, loss_of, make_model
from torch import Tensor

from hvd_shadowsync import BMUF, Checkpointer, ElasticAveraging, ModelAveraging, ShadowSync, ending
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.echo import EchoCommunicator
from hvd_shadowsync.comm.survivors import Survivors

ALGORITHMS = [ModelAveraging(), ElasticAveraging(), BMUF(block_momentum=0.2, nesterov=True)]
DRIVERS: list[dict[str, Any]] = [{"sync_every": 1}, {"sync_every": 1, "foreground": True}]
STEPS, LATE = 6, 10**9
Outcome = tuple[int, int, int, Tensor]
"""How many ranks are left, how many were lost and replaced, as this one knows, the weights."""


def step(sync: ShadowSync, model: torch.nn.Module, number: int) -> None:
    sync.optimizer.zero_grad()
    loss_of(model, batch(sync.shard, number)).backward()
    sync.optimizer.step()
    time.sleep(0.001)


def job(comm: Communicator, *, replaced: int, **options: Any) -> Outcome:
    """Train until so many ranks were replaced, and some steps more; those that replace them only these."""
    model = make_model(seed=comm.rank)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    with ShadowSync(optimizer, model=model, communicator=comm, stall_warning_s=None, **options) as sync:
        assert sync.num_shards == comm.size
        assert sync.gather(7) == [7] * sync.size
        deadline, number = time.monotonic() + TIMEOUT_S / 2, 0
        while not isinstance(comm, EchoCommunicator) and sync.metrics()["ranks_replaced"] < replaced:
            assert time.monotonic() < deadline, "nobody has come"
            step(sync, model, number)
            number += 1
        for more in range(STEPS):
            step(sync, model, number + more)
        sync.synchronize()
        metrics = sync.metrics()
        return sync.size, int(metrics["ranks_lost"]), int(metrics["ranks_replaced"]), flat(model)


def run(size: int, kill: Mapping[int, int], *, spares: int, replaced: int, **options: Any) -> list[Outcome]:
    """Return what became of those that are left."""
    program = lambda comm: job(comm, replaced=replaced, **options)  # noqa: E731
    ended = local.run(size, program, timeout_s=TIMEOUT_S, kill=kill, spares=spares)
    return [each for each in ended if each is not None]


def has_replaced(sync: ShadowSync) -> bool:
    return sync.metrics()["ranks_replaced"] == 1


def require_alike(ended: list[Outcome]) -> None:
    """Fail unless those that have seen the last loss, which others may have left before, have the same weights."""
    left = min(count for count, *_ in ended)
    alike = [weights for count, *_, weights in ended if count == left]
    assert all(torch.isfinite(weights).all() for *_, weights in ended)
    assert all(torch.equal(alike[0], weights) for weights in alike)


@pytest.mark.parametrize("driver", DRIVERS, ids=["background", "foreground"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.leaves_threads
def test_whenever_a_rank_is_lost_another_takes_its_place(
    victim: int, algorithm: Algorithm, driver: dict[str, Any]
) -> None:
    """In its calls of the construction, of the beginning of rounds, and of rounds."""
    for call in [*range(2, 40, 4), *range(40, 90, 12)]:
        ended = run(3, {victim: call}, spares=1, replaced=1, algorithm=algorithm, **driver)
        assert [count for count, *_ in ended] == [3, 3, 3], f"call {call}"
        assert sorted(replaced for _, _, replaced, _ in ended) == [0, 1, 1]
        require_alike(ended)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.leaves_threads
def test_whenever_the_new_one_is_lost_the_next_takes_its_place(algorithm: Algorithm) -> None:
    """In each of its first calls; rank 0 is lost first, so that a rank that was not the first takes it in."""
    for call in range(1, 40):
        ended = run(3, {0: 40, 3: call}, spares=2, replaced=1, algorithm=algorithm, sync_every=1)
        assert len(ended) >= 2, f"call {call}"
        require_alike(ended)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("second", [0, 2], ids=["the first", "another"])
@pytest.mark.leaves_threads
def test_whenever_a_second_rank_is_lost_meanwhile_the_others_end_alike(second: int, algorithm: Algorithm) -> None:
    for call in range(42, 150, 3):
        ended = run(3, {1: 40, second: call}, spares=3, replaced=1, algorithm=algorithm, sync_every=1)
        assert len(ended) >= 2, f"call {call}"
        require_alike(ended)


def test_what_the_new_one_gets() -> None:
    """Weights, momentum, the optimizer's state and the steps are those of the others when it is taken in."""

    def program(comm: Communicator) -> Any:
        model = make_model(seed=comm.rank, batch_norm=False)
        model.register_buffer("scale", torch.tensor([1.0 + isinstance(comm, EchoCommunicator)]))
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
        sync = ShadowSync(
            optimizer, model=model, communicator=comm, algorithm=BMUF(block_momentum=0.5), sync_every=1,
            foreground=True, stall_warning_s=None, sync_buffers=False,
        )  # fmt: skip
        new = isinstance(comm, EchoCommunicator)
        if new:
            optimizer.param_groups[0]["lr"] = 0.0  # until it has joined: it takes the others' rate over as well
        for number in range(4):
            step(sync, model, number)
        if comm.rank == 2 and not new:
            assert isinstance(comm, local.LocalCommunicator)
            comm.die()
        while not new and sync.metrics()["ranks_replaced"] < 1:
            time.sleep(0.001)
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
        steps = sync.steps
        sync.synchronize()
        sums = [optimizer.state[param]["sum"].clone() for param in model.parameters()]
        state = sync.state_dict()["state"]["velocity"]
        done = steps, sums, state, float(model.scale), optimizer.param_groups[0]["lr"], sync.shard
        sync.close()
        return done

    first, _, lost, new = local.run(3, program, timeout_s=TIMEOUT_S, kill={}, spares=1)
    assert lost is None
    assert new[0] > 4
    assert all((mine >= theirs - 1e-6).all() for mine, theirs in zip(new[1], first[1], strict=True))
    assert all(torch.equal(new[2][name], first[2][name]) for name in first[2])
    assert new[3:] == (1.0, 0.02, 2)


@pytest.mark.parametrize("driver", DRIVERS, ids=["background", "foreground"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.leaves_threads
def test_collective_calls_by_the_number_of_steps_are_made_together_with_the_new_one(
    victim: int, algorithm: Algorithm, driver: dict[str, Any]
) -> None:
    """Whatever the others were doing when it was taken in: in a step, or in a call, or between two of one step."""

    def program(comm: Communicator, every: int, calls: int) -> int:
        new, model = isinstance(comm, EchoCommunicator), make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {**driver, "algorithm": algorithm, "communicator": comm, "stall_warning_s": None}
        with ShadowSync(optimizer, model=model, **options) as sync:
            together = 0
            while together < 4:
                step(sync, model, sync.steps)
                if comm.rank == victim and not new and sync.steps == 3:
                    comm.die()  # type: ignore[attr-defined]
                for call in range(calls) if sync.steps % every == 0 else ():
                    said = sync.gather((sync.steps, call, new))
                    assert len({each[:2] for each in said}) == 1, said
                    together += any(each[2] for each in said)
                    if call == 0:
                        sync.synchronize()
        return together

    for every, calls in ((1, 1), (1, 2), (2, 1), (5, 2), (7, 1)):
        ended = local.run(3, lambda comm: program(comm, every, calls), timeout_s=TIMEOUT_S, kill={}, spares=1)  # noqa: B023
        assert ended == [None if number == victim else 4 for number in range(4)], f"every {every} steps, {calls}"


@pytest.mark.parametrize("told", ["first", "new"])
@pytest.mark.leaves_threads
def test_all_end_when_one_is_told_to_after_another_has_joined(told: str, tmp_path: Path) -> None:
    """By its checkpointer, which all ranks know each other's of, that of the new one as well."""

    def program(comm: Communicator) -> float:
        new, model = isinstance(comm, EchoCommunicator), make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, stall_warning_s=None)
        checkpointer = Checkpointer(tmp_path, model, sync, every_s=1e9, end_signals=())
        with suppress(SystemExit):
            for number in range(LATE):
                step(sync, model, number)
                if comm.rank == 1 and not new and number == 2:
                    comm.die()  # type: ignore[attr-defined]
                if (told == "new") == new and comm.rank in (0, 2) and sync.size == 3 and (new or has_replaced(sync)):
                    checkpointer.stop()
        return checkpointer.metrics()["checkpoints"]

    ended = local.run(3, program, timeout_s=TIMEOUT_S, kill={}, spares=1)
    assert ended == [1, None, 0, 0]


def test_a_job_that_is_over_before_the_new_one_is_ready() -> None:
    """It ends, though its program is in its first step."""
    kills: list[bool] = []

    def program(comm: Communicator) -> int:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, stall_warning_s=None)
        if isinstance(comm, EchoCommunicator):
            while not kills:
                time.sleep(0.001)
        for number in range(STEPS):
            step(sync, model, number)
            if comm.rank == 1 and number == 2 and not isinstance(comm, EchoCommunicator):
                assert isinstance(comm, local.LocalCommunicator)
                comm.die()
        while sync.metrics()["ranks_lost"] < 1:
            step(sync, model, 0)
        for number in range(STEPS):
            step(sync, model, number)
        sync.close()
        kills.append(True)
        return sync.size

    assert local.run(2, program, timeout_s=TIMEOUT_S, kill={}, spares=1) == [1, None, None]


def test_the_new_one_knows_who_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that it replaces: MPI_Finalize may wait for either."""
    monkeypatch.setattr(ending, "_LOST", lost := set[int]())
    monkeypatch.setattr(ending, "_REPLACED", replaced := set[int]())
    left = local.LocalCommunicator(local.world(4, kill={})[0]._shared.of([2]), 0)
    assert Survivors(left, everyone=range(4)).join(lambda comm: comm.members) == (2,)
    assert (lost, replaced) == ({0, 1, 2, 3}, {2})


@pytest.mark.leaves_threads
def test_one_that_does_not_answer_when_all_have_come_to_take_it_in_joins_later(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(local.LocalReserve, "answers", lambda *_: next(answers))
    ended = run(3, {1: 40}, spares=1, replaced=1, sync_every=1)
    assert [count for count, *_ in ended] == [3, 3, 3]
    assert next(answers, None) is None


def test_spares_that_nobody_calls_end_with_the_others() -> None:
    assert local.run(2, lambda comm: comm.rank, timeout_s=TIMEOUT_S, kill={}, spares=2) == [0, 1, None, None]


def test_collective_calls_of_one_that_has_not_joined_are_answered_by_itself() -> None:
    echo = EchoCommunicator(range(3), lambda _: None)  # type: ignore[arg-type,return-value]
    value, out = torch.tensor([1.0, 2.0]), torch.empty(6)
    assert echo.iallgather(value, out).test()
    assert out.tolist() == [1.0, 2.0] * 3
    assert echo.iallreduce(value).test()
    assert value.tolist() == [3.0, 6.0]
    assert echo.ialltoall(torch.tensor([1.0, 2.0, 3.0]), (blocks := torch.empty(3))).test()
    assert blocks.tolist() == [3.0] * 3, "as rank 2 of ranks that all send the same"
    assert echo.ibcast(value, 0).test()
    assert (echo.rank, echo.size, echo.allgather_object("me")) == (2, 3, ["me"] * 3)
    assert echo.dup().size == 3
