"""One rank of a job of `faults.py`: trains as the settings on its command line say, and says how far it has come.

Each rank appends one JSON object a line to `rank<r>.jsonl` in the folder of the settings, and writes the stacks of its
threads to `rank<r>.stacks` on SIGUSR1. What a rank does to itself is here; signals come from outside.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mpi4py import MPI

SETTINGS: dict[str, Any] = json.loads(sys.argv[1])
FOLDER = Path(SETTINGS["folder"])
RANK = MPI.COMM_WORLD.rank
SMALL_FILE_BYTES = 16_384
STEP_S = 0.004
ALWAYS = 100_000


def say(event: str, **more: Any) -> None:
    with open(FOLDER / f"rank{RANK}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "rank": RANK, "pid": os.getpid(), "time": time.time(), **more}) + "\n")


faulthandler.register(signal.SIGUSR1, file=open(FOLDER / f"rank{RANK}.stacks", "w"), all_threads=True)  # noqa: SIM115
say("begin")

import torch  # noqa: E402

from hvd_shadowsync import (  # noqa: E402
    BMUF,
    Checkpointer,
    ElasticAveraging,
    EmbeddingError,
    EmbeddingTable,
    ModelAveraging,
    ShadowSync,
    ShardedEmbeddingBag,
)
from hvd_shadowsync.checkpointing.folder import Draft, Stored  # noqa: E402
from hvd_shadowsync.embedding import RowWiseAdagrad  # noqa: E402

ALGORITHMS = {"S-MA": ModelAveraging(), "S-EASGD": ElasticAveraging(), "S-BMUF": BMUF(block_momentum=0.2)}


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(RANK)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    sync = ShadowSync(optimizer, model=model, **handle_options())
    checkpointer = None
    if SETTINGS["checkpoints"] is not None:
        checkpointer = Checkpointer(SETTINGS["checkpoints"], model, sync, every_steps=SETTINGS["every_steps"])
        checkpointer.load_latest()
        loaded = checkpointer.loaded
        say("loaded", path=None if loaded is None else str(loaded))
        kill_in_write()
        if model.tables is not None and SETTINGS["tables"] != "copies":
            checkpointer.save_now()  # where rows of a lost rank come from
    train(model, optimizer, sync, checkpointer)
    sync.synchronize()
    told: dict[str, Any] = {"digest": digest(model.dense), "size": sync.size, "rows": None}
    if checkpointer is not None:
        checkpointer.save_now()
        note_checkpoint(checkpointer)
        checkpointer.close()
    if model.tables is not None:
        told["rows"] = digest_of_rows(model.tables)
        model.tables.close()
    sync.close()
    say("ended", lost=int(sync.metrics()["ranks_lost"]), **told)


class Model(torch.nn.Module):
    """A dense part, behind sharded tables where the job has some."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Sequential(
            torch.nn.Linear(8, 600), torch.nn.BatchNorm1d(600), torch.nn.Linear(600, 1)
        )  # fmt: skip
        self.tables: ShardedEmbeddingBag | None = None
        if (tables := SETTINGS["tables"]) is not None:
            self.tables = ShardedEmbeddingBag(
                [EmbeddingTable("a", 900, 4), EmbeddingTable("b", 90, 4)], {"a": "row-wise", "b": "column-wise"},
                RowWiseAdagrad(lr=0.02), mode="served" if tables == "served" else "alltoall",
                replication=2 if tables == "copies" else 1,
            )  # fmt: skip

    def forward(self, inputs: torch.Tensor) -> Any:
        if self.tables is not None:
            ids = (inputs[:, :2].abs() * 300).long()
            inputs = inputs + self.tables({"a": ids[:, 0] % 900, "b": ids[:, 1] % 90})
        return self.dense(inputs)


def digest_of_rows(tables: ShardedEmbeddingBag) -> str:
    """Return a digest of all rows with their state; again where a rank is lost meanwhile."""
    while True:
        found = hashlib.sha256()
        try:
            for block in tables.global_state_dict():
                found.update(block.values.numpy().tobytes())
            return found.hexdigest()
        except EmbeddingError as error:
            if "make the call again" not in str(error):
                raise


def handle_options() -> dict[str, Any]:
    wire = SETTINGS["wire_dtype"]
    names = ("sync_every", "sync_interval_ms", "cpu_budget", "foreground", "apply", "warmup_steps")
    given = {name: SETTINGS[name] for name in names if SETTINGS.get(name) is not None}
    wire_dtype = None if wire is None else getattr(torch, wire)
    return {"algorithm": ALGORITHMS[SETTINGS["algorithm"]], "wire_dtype": wire_dtype, **given}


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, sync: ShadowSync, checkpointer: Checkpointer | None
) -> None:
    """Take the steps, with a call of all ranks in the middle of them, and faults of this rank's own."""
    fault = SETTINGS["fault"]
    mine = fault.get("step") if fault["rank"] == RANK else None
    for step in range(ALWAYS if fault["kind"] == "terminate" else SETTINGS["steps"]):
        optimizer.zero_grad()
        inputs = torch.randn(8, 8)
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        time.sleep(STEP_S)
        if step == 5:
            say("trains")
        if step == SETTINGS["steps"] // 2:
            meet(sync)
        if checkpointer is not None:
            note_checkpoint(checkpointer)
        if step == mine:
            fail(fault["kind"])
        if fault["kind"] == "full disk" and sync.rank == 0 and step in (fault["step"], fault["step"] + fault["steps"]):
            limit = SMALL_FILE_BYTES if step == fault["step"] else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def meet(sync: ShadowSync) -> None:
    call = SETTINGS["meets"]
    if call == "gather":
        sync.gather(RANK)
    elif call == "metrics":
        sync.metrics(merged=True)
    elif call == "optimizer":
        sync.average_optimizer_state()
    elif call == "weights":
        with sync.averaged_weights():
            pass


def fail(kind: str) -> None:
    say("fails")
    if kind == "exception":
        raise RuntimeError("the data of this rank are broken")
    if kind == "exit":
        sys.exit(SETTINGS["fault"]["code"])


def kill_in_write() -> None:
    """Have the first rank of those that are left die when so many checkpoints are about to get their names."""
    fault, complete, seen = SETTINGS["fault"], Draft.complete, []

    def dying(draft: Draft, *more: int) -> Stored:
        seen.append(1)
        if fault["kind"] == "kill in a write" and len(seen) == fault["write"] and fault["rank"] == RANK:
            say("fails")
            os.kill(os.getpid(), signal.SIGKILL)
        return complete(draft, *more)

    Draft.complete = dying  # type: ignore[method-assign]


WRITTEN: list[int] = [0]


def note_checkpoint(checkpointer: Checkpointer) -> None:
    figures = checkpointer.metrics()
    if figures["checkpoints"] > WRITTEN[0]:
        WRITTEN[0] = int(figures["checkpoints"])
        say("saved", step=int(figures["checkpoint_step"]), failures=int(figures["checkpoint_failures"]))


def digest(model: torch.nn.Module) -> str:
    tensors = [each for each in model.state_dict().values() if each.is_floating_point()]
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in tensors)).hexdigest()


if __name__ == "__main__":
    main()
