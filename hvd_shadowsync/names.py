"""Which tensors a replica consists of, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hvd_shadowsync.owned import is_owned
from hvd_shadowsync.replica import NamedTensor


def name_tensors(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module | None, named_parameters: Mapping[str, Tensor] | None
) -> tuple[list[NamedTensor], list[NamedTensor]]:
    """Return the parameters that `optimizer` has, and the buffers of `model` (but what a rank has alone), with names.

    Parameters that neither `model` nor `named_parameters` names are called after their place in the optimizer.
    """
    given = dict(named_parameters or {}) if model is None else dict(model.named_parameters())
    names = {id(tensor): name for name, tensor in given.items()}
    params = []
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            name = names.get(id(param), f"group{group_index}.{index}")
            params.append(NamedTensor(name, _usable(name, param)))
    buffers = model.named_buffers() if model is not None else []
    return params, [NamedTensor(name, _usable(name, buffer)) for name, buffer in buffers if not is_owned(buffer)]


def name_state(optimizer: torch.optim.Optimizer, params: Iterable[NamedTensor]) -> list[NamedTensor]:
    """Return the dense floating-point tensors of the state of `optimizer`, named after their parameters, sorted."""
    names = {id(each.tensor): each.name for each in params}
    found = [
        NamedTensor(f"{names[id(param)]}.{key}", value)
        for param, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and _is_averaged(value)
    ]
    return sorted(found, key=lambda each: each.name)


def _is_averaged(value: Tensor) -> bool:
    return (value.is_floating_point() or value.is_complex()) and value.layout is torch.strided


def checked_names(pairs: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return `named_parameters` as a dict.

    Raises:
        TypeError: not pairs of a name and a tensor.
        ValueError: a name twice, or a parameter of `optimizer` without a name.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in _pairs(pairs):
        if name in named:
            raise ValueError(f"named_parameters has the name {name!r} twice; names have to be unique")
        named[name] = tensor
    known = {id(tensor) for tensor in named.values()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    missing = [tuple(param.shape) for param in params if id(param) not in known]
    if missing:
        raise ValueError(
            f"named_parameters lacks {len(missing)} of the optimizer's {len(params)} parameters (the first has shape "
            f"{missing[0]}); pass the named_parameters() of the model that the optimizer was made for"
        )
    return named


def _pairs(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for pair in pairs:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError(
                f"named_parameters has {type(pair).__name__} where a pair (name, tensor) is wanted; "
                "pass model.named_parameters()"
            )
        yield pair


def _usable(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise TypeError(f"{name} is {kind}; only dense tensors with values can be synchronised")
    return tensor
