"""The handle: what stays of the user's optimizer, its life from construction to close(), and what ranks agree on."""

from __future__ import annotations

import collections
import copy
import gc
import itertools
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ranks_as_threads import (
    Lockstep,
    Slopes,
    await_rounds,
    batch,
    content,
    flat,
    identical_everywhere,
    loss_of,
    make_model,
    on_ranks,
    same,
    sgd,
    train,
)
from torch import Tensor

from hvd_shadowsync import (
    BMUF,
    CheckpointError,
    ElasticAveraging,
    ModelAveraging,
    ReplicaMismatchError,
    ShadowSync,
    ShadowSyncError,
    checkpoint,
    pacing,
)
from hvd_shadowsync import rounds as rounds_module
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm import job
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.local import LocalCommunicator
from hvd_shadowsync.embedding import SGD, EmbeddingTable, ShardedEmbeddingBag
from hvd_shadowsync.pacing import Pacing
from hvd_shadowsync.shadow import ShadowThread, serving_pauses

ALGORITHMS: list[Algorithm] = [
    ModelAveraging(),
    ModelAveraging(alpha=0.5),
    ElasticAveraging(),
    BMUF(),
    BMUF(block_momentum=0.2, nesterov=True),
]
FOREGROUND: dict[str, Any] = {"sync_every": 1, "foreground": True}
BACKGROUND: dict[str, Any] = {"sync_every": 1}
DRIVERS = pytest.mark.parametrize("driver", [BACKGROUND, FOREGROUND], ids=["background", "foreground"])
NEVER: dict[str, Any] = {"sync_every": 10**9, "foreground": True}


# --- the user's own optimizer -----------------------------------------------------------------------------------------


@DRIVERS
def test_the_optimizer_is_the_same_object_with_the_same_parts(driver: dict[str, Any]) -> None:
    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        train(model, optimizer, 2)
        parts = [optimizer.state, optimizer.defaults, optimizer.param_groups, optimizer.param_groups[0]["params"]]
        momenta = {id(value["momentum_buffer"]) for value in optimizer.state.values()}
        kind, attributes = type(optimizer), set(vars(optimizer))
        sync = ShadowSync(optimizer, model=model, communicator=comm, **driver)
        assert sync.optimizer is optimizer
        assert optimizer.shadow is sync
        train(model, optimizer, 3)
        again = [optimizer.state, optimizer.defaults, optimizer.param_groups, optimizer.param_groups[0]["params"]]
        assert all(one is other for one, other in zip(parts, again, strict=True))
        assert {id(value["momentum_buffer"]) for value in optimizer.state.values()} == momenta
        sync.close()
        assert type(optimizer) is kind
        assert set(vars(optimizer)) == attributes

    on_ranks(2, program)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_copy_is_a_plain_optimizer_with_the_same_state(size: int, copied: Callable[[Any], Any]) -> None:
    """Copied together with the model; it trains on as a plain one does, and the handle does not notice."""

    def program(comm: Communicator) -> None:
        model = make_model(batch_norm=False)
        optimizer = sgd(model, momentum=0.9)
        with ShadowSync(optimizer, model=model, communicator=comm, **NEVER) as sync:
            train(model, optimizer, 3)
            twin, twins = copied((model, optimizer))
            assert type(twins) is torch.optim.SGD
            assert not hasattr(twins, "shadow")
            assert "shadow_sync" not in twins.state_dict()
            steps = sync.metrics()["steps"]
            train(twin, twins, 3, first=3)
            assert sync.metrics()["steps"] == steps
            train(model, optimizer, 3, first=3)
            assert same(content(twin), content(model))

    on_ranks(size, program)


@DRIVERS
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_state_dict_round_trip_through_pickle(algorithm: Algorithm, driver: dict[str, Any]) -> None:
    """What is loaded comes out again: the optimizer's state as it is, the rounds' counters as they were."""

    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **driver) as sync:
            train(model, optimizer, 6, stream=comm.rank)
            sync.synchronize()
            weights, saved = content(model), optimizer.state_dict()
            before = {key: value for key, value in sync.metrics().items() if key in ("steps", "rounds")}
        saved = pickle.loads(pickle.dumps(saved))
        assert set(saved) == {"state", "param_groups", "shadow_sync"}
        model = make_model(7)
        optimizer = sgd(model, lr=9.0)
        model.load_state_dict(weights)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **driver) as sync:
            optimizer.load_state_dict(saved)
            assert_states_equal(optimizer.state_dict(), saved)
            assert optimizer.param_groups[0]["lr"] == 0.1
            sync.pause()
            train(model, optimizer, 1, stream=comm.rank, first=6)
            after = sync.metrics()
            assert (after["steps"], after["rounds"]) == (before["steps"] + 1, before["rounds"])

    on_ranks(2, program)


def assert_states_equal(left: Any, right: Any) -> None:
    """Compare nested dicts of tensors, exactly."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_states_equal(left[key], right[key])
    elif isinstance(left, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("size", [1, 2])
def test_hooks_of_the_user_are_kept(size: int) -> None:
    """Registered before or after the wrap, they fire once a step, with the user's arguments, and outlive close()."""

    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("early pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("early post"))
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state"))
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
        with ShadowSync(optimizer, model=model, communicator=comm, **FOREGROUND):
            optimizer.register_step_pre_hook(lambda *_: calls.append("late pre"))
            optimizer.register_step_post_hook(lambda *_: calls.append("late post"))
            for _ in range(3):
                calls.clear()
                train(model, optimizer, 1)
                assert calls == ["early pre", "late pre", "early post", "late post"]
            calls.clear()
            optimizer.load_state_dict(optimizer.state_dict())
            assert calls == ["state", "load"]
        calls.clear()
        train(model, optimizer, 1)
        assert calls == ["early pre", "late pre", "early post", "late post"]

    on_ranks(size, program)


def test_a_hook_of_the_user_that_changes_weights_is_part_of_the_step() -> None:
    """A post hook made before the wrap (weight clipping, say) runs before the round's snapshot."""

    def program(comm: Communicator) -> list[float]:
        slopes = Slopes(comm.rank)
        slopes.optimizer.register_step_post_hook(lambda *_: slopes.weights.data.fill_(4.0 * comm.rank))
        with ShadowSync(slopes.optimizer, communicator=comm, **FOREGROUND):
            slopes.step()
            return slopes.weights.detach().unique().tolist()

    assert on_ranks(2, program) == [[2.0], [2.0]]


# --- a world of one ---------------------------------------------------------------------------------------------------


class Silent(LocalCommunicator):
    """The only rank of a world, in which nobody may say anything."""

    def __init__(self) -> None:
        self.rank, self.size, self.members = 0, 1, (0,)
        self.outlives_ranks = False

    def _join(self, kind: str, deposit: Any, combine: Any) -> Any:
        raise AssertionError(f"{kind} at world size 1")

    isend = irecv = probe = allgather_object = _join  # type: ignore[assignment]

    def dup(self) -> Communicator:
        return Silent()


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("driver", [{}, BACKGROUND, FOREGROUND, {"sync_every": 1, "apply": "hogwild"}], ids=str)
def test_alone_there_is_no_thread_no_traffic_and_no_difference(
    algorithm: Algorithm, driver: dict[str, Any], warmup_steps: int
) -> None:
    plain, model = make_model(), make_model()
    train(plain, sgd(plain, momentum=0.9), 8)
    optimizer = sgd(model, momentum=0.9)
    threads = set(threading.enumerate())
    options: dict[str, Any] = {"algorithm": algorithm, "warmup_steps": warmup_steps, **driver}
    with ShadowSync(optimizer, model=model, communicator=Silent(), **options) as sync:
        train(model, optimizer, 4)
        sync.pause()
        sync.synchronize()
        with sync.averaged_weights():
            pass
        train(model, optimizer, 2, first=4)
        sync.resume()
        sync.load_state_dict(sync.state_dict())
        sync.average_optimizer_state()
        assert sync.gather("me") == ["me"]
        assert (sync.rank, sync.size) == (0, 1)
        assert sync.metrics(merged=True)["bytes_sent"] == 0
        train(model, optimizer, 2, first=6)
        assert set(threading.enumerate()) == threads
        saved = optimizer.state_dict()
        assert set(saved) == {"state", "param_groups", "shadow_sync"}
        assert saved["shadow_sync"]["state"] == {}
        assert saved["shadow_sync"]["counters"]["steps"] == 8
    assert same(content(model), content(plain))


def test_a_checkpoint_goes_through_a_world_of_one() -> None:
    """Counters go on; what rounds remembered of the weights is void once they are trained alone."""

    def program(comm: Communicator) -> dict[str, Any]:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        algorithm = BMUF(block_momentum=0.2)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **FOREGROUND) as sync:
            train(model, optimizer, 6, stream=comm.rank)
            sync.synchronize()
            return copy.deepcopy(optimizer.state_dict())

    saved = on_ranks(2, program)[0]
    model = make_model()
    optimizer = sgd(model, momentum=0.9)
    with ShadowSync(optimizer, model=model, communicator=Silent()) as sync:
        optimizer.load_state_dict(saved)
        train(model, optimizer, 4)
        assert (sync.metrics()["steps"], sync.metrics()["rounds"]) == (10, 6)
        rounds = optimizer.state_dict()["shadow_sync"]
    assert rounds["counters"]["steps"] == 10
    assert rounds["algorithm"] == saved["shadow_sync"]["algorithm"]
    assert rounds["state"] == {}


# --- several handles --------------------------------------------------------------------------------------------------


@DRIVERS
def test_two_optimizers_of_a_gan(driver: dict[str, Any]) -> None:
    """Steps of one do not move the other, and each has rounds, pauses and an end of its own."""

    def program(comm: Communicator) -> None:
        generator, critic = make_model(comm.rank), make_model(10 + comm.rank)
        making, judging = sgd(generator), torch.optim.Adam(critic.parameters(), lr=0.01)
        left = ShadowSync(making, model=generator, communicator=comm, **driver)
        right = ShadowSync(judging, model=critic, communicator=comm, algorithm=BMUF(), **driver)
        assert making.shadow is left
        assert judging.shadow is right
        for step in range(10):
            train(generator, making, 1, stream=comm.rank, first=step)
            if step % 2:
                train(critic, judging, 1, stream=comm.rank, first=step)
        assert (left.metrics()["steps"], right.metrics()["steps"]) == (10, 5)
        other = content(critic)
        right.pause()
        left.synchronize()
        left.close()
        assert not hasattr(making, "shadow")
        assert driver is BACKGROUND or same(content(critic), other)
        right.resume()
        train(critic, judging, 5, stream=comm.rank)
        right.synchronize()
        assert identical_everywhere(right, generator)
        assert identical_everywhere(right, critic)
        right.close()

    on_ranks(2, program)


def test_one_handle_after_the_other() -> None:
    def program(comm: Communicator) -> None:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        for algorithm in ALGORITHMS:
            with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **BACKGROUND) as sync:
                train(model, optimizer, 3, stream=comm.rank)
                sync.synchronize()
                assert identical_everywhere(sync, model)

    on_ranks(2, program)


def settle(comm: Communicator, sync: ShadowSync, slopes: Slopes, rounds: int = 3) -> None:
    """Take steps that move nothing until so many more rounds are merged: what was done before is averaged by then."""
    comm.allgather_object(None)  # nobody waits in a call of the handle while others step: it would not count
    target = sync.metrics()["rounds"] + rounds
    while sync.metrics()["rounds"] < target:
        slopes.step(0.0)
        time.sleep(0.0005)


# --- parameters that are added ----------------------------------------------------------------------------------------


@DRIVERS
def test_parameters_added_later_start_from_rank_0s_and_old_ones_go_on(driver: dict[str, Any]) -> None:
    """The old weights' mean is moved by nothing but their steps; the new ones become equal."""

    def program(comm: Communicator) -> tuple[float, Tensor, Tensor]:
        slopes = Slopes(comm.rank)
        extra = torch.nn.Parameter(torch.full((5,), comm.rank + 3.0))
        with ShadowSync(slopes.optimizer, communicator=comm, **driver) as sync:
            for _ in range(4):
                slopes.step()
            slopes.optimizer.add_param_group({"params": [extra], "lr": 0.5})
            for _ in range(4):
                extra.grad = torch.zeros(5)
                slopes.step()
            settle(comm, sync, slopes)
            sync.synchronize()
            return slopes.optimizer.param_groups[1]["lr"], slopes.weights.detach() - slopes.moved(8 * 1.5), extra

    for lr, error, extra in on_ranks(2, program):
        assert lr == 0.5
        assert error.abs().max() < 1e-5
        assert extra.tolist() == [3.0] * 5


@DRIVERS
@pytest.mark.parametrize("call", ["synchronize", "averaged_weights", "end"])
@pytest.mark.parametrize("steps", [0, 3])
def test_parameters_added_right_before_a_collective_call_are_in_it(
    steps: int, call: str, driver: dict[str, Any]
) -> None:
    def program(comm: Communicator) -> list[list[float]]:
        slopes, extra = Slopes(comm.rank), torch.nn.Parameter(torch.full((3,), 1.0 + comm.rank))
        with ShadowSync(slopes.optimizer, communicator=comm, **driver) as sync:
            for _ in range(steps):
                slopes.step()
            slopes.optimizer.add_param_group({"params": [extra]})
            if call == "averaged_weights":
                with sync.averaged_weights():
                    return sync.gather(extra.tolist())
            getattr(sync, call)()
            return sync.gather(extra.tolist())

    assert on_ranks(2, program) == [[[1.0] * 3] * 2] * 2


@pytest.mark.parametrize("algorithm", [BMUF(block_momentum=0.2), ElasticAveraging()], ids=str)
def test_parameters_added_before_the_first_step(algorithm: Algorithm) -> None:
    def program(comm: Communicator) -> list[float]:
        slopes = Slopes(comm.rank)
        extra = torch.nn.Parameter(torch.full((2,), comm.rank + 3.0))
        with ShadowSync(slopes.optimizer, communicator=comm, algorithm=algorithm, **BACKGROUND) as sync:
            slopes.optimizer.add_param_group({"params": [extra]})
            for _ in range(5):
                slopes.step()
            sync.synchronize()
            assert len({tuple(each.tolist()) for each in sync.gather(slopes.weights.detach())}) == 1
            return extra.tolist()

    assert on_ranks(2, program) == [[3.0] * 2] * 2


@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF(block_momentum=0.2), ElasticAveraging()], ids=str)
def test_parameters_added_at_different_steps(algorithm: Algorithm) -> None:
    """Rounds wait until all ranks have them."""

    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        extra = torch.nn.Parameter(torch.full((2,), float(comm.rank)))
        with ShadowSync(slopes.optimizer, communicator=comm, algorithm=algorithm, **BACKGROUND) as sync:
            for step in range(12):
                if step == 2 + 5 * comm.rank:
                    slopes.optimizer.add_param_group({"params": [extra]})
                slopes.step()
            sync.synchronize()
            everyone = sync.gather((slopes.weights.tolist(), extra.tolist()))
            assert everyone[0] == everyone[1]
            assert everyone[0][1] == [0.0, 0.0]

    on_ranks(2, program)


@DRIVERS
def test_parameters_added_on_one_rank_only_are_an_error_on_all(
    driver: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_module, "MISMATCH_TIMEOUT_S", 0.2)

    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        extra = torch.nn.Parameter(torch.zeros(2))
        sync = ShadowSync(slopes.optimizer, communicator=comm, **driver)
        slopes.step()
        if comm.rank == 0:
            slopes.optimizer.add_param_group({"params": [extra]})
        with pytest.raises(ShadowSyncError) as caught:
            for _ in range(2000):
                slopes.step()
                time.sleep(0.001)
        error = caught.value if driver is FOREGROUND else caught.value.__cause__
        assert isinstance(error, ReplicaMismatchError)
        assert "call add_param_group with the same parameters on every rank" in str(error)
        del sync

    on_ranks(2, program)


def test_parameters_that_were_replaced_are_an_error() -> None:
    def program(comm: Communicator) -> None:
        model = make_model(batch_norm=False)
        optimizer = sgd(model)
        sync = ShadowSync(optimizer, model=model, communicator=comm, **BACKGROUND)
        train(model, optimizer, 2, stream=comm.rank)
        model[2] = torch.nn.Linear(5, 1)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        train(model, optimizer, 2, stream=comm.rank)
        with pytest.raises(ShadowSyncError, match=r"in place of 2\.weight \(2 of 4 were replaced\).*make a new one"):
            sync.synchronize()
        sync.close()
        with ShadowSync(optimizer, model=model, communicator=comm, **BACKGROUND) as sync:
            train(model, optimizer, 2, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(2, program)


# --- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(ModelAveraging):
    """Model averaging that fails."""

    def update(self, reduced: Tensor, state: Any) -> Any:
        raise ArithmeticError("no mean today")


def failed(comm: Communicator) -> tuple[Slopes, ShadowSync]:
    """Return a handle whose shadow thread has failed, but nobody has heard of it."""
    slopes = Slopes(comm.rank)
    sync = ShadowSync(slopes.optimizer, communicator=comm, algorithm=Broken(), **BACKGROUND)
    slopes.step()
    deadline = time.monotonic() + 10
    while sync._course.driver._failure is None and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.001)
    return slopes, sync


def test_an_error_in_the_shadow_thread_is_raised_in_the_next_step() -> None:
    def program(comm: Communicator) -> str:
        slopes, _ = failed(comm)
        before = slopes.weights.detach().clone()
        with pytest.raises(ShadowSyncError, match="shadow thread failed after 0 rounds, at step 2") as caught:
            slopes.step()
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert caught.value.__cause__.__traceback__ is not None
        assert not torch.equal(slopes.weights, before)  # the step itself was taken
        return str(caught.value)

    assert all("ArithmeticError: no mean today" in message for message in on_ranks(2, program))


@pytest.mark.parametrize("call", ["synchronize", "close", "pause", "state_dict"])
def test_an_error_in_the_shadow_thread_is_raised_in_calls(call: str) -> None:
    def program(comm: Communicator) -> None:
        _, sync = failed(comm)
        with pytest.raises(ShadowSyncError, match="no mean today") as caught:
            getattr(sync, call)()
        assert isinstance(caught.value.__cause__, ArithmeticError)

    on_ranks(2, program)


def test_training_goes_on_without_us_after_an_error_and_close() -> None:
    """Who catches the error and closes the handle has a plain optimizer again."""

    def program(comm: Communicator) -> None:
        slopes, sync = failed(comm)
        with pytest.raises(ShadowSyncError):
            slopes.step()
        with pytest.raises(ShadowSyncError):
            sync.close()
        sync.close()
        slopes.step()
        assert not hasattr(slopes.optimizer, "shadow")
        torch.testing.assert_close(slopes.weights.detach(), slopes.moved(3 * (comm.rank + 1)))

    on_ranks(2, program)


def test_an_error_in_foreground_rounds_is_raised_as_it_is() -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        ShadowSync(slopes.optimizer, communicator=comm, algorithm=Broken(), **FOREGROUND)
        with pytest.raises(ArithmeticError, match="no mean today"):
            slopes.step()

    on_ranks(2, program)


# --- the end ----------------------------------------------------------------------------------------------------------

COLLECTIVE_CALLS: dict[str, Callable[[ShadowSync], object]] = {
    "pause()": lambda sync: sync.pause(),
    "resume()": lambda sync: sync.resume(),
    "synchronize()": lambda sync: sync.synchronize(),
    "averaged_weights()": lambda sync: sync.averaged_weights().__enter__(),
    "average_optimizer_state()": lambda sync: sync.average_optimizer_state(),
    "gather": lambda sync: sync.gather(1),
    "synchronize() of state_dict": lambda sync: sync.state_dict(),
    "load_state_dict()": lambda sync: sync.load_state_dict({}),
}


@pytest.mark.parametrize("size", [1, 2])
def test_calls_after_close_raise_and_the_optimizer_is_plain(size: int) -> None:
    def program(comm: Communicator) -> None:
        model = make_model(batch_norm=False)
        optimizer = sgd(model)
        sync = ShadowSync(optimizer, model=model, communicator=comm, **FOREGROUND)
        train(model, optimizer, 3, stream=comm.rank)
        sync.close()
        sync.close()
        for name, call in COLLECTIVE_CALLS.items():
            with pytest.raises(ShadowSyncError, match=r"came after close\(\); make a new ShadowSync") as caught:
                call(sync)
            assert str(caught.value).startswith(name.split(" of ")[0])
        assert sync.metrics()["steps"] == 3
        with sync:
            pass
        plain = copy.deepcopy(model)
        train(plain, sgd(plain), 3, stream=comm.rank)
        train(model, optimizer, 3, stream=comm.rank)
        assert same(content(model), content(plain))
        assert set(optimizer.state_dict()) == {"state", "param_groups"}
        for name in ("shadow", "synchronize", "skip_synchronize"):
            assert not hasattr(optimizer, name)

    on_ranks(size, program)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_close_merges_the_round_under_way_and_ends_the_thread(algorithm: Algorithm) -> None:
    def program(comm: Communicator) -> set[str]:
        slopes = Slopes(comm.rank)
        sync = ShadowSync(slopes.optimizer, communicator=comm, algorithm=algorithm, **BACKGROUND)
        for _ in range(5):
            slopes.step()
        thread = sync._course.driver._thread  # type: ignore[union-attr]
        assert thread.is_alive()
        sync.close()
        assert not thread.is_alive()
        return {"done"}

    assert on_ranks(2, program) == [{"done"}] * 2


def test_close_waits_for_ranks_that_train_on() -> None:
    """Rank 0 leaves early, and has no step that is not averaged yet: rank 1's rounds go on without counting it."""

    def program(comm: Communicator) -> float:
        slopes = Slopes(comm.rank)
        sync = ShadowSync(slopes.optimizer, communicator=comm, **BACKGROUND)
        lockstep = Lockstep(sync)
        for _ in range(4):
            slopes.step()
            lockstep()
        if comm.rank == 1:
            for _ in range(6):
                slopes.step()
                lockstep()
        sync.close()
        return float(((slopes.weights.detach() - slopes.start) / slopes.direction).mean()) / slopes.lr

    assert on_ranks(2, program) == [pytest.approx(4 * 1.5 + 6 * 2, abs=1e-3)] * 2


@DRIVERS
def test_the_context_closes(driver: dict[str, Any]) -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **driver) as sync:
            slopes.step()
        with pytest.raises(ShadowSyncError):
            sync.synchronize()

    on_ranks(2, program)


def test_an_exception_in_the_context_reaches_the_caller_and_the_others_train_on() -> None:
    """The rank that failed does not wait in the context's end; its thread goes on answering until it may leave."""

    def program(comm: Communicator) -> float:
        slopes = Slopes(comm.rank)
        sync = ShadowSync(slopes.optimizer, communicator=comm, **BACKGROUND)
        if comm.rank == 0:
            with pytest.raises(ZeroDivisionError, match="by the user"), sync:
                for _ in range(3):
                    slopes.step()
                raise ZeroDivisionError("by the user")
            rounds = 0.0
        else:
            with sync:
                for _ in range(3):
                    slopes.step()
                await_rounds(sync, int(sync.metrics()["rounds"]) + 1)
                rounds = sync.metrics()["rounds"]
                for _ in range(20):
                    slopes.step()
                    await_rounds(sync, int(sync.metrics()["rounds"]) + 1)
                rounds = sync.metrics()["rounds"] - rounds
        sync.close()
        return rounds

    assert on_ranks(2, program)[1] >= 20


def test_an_exception_before_the_first_step() -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with pytest.raises(KeyError), ShadowSync(slopes.optimizer, communicator=comm):
            raise KeyError("early")

    on_ranks(2, program)


# --- pause and resume -------------------------------------------------------------------------------------------------


@DRIVERS
def test_paused_ranks_train_apart_until_resume(driver: dict[str, Any]) -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **driver) as sync:
            sync.pause()
            for _ in range(20):
                slopes.step()
            time.sleep(0.05)
            slopes.step()
            assert sync.metrics()["rounds"] == 0
            assert sync.metrics()["steps"] == 21
            torch.testing.assert_close(slopes.weights.detach(), slopes.moved(21 * (comm.rank + 1)))
            sync.gather("both have looked")
            sync.resume()
            slopes.step(0.0)
            await_rounds(sync, 1)
            sync.gather("both have merged")
            torch.testing.assert_close(slopes.weights.detach(), slopes.moved(21 * 1.5))

    on_ranks(2, program)


def test_a_round_under_way_at_pause_is_merged_and_no_more() -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **BACKGROUND) as sync:
            lockstep = Lockstep(sync)
            for _ in range(5):
                slopes.step()
                lockstep()
            sync.pause()
            sync.gather("both pause")
            for _ in range(50):
                slopes.step()
                time.sleep(0.001)
            assert sync.metrics()["rounds"] == 5
            sync.resume()

    on_ranks(2, program)


def test_synchronize_and_close_work_while_paused() -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **BACKGROUND) as sync:
            sync.pause()
            slopes.step()
            sync.synchronize()
            torch.testing.assert_close(slopes.weights.detach(), slopes.moved(1.5))
            slopes.step()
            assert sync.metrics()["rounds"] == 0

    on_ranks(2, program)


# --- synchronize and averaged_weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_synchronize_gives_every_rank_the_mean(algorithm: Algorithm, size: int) -> None:
    """Of replicas that trained apart, whatever the algorithm; batch-norm statistics too, counters are rank 0's."""

    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **NEVER) as sync:
            train(model, optimizer, 4 + comm.rank, stream=comm.rank)
            everyone = sync.gather(content(model))
            sync.synchronize()
            assert identical_everywhere(sync, model)
            for name, value in content(model).items():
                if value.is_floating_point():
                    torch.testing.assert_close(value, torch.stack([each[name] for each in everyone]).mean(0))
            assert model[1].num_batches_tracked == 4
            before = content(model)
            sync.synchronize()
            assert same(content(model), before)

    on_ranks(size, program)


@DRIVERS
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_averaged_weights_are_the_mean_inside_and_ones_own_outside(
    algorithm: Algorithm, driver: dict[str, Any]
) -> None:
    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **driver) as sync:
            train(model, optimizer, 5 + comm.rank, stream=comm.rank)
            sync.pause()
            sync.gather("no round is under way any more, and none begins")
            train(model, optimizer, 2, stream=comm.rank)
            own = content(model)
            theirs = sync.gather(own)
            with sync.averaged_weights():
                assert identical_everywhere(sync, model)
                assert not same(content(model), own)
                assert model[1].num_batches_tracked == theirs[0]["1.num_batches_tracked"]
                model.eval()
                loss_of(model, batch(0, 0))
            assert same(content(model), own)
            assert not identical_everywhere(sync, model)
            with pytest.raises(ZeroDivisionError), sync.averaged_weights():
                raise ZeroDivisionError
            assert same(content(model), own)
            model.train()
            sync.resume()
            train(model, optimizer, 3, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(2, program)


def test_averaged_weights_show_the_mean_of_what_each_rank_has() -> None:
    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, **NEVER) as sync:
            train(model, optimizer, 5, stream=comm.rank)
            everyone = sync.gather(content(model))
            assert not same(everyone[0], everyone[1])
            with sync.averaged_weights():
                for name, value in content(model).items():
                    if value.is_floating_point():
                        torch.testing.assert_close(value, torch.stack([each[name] for each in everyone]).mean(0))

    on_ranks(2, program)


@pytest.mark.parametrize("driver", [BACKGROUND, {"sync_every": 5}, {"sync_every": 5, "foreground": True}], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_what_is_evaluated_is_what_is_saved_afterwards_however_late_a_rank_came(
    algorithm: Algorithm, driver: dict[str, Any]
) -> None:
    """Rank 0 waits until its steps are in the weights of rank 1, which takes some more, no round after them."""

    def program(comm: Communicator) -> None:
        model = make_model(batch_norm=False)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **driver) as sync:
            train(model, optimizer, 3 if comm.rank == 0 else 63, stream=comm.rank)
            with sync.averaged_weights():
                seen = content(model)
                assert identical_everywhere(sync, model)
            sync.synchronize()
            for name, value in content(model).items():
                torch.testing.assert_close(value, seen[name], rtol=1e-6, atol=1e-7)

    on_ranks(2, program)


def test_steps_that_averaged_weights_gave_back_count_again() -> None:
    """Without a round: the rank whose steps were in the mean for the block alone has not lost them at the next one."""

    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **NEVER) as sync:
            for _ in range(2):
                slopes.step()
            for _ in range(2):
                with sync.averaged_weights():
                    torch.testing.assert_close(slopes.weights.detach(), slopes.moved((2 + 4) / 2))
                torch.testing.assert_close(slopes.weights.detach(), slopes.moved(2 * (comm.rank + 1)))
            if comm.rank == 0:
                slopes.step()
            sync.synchronize()
            torch.testing.assert_close(slopes.weights.detach(), slopes.moved((3 + 4) / 2))

    on_ranks(2, program)


def test_a_replica_with_bad_numbers_keeps_the_mean_after_an_evaluation() -> None:
    def program(comm: Communicator) -> bool:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **NEVER) as sync:
            slopes.step()
            if comm.rank == 1:
                with torch.no_grad():
                    slopes.weights[0] = torch.nan
            with sync.averaged_weights():
                assert bool(slopes.weights.isfinite().all())
            return bool(slopes.weights.isfinite().all())

    assert on_ranks(2, program) == [True, True]


# --- uneven data ------------------------------------------------------------------------------------------------------


@DRIVERS
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("steps", [lambda rank: 5 * (rank + 1), lambda rank: 6 * rank], ids=["more", "none"])
def test_ranks_with_more_data_than_others(
    algorithm: Algorithm, driver: dict[str, Any], steps: Callable[[int], int]
) -> None:
    """Also a rank without any: all end with the same weights, and with those of whoever trained."""

    def program(comm: Communicator) -> None:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **driver) as sync:
            start = content(model)
            train(model, optimizer, steps(comm.rank), stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)
            assert not same(content(model), start)
            assert sync.metrics()["steps"] == steps(comm.rank)
            train(model, optimizer, 2, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(3, program)


def test_close_with_uneven_steps_without_synchronize() -> None:
    def program(comm: Communicator) -> int:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **BACKGROUND) as sync:
            for _ in range(10 * comm.rank):
                slopes.step()
            return int(sync.metrics()["steps"])

    assert on_ranks(3, program) == [0, 10, 20]


# --- buffers, dtypes, frozen parameters -------------------------------------------------------------------------------


def test_rounds_average_batch_norm_statistics_and_take_counters_of_rank_0() -> None:
    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model, lr=0.0)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=3, foreground=True) as sync:
            if comm.rank == 1:
                model[1].num_batches_tracked += 100
            train(model, optimizer, 2, stream=comm.rank)
            apart = copy.deepcopy(model)
            train(apart, sgd(apart, lr=0.0), 1, stream=comm.rank, first=2)
            train(model, optimizer, 1, stream=comm.rank, first=2)
            assert sync.metrics()["rounds"] == 1
            everyone = sync.gather((apart[1].running_mean, apart[1].running_var))
            assert not torch.equal(everyone[0][0], everyone[1][0])
            torch.testing.assert_close(model[1].running_mean, (everyone[0][0] + everyone[1][0]) / 2)
            torch.testing.assert_close(model[1].running_var, (everyone[0][1] + everyone[1][1]) / 2)
            assert model[1].num_batches_tracked == 3

    on_ranks(2, program)


@pytest.mark.parametrize("options", [{"sync_buffers": False}, {"model": None}], ids=["off", "no model"])
def test_buffers_are_left_alone_where_they_are_not_asked_for(options: dict[str, Any]) -> None:
    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model)
        with ShadowSync(optimizer, communicator=comm, **{"model": model} | options, **FOREGROUND) as sync:
            train(model, optimizer, 3 + comm.rank, stream=comm.rank)
            sync.synchronize()
            weights = sync.gather(flat(model))
            assert torch.equal(weights[0], weights[1])
            statistics = sync.gather(model[1].running_mean.clone())
            assert not torch.equal(statistics[0], statistics[1])
            assert model[1].num_batches_tracked == 3 + comm.rank

    on_ranks(2, program)


@DRIVERS
def test_parameters_of_several_dtypes_become_their_mean(driver: dict[str, Any]) -> None:
    """In one replica; a float64 weight keeps its precision beside a half one."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    third = torch.tensor(1 / 3, dtype=torch.float64)

    def program(comm: Communicator) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for dtype in dtypes]
        params.append(torch.nn.Parameter(torch.zeros(4, 6).t()))  # not contiguous
        optimizer = torch.optim.SGD(params, lr=1.0)
        with ShadowSync(optimizer, communicator=comm, **driver) as sync:
            for param in params:
                value = -(third * 2 * comm.rank if param.dtype is torch.float64 else torch.tensor(2.0 * comm.rank))
                param.grad = torch.full_like(param, 0)
                param.grad += (value * (1 + 2j) if param.is_complex() else value).to(param.dtype)
            optimizer.step()
            await_rounds(sync, 1)
            sync.gather("merged")
            return [param.detach().clone() for param in params]

    for values in on_ranks(2, program):
        expected = [1.0, float(third), 1.0, 1.0, 1 + 2j, 1.0]
        for value, mean, dtype in zip(values, expected, [*dtypes, torch.float32], strict=True):
            assert value.dtype is dtype
            torch.testing.assert_close(value, torch.full_like(value, mean), rtol=1e-15, atol=0)


@pytest.mark.parametrize("in_optimizer", [True, False])
def test_frozen_parameters_start_alike_and_stay(in_optimizer: bool) -> None:
    def program(comm: Communicator) -> None:
        model = make_model(comm.rank, batch_norm=False)
        model[0].requires_grad_(False)
        trained = model.parameters() if in_optimizer else [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        frozen = content(make_model(0, batch_norm=False)[0])
        with ShadowSync(optimizer, model=model, communicator=comm, warmup_steps=1, **FOREGROUND) as sync:
            assert same(content(model[0]), frozen)
            train(model, optimizer, 4, stream=comm.rank)
            sync.synchronize()
            assert same(content(model[0]), frozen)
            assert identical_everywhere(sync, model)

    on_ranks(2, program)


def test_a_parameter_that_is_unfrozen_later() -> None:
    def program(comm: Communicator) -> None:
        model = make_model(comm.rank, batch_norm=False)
        model[0].requires_grad_(False)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, **FOREGROUND) as sync:
            train(model, optimizer, 2, stream=comm.rank)
            model[0].requires_grad_(True)
            before = content(model[0])
            train(model, optimizer, 2, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)
            assert not same(content(model[0]), before)

    on_ranks(2, program)


# --- options ----------------------------------------------------------------------------------------------------------


def test_hogwild_merges_without_a_step() -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, sync_every=1, apply="hogwild") as sync:
            for steps in range(1, 4):
                version = slopes.weights._version
                slopes.step()
                assert steps == 1 or slopes.weights._version == version + 1  # autograd takes no notice of merges
                while sync.metrics()["rounds"] < steps:
                    time.sleep(0.001)
                sync.gather("both have merged")
                torch.testing.assert_close(slopes.weights.detach(), slopes.moved(1.5 * steps))

    on_ranks(2, program)


def test_at_the_boundary_nothing_is_merged_without_a_step() -> None:
    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **BACKGROUND) as sync:
            slopes.step()
            time.sleep(0.1)
            torch.testing.assert_close(slopes.weights.detach(), slopes.moved(comm.rank + 1), rtol=0, atol=0)
            assert sync.metrics()["rounds"] == 0

    on_ranks(2, program)


@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF(), ElasticAveraging(alpha=0.5)], ids=str)
def test_hogwild_while_gradients_are_computed(algorithm: Algorithm) -> None:
    def program(comm: Communicator) -> None:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        options: dict[str, Any] = {"algorithm": algorithm, "sync_every": 1, "apply": "hogwild"}
        with ShadowSync(optimizer, model=model, communicator=comm, **options) as sync:
            train(model, optimizer, 40, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)
            assert flat(model).isfinite().all()

    on_ranks(2, program)


@DRIVERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_wire(dtype: torch.dtype, driver: dict[str, Any]) -> None:
    """Half the bytes a round, distances within the wire's precision, and an exact mean at synchronize()."""

    def program(comm: Communicator) -> tuple[float, Tensor]:
        sent = []
        for wire_dtype in (None, dtype):
            slopes = Slopes(comm.rank, numel=400)
            with ShadowSync(slopes.optimizer, communicator=comm, wire_dtype=wire_dtype, **driver) as sync:
                lockstep = Lockstep(sync)
                for _ in range(6):
                    slopes.step()
                    lockstep()
                sent.append(sync.metrics()["bytes_sent"])
                error = (slopes.weights.detach() - slopes.moved(6 * 1.5)).abs().max()
                assert error < (1e-4 if wire_dtype is None else 6 * 2 * 0.125 * torch.finfo(dtype).eps)
                sync.synchronize()
                everyone = sync.gather(slopes.weights.detach().clone())
                assert torch.equal(everyone[0], everyone[1])
        return sent[1] / sent[0], slopes.weights

    assert [share for share, _ in on_ranks(2, program)] == [0.5, 0.5]


@DRIVERS
def test_interpolation_loses_the_share_alpha_of_what_was_in_flight(driver: dict[str, Any]) -> None:
    """With nothing in flight w = (1 - alpha) w + alpha mean: the distance from the mean shrinks by 1 - alpha."""
    alpha = 0.25

    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        options: dict[str, Any] = {"algorithm": ModelAveraging(alpha=alpha), "merge": "interpolate", **driver}
        with ShadowSync(slopes.optimizer, communicator=comm, **options) as sync:
            lockstep, away = Lockstep(sync), 0.0
            for steps in range(1, 6):
                slopes.step()
                lockstep()
                sync.gather("merged")
                away = (away + comm.rank + 1 - 1.5) * (1 - alpha)
                torch.testing.assert_close(slopes.weights.detach(), slopes.moved(1.5 * steps + away))

    on_ranks(2, program)


def averaged_by_hand(size: int, steps: int, **settings: float) -> torch.nn.Module:
    """Train one model on all ranks' data in this thread: the mean of the gradients, in rank order."""
    model = make_model(0, batch_norm=False)
    optimizer = sgd(model, **settings)
    for step in range(steps):
        total = [torch.zeros_like(param) for param in model.parameters()]
        for rank in range(size):
            model.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            for into, param in zip(total, model.parameters(), strict=True):
                into.add_(param.grad)
        for mean, param in zip(total, model.parameters(), strict=True):
            param.grad = mean.div_(size)
        optimizer.step()
    return model


@DRIVERS
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_the_warmup_is_averaged_sgd_exactly(size: int, algorithm: Algorithm, driver: dict[str, Any]) -> None:
    expected = content(averaged_by_hand(size, 6, momentum=0.9))

    def program(comm: Communicator) -> None:
        model = make_model(comm.rank, batch_norm=False)
        optimizer = sgd(model, momentum=0.9)
        options: dict[str, Any] = {"algorithm": algorithm, "warmup_steps": 6, **driver}
        with ShadowSync(optimizer, model=model, communicator=comm, **options) as sync:
            train(model, optimizer, 6, stream=comm.rank)
            assert same(content(model), expected)
            assert (sync.metrics()["steps"], sync.metrics()["rounds"]) == (6, 0)
            sync.synchronize()
            for name, value in content(model).items():
                torch.testing.assert_close(value, expected[name])
            train(model, optimizer, 3, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(size, program)


def test_parameters_added_in_the_warmup_are_averaged_from_their_first_step() -> None:
    def program(comm: Communicator) -> list[float]:
        slopes = Slopes(comm.rank)
        extra = torch.nn.Parameter(torch.zeros(2))
        with ShadowSync(slopes.optimizer, communicator=comm, warmup_steps=6, **NEVER):
            slopes.step()
            slopes.optimizer.add_param_group({"params": [extra], "lr": 1.0})
            for _ in range(2):
                extra.grad = torch.full((2,), -1.0 - comm.rank)
                slopes.step()
            return extra.tolist()

    assert on_ranks(2, program) == [[3.0, 3.0]] * 2


@pytest.mark.parametrize("options", [BACKGROUND, FOREGROUND, {"warmup_steps": 2, **FOREGROUND}], ids=str)
def test_initial_weights_are_rank_0s(options: dict[str, Any]) -> None:
    """At construction, buffers included; and once more at the first step, for what was loaded in between."""

    def program(comm: Communicator) -> None:
        model = make_model(comm.rank + 1)
        model[1].running_mean.fill_(comm.rank)
        optimizer = sgd(model, lr=0.0)
        with ShadowSync(optimizer, model=model, communicator=comm, **options) as sync:
            assert same(content(model), content(make_model(1)))
            model.load_state_dict(make_model(comm.rank + 5).state_dict())
            train(model, optimizer, 1, stream=comm.rank)
            assert torch.equal(flat(model), flat(make_model(5)))
            sync.gather("both have looked")

    on_ranks(2, program)


def test_initial_weights_that_are_checked() -> None:
    def program(comm: Communicator) -> None:
        model = make_model(3)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, initial_weights="check", **FOREGROUND) as sync:
            train(model, optimizer, 3, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)
        model = make_model(comm.rank)
        optimizer = sgd(model)
        with pytest.raises(ReplicaMismatchError, match=r"initial value of 0\.weight: sha256 .* on rank 0, sha256"):
            ShadowSync(optimizer, model=model, communicator=comm, initial_weights="check")
        assert same(content(model), content(make_model(comm.rank)))

    on_ranks(2, program)
    assert "shadow-attendance" not in [each.name for each in threading.enumerate()]


def test_average_optimizer_state() -> None:
    def program(comm: Communicator) -> None:
        model = make_model(batch_norm=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with ShadowSync(optimizer, model=model, communicator=comm, **NEVER) as sync:
            train(model, optimizer, 2 + comm.rank, stream=comm.rank)
            everyone = sync.gather(copy.deepcopy(optimizer.state_dict()["state"]))
            sync.average_optimizer_state()
            for index, state in optimizer.state_dict()["state"].items():
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    mean = torch.stack([each[index][key] for each in everyone]).mean(0)
                    torch.testing.assert_close(state[key], mean)

    on_ranks(2, program)


# --- time and memory --------------------------------------------------------------------------------------------------


def live_tensors() -> list[Tensor]:
    return [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]


def storage_bytes() -> int:
    """Return the bytes that all tensors of this process hold, each storage once."""
    dense = [each.untyped_storage() for each in live_tensors() if each.layout is torch.strided]
    storages = {each.data_ptr(): each.nbytes() for each in dense}
    return sum(storages.values())


@DRIVERS
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_nothing_grows_with_time(algorithm: Algorithm, driver: dict[str, Any]) -> None:
    """As many tensors, threads and Python objects after 60 rounds as after 20."""

    def program(comm: Communicator) -> list[tuple[int, int, int]]:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        counts = []
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **driver) as sync:
            after = Lockstep(sync, in_turn=algorithm.asynchronous and driver is BACKGROUND)
            for _ in range(3):
                train(model, optimizer, 20, stream=comm.rank, after=after)
                optimizer.zero_grad()
                sync.gather("no round is under way")
                comm.allgather_object("quiet")
                if comm.rank == 0:
                    gc.collect()
                    counts.append((len(live_tensors()), threading.active_count(), len(gc.get_objects())))
                comm.allgather_object("counted")
        return counts

    first, second, third = on_ranks(2, program)[0]
    assert third[0] == second[0] <= first[0]
    assert third[1] == second[1] == first[1]
    assert third[2] - second[2] < 20  # rounds


def test_a_closed_handle_is_forgotten() -> None:
    def program(comm: Communicator) -> weakref.ref[ShadowSync]:
        model = make_model()
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, **BACKGROUND) as sync:
            train(model, optimizer, 3)
        return weakref.ref(sync)

    left = on_ranks(2, program)
    gc.collect()
    assert [each() for each in left] == [None, None]


class Scales:
    """Weighs all tensors of the process at every tenth call, which takes a while, and remembers the most."""

    most = calls = 0

    @classmethod
    def weigh(cls) -> None:
        if cls.calls % 10 == 0:
            cls.most = max(cls.most, storage_bytes())
        cls.calls += 1


class Weighed:
    """Weighs in the midst of rounds and consolidations, when most vectors are there."""

    scales: ClassVar[type[Scales]] = Scales

    def init(self, params: Tensor) -> Any:
        self.scales.weigh()
        return super().init(params)  # type: ignore[misc]

    def update(self, reduced: Tensor, state: Any) -> Any:
        result = super().update(reduced, state)  # type: ignore[misc]
        self.scales.weigh()
        return result

    def rebase(self, mean: Tensor, state: Any) -> Any:
        result = super().rebase(mean, state)  # type: ignore[misc]
        self.scales.weigh()
        return result


@dataclass(frozen=True)
class WeighedAveraging(Weighed, ModelAveraging):
    pass


@dataclass(frozen=True)
class WeighedBMUF(Weighed, BMUF):
    pass


@DRIVERS
@pytest.mark.parametrize(
    ("algorithm", "limit"),
    [(WeighedAveraging(), 2.0), (WeighedAveraging(alpha=0.5), 2.0), (WeighedBMUF(), 3.0)],
    ids=["MA", "MA half way", "BMUF"],
)
def test_extra_memory_per_rank(algorithm: Algorithm, limit: float, driver: dict[str, Any]) -> None:
    """At most so many times the weights, of which there are 16 MiB here."""
    numel = 1 << 22

    def program(comm: Communicator) -> tuple[int, int]:
        slopes = Slopes(comm.rank, numel)
        slopes.set_gradient()
        slopes.optimizer.step()
        comm.allgather_object("both have what training needs")
        plain = storage_bytes()
        Scales.most = 0
        comm.allgather_object("weighed")
        with ShadowSync(slopes.optimizer, communicator=comm, algorithm=algorithm, **driver) as sync:
            for _ in range(2):
                slopes.set_gradient()
                slopes.optimizer.step()
                await_rounds(sync, 1)
            sync.synchronize()
        return plain, Scales.most

    plain, most = on_ranks(2, program)[0]
    assert most > plain + 2 * 4 * numel  # the snapshots were weighed
    assert (most - plain) / 2 / (4 * numel) <= limit


@pytest.mark.parametrize(
    ("options", "paused"),
    [({"sync_interval_ms": 1e7}, False), ({"cpu_budget": 1e-6}, False), ({"cpu_budget": 1.0}, True)],
    ids=["interval", "budget", "paused"],
)
def test_waiting_for_a_round_costs_a_few_looks(
    options: dict[str, Any], paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are threads woken by each step, nor does each look at the clock put the round off."""
    looks: list[int] = []
    wait_s = Pacing.wait_s
    monkeypatch.setattr(Pacing, "wait_s", lambda self, **now: looks.append(now["steps"]) or wait_s(self, **now))

    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **options) as sync:
            if paused:
                sync.pause()
            for _ in range(100):
                slopes.step()
                time.sleep(0.0005)

    on_ranks(2, program)
    assert len(looks) < 20


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let each look at the clock be a second of CPU time; return what rounds wait for as it is asked for."""
    clocks: dict[Any, Iterator[int]] = collections.defaultdict(itertools.count)
    monkeypatch.setattr(ShadowThread, "_spent_s", lambda self: float(next(clocks[self.rounds])))
    found: list[float] = []
    wait_s = Pacing.wait_s
    monkeypatch.setattr(Pacing, "wait_s", lambda self, **now: found.append(now["spent_s"]) or wait_s(self, **now))
    return found


def test_the_first_rounds_do_not_wait_for_the_budget(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """By this clock each look is a second of CPU time, which the budget allows in many days: the head start pays 40."""
    monkeypatch.setattr(pacing, "HEAD_START_S", 4e7)

    def program(comm: Communicator) -> int:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, cpu_budget=1e-6) as sync:
            begun = time.monotonic()
            while not any(waits) and time.monotonic() - begun < 60:
                slopes.step()
                time.sleep(0.0005)
            return sync.metrics()["rounds"]

    assert min(on_ranks(2, program)) >= 8
    assert max(waits) < 6


def test_the_budget_counts_what_answering_requests_takes(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """By this clock an exchange with the center takes a second, and the wait before it another one."""
    monkeypatch.setattr(pacing, "HEAD_START_S", 3e6)

    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        algorithm = ElasticAveraging()
        with ShadowSync(slopes.optimizer, communicator=comm, algorithm=algorithm, cpu_budget=1e-6) as sync:
            while sync.metrics()["rounds"] < 2 or not any(waits):
                slopes.step()
                time.sleep(0.0005)

    on_ranks(2, program)
    assert max(waits) == 2


@pytest.mark.parametrize(("round_s", "longest_s"), [(0.001, 0.004), (0.05, 0.01), (5.0, 0.02)])
def test_looks_for_requests_are_as_rare_as_rounds_are_long(round_s: float, longest_s: float) -> None:
    assert serving_pauses(round_s).pause_s(10**6) == pytest.approx(longest_s)


def test_a_forked_child_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a rank at exit, or the job after an exception, does nothing in a child."""

    def program(comm: Communicator) -> None:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **BACKGROUND) as sync:
            slopes.step()
            comm.allgather_object("both have begun")
            if comm.rank == 0:
                with monkeypatch.context() as child:
                    child.setattr(job, "_PROCESS", -1)
                    sync._close_at_exit()
                    job.end_job("of a child")
                assert slopes.optimizer.shadow is sync

    on_ranks(2, program)


# --- calls that all ranks make ----------------------------------------------------------------------------------------


@DRIVERS
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("warmup_steps", [0, 6])
def test_a_rank_that_waits_in_a_call_takes_part_in_the_others_rounds(
    algorithm: Algorithm, driver: dict[str, Any], warmup_steps: int
) -> None:
    """The ranks come with different numbers of steps, one with none, to calls that leave the weights alone."""

    def program(comm: Communicator) -> None:
        model = make_model()
        optimizer = sgd(model, lr=0.01)
        options: dict[str, Any] = {"algorithm": algorithm, "warmup_steps": warmup_steps, **driver}
        with ShadowSync(optimizer, model=model, communicator=comm, **options) as sync:
            train(model, optimizer, 5 * comm.rank, stream=comm.rank)
            assert sync.gather(comm.rank) == [0, 1, 2]
            assert sync.metrics(merged=True)["steps"] == 5
            before = content(model)
            sync.gather("nothing is under way")
            assert same(content(model), before)
            train(model, optimizer, 5 * (2 - comm.rank), stream=comm.rank)
            sync.average_optimizer_state()
            assert sync.metrics(merged=True)["steps"] == 10
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(3, program)


def test_calls_before_the_first_step_start_nothing() -> None:
    """What was loaded after them counts from the first step."""

    def program(comm: Communicator) -> list[float]:
        slopes = Slopes(comm.rank)
        with ShadowSync(slopes.optimizer, communicator=comm, **FOREGROUND) as sync:
            assert sync.gather(comm.rank) == [0, 1]
            assert sync.metrics(merged=True)["rounds"] == 0
            slopes.weights.data.fill_(3.0 - comm.rank)
            slopes.step(0.0)
            return slopes.weights.detach().unique().tolist()

    assert on_ranks(2, program) == [[3.0]] * 2


@DRIVERS
@pytest.mark.parametrize("other", ["synchronize", "close"])
def test_calls_that_do_not_go_together_are_an_error_on_every_rank(other: str, driver: dict[str, Any]) -> None:
    def program(comm: Communicator) -> str:
        slopes = Slopes(comm.rank)
        sync = ShadowSync(slopes.optimizer, communicator=comm, **driver)
        for _ in range(3):
            slopes.step()
        with pytest.raises(ShadowSyncError, match="the ranks wait for one another") as caught:
            getattr(sync, other)() if comm.rank == 0 else sync.metrics(merged=True)
        return str(caught.value)

    for message in on_ranks(2, program):
        assert f"rank 0 in {other}(), rank 1 in a collective call such as metrics(merged=True)" in message
        assert "on every rank, in the same order" in message


def test_a_rank_without_data_and_two_optimizers() -> None:
    """It waits in its first call of one handle while the others begin to train with both."""

    def program(comm: Communicator) -> None:
        models = [make_model(seed) for seed in range(2)]
        optimizers = [sgd(each) for each in models]
        pairs = list(zip(models, optimizers, strict=True))
        first, second = (ShadowSync(o, model=m, communicator=comm, **BACKGROUND) for m, o in pairs)
        for step in range(0 if comm.rank == 1 else 10):
            for model, optimizer in pairs:
                train(model, optimizer, 1, first=step)
        for sync, model in ((first, models[0]), (second, models[1])):
            sync.synchronize()
            assert identical_everywhere(sync, model)
        first.close()
        second.close()

    on_ranks(2, program)


def test_counters_of_rank_0_go_on_while_a_round_is_in_flight() -> None:
    """Its integer buffers are the others' model, and are never set back."""

    def program(comm: Communicator) -> list[int]:
        model = make_model()
        optimizer = sgd(model)
        seen = []
        with ShadowSync(optimizer, model=model, communicator=comm, **BACKGROUND) as sync:
            for step in range(30):
                train(model, optimizer, 1, stream=comm.rank, first=step)
                seen.append(int(model[1].num_batches_tracked))
            sync.synchronize()
            seen.append(int(model[1].num_batches_tracked))
        return seen

    first, second = on_ranks(2, program)
    assert first == [*range(1, 31), 30]
    assert second[-1] == 30


def test_meeting_in_different_calls_is_an_error_on_every_rank() -> None:
    def program(comm: Communicator) -> str:
        slopes = Slopes(comm.rank)
        sync = ShadowSync(slopes.optimizer, communicator=comm, **FOREGROUND)
        slopes.step()
        with pytest.raises(ShadowSyncError, match="meet in different calls") as caught:
            sync.gather("mine") if comm.rank == 0 else sync.average_optimizer_state()
        return str(caught.value)

    for message in on_ranks(2, program):
        assert "rank 0 in gather(), rank 1 in average_optimizer_state()" in message


def test_complex_optimizer_state_is_averaged() -> None:
    def program(comm: Communicator) -> list[complex]:
        weights = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
        with ShadowSync(optimizer, communicator=comm, **NEVER) as sync:
            weights.grad = torch.full((2,), 2.0 + 4.0j * comm.rank)
            optimizer.step()
            sync.average_optimizer_state()
            return optimizer.state[weights]["momentum_buffer"].tolist()

    assert on_ranks(2, program) == [[2 + 2j] * 2] * 2


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 5}, TypeError, "model is a int; pass the torch.nn.Module itself"),
        ({"model": torch.nn.Linear}, TypeError, "model is Linear; pass the torch.nn.Module itself, an instance"),
        ({"model": torch.nn.Linear(2, 2)}, ValueError, "model has none of the optimizer's parameters; pass the model"),
        ({"communicator": 5}, TypeError, "communicator is a int; pass one of hvd_shadowsync.comm"),
        ({"foreground": "False"}, TypeError, "foreground='False' is neither True nor False"),
        ({"sparse_as_dense": 1}, TypeError, "sparse_as_dense=1 is neither True nor False"),
        ({"deterministic": "yes"}, TypeError, "deterministic='yes' is neither True nor False"),
        ({"deterministic": True}, ValueError, "deterministic=True needs sync_every=k, the steps from round to round"),
        ({"foreground": True}, ValueError, "foreground=True needs sync_every=k, the steps from round to round"),
        (
            {"deterministic": True, "sync_every": 2, "sync_interval_ms": 5.0},
            ValueError,
            "sync_interval_ms=5.0 does not go with deterministic=True, where steps alone pace rounds; leave it out",
        ),
        (
            {"foreground": True, "sync_every": 2, "cpu_budget": 0.5},
            ValueError,
            "cpu_budget=0.5 does not go with foreground=True, where steps alone pace rounds; leave it out",
        ),
        (
            {"deterministic": True, "sync_every": 2, "apply": "hogwild"},
            ValueError,
            "apply='hogwild' is for background rounds; leave out deterministic=True or apply",
        ),
        (
            {"deterministic": True, "sync_every": 2, "hierarchical": True},
            ValueError,
            "hierarchical=True has no meaning with deterministic=True, whose ranks all exchange; leave it out",
        ),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShadowSync(sgd(make_model()), **{"communicator": Silent(), **arguments})


@pytest.mark.parametrize("in_the_model", [True, False])
def test_tables_that_are_served_are_not_deterministic(in_the_model: bool) -> None:
    def program(comm: Communicator) -> None:
        tables = ShardedEmbeddingBag([EmbeddingTable("ads", 9, 2)], None, SGD(0.1), mode="served", communicator=comm)
        model = make_model()
        whole = torch.nn.ModuleList([model, tables]) if in_the_model else model
        with pytest.raises(ValueError, match="deterministic=True does not go with mode='served' of the table 'ads'"):
            ShadowSync(sgd(model), model=whole, communicator=comm, sync_every=1, deterministic=True)
        tables.close()

    on_ranks(2, program)


@pytest.mark.parametrize("steps", [(0, 5), (3, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("options", [BACKGROUND, FOREGROUND, {"warmup_steps": 10, **FOREGROUND}], ids=str)
def test_weights_are_loaded_by_ranks_that_come_at_different_steps(
    options: dict[str, Any], steps: tuple[int, int]
) -> None:
    """Also where rounds have not begun, for one of them or for all."""

    def program(comm: Communicator) -> None:
        model = make_model(batch_norm=False)
        optimizer = sgd(model)
        loaded = make_model(7, batch_norm=False)
        with ShadowSync(optimizer, model=model, communicator=comm, **options) as sync:
            train(model, optimizer, steps[comm.rank], stream=comm.rank)
            sync.settle()
            model.load_state_dict(loaded.state_dict())
            sync.load_state_dict(None)
            assert same(content(model), content(loaded))
            train(model, optimizer, 2, stream=comm.rank)
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(2, program)


@pytest.mark.parametrize("state", [{"foo": 1}, "abc", [1]])
def test_a_state_that_is_none_of_rounds_is_refused(state: Any) -> None:
    optimizer = sgd(make_model())
    with ShadowSync(optimizer, communicator=Silent()) as sync:
        with pytest.raises(ValueError, match="pass what state_dict\\(\\) returned"):
            sync.load_state_dict(state)
        with pytest.raises(ValueError, match="no algorithm, state and counters"):
            optimizer.load_state_dict({**optimizer.state_dict(), "shadow_sync": state})


# --- checkpoint files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"model": 5, "optimizer": 6},
        {"model": {}, "optimizer": [1]},
        {"model": {}, "optimizer": {"shadow_sync": {"foo": 1}}},
        {"model": {}, "optimizer": {"foo": 1}},
    ],
    ids=str,
)
def test_a_file_of_another_kind_is_a_checkpoint_error_and_changes_nothing(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sync = ShadowSync(sgd(model), model=model, communicator=Silent())
    with pytest.raises(CheckpointError, match=r"file\.pt does not fit the model"):
        checkpoint.load(tmp_path / "file.pt", model, sync)
    sync.close()
    assert same(model.state_dict(), before)


def test_what_could_not_be_loaded_again_is_refused_at_saving(tmp_path: Path) -> None:
    model = make_model()
    with ShadowSync(sgd(model), model=model, communicator=Silent()) as sync:
        with pytest.raises(CheckpointError, match="extra has something that could not be loaded again"):
            checkpoint.save(tmp_path / "file.pt", model, sync, extra={"seen": range(3)})
        assert list(tmp_path.iterdir()) == []
        checkpoint.save(tmp_path / "file.pt", model, sync, extra={"epoch": 3})
        assert checkpoint.load(tmp_path / "file.pt", model, sync) == {"epoch": 3}


@pytest.mark.parametrize("apply", ["boundary", "hogwild"])
def test_what_is_loaded_while_rounds_are_under_way_is_what_the_file_holds(apply: str, tmp_path: Path) -> None:
    def program(comm: Communicator) -> None:
        model = make_model(comm.rank)
        optimizer = sgd(model, lr=0.3)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, apply=apply) as sync:
            checkpoint.save(tmp_path / "file.pt", model, sync)
            saved = checkpoint.read(tmp_path / "file.pt")["model"]
            for attempt in range(20):
                train(model, optimizer, 5, stream=comm.rank, first=5 * attempt)
                checkpoint.load(tmp_path / "file.pt", model, sync)
                assert same(content(model), saved)

    on_ranks(2, program)
