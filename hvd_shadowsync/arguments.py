"""What may be passed to the wrapper, and what is wrong with the rest: messages name argument, value and remedy."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvd_shadowsync.algorithms import Algorithm, ModelAveraging
from hvd_shadowsync.checks import check_count, check_flag, check_interval, choice
from hvd_shadowsync.comm.attendance import StallRules
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag, open_modules
from hvd_shadowsync.metrics import COUNTERS
from hvd_shadowsync.pacing import Pacing
from hvd_shadowsync.reduction import RoundOptions
from hvd_shadowsync.replica import MERGES, NamedTensor

APPLIES = ("boundary", "hogwild")
INITIALS = ("broadcast", "check")
WIRE_DTYPES = (None, torch.float16, torch.bfloat16)
ON_STALL = ("end", "drop")


@dataclass(frozen=True)
class Settings:
    """What `ShadowSync` was given that has to be the same on every rank, under the names of its arguments.

    Attributes, besides:
        options: `algorithm`, `merge`, `wire_dtype`, `foreground` or `deterministic`, `hierarchical`, `max_distance`.
        pacing: `sync_every`, `sync_interval_ms`, `cpu_budget`.
        stalls: `stall_warning_s`, `stall_timeout_s`, `on_stall`.
    """

    options: RoundOptions
    pacing: Pacing
    stalls: StallRules
    apply: str
    initial_weights: str
    sync_buffers: bool
    warmup_steps: int
    sparse_as_dense: bool
    max_sync_gap: int | None

    def __post_init__(self) -> None:
        choice("apply", self.apply, APPLIES)
        choice("initial_weights", self.initial_weights, INITIALS)
        check_count("warmup_steps", self.warmup_steps, least=0)
        check_flag("sparse_as_dense", self.sparse_as_dense)
        if self.max_sync_gap is not None:
            check_count("max_sync_gap", self.max_sync_gap, least=1)


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` is one that can be synchronised, and is not yet."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer itself")
    if getattr(optimizer, "shadow", None) is not None:
        raise ValueError("optimizer is synchronised already; close() its handle (optimizer.shadow) first")
    if type(optimizer).__module__.startswith("horovod.") or hasattr(optimizer, "_allreduce_delay"):
        raise TypeError("optimizer is wrapped by Horovod already; pass the plain optimizer instead")


def check_model(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless `model` is None or a module that has parameters of `optimizer`."""
    if model is None:
        return
    if not isinstance(model, torch.nn.Module):
        kind = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model is {kind}; pass the torch.nn.Module itself, an instance")
    known = {id(param) for param in model.parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if params and not any(id(param) in known for param in params):
        raise ValueError("model has none of the optimizer's parameters; pass the model that the optimizer was made for")


def check_communicator(communicator: Any) -> None:
    """Raise unless `communicator` is None or one of ours."""
    if communicator is not None and not isinstance(communicator, Communicator):
        raise TypeError(
            f"communicator is a {type(communicator).__name__}; pass one of hvd_shadowsync.comm, such as "
            "hvd_shadowsync.comm.mpi.world(ranks), or leave it out for all ranks"
        )


def check_rounds_state(state: Any, params: Sequence[NamedTensor]) -> None:
    """Raise unless `state` is None, empty, or what `ShadowSync.state_dict` returned, for `params`."""
    if not state:
        return
    if not (isinstance(state, Mapping) and {"algorithm", "state", "counters"} <= set(state)):
        raise ValueError("the state of rounds has no algorithm, state and counters; pass what state_dict() returned")
    counters, tensors = state["counters"], state["state"]
    if not (isinstance(state["algorithm"], Mapping) and isinstance(state["algorithm"].get("name"), str)):
        raise ValueError("the state of rounds does not name its algorithm; pass what state_dict() returned")
    if not (isinstance(counters, Mapping) and all(type(counters.get(name)) is int for name in COUNTERS)):
        raise ValueError(f"the state of rounds lacks counters ({', '.join(COUNTERS)}); pass what state_dict() returned")
    if not (isinstance(tensors, Mapping) and all(isinstance(each, Mapping) for each in tensors.values())):
        raise ValueError("the state of rounds has no tensors by parameter name; pass what state_dict() returned")
    for kind, by_name in tensors.items():
        for each in params:
            found = by_name.get(each.name)
            if each.name in by_name and not (isinstance(found, torch.Tensor) and found.numel() == each.numel):
                raise ValueError(
                    f"the state of rounds has a {kind} of {each.name} that does not fit the parameter; pass the state "
                    "of this model"
                )


def round_options(
    algorithm: Algorithm | None,
    merge: str,
    wire_dtype: torch.dtype | None,
    foreground: bool,
    hierarchical: bool | str = "auto",
    max_distance: float | None = None,
) -> RoundOptions:
    """Return checked options of rounds."""
    algorithm = ModelAveraging() if algorithm is None else algorithm
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"algorithm={algorithm!r} is not an algorithm; pass an instance such as ModelAveraging(), "
            "ElasticAveraging() or BMUF()"
        )
    choice("merge", merge, MERGES)
    if merge == "interpolate" and algorithm.alpha == 1:
        raise ValueError(
            f"merge='interpolate' with alpha={algorithm.alpha} overwrites all steps made while a round is in flight; "
            "give alpha < 1 (0.5, say), or merge='delta'"
        )
    if wire_dtype not in WIRE_DTYPES:
        raise ValueError(f"wire_dtype={wire_dtype!r} is not supported; give torch.float16, torch.bfloat16 or None")
    if not (isinstance(hierarchical, bool) or hierarchical == "auto"):
        raise ValueError(f"hierarchical={hierarchical!r} is not supported; give 'auto', True or False")
    if max_distance is not None:
        check_interval("max_distance", max_distance, low=0.0, high=float("inf"), low_included=False)
    return RoundOptions(algorithm, merge, wire_dtype, bool(foreground), hierarchical, max_distance)


def stall_rules(stall_warning_s: float | None, stall_timeout_s: float | None, on_stall: str) -> StallRules:
    """Return checked rules of what is done about ranks that others wait for."""
    for name, value in (("stall_warning_s", stall_warning_s), ("stall_timeout_s", stall_timeout_s)):
        if value is not None:
            check_interval(name, value, low=0.0, high=math.inf, low_included=False, high_included=False)
    if choice("on_stall", on_stall, ON_STALL) == "drop" and stall_timeout_s is None:
        raise ValueError("on_stall='drop' needs stall_timeout_s, after how many seconds; give it")
    return StallRules(stall_warning_s, stall_timeout_s, on_stall)


def check_dropping(rules: StallRules, comm: Communicator) -> None:
    """Raise where ranks of `comm` are to be dropped, but the others would not go on."""
    if rules.on_stall == "drop" and comm.size > 1 and not comm.outlives_ranks:
        raise ValueError(
            "on_stall='drop' needs a job that goes on without ranks that are lost; launch it with `shadowrun "
            "--fault-tolerant`, or give on_stall='end'"
        )


def check_combinations(settings: Settings, *, deterministic: bool, model: torch.nn.Module | None) -> None:
    """Raise where arguments that are right by themselves do not go together."""
    options = settings.options
    if settings.sync_buffers and model is None:
        raise ValueError("sync_buffers=True needs model=..., whose buffers they are; give it")
    if options.foreground:
        _check_foreground("deterministic=True" if deterministic else "foreground=True", settings)
    if deterministic:
        _check_tables(model)
    if options.hierarchical is True and options.algorithm.asynchronous:
        what = type(options.algorithm).__name__
        raise ValueError(f"hierarchical=True has no meaning with {what}, whose ranks all exchange; leave it out")
    if options.algorithm.asynchronous and options.wire_dtype is not None:
        raise ValueError(
            f"wire_dtype={options.wire_dtype} is not available with {type(options.algorithm).__name__}; "
            "leave it out, or use ModelAveraging or BMUF"
        )
    _check_gap(settings, model)


def _check_foreground(asked: str, settings: Settings) -> None:
    """Raise where something does not go with rounds in the training thread, for which the user `asked`."""
    pacing = settings.pacing
    if pacing.sync_every is None:
        raise ValueError(f"{asked} needs sync_every=k, the steps from round to round; give it")
    for name, value in (("sync_interval_ms", pacing.sync_interval_ms), ("cpu_budget", pacing.cpu_budget)):
        if value is not None:
            raise ValueError(f"{name}={value} does not go with {asked}, where steps alone pace rounds; leave it out")
    if settings.apply == "hogwild":
        raise ValueError(f"apply='hogwild' is for background rounds; leave out {asked} or apply")
    if settings.options.hierarchical is True:
        raise ValueError(f"hierarchical=True has no meaning with {asked}, whose ranks all exchange; leave it out")


def _check_gap(settings: Settings, model: torch.nn.Module | None) -> None:
    """Raise unless training may wait for rounds at the gap `max_sync_gap`."""
    if (max_sync_gap := settings.max_sync_gap) is None:
        return
    if settings.options.foreground:
        raise ValueError(
            f"max_sync_gap={max_sync_gap} has no meaning in the foreground, where no gap grows; leave it out"
        )
    if max_sync_gap < settings.pacing.steps:
        raise ValueError(
            f"max_sync_gap={max_sync_gap} is below sync_every={settings.pacing.sync_every}, the gap that is asked for; "
            "give at least as much"
        )
    if lockstep := [each for each in _tables(model) if each.mode != "served"]:
        raise ValueError(
            f"max_sync_gap={max_sync_gap} does not go with mode={lockstep[0].mode!r} of the table "
            f"{lockstep[0].tables[0].name!r}, in which ranks wait for one another between steps: they would wait for "
            "those that wait at the gap; leave it out, or make the table with mode='served'"
        )


def _tables(model: torch.nn.Module | None) -> list[ShardedEmbeddingBag]:
    """Return the sharded tables of `model`, and those of this thread."""
    inside = [] if model is None else [each for each in model.modules() if isinstance(each, ShardedEmbeddingBag)]
    return [*inside, *open_modules(threading.current_thread())]


def _check_tables(model: torch.nn.Module | None) -> None:
    """Raise where rows are updated in the order in which ranks happen to come."""
    if served := [each for each in _tables(model) if each.mode == "served"]:
        raise ValueError(
            f"deterministic=True does not go with mode='served' of the table {served[0].tables[0].name!r}, whose rows "
            "change in the order in which ranks happen to come; make it with mode='alltoall'"
        )
