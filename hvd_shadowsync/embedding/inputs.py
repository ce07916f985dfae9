"""What may be passed as a batch of ids, brought into one form and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hvd_shadowsync.embedding.kernels.base import Bags, Kernel
from hvd_shadowsync.embedding.tables import EmbeddingTable

ID_DTYPES = (torch.int64, torch.int32)
NARROW = 2**31
"""Rows up to which ids are kept as int32."""


class Padded(NamedTuple):
    """One feature's bags as rows of equal length: of row b the first `lengths[b]` ids count, the rest is padding."""

    ids: Tensor  # [batch, most] int64 or int32
    lengths: Tensor  # [batch] int64 or int32
    weights: Tensor | None = None  # [batch, most]


@dataclass(frozen=True)
class Jagged:
    """All features in one piece, as torchrec's `KeyedJaggedTensor` has them, which may be passed as well.

    Attributes:
        keys: names of the features, in the order of the pieces.
        values: [ids] int64 or int32: feature after feature, bag after bag.
        lengths: [features * batch] int64 or int32.
        weights: [ids] of the tables' dtype; None: 1.
    """

    keys: Sequence[str]
    values: Tensor
    lengths: Tensor
    weights: Tensor | None = None


@runtime_checkable
class _KeyedJagged(Protocol):
    def keys(self) -> Sequence[str]: ...
    def values(self) -> Tensor: ...
    def lengths(self) -> Tensor: ...
    def weights_or_none(self) -> Tensor | None: ...


class Batch(NamedTuple):
    """A batch in the one form.

    Attributes:
        features: in the order of the tables, the bags of each; all have `num_samples`. Copies: what was passed may be
            changed at once.
        num_samples: bags of each feature.
        learned: by feature, the weights that want a gradient, with their history.
    """

    features: list[Bags]
    num_samples: int
    learned: dict[int, Tensor]


class Feature(NamedTuple):
    """A feature, and the table that it looks rows up in."""

    name: str
    table: EmbeddingTable


def features_of(tables: Sequence[EmbeddingTable]) -> list[Feature]:
    """Return all features, in the order of the tables."""
    return [Feature(name, table) for table in tables for name in table.features]


def read_batch(
    inputs: Any, features: Sequence[Feature], dtype: torch.dtype, kernel: Kernel, *, include_last_offset: bool
) -> Batch:
    """Bring `inputs` into the one form.

    Args:
        inputs: a mapping from each feature to `ids` (one id a sample), `(ids, offsets)`, `(ids, offsets, weights)`, a
            matrix of ids (rows are bags), or `Padded`; a tensor [batch, features] or [batch, features, ids]; or
            `Jagged` or torchrec's `KeyedJaggedTensor`.
        features: in order.
        dtype: of the tables, which weights have to have.
        kernel: checks ids.
        include_last_offset: whether offsets end with the number of ids, as in `nn.EmbeddingBag`.

    Raises:
        TypeError, ValueError: names the feature, the value and the remedy.
    """
    found = _by_feature(inputs, features)
    bags, learned = [], {}
    for index, feature in enumerate(features):
        made = _bags(feature.name, found[feature.name], include_last_offset=include_last_offset)
        _check(feature, made, dtype, kernel)
        if made.weights is not None and made.weights.requires_grad and torch.is_grad_enabled():
            learned[index] = made.weights.cpu()
        bags.append(_own(feature, made))
    counts = {each.num_bags for each in bags}
    if len(counts) > 1:
        sizes = ", ".join(f"{f.name}: {b.num_bags}" for f, b in zip(features, bags, strict=True))
        raise ValueError(
            f"the features have different numbers of samples ({sizes[:200]}); give one bag a sample to each "
            "(offsets that end with the number of ids need include_last_offset=True)"
        )
    return Batch(bags, counts.pop(), learned)


def empty_batch(features: Sequence[Feature]) -> Batch:
    """Return a batch without samples."""
    return Batch([Bags(torch.empty(0, dtype=torch.int64))] * len(features), 0, {})


def _own(feature: Feature, bags: Bags) -> Bags:
    """Return a copy, which nobody changes between the check of the ids and the update of their rows."""
    kind = torch.int32 if feature.table.num_embeddings <= NARROW else torch.int64
    lengths = None if bags.lengths is None else bags.lengths.to(torch.int32, copy=True)
    weights = None if bags.weights is None else bags.weights.detach().cpu().contiguous().clone()
    return Bags(bags.ids.to(kind, copy=True), lengths, weights)


def _by_feature(inputs: Any, features: Sequence[Feature]) -> Mapping[str, Any]:
    names = [feature.name for feature in features]
    if isinstance(inputs, Tensor):
        return _from_tensor(inputs, names)
    if isinstance(inputs, Jagged):
        found = _from_jagged(inputs.keys, inputs.values, inputs.lengths, inputs.weights)
    elif isinstance(inputs, Mapping):
        found = dict(inputs)
    elif isinstance(inputs, _KeyedJagged):
        found = _from_jagged(inputs.keys(), inputs.values(), inputs.lengths(), inputs.weights_or_none())
    else:
        raise TypeError(
            f"inputs is a {type(inputs).__name__}; give a dict of features, a tensor [batch, {len(names)}], or Jagged"
        )
    if unknown := [name for name in found if name not in names]:
        raise ValueError(f"inputs has the feature {unknown[0]!r}, which no table has; known are {_listed(names)}")
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"inputs lacks the feature {missing[0]!r}; give all of {_listed(names)}, empty bags where none"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")


def _from_tensor(inputs: Tensor, names: list[str]) -> dict[str, Any]:
    if inputs.dim() not in (2, 3) or inputs.shape[1] != len(names):
        raise ValueError(
            f"inputs is a tensor of shape {tuple(inputs.shape)}; give [batch, {len(names)}] or "
            f"[batch, {len(names)}, ids], a column for each of {_listed(names)}"
        )
    columns = inputs.detach().cpu().transpose(0, 1).contiguous()  # [features, batch, ...]
    return dict(zip(names, columns.unbind(0), strict=True))


def _from_jagged(keys: Sequence[str], values: Tensor, lengths: Tensor, weights: Tensor | None) -> dict[str, Any]:
    for name, tensor in (("values", values), ("lengths", lengths)):
        _require_ids(name, tensor)
    if values.dim() != 1:
        raise ValueError(f"values has shape {tuple(values.shape)}; give the ids of all features in one dimension")
    if twice := [key for key in keys if list(keys).count(key) > 1]:
        raise ValueError(f"keys has {twice[0]!r} {list(keys).count(twice[0])} times; give each feature once")
    if not keys or lengths.dim() != 1 or len(lengths) % len(keys):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)} for {len(keys)} keys; give [features * batch]")
    lengths = lengths.detach().cpu().view(len(keys), -1)
    if len(lengths) and lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths has {int(lengths.min())}; give the number of ids of each bag, at least 0")
    if lengths.numel() and int(lengths.max()) > len(values):
        raise ValueError(
            f"lengths has {int(lengths.max())} where values has {len(values)} ids; they have to sum to that"
        )
    sizes = lengths.sum(1, dtype=torch.int64).tolist()
    if sum(sizes) != len(values):
        raise ValueError(f"lengths sum to {sum(sizes)} where values has {len(values)} ids; they have to be the same")
    if weights is not None and weights.shape != values.shape:
        raise ValueError(f"weights has shape {tuple(weights.shape)} where values has {tuple(values.shape)}")
    parts = torch.split(values.detach().cpu(), sizes)
    scales = [None] * len(keys) if weights is None else list(torch.split(weights, sizes))
    ones = lengths.numel() == sum(sizes) and (not sum(sizes) or int(lengths.max()) == 1)
    counted = [None if ones else each for each in lengths.int()]
    return {k: Bags(v.contiguous(), n, w) for k, v, n, w in zip(keys, parts, counted, scales, strict=True)}


def _require_ids(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} is of {kind}; give a tensor of torch.int64 or torch.int32")
    if ids.layout is not torch.strided or ids.is_meta:
        kind = "a meta tensor, without values" if ids.is_meta else f"of {ids.layout}"
        raise TypeError(f"{name} is {kind}; give an ordinary tensor")


def _bags(name: str, given: Any, *, include_last_offset: bool) -> Bags:
    if isinstance(given, Bags):
        return given
    if isinstance(given, Padded):
        return _from_padded(name, given)
    if isinstance(given, Tensor):
        return _from_matrix(name, given, None)
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise TypeError(
            f"feature {name!r} is a {type(given).__name__}; give ids, (ids, offsets) or (ids, offsets, weights)"
        )
    ids, offsets, weights = given if len(given) == 3 else (*given, None)
    if offsets is None:
        return _from_matrix(name, ids, weights)
    _require_ids(f"ids of feature {name!r}", ids)
    _require_ids(f"offsets of feature {name!r}", offsets)
    if ids.dim() != 1 or offsets.dim() != 1:
        raise ValueError(
            f"feature {name!r} has ids of shape {tuple(ids.shape)} and offsets of shape {tuple(offsets.shape)}; "
            "give both in one dimension, or a matrix of ids without offsets"
        )
    _require_weights(name, ids, weights)
    return Bags(_host(ids), _lengths(name, _host(offsets), len(ids), include_last_offset), weights)


def _from_matrix(name: str, ids: Any, weights: Tensor | None) -> Bags:
    _require_ids(f"ids of feature {name!r}", ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"feature {name!r} has ids of shape {tuple(ids.shape)}; give [batch] or [batch, ids of a bag]")
    _require_weights(name, ids, weights)
    flat = None if weights is None else weights.reshape(-1)
    if ids.dim() == 1 or ids.shape[1] == 1:
        return Bags(_host(ids).view(-1), None, flat)
    return Bags(_host(ids).view(-1), torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int32), flat)


def _from_padded(name: str, given: Padded) -> Bags:
    ids, lengths, weights = given
    _require_ids(f"ids of feature {name!r}", ids)
    _require_ids(f"lengths of feature {name!r}", lengths)
    if ids.dim() != 2 or lengths.shape != ids.shape[:1]:
        raise ValueError(
            f"feature {name!r} has padded ids of shape {tuple(ids.shape)} with lengths of shape "
            f"{tuple(lengths.shape)}; give [batch, most] and [batch]"
        )
    _require_weights(name, ids, weights)
    lengths = lengths.detach().cpu()
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= ids.shape[1]:
        raise ValueError(f"feature {name!r} has lengths outside [0, {ids.shape[1]}], the width of its padded ids")
    used = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    return Bags(ids.detach().cpu()[used], lengths.int(), None if weights is None else weights[used.to(weights.device)])


def _require_weights(name: str, ids: Tensor, weights: Any) -> None:
    if weights is not None and (not isinstance(weights, Tensor) or weights.shape != ids.shape):
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"feature {name!r} has weights {shape} for ids {tuple(ids.shape)}; give one for each id")


def _host(ids: Tensor) -> Tensor:
    return ids.detach().cpu().contiguous()


def _lengths(name: str, offsets: Tensor, num_ids: int, include_last_offset: bool) -> Tensor | None:
    """Return the number of ids of each bag; None where each has one."""
    what = f"feature {name!r} has offsets"
    if include_last_offset:
        if not len(offsets) or int(offsets[-1]) != num_ids:
            raise ValueError(
                f"{what} that do not end with the number of its ids, {num_ids}; include_last_offset=True says so"
            )
        ends = offsets[1:]
        starts = offsets[:-1]
    else:
        starts = offsets
        ends = torch.cat([offsets[1:], offsets.new_tensor([num_ids])])[: len(offsets)]
    if num_ids and not len(starts):
        raise ValueError(f"{what} for no bag, but {num_ids} ids; give the place of each bag's first id")
    if len(starts) and int(starts[0]) != 0:
        raise ValueError(f"{what} that begin with {int(starts[0])}; the first has to be 0")
    if num_ids == len(starts) and torch.equal(starts, torch.arange(num_ids, dtype=starts.dtype)):
        return None
    back = ends < starts  # differences might overflow
    if back.any():
        at = int(back.nonzero()[0])
        raise ValueError(
            f"{what} that go back after bag {at}, from {int(starts[at])} to {int(ends[at])}; they have to grow, "
            f"up to {num_ids}"
        )
    return (ends - starts).int()


def _check(feature: Feature, bags: Bags, dtype: torch.dtype, kernel: Kernel) -> None:
    rows = feature.table.num_embeddings
    if (at := kernel.first_outside(bags.ids, rows)) >= 0:
        raise ValueError(
            f"feature {feature.name!r} has the id {int(bags.ids[at])} at place {at}; table {feature.table.name!r} has "
            f"rows 0 to {rows - 1}"
        )
    if bags.weights is None:
        return
    if bags.weights.dtype is not dtype:
        raise TypeError(f"feature {feature.name!r} has weights of {bags.weights.dtype}; the tables are of {dtype}")
    if feature.table.pooling != "sum":
        raise ValueError(
            f"feature {feature.name!r} has weights, but table {feature.table.name!r} has "
            f"pooling={feature.table.pooling!r}; weights need pooling='sum'"
        )
