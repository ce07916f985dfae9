"""Programs that write checkpoints and are told to end in all the ways that are; the case is named on the command line.

`checkpoints.py CASE FOLDER`: trains until it is ended, or for a minute, which fails the test.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ranks
import torch
from parallel.programs.problem import Data, loss_of, make_model

from hvd_shadowsync import Checkpointer, ElasticAveraging, EmbeddingTable, ShadowSync, ShardedEmbeddingBag
from hvd_shadowsync.checkpointing.folder import Draft
from hvd_shadowsync.embedding import RowWiseAdagrad

LAST = ranks.SIZE - 1


def trains(
    folder: str, *, meets: bool = False, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGUSR2), **options: object
) -> None:
    model = make_model(ranks.RANK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sync = ShadowSync(optimizer, model=model, **{"sync_every": 2, **options})
    checkpointer = Checkpointer(folder, model, sync, every_steps=100_000, end_signals=signals)
    checkpointer.load_latest()
    data = Data(ranks.RANK)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        optimizer.zero_grad()
        loss_of(model, data.batch()).backward()
        optimizer.step()
        time.sleep(0.001)
        if sync.steps == 20:
            ranks.say("trains", "on", str(checkpointer.loaded))
            if meets and ranks.RANK == LAST:
                sync.metrics(merged=True)


def meets(folder: str) -> None:
    """The last rank waits in a collective call when the job is told to end."""
    trains(folder, meets=True)


def gathers_in_the_warmup(folder: str) -> None:
    trains(folder, meets=True, warmup_steps=100_000)


def waits_in_one_of_two(folder: str) -> None:
    """A GAN: the last rank is told to end, and listens for the second handle; rank 0 waits in a call of the first."""
    models = [make_model(ranks.RANK), make_model(ranks.RANK + 1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    first, second = (ShadowSync(o, model=m, sync_every=2) for o, m in zip(optimizers, models, strict=True))
    listens = Checkpointer(f"{folder}/second", models[1], second, every_steps=100_000)
    loaded = Checkpointer(f"{folder}/first", models[0], first, every_steps=100_000, end_signals=()).load_latest()
    data = Data(ranks.RANK)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, data.batch()).backward()
            optimizer.step()
        time.sleep(0.001)
        if second.steps == 20:
            ranks.say("trains", "on", str(listens.loaded or loaded))
            if ranks.RANK == 0:
                first.synchronize()


def in_the_foreground(folder: str) -> None:
    trains(folder, foreground=True)


def with_default_signals(folder: str) -> None:
    trains(folder, signals=(signal.SIGTERM,))


def one_is_through(folder: str) -> None:
    """The last rank has less data, closes its Checkpointer and waits in the handle's close()."""
    model = make_model(ranks.RANK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = Data(ranks.RANK)
    deadline = time.monotonic() + 60
    with (
        ShadowSync(optimizer, model=model, sync_every=2) as sync,
        Checkpointer(folder, model, sync, every_steps=100_000) as checkpointer,
    ):
        checkpointer.load_latest()
        while time.monotonic() < deadline:
            optimizer.zero_grad()
            loss_of(model, data.batch()).backward()
            optimizer.step()
            time.sleep(0.001)
            if ranks.RANK == LAST and sync.steps == 20:
                break
            if ranks.RANK == 0 and sync.steps == 200:
                ranks.say("trains", "on", str(checkpointer.loaded))


def writer_is_killed(folder: str) -> None:
    """Rank 0 is killed while it writes the last checkpoint."""
    if ranks.RANK == 0:
        Draft.complete = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
    with_default_signals(folder)


def nobody_can_write(folder: str) -> None:
    def fail(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    Draft.complete = fail  # type: ignore[method-assign]
    with_default_signals(folder)


class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
    """Batches for a DataLoader's workers; after so many each takes longer than the job."""

    def __init__(self, quick: float) -> None:
        self.quick = quick

    def __iter__(self) -> Iterator[torch.Tensor]:
        number = 0
        while number := number + 1:
            if number > self.quick:
                time.sleep(60)
            yield torch.ones(4)


def with_workers(folder: str, *, quick: float = math.inf, block: bool = False, handles: bool = False) -> None:
    """Workers get the signal as well."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sync = ShadowSync(optimizer, model=model, sync_every=2)
    checkpointer = Checkpointer(folder, model, sync)
    with sync if block else contextlib.nullcontext():
        try:
            for batch in torch.utils.data.DataLoader(Endless(quick), batch_size=2, num_workers=2):
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
                time.sleep(0.001)
                if sync.steps == 20:
                    ranks.say("trains", "on", str(checkpointer.loaded))
        except RuntimeError as error:
            if not handles:
                raise
            ranks.say("handles", "it", str(error))
            optimizer.step()


def waits_for_workers(folder: str) -> None:
    """The training thread waits for a batch: no end of a step comes before the loader's error."""
    with_workers(folder, quick=20)


def waits_in_a_block(folder: str) -> None:
    """The same inside a `with` statement, whose end would leave the others."""
    with_workers(folder, quick=20, block=True)


def handles_the_loss_of_workers(folder: str) -> None:
    """The script has an `except RuntimeError` of its own."""
    with_workers(folder, quick=20, handles=True)


def with_a_center(folder: str) -> None:
    trains(folder, algorithm=ElasticAveraging())


def with_tables(folder: str) -> None:
    """Sharded tables: lookups in lockstep, rows written by their owners."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tables = [EmbeddingTable("a", 50, 4), EmbeddingTable("b", 30, 4)]
            self.tables = ShardedEmbeddingBag(tables, {"a": "row-wise", "b": "table-wise"}, RowWiseAdagrad(0.1))
            self.top = torch.nn.Linear(8, 1)

    model = Model()
    optimizer = torch.optim.SGD(model.top.parameters(), lr=0.05)
    sync = ShadowSync(optimizer, model=model, sync_every=2)
    checkpointer = Checkpointer(folder, model, sync, every_steps=5, keep=2)
    checkpointer.load_latest()
    generator = torch.Generator().manual_seed(ranks.RANK)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ids = {"a": torch.randint(0, 50, (4, 2), generator=generator)}
        ids["b"] = torch.randint(0, 30, (4, 2), generator=generator)
        optimizer.zero_grad()
        model.top(model.tables(ids)).square().mean().backward()
        optimizer.step()
        if sync.steps >= 20 and (ranks.RANK or checkpointer.metrics()["checkpoints"] > 1) and not said:
            said.append(True)
            ranks.say("trains", "on", str(checkpointer.loaded))


said: list[bool] = []

if __name__ == "__main__":
    ranks.begin()
    globals()[sys.argv[1]](sys.argv[2])
