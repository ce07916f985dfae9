"""Lookups that go wrong on the last rank, or ranks whose calls do not go together; each rank says what it was told.

The last error is not caught. `exit`: the last rank ends its script while the others go on training; nothing is wrong
with that. `dies`: it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import ranks
import torch

from hvd_shadowsync import EmbeddingError, EmbeddingTable, ReplicaMismatchError, ShardedEmbeddingBag
from hvd_shadowsync.embedding import SGD

DIFFERS = ranks.RANK == ranks.SIZE - 1
TABLES = [EmbeddingTable("a", 10, 4), EmbeddingTable("b", 6, 2)]
RIGHT = {"a": torch.tensor([1, 2]), "b": torch.tensor([0, 5])}


def wrong(**features: Any) -> Callable[[ShardedEmbeddingBag], Any]:
    inputs = {**RIGHT, **features} if DIFFERS else RIGHT
    return lambda module: module({name: value for name, value in inputs.items() if value is not None})


def another_call(module: ShardedEmbeddingBag) -> None:
    vectors = module(RIGHT)
    if DIFFERS:
        module(RIGHT)
    else:
        vectors.sum().backward()


def another_mode(module: ShardedEmbeddingBag) -> None:
    with torch.set_grad_enabled(not DIFFERS):
        module(RIGHT)


def another_order(module: ShardedEmbeddingBag) -> None:
    first, second = module(RIGHT), module(RIGHT)
    (second if DIFFERS else first).sum().backward()


def other_weights(module: ShardedEmbeddingBag) -> None:
    weighted = (torch.tensor([1, 2]), torch.tensor([0, 1]), torch.ones(2))
    module({**RIGHT, "a": weighted} if DIFFERS else RIGHT)


CASES: dict[str, Callable[[ShardedEmbeddingBag], Any]] = {
    "too large": wrong(a=torch.tensor([1, 10])),
    "negative": wrong(b=torch.tensor([-1, 0])),
    "dtype": wrong(a=torch.tensor([1.0, 2.0])),
    "offsets": wrong(a=(torch.tensor([1, 2, 3]), torch.tensor([2, 1]))),
    "unknown feature": wrong(c=torch.tensor([1, 2])),
    "missing feature": wrong(b=None),
    "samples": wrong(b=torch.tensor([1])),
    "another call": another_call,
    "another mode": another_mode,
    "another order": another_order,
    "other weights": other_weights,
}


def construct(**changed: Any) -> ShardedEmbeddingBag:
    arguments: dict[str, Any] = {"tables": TABLES, "plan": None, "optimizer": SGD(0.1), "debug": True, **changed}
    return ShardedEmbeddingBag(**arguments)


def main(case: str) -> None:
    if case in ("exit", "dies"):
        module = construct(plan={"a": "row-wise", "b": "table-wise"})
        for step in range(2 if DIFFERS else 20):
            module(RIGHT).sum().backward()
            if DIFFERS and step == 1 and case == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
        ranks.say("trained", what=case)
        return
    for name, changed in {"lr": {"optimizer": SGD(0.2)}, "tables": {"tables": TABLES[:1]}}.items():
        try:
            construct(**(changed if DIFFERS else {}))
            ranks.say("accepted", what=name)
        except ReplicaMismatchError as error:
            ranks.say("refused", what=name, text=str(error))
    for name, use in CASES.items():
        module = construct()
        try:
            use(module)
            ranks.say("accepted", what=name)
        except EmbeddingError as error:
            ranks.say("refused", what=name, text=str(error))
        module.close()
    CASES[case](construct())


if __name__ == "__main__":
    main(sys.argv[1])
