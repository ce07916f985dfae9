"""Programs whose ranks end in all the ways that programs end; the case is named on the command line.

"Trains on" means: until the job is ended from outside, or for a minute, which fails the test.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import ranks
import torch
from parallel.programs.problem import Data, content, loss_of, make_model
from torch import Tensor

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync, ShadowSyncError
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.checkpointing import Checkpointer

RANK, LAST = ranks.RANK, ranks.SIZE - 1
BROKEN = "the data of this rank are broken"


@dataclass
class Training:
    """A model, its optimizer and this rank's data."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    data: Data

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, self.data.batch()).backward()
        self.optimizer.step()
        time.sleep(0.001)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def on(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.step()


def training() -> Training:
    model = make_model(RANK)
    return Training(model, torch.optim.SGD(model.parameters(), lr=0.05), Data(RANK))


def wrapped(**options: Any) -> tuple[Training, ShadowSync]:
    job = training()
    return job, ShadowSync(job.optimizer, model=job.model, **{"sync_every": 2, **options})


def fail() -> None:
    ranks.say("raises", "RuntimeError")
    raise RuntimeError(BROKEN)


# --- exceptions on the last rank ------------------------------------------------------------------------------------


def raises_in_training() -> None:
    job, _ = wrapped()
    job.steps(20)
    if RANK == LAST:
        fail()
    job.on()


def raises_inside_with() -> None:
    job = training()
    with ShadowSync(job.optimizer, model=job.model, sync_every=2):
        job.steps(20)
        if RANK == LAST:
            fail()
        job.on()


def raises_in_the_warmup() -> None:
    job, _ = wrapped(warmup_steps=1000)
    job.steps(20)
    if RANK == LAST:
        fail()
    job.on()


def raises_while_others_close() -> None:
    job, sync = wrapped()
    job.steps(20)
    if RANK == LAST:
        time.sleep(0.5)
        fail()
    sync.close()


def raises_while_others_merge_metrics() -> None:
    job, sync = wrapped()
    job.steps(20)
    if RANK == LAST:
        time.sleep(0.5)
        fail()
    sync.metrics(merged=True)


def raises_before_construction() -> None:
    if RANK == LAST:
        fail()
    wrapped()


def raises_before_construction_with_mpi() -> None:
    """A script that asks mpi4py for its rank, to read its part of the data."""
    from mpi4py import MPI

    assert MPI.COMM_WORLD.rank == RANK
    if RANK == LAST:
        fail()
    wrapped()


def interrupted() -> None:
    """Ctrl-C that reaches Python on the last rank."""
    job, _ = wrapped()
    job.steps(20)
    if RANK == LAST:
        ranks.say("raises", "KeyboardInterrupt")
        raise KeyboardInterrupt
    job.on()


# --- exits on the last rank -----------------------------------------------------------------------------------------


def exits_with_3() -> None:
    job, _ = wrapped()
    job.steps(20)
    if RANK == LAST:
        ranks.say("exits", "3")
        sys.exit(3)
    job.steps(300)
    ranks.say("trained", "to the end")


def exits_early(**options: Any) -> None:
    """A rank with less data returns from its main program; the rounds of the others go on."""
    job, sync = wrapped(**options)
    job.steps(20)
    if RANK == LAST:
        return
    time.sleep(0.2)
    before, rounds = content(job.model), sync.metrics()["rounds"]
    job.steps(400)
    assert sync.metrics()["rounds"] > rounds
    moved = max(float((content(job.model)[name] - value).abs().max()) for name, value in before.items())
    assert moved > 0
    sync.synchronize()
    sync.close()
    ranks.say("trained", "to the end")


def exits_early_with_its_share_of_a_center() -> None:
    """Its communicator thread goes on answering for its part of the center."""
    exits_early(algorithm=ElasticAveraging())


def exits_without_a_step() -> None:
    job, sync = wrapped()
    if RANK == LAST:
        return
    job.steps(100)
    sync.synchronize()
    sync.close()
    ranks.say("trained", "to the end")


def exits_in_the_warmup() -> None:
    job, sync = wrapped(warmup_steps=50)
    job.steps(5)
    if RANK == LAST:
        return
    job.steps(200)
    sync.synchronize()
    assert sync.metrics()["rounds"] > 0
    sync.close()
    ranks.say("trained", "to the end")


def wrapped_until_exit(**options: Any) -> tuple[Training, ShadowSync]:
    """Return what `wrapped` does; says at the very end whether somebody has closed the handle."""
    job = training()
    atexit.register(lambda: None if hasattr(job.optimizer, "shadow") else ranks.say("trained", "and closed"))
    return job, ShadowSync(job.optimizer, model=job.model, sync_every=2, **options)


def nobody_closes() -> None:
    job, _ = wrapped_until_exit()
    job.steps(50)


def one_does_not_close() -> None:
    job, sync = wrapped_until_exit()
    job.steps(50)
    if RANK != LAST:
        sync.close()


def nobody_closes_two() -> None:
    """A GAN whose handles are forgotten."""
    (first, _), (second, _) = wrapped_until_exit(), wrapped()
    for _ in range(30):
        first.step()
        second.step()


def one_closes_the_first_of_two() -> None:
    """Rank 0 closes one handle by hand; all others are forgotten, and closed in the order in which they were made."""
    (first, one), (second, _) = wrapped_until_exit(), wrapped()
    for _ in range(30):
        first.step()
        second.step()
    if RANK == 0:
        one.close()


# --- errors of the shadow thread on the last rank -------------------------------------------------------------------


class State(NamedTuple):
    """Nothing to remember."""


@dataclass(frozen=True)
class BreaksDown(Algorithm):
    """Model averaging that fails in its third update on the last rank."""

    alpha: float = 1.0

    def init(self, params: Tensor) -> State:
        return State()

    def update(self, reduced: Tensor, state: State) -> tuple[Tensor, State]:
        UPDATES.append(reduced.numel())
        if RANK == LAST and len(UPDATES) == 3:
            ranks.say("breaks", "the algorithm")
            raise ArithmeticError("the third update went wrong")
        return reduced, state

    def surviving_progress(self, merge: str, size: int) -> float:
        return ModelAveraging(self.alpha).surviving_progress(merge, size)


UPDATES: list[int] = []


@contextmanager
def raised_in_step() -> Iterator[None]:
    try:
        yield
    except ShadowSyncError as error:
        cause = type(error.__cause__).__name__
        ranks.say("raised", f"{type(error).__name__} from {cause}", str(error))
        raise


def shadow_thread_fails() -> None:
    job, _ = wrapped(algorithm=BreaksDown())
    with raised_in_step():
        job.on()


def shadow_thread_fails_in_hogwild() -> None:
    job, _ = wrapped(algorithm=BreaksDown(), apply="hogwild")
    with raised_in_step():
        job.on()


def shadow_thread_fails_and_the_script_exits() -> None:
    """A script that reports errors by itself and exits with a code of its own."""
    job, _ = wrapped(algorithm=BreaksDown())
    try:
        with raised_in_step():
            job.steps(1000) if RANK == LAST else job.steps(300)
    except RuntimeError as error:
        print(f"training failed: {error}", file=sys.stderr)
        sys.exit(5)


# --- all replicas bad -----------------------------------------------------------------------------------------------


def all_replicas_get_bad(*, waits: bool = True, **options: Any) -> None:
    """Gradients are NaN on all ranks from a step on; the script does nothing about it, but saves now and then."""
    job, sync = wrapped(**options)
    checkpointer = Checkpointer(ranks.FOLDER / "checkpoints", job.model, sync, every_steps=1)
    job.steps(20)
    assert checkpointer.save_now() is not None
    next(job.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with raised_in_step():
        if waits and RANK == LAST:
            job.steps(40)
            sync.synchronize()
        job.on()


def all_replicas_of_a_center_get_bad() -> None:
    all_replicas_get_bad(waits=False, algorithm=ElasticAveraging())


# --- ended from outside ---------------------------------------------------------------------------------------------


def trains_on() -> None:
    job, sync = wrapped()
    while sync.metrics()["rounds"] < 2:
        job.step()
    ranks.say("trains", "on")
    job.on()


def waits_in_close() -> None:
    job, sync = wrapped()
    job.steps(20)
    ranks.say("trains", "on")
    if RANK == LAST:
        job.on()
    sync.close()


# --- several handles, pauses ----------------------------------------------------------------------------------------


def two_handles_and_no_data() -> None:
    """The same script on all ranks; the last one's data are used up before they begin."""
    (first, one), (second, two) = wrapped(), wrapped()
    for _ in range(0 if RANK == LAST else 30):
        first.step()
        second.step()
    one.synchronize()
    two.synchronize()
    one.close()
    two.close()
    ranks.say("trained", "to the end")


def closes_in_the_middle_of_rounds() -> None:
    """Rounds of some milliseconds, back to back; the ranks close at different points of them."""
    for turn, algorithm in enumerate([ModelAveraging(), BMUF(), ElasticAveraging()] * 3):
        weights = torch.nn.Parameter(torch.zeros(1_500_000))
        optimizer = torch.optim.SGD([weights], lr=0.5)
        sync = ShadowSync(optimizer, algorithm=algorithm, sync_every=1, apply="hogwild" if turn > 5 else "boundary")
        for _ in range(3 + (turn + RANK) % 3):
            weights.grad = torch.ones_like(weights)
            optimizer.step()
            time.sleep(0.001 * turn)
        sync.close()
        assert not hasattr(optimizer, "shadow")
        assert bool(weights.isfinite().all())
    ranks.say("trained", "to the end")


def pauses_for_ever() -> None:
    """The last rank has paused and trains on alone; the others are through."""
    job, sync = wrapped()
    job.steps(20)
    if RANK == LAST:
        sync.pause()
        job.steps(300)
    sync.close()
    ranks.say("trained", "to the end")


if __name__ == "__main__":
    ranks.begin()
    globals()[sys.argv[1]]()
