"""What a user says of an embedding table: its rows, its width, the features that look rows up, how they are pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from hvd_shadowsync.checks import check_count, choice

POOLINGS = ("sum", "mean")
Initializer = Callable[..., object]
"""Fills rows in place: `init(rows, generator=generator)`, as the functions of `torch.nn.init` do."""


@dataclass(frozen=True)
class EmbeddingTable:
    """One table of a `ShardedEmbeddingBag`.

    As `torch.nn.EmbeddingBag`, but `pooling` is its `mode`, and "sum" by default, where that has "mean". There is no
    `padding_idx`, `max_norm` or "max".

    Attributes:
        name: unique among the tables.
        num_embeddings: rows; ids are in [0, num_embeddings).
        embedding_dim: floats in a row.
        pooling: "sum" (default) or "mean" of the rows of a bag; an empty bag gives zeros.
        features: names of the inputs that look up rows of this table; default one feature with the table's name.
        init: fills rows in place, called as `init(rows, generator=generator)` on blocks of whole rows; default
            `torch.nn.init.normal_`, as in `nn.EmbeddingBag`. The values depend on the seed alone, not on the placement.

    Raises:
        TypeError, ValueError: an attribute is not what it should be; names it and the remedy.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    pooling: str = "sum"
    features: Sequence[str] = ()
    init: Initializer = nn.init.normal_

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise ValueError(f"name={self.name!r} is no name for a table; give a string of its own, without dots")
        check_count("num_embeddings", self.num_embeddings, least=1)
        check_count("embedding_dim", self.embedding_dim, least=1)
        choice("pooling", self.pooling, POOLINGS)
        if isinstance(self.features, str) or not all(isinstance(each, str) and each for each in self.features):
            raise TypeError(f"features={self.features!r} is not a list of names; give strings, such as [{self.name!r}]")
        if not callable(self.init):
            raise TypeError(f"init={self.init!r} cannot be called; give a function such as torch.nn.init.normal_")
        object.__setattr__(self, "features", tuple(self.features) or (self.name,))

    @property
    def numel(self) -> int:
        """Weights of the table."""
        return self.num_embeddings * self.embedding_dim


def check_tables(tables: Sequence[EmbeddingTable]) -> tuple[EmbeddingTable, ...]:
    """Return `tables` as a tuple; raise where they are none, or where names of tables or of features repeat."""
    found = tuple(tables)
    for table in found:
        if not isinstance(table, EmbeddingTable):
            raise TypeError(f"tables has a {type(table).__name__}; give EmbeddingTable(name, rows, dim, ...)")
    if not found:
        raise ValueError("tables is empty; give at least one EmbeddingTable")
    _require_unique("table", [table.name for table in found])
    _require_unique("feature", [feature for table in found for feature in table.features])
    return found


def _require_unique(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tables have the {what} {name!r} {names.count(name)} times; names have to be unique")
