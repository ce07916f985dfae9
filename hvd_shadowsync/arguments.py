"""What may be passed to the wrapper, and what is wrong with the rest: messages name argument, value and remedy."""

from __future__ import annotations

from typing import Any

import torch

from hvd_shadowsync.algorithms import Algorithm, ModelAveraging
from hvd_shadowsync.checks import choice
from hvd_shadowsync.replica import MERGES
from hvd_shadowsync.rounds import RoundOptions

WIRE_DTYPES = (None, torch.float16, torch.bfloat16)


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` is one that can be synchronised, and is not yet."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer itself")
    if getattr(optimizer, "shadow", None) is not None:
        raise ValueError("optimizer is synchronised already; close() its handle (optimizer.shadow) first")
    if type(optimizer).__module__.startswith("horovod.") or hasattr(optimizer, "_allreduce_delay"):
        raise TypeError("optimizer is wrapped by Horovod already; pass the plain optimizer instead")


def round_options(
    algorithm: Algorithm | None, merge: str, wire_dtype: torch.dtype | None, foreground: bool
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
    return RoundOptions(algorithm, merge, wire_dtype, bool(foreground))


def check_combinations(options: RoundOptions, apply: str, sync_every: int | None) -> None:
    """Raise where arguments that are right by themselves do not go together."""
    if options.foreground and sync_every is None:
        raise ValueError("foreground=True needs sync_every=k, the steps from round to round; give it")
    if options.foreground and apply == "hogwild":
        raise ValueError("apply='hogwild' is for background rounds; leave out foreground=True or apply")
    if options.algorithm.asynchronous and options.wire_dtype is not None:
        raise ValueError(
            f"wire_dtype={options.wire_dtype} is not available with {type(options.algorithm).__name__}; "
            "leave it out, or use ModelAveraging or BMUF"
        )
