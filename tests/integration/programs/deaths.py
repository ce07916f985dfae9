"""A training whose ranks die at named places: `deaths.py '{"faults": [{"rank": 1, "place": "update", "at": 3}]}'`.

A rank that is to die does so itself, inside a call that is wrapped for it, at the `at`-th time that it comes there (1
by default). The others train until they have noticed as many losses as `lost` says (all faults by default), and some
steps more; each says with which weights it ended, and how long its longest step was.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import ranks
import torch
from mpi4py import MPI
from parallel.programs.problem import Data, loss_of

from hvd_shadowsync import (
    BMUF,
    Checkpointer,
    ElasticAveraging,
    EmbeddingTable,
    ModelAveraging,
    ShadowSync,
    ShardedEmbeddingBag,
    agree,
)
from hvd_shadowsync.ballot import Intent
from hvd_shadowsync.checkpointing.folder import Draft
from hvd_shadowsync.embedding import RowWiseAdagrad, files
from hvd_shadowsync.embedding.exchange import Exchange
from hvd_shadowsync.embedding.served import Served
from hvd_shadowsync.rounds import Rounds, Staged
from hvd_shadowsync.shadow import ShadowThread
from hvd_shadowsync.warmup import Warmup

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
FAULTS: list[dict[str, Any]] = OPTIONS["faults"]
ALGORITHMS = {
    "S-MA": ModelAveraging,
    "S-EASGD": ElasticAveraging,
    "S-BMUF": functools.partial(BMUF, block_momentum=0.2),
}
LEAST_STEPS, STEPS_AFTER, DEADLINE_S = 40, 20, 60.0
FIRST_STEPS = 5
"""Whose duration is not counted: they begin the rounds."""

VISITS: Counter[str] = Counter()
PHASES = [""]
"""What is added to a place's name to count it; with " of a saved job" also from the first checkpoint of tables on."""


def reached(place: str) -> None:
    """Die where a fault of this rank says so."""
    for name in [place + phase for phase in PHASES]:
        VISITS[name] += 1
        for fault in FAULTS:
            if (fault["rank"], fault["place"], fault.get("at", 1)) == (ranks.RANK, name, VISITS[name]):
                ranks.say("dies", name)
                die(fault.get("how", "SIGKILL"))


def die(how: str) -> NoReturn:
    if how == "exception":
        raise RuntimeError("the data of this rank are broken")
    if how == "segmentation fault":
        ctypes.string_at(0)
    if how == "host":
        status = Path(f"/proc/{os.getppid()}/stat").read_text()  # of what runs this program
        above = status.rpartition(")")[2].split()[1]
        os.kill(int(above), signal.SIGKILL)  # Open MPI's daemon there, or mpirun itself
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def watched(owner: Any, name: str, place: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Have `owner.name` say that it was reached, before it does what it does."""
    call = getattr(owner, name)

    @functools.wraps(call)
    def wrapped(*arguments: Any, **more: Any) -> Any:
        if when(*arguments):
            reached(place)
        return call(*arguments, **more)

    setattr(owner, name, wrapped)


def watch() -> None:
    watched(agree, "require_same", "construction")
    watched(Warmup, "_mean", "warm-up")
    watched(ShadowThread, "_await_turn", "between rounds")
    watched(Rounds, "_begin_snapshot", "snapshot")
    watched(Rounds, "_update", "update")
    watched(Rounds, "_consolidate", "synchronize")
    watched(Staged, "merge", "merge")
    watched(Rounds, "_vote", "close", lambda _, own: own.intent is Intent.LEAVE)
    watched(Draft, "complete", "write")
    for exchange in (Exchange, Served):
        watched(exchange, "lookup", "lookup")
        watched(exchange, "update", "row update")
    watched(files, "write_shards", "rows are written")


class Pickled:
    """A value for `gather()` that says when it is being sent."""

    def __getstate__(self) -> object:
        reached("gather")
        return None


def model_of(rank: int) -> torch.nn.Sequential:
    torch.manual_seed(rank)
    return torch.nn.Sequential(
        torch.nn.Linear(6, OPTIONS.get("width", 12)), torch.nn.BatchNorm1d(OPTIONS.get("width", 12)),
        torch.nn.Tanh(), torch.nn.Linear(OPTIONS.get("width", 12), 1),
    )  # fmt: skip


def digest(model: torch.nn.Module) -> str:
    """Return a digest of the weights and the floating-point buffers: what `synchronize()` makes alike."""
    tensors = [each for each in model.state_dict().values() if each.is_floating_point()]
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in tensors)).hexdigest()


class Training:
    """Steps with their longest duration."""

    def __init__(self) -> None:
        self.model = model_of(ranks.RANK)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.6 / OPTIONS.get("width", 12), momentum=0.9)
        self.sync = ShadowSync(self.optimizer, model=self.model, **handle_options())
        self.data = Data(ranks.RANK)
        self.steps, self.longest_s = 0, 0.0

    def step(self) -> None:
        reached("step")
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        loss_of(self.model, self.data.batch()).backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps > FIRST_STEPS:
            self.longest_s = max(self.longest_s, time.perf_counter() - begun)
        time.sleep(0.001)

    def until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S:.0f} s"
            self.step()

    def lost(self) -> int:
        return int(self.sync.metrics()["ranks_lost"])


def handle_options() -> dict[str, Any]:
    wire = torch.float16 if OPTIONS.get("half") else None
    more = {name: OPTIONS[name] for name in ("foreground", "warmup_steps", "apply") if name in OPTIONS}
    return {"algorithm": ALGORITHMS[OPTIONS.get("algorithm", "S-MA")](), "sync_every": 2, "wire_dtype": wire, **more}


def trains() -> None:
    reached("before")
    job = Training()
    folder = OPTIONS.get("checkpoints")
    checkpointer = Checkpointer(folder, job.model, job.sync, every_steps=15, keep=9) if folder else None
    if "gather" in places():
        job.until(lambda: job.steps >= LEAST_STEPS // 2, "half of the steps")
        job.sync.gather(Pickled())
    job.until(lambda: job.steps >= LEAST_STEPS, "all steps")
    if "synchronize" in places():
        job.sync.synchronize()
    job.until(lambda: job.lost() >= OPTIONS.get("lost", len(FAULTS)), "the losses")
    last = job.steps + STEPS_AFTER
    job.until(lambda: job.steps >= last, "the steps after the losses")
    if checkpointer is not None:
        written = checkpointer.metrics()["checkpoints"]
        enough = lambda: checkpointer.metrics()["checkpoints"] > written or job.sync.rank > 0  # noqa: E731
        job.until(enough, "another checkpoint")
    job.sync.synchronize()
    told = {"digest": digest(job.model), "size": job.sync.size, "rank": job.sync.rank}
    if checkpointer is not None:
        told["saved"] = str(checkpointer.save_now())
        checkpointer.close()
    job.sync.close()
    told |= {"lost": job.lost(), "longest_step_ms": round(1000 * job.longest_s, 1)}
    ranks.say("ended", "well", json.dumps(told))


class TrainingWithTables:
    """Steps of a model with sharded tables, the same number on all ranks that are left."""

    def __init__(self) -> None:
        tables = [EmbeddingTable("a", 50, 4), EmbeddingTable("b", 30, 4)]
        self.bags = ShardedEmbeddingBag(
            tables, {"a": "row-wise", "b": "table-wise"}, RowWiseAdagrad(0.1), mode=OPTIONS.get("mode", "alltoall"),
            replication=OPTIONS.get("replication", 1),
        )  # fmt: skip
        self.top = torch.nn.Linear(8, 1)
        self.model = torch.nn.Sequential(self.bags, self.top)
        self.optimizer = torch.optim.SGD(self.top.parameters(), lr=0.05)
        self.sync = ShadowSync(self.optimizer, model=self.model, sync_every=2)
        self.generator = torch.Generator().manual_seed(ranks.RANK)
        self.steps, self.longest_s = 0, 0.0

    def step(self) -> None:
        reached("step")
        ids = {"a": torch.randint(0, 50, (4, 2), generator=self.generator)}
        ids["b"] = torch.randint(0, 30, (4, 2), generator=self.generator)
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(ids).square().mean().backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps > FIRST_STEPS:
            self.longest_s = max(self.longest_s, time.perf_counter() - begun)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Train until it is so on the first rank that is left, in the eyes of all."""
        deadline = time.monotonic() + DEADLINE_S
        while not any(self.sync.gather(done())):
            assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S:.0f} s"
            for _ in range(5):
                self.step()


def with_tables() -> None:
    job = TrainingWithTables()
    folder = OPTIONS.get("checkpoints")
    checkpointer = Checkpointer(folder, job.model, job.sync, every_steps=10) if folder else None
    if checkpointer is not None:
        job.until(lambda: checkpointer.metrics()["checkpoints"] > 0, "a checkpoint")
        PHASES.append(" of a saved job")
    for _ in range(LEAST_STEPS):
        job.step()
    job.until(lambda: job.bags.metrics()["ranks_lost"] >= len(FAULTS), "the losses")
    for _ in range(STEPS_AFTER):
        job.step()
    job.sync.synchronize()
    told: dict[str, Any] = {"digest": digest(job.top), "size": job.bags.size, "rank": job.sync.rank}
    told |= {"lost": job.bags.metrics()["ranks_lost"], "longest_step_ms": round(1000 * job.longest_s, 1)}
    rows = hashlib.sha256()
    for block in job.bags.global_state_dict():
        assert bool(block.values.isfinite().all())
        rows.update(block.values.numpy().tobytes())
    told["rows"] = rows.hexdigest()
    if checkpointer is not None:
        told["saved"] = str(checkpointer.save_now())
        checkpointer.close()
    job.bags.close()
    job.sync.close()
    ranks.say("ended", "well", json.dumps(told))


def places() -> set[str]:
    return {each["place"] for each in FAULTS}


def die_in_finalize() -> None:
    """End MPI here and now, as the end of the program would."""
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=lambda *_: reached("finalize")), None)
    MPI.Finalize()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)
    ranks.begin()
    watch()
    if OPTIONS.get("tables"):
        with_tables()
    else:
        trains()
    if any(each["rank"] == ranks.RANK and each["place"] == "finalize" for each in FAULTS):
        die_in_finalize()
