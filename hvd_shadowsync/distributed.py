"""`DistributedOptimizer` with Horovod's signature: what each of its arguments means without gradient allreduces."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.checks import check_count
from hvd_shadowsync.comm import job, mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.optimizer import ShadowSync

AVERAGE = 0  # horovod.torch.Average
WIRE_DTYPES = {"NoneCompressor": None, "FP16Compressor": torch.float16}


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = None,
    backward_passes_per_step: int = 1,
    op: int = AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    algorithm: Algorithm | None = None,
    model: torch.nn.Module | None = None,
    sync_every: int | None = None,
    sync_interval_ms: float | None = None,
    cpu_budget: float | None = None,
    warmup_steps: int = 0,
    merge: str = "delta",
    foreground: bool = False,
    deterministic: bool = False,
    apply: str = "boundary",
    sync_buffers: bool | None = None,
    wire_dtype: torch.dtype | None = None,
    hierarchical: bool | str = "auto",
    max_distance: float | None = None,
    max_sync_gap: int | None = None,
    stall_warning_s: float | None = 60.0,
    stall_timeout_s: float | None = None,
    on_stall: str = "end",
    initial_weights: str = "broadcast",
    end_job_on_exception: bool = True,
) -> torch.optim.Optimizer:
    """Synchronise `optimizer`'s replicas in the background and return it: the same object, with its handle `.shadow`.

    The first ten arguments are Horovod's (`horovod.torch.DistributedOptimizer` 0.28). Gradients stay on their rank
    after the warm-up, so:

    Args:
        optimizer: the optimizer, which is returned.
        named_parameters: names of the parameters; `model` names them as well.
        compression: `Compression.none`, or `Compression.fp16`, which means `wire_dtype=torch.float16`.
        backward_passes_per_step: at least 1; accumulates by itself, since no backward pass communicates.
        op: `Average`; others raise ValueError.
        gradient_predivide_factor: no effect on a mean of weights; warns where it is not 1.
        num_groups, groups: grouping of gradient allreduces, of which there are none; warns where given.
        sparse_as_dense: in the warm-up, leave averaged gradients dense.
        process_set: synchronise over the ranks of this set only; default all.
        algorithm, model, sync_every, sync_interval_ms, cpu_budget, warmup_steps, merge, foreground, deterministic,
        apply, sync_buffers, wire_dtype, hierarchical, max_distance, max_sync_gap, stall_warning_s, stall_timeout_s,
        on_stall, initial_weights, end_job_on_exception: as for `ShadowSync`.

    Returns:
        `optimizer` itself. `optimizer.shadow` is the `ShadowSync`; `optimizer.synchronize()` and
        `optimizer.skip_synchronize()` have Horovod's meaning (gradients), so clipping recipes go on working.

    Raises:
        TypeError, ValueError, TransportError, ReplicaMismatchError: as `ShadowSync`.
    """
    job.end_job_on_exception(end_job_on_exception)
    check_count("backward_passes_per_step", backward_passes_per_step, least=1)
    if op != AVERAGE:
        raise ValueError(
            f"op={op!r}: weights can only be averaged; use op=hvd.Average (in place of Sum, scale the learning rate)"
        )
    _warn_without_effect(gradient_predivide_factor, num_groups, groups)
    members = communicator_of(process_set)
    handle = ShadowSync(
        optimizer,
        algorithm=algorithm,
        model=model,
        named_parameters=named_parameters,
        sync_every=sync_every,
        sync_interval_ms=sync_interval_ms,
        cpu_budget=cpu_budget,
        warmup_steps=warmup_steps,
        merge=merge,
        foreground=foreground,
        deterministic=deterministic,
        apply=apply,
        sync_buffers=sync_buffers,
        wire_dtype=_wire_dtype(compression, wire_dtype),
        hierarchical=hierarchical,
        max_distance=max_distance,
        max_sync_gap=max_sync_gap,
        stall_warning_s=stall_warning_s,
        stall_timeout_s=stall_timeout_s,
        on_stall=on_stall,
        sparse_as_dense=sparse_as_dense,
        initial_weights=initial_weights,
        communicator=members,
        end_job_on_exception=end_job_on_exception,
    )
    if members is not None:
        members.free()
    return handle.optimizer


def _wire_dtype(compression: Any, wire_dtype: torch.dtype | None) -> torch.dtype | None:
    if compression is None:
        return wire_dtype
    name = getattr(compression, "__name__", type(compression).__name__)
    if name not in WIRE_DTYPES:
        raise ValueError(f"compression={name} is unknown; use Compression.none or Compression.fp16, or wire_dtype=...")
    compressed = WIRE_DTYPES[name]
    if compressed is not None and wire_dtype not in (None, compressed):
        raise ValueError(f"compression={name} and wire_dtype={wire_dtype} contradict each other; give one of them")
    return compressed or wire_dtype


def communicator_of(process_set: Any) -> Communicator | None:
    """Return a communicator over the ranks of a Horovod process set, which the caller frees; None for all ranks."""
    if process_set is None or getattr(process_set, "process_set_id", None) == 0:
        return None
    ranks = getattr(process_set, "ranks", None)
    if not ranks:
        raise TypeError(f"process_set={process_set!r} has no ranks; pass a horovod ProcessSet that was added")
    return mpi.world(ranks)


def _warn_without_effect(gradient_predivide_factor: float, num_groups: int, groups: Any) -> None:
    given = {
        "gradient_predivide_factor": gradient_predivide_factor != 1.0,
        "num_groups": num_groups != 0,
        "groups": groups is not None,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        warnings.warn(f"{', '.join(names)}: no effect, since gradients are not exchanged between ranks", stacklevel=3)
