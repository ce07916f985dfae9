"""A training whose ranks are lost and replaced: `replacements.py '{"faults": {"1": 15}, "replaced": 1}'`.

`faults` says at which of its own steps a rank kills itself; `new_faults` likewise how a replacement ends: at which of
its steps, "before" its handle, by an "exception" there, or not at all but "starts" for ever, or is stopped once it has
said that it is "ready", or "answered" that it is there. Ranks train until as many were lost and replaced as `lost` and
`replaced` say, and some steps more. With `gives_up` the first one that starts is given up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hvd_shadowsync import BMUF, Checkpointer, ElasticAveraging, ModelAveraging, ShadowSync, ShadowSyncError
from hvd_shadowsync.comm import spares

known = spares.here()
IS_NEW = known is not None and known.is_spare

import ranks  # noqa: E402 (by now a replacement has the number of the rank that it replaces)
import torch  # noqa: E402
from parallel.programs.problem import Data, loss_of  # noqa: E402

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
ALGORITHMS = {"S-MA": ModelAveraging(), "S-EASGD": ElasticAveraging(), "S-BMUF": BMUF(block_momentum=0.2)}
LEAST_STEPS, STEPS_AFTER, DEADLINE_S = 40, 20, 120.0
FAULTS = {int(rank): at for rank, at in OPTIONS.get("faults", {}).items()}
NEW_FAULT = OPTIONS.get("new_faults", {}).get(str(known.me)) if known is not None and IS_NEW else None


def die(place: str) -> None:
    ranks.say("dies", "replacement" if IS_NEW else "rank", place)
    os.kill(os.getpid(), signal.SIGKILL)


def digest(model: torch.nn.Module) -> str:
    tensors = [each for each in model.state_dict().values() if each.is_floating_point()]
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in tensors)).hexdigest()


def begin_badly() -> None:
    """Do what a replacement is to do before it has a handle."""
    ranks.say("starts", "replacement", json.dumps({"world": OPTIONS.get("new_faults")}))
    if NEW_FAULT == "before":
        die("before")
    if NEW_FAULT == "exception":
        ranks.say("raises", "replacement")
        raise RuntimeError("a broken file on this host")
    while NEW_FAULT == "starts":
        time.sleep(1)
    if NEW_FAULT in ("ready", "answered"):
        stop_after(spares.Tag.READY if NEW_FAULT == "ready" else spares.Tag.ANSWER)


def stop_after(last: spares.Tag) -> None:
    """Have this process stopped as soon as it has said that."""
    assert known is not None, "it is a spare"
    say = known._say

    def say_and_stop(seats: Sequence[int], tag: spares.Tag, *values: int) -> None:
        say(seats, tag, *values)
        if tag is last:
            ranks.say("stops", tag.name)
            os.kill(os.getpid(), signal.SIGSTOP)

    known._say = say_and_stop  # type: ignore[method-assign]


def give_up_one() -> None:
    """Have the process that was called counted as one that takes too long, and the next one not."""
    assert known is not None, "there are spares"
    give_up = known._give_up

    def give_up_once(spare: int, after_s: float) -> None:
        spares.READY_S = 1e9
        give_up(spare, after_s)

    known._give_up = give_up_once  # type: ignore[method-assign]
    spares.READY_S = 0.0


def numbers_of_the_drop_in() -> list[int]:
    import hvd_shadowsync.torch as hvd

    hvd.init()
    for call in (hvd.allreduce, hvd.broadcast_object, hvd.join):
        try:
            call(torch.zeros(1))
        except ShadowSyncError as error:
            assert "optimizer.shadow.gather" in str(error)
        else:
            raise AssertionError("it is Horovod's")
    return [hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()]


class Training:
    def __init__(self) -> None:
        torch.manual_seed(ranks.RANK + 100 * IS_NEW)
        width = OPTIONS.get("width", 12)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        )
        self.model.register_buffer("frozen", torch.tensor([float(IS_NEW)]))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        more = {name: OPTIONS[name] for name in ("foreground", "deterministic", "warmup_steps") if name in OPTIONS}
        algorithm = ALGORITHMS[OPTIONS.get("algorithm", "S-MA")]
        self.sync = ShadowSync(self.optimizer, model=self.model, algorithm=algorithm, sync_every=2, **more)
        self.data = Data(self.sync.shard)
        self.steps = 0
        self.joined: dict[str, Any] = {}

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, self.data.batch()).backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps % 500 == 0:
            ranks.say("trains", str(self.steps))
        if IS_NEW and self.steps == 1:
            first = next(iter(self.optimizer.state.values()))
            self.joined = {"steps": self.sync.steps, "adam_steps": int(first["step"])}
        if self.steps == (NEW_FAULT if IS_NEW else FAULTS.get(ranks.RANK)):
            die("step")
        time.sleep(0.001)

    def until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S:.0f} s"
            self.step()

    def has(self, name: str, number: int) -> bool:
        return self.sync.metrics()[name] >= number


def others_say(event: str) -> bool:
    """Tell whether a replacement is in the middle of its start, or has stopped: it says so in a file."""
    return any(f'"event": "{event}"' in line for path in ranks.FOLDER.glob("rank*.jsonl") for line in open(path))


def trains() -> None:
    if IS_NEW:
        begin_badly()
    drop_in = numbers_of_the_drop_in() if OPTIONS.get("drop_in") else None
    job = Training()
    folder = OPTIONS.get("checkpoints")
    checkpointer = Checkpointer(folder, job.model, job.sync, every_steps=10, keep=50) if folder else None
    if checkpointer is not None:
        checkpointer.load_latest()
    if not IS_NEW:
        job.until(lambda: job.steps >= LEAST_STEPS, "all steps")
        job.until(lambda: job.has("ranks_lost", OPTIONS.get("lost", len(FAULTS))), "the losses")
        if OPTIONS.get("awaits"):
            job.until(lambda: others_say(OPTIONS["awaits"]), "what a replacement says")
        if OPTIONS.get("gives_up"):
            give_up_one()
        job.until(lambda: job.has("ranks_replaced", OPTIONS.get("replaced", 0)), "the replacements")
    last = job.steps + STEPS_AFTER
    job.until(lambda: job.steps >= last, "the steps after")
    job.sync.synchronize()
    told = {
        "digest": digest(job.model), "size": job.sync.size, "rank": job.sync.rank, "new": IS_NEW, "drop_in": drop_in,
        "shards": [job.sync.shard, job.sync.num_shards], "steps": job.sync.steps, "frozen": float(job.model.frozen),
        "environ": [int(os.environ[each]) for each in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")],
        "metrics": {name: job.sync.metrics()[name] for name in ("ranks_lost", "ranks_replaced")}, "joined": job.joined,
    }  # fmt: skip
    if checkpointer is not None:
        told["loaded"] = None if checkpointer.loaded is None else checkpointer.loaded.name
        told["saved"] = str(checkpointer.save_now())
        checkpointer.close()
    job.sync.close()
    ranks.say("ended", "well", json.dumps(told))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)
    ranks.begin()
    trains()
