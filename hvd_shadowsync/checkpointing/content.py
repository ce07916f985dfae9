"""What goes into a checkpoint's dense file: taken by the training thread at a step boundary, examined by another."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.captured import Capture
from hvd_shadowsync.checkpoint import require_loadable
from hvd_shadowsync.errors import CheckpointError
from hvd_shadowsync.optimizer import ShadowSync
from hvd_shadowsync.owned import is_owned

CHUNK = 1 << 20


@dataclass(frozen=True)
class Content:
    """A copy that nobody else changes.

    Attributes:
        step: steps of this rank.
        model, optimizer, extra: as `checkpoint.save` writes them.
        params: which of `model` are parameters.
    """

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    extra: Any
    params: frozenset[str]

    def by_name(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"model": self.model, "optimizer": self.optimizer, "extra": self.extra}

    def examine(self) -> None:
        """Raise where this must not take the place of an earlier checkpoint.

        Raises:
            CheckpointError: parameters or optimizer state have NaN or infinity, buffers have NaN (infinity may be a
                mask's), or there is something that could not be loaded.
        """
        require_loadable(_outline(self.by_name()))
        state = self.optimizer.get("state", {})
        for name, tensor in (*_tensors(self.model, "model"), *_tensors(state, "optimizer")):
            strict = name.startswith("optimizer") or name.removeprefix("model.") in self.params
            require_finite(name, tensor, infinity=not strict)


def take(model: torch.nn.Module, sync: ShadowSync, capture: Capture | None, extra: Any) -> Content:
    """Copy what a checkpoint needs, at a step boundary of the training thread; the weights are those of `capture`.

    Without one they are the live ones, and so is what rounds remember.
    """
    captured = {} if capture is None else capture.tensors()
    live = model.state_dict(keep_vars=True)
    shared = {name: value for name, value in live.items() if not (isinstance(value, Tensor) and is_owned(value))}
    weights = {name: captured[id(value)] if id(value) in captured else _copied(value) for name, value in shared.items()}
    params = frozenset(name for name, value in shared.items() if isinstance(value, torch.nn.Parameter))
    state = sync.state_beside(capture.rounds) if capture is not None else sync.optimizer.state_dict()
    rounds = state.pop("shadow_sync", None)
    optimizer = _copied(state) | ({"shadow_sync": rounds} if rounds else {})
    return Content(sync.steps, weights, optimizer, _copied(extra), params)


def require_finite(name: str, tensor: Tensor, *, infinity: bool = False) -> None:
    """Raise where `tensor` has NaN, or infinity unless that is allowed.

    Raises:
        CheckpointError: names the tensor.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        if bool(part.isnan().any()) or not (infinity or bool(part.isfinite().all())):
            raise CheckpointError(
                f"{name} has NaN or infinity; the earlier checkpoint stays: go on from that, with a lower learning rate"
            )


def _copied(value: Any) -> Any:
    """Return `value` with copies of its tensors, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        kind: Any = next((each for each in (OrderedDict, Counter) if type(value) is each), dict)
        return kind({key: _copied(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
    return value


def _outline(value: Any) -> Any:
    """Return `value` with empty tensors; those of other classes as they are."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return torch.empty(0, dtype=value.dtype)
    if type(value) in (dict, OrderedDict):
        return type(value)({key: _outline(each) for key, each in value.items()})
    if type(value) in (list, tuple):
        return type(value)(map(_outline, value))
    return value


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _tensors(each, f"{name}.{index}")
