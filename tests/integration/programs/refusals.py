"""Programs that do what is refused; each rank says what it was told, and the last refusal is not caught.

Case "mismatches": the last rank differs from the others. Case "arguments": all ranks pass what is wrong. Case
"environment": all ranks train plainly, in an environment in which that may be refused. Case "launchers": one process,
started by launchers that promise two.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ranks
import torch
from parallel.programs.problem import Data, content, make_model, same, train

from hvd_shadowsync import BMUF, DistributedOptimizer, ElasticAveraging, ModelAveraging, ShadowSync

DIFFERS = ranks.RANK == ranks.SIZE - 1


class Renamed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model(0)


def construct(
    model: Callable[[], torch.nn.Module] = lambda: make_model(0), lr: float = 0.1, **options: Any
) -> ShadowSync:
    made = model()
    return ShadowSync(torch.optim.SGD(made.parameters(), lr=lr), model=made, **options)


MISMATCHES: Mapping[str, dict[str, Any]] = {
    "model": {"model": lambda: torch.nn.Sequential(torch.nn.Linear(6, 13), torch.nn.Linear(13, 1))},
    "names": {"model": Renamed},
    "dtype": {"model": lambda: make_model(0).double()},
    "lr": {"lr": 0.2},
    "algorithm": {"algorithm": BMUF(block_lr=0.5)},
    "stalls": {"stall_warning_s": None},
}


def parameters() -> Any:
    return torch.optim.SGD(make_model(0).parameters(), lr=0.1)


ARGUMENTS: Mapping[str, Callable[[], Any]] = {
    "no optimizer": lambda: ShadowSync(make_model(0)),  # type: ignore[arg-type]
    "other names": lambda: DistributedOptimizer(parameters(), named_parameters=make_model(0).named_parameters()),
    "names that are none": lambda: DistributedOptimizer(parameters(), named_parameters=make_model(0).parameters()),
    "class of algorithm": lambda: construct(algorithm=ModelAveraging),
    "name of algorithm": lambda: construct(algorithm="bmuf"),
    "alpha": lambda: construct(algorithm=ElasticAveraging(alpha=1.5)),
    "sync_every": lambda: construct(sync_every=0),
    "sync_every of a wrong type": lambda: construct(sync_every="10"),
    "interval": lambda: construct(sync_interval_ms=-1.0),
    "budget": lambda: construct(cpu_budget=2.0),
    "warmup": lambda: construct(warmup_steps=-1),
    "merge": lambda: construct(merge="average"),
    "apply": lambda: construct(apply="later"),
    "foreground": lambda: construct(foreground=True),
    "wire_dtype": lambda: construct(wire_dtype=torch.int8),
    "hierarchical": lambda: construct(hierarchical="yes"),
    "hierarchical center": lambda: construct(hierarchical=True, algorithm=ElasticAveraging()),
    "hierarchical twin": lambda: construct(hierarchical=True, foreground=True, sync_every=5),
    "sum": lambda: DistributedOptimizer(parameters(), op=1),
    "unknown": lambda: construct(sync_steps=10),
    "interpolation": lambda: construct(merge="interpolate", algorithm=ModelAveraging(alpha=1.0)),
}


def refuse(name: str, attempt: Callable[[], Any]) -> None:
    try:
        attempt()
    except (RuntimeError, TypeError, ValueError) as error:
        ranks.say("refused", name, f"{type(error).__name__}: {error}")
    else:
        ranks.say("accepted", name)


def mismatches(last: str) -> None:
    for name, differing in MISMATCHES.items():
        refuse(name, lambda mine=differing if DIFFERS else {}: construct(**mine))  # type: ignore[misc]
    construct(**(MISMATCHES[last] if DIFFERS else {}))


def arguments(last: str) -> None:
    for name, attempt in ARGUMENTS.items():
        refuse(name, attempt)
    ARGUMENTS[last]()


def launchers(last: str) -> None:
    refuse("PMI_SIZE", construct)
    del os.environ["PMI_SIZE"]
    os.environ[last] = "2"
    construct()


def environment(what: str) -> None:
    if what == "no mpi4py":
        sys.modules["mpi4py"] = None  # type: ignore[assignment]
    if what == "single":
        import mpi4py

        mpi4py.rc.thread_level = "single"
    model = make_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ShadowSync(optimizer, model=model) as sync:
        train(model, optimizer, Data(0), 20)
        ranks.say("trained", f"size {sync.size}", str(same(content(model), plainly_trained())))


def plainly_trained() -> dict[str, torch.Tensor]:
    model = make_model(0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), Data(0), 20)
    return content(model)


if __name__ == "__main__":
    ranks.begin()
    globals()[sys.argv[1]](sys.argv[2])
