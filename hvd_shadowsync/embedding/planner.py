"""Which table goes where: a pure function from tables, what they cost and how much memory there is to a `Plan`.

A plan is as good as its fullest rank, for which all others wait. What a part of a table costs its owner is reckoned by
`CostModel`; parts are dealt out by longest processing time first (Graham 1969, SIAM J. Appl. Math. 17): the dearest
table first, each to the ranks that have the least to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hvd_shadowsync.checks import check_count, choice
from hvd_shadowsync.embedding.costs import CostModel, TableCost
from hvd_shadowsync.embedding.optimizers import INFINITY, SparseOptimizer
from hvd_shadowsync.embedding.placement import (
    COLUMN_WISE,
    REPLICATED,
    ROW_HASHED,
    STRATEGIES,
    TABLE_WISE,
    Placement,
    Plan,
)
from hvd_shadowsync.embedding.tables import EmbeddingTable, check_tables

BALANCED = "balanced"
ROUND_ROBIN = "round-robin"
PLANNED = (BALANCED, ROUND_ROBIN, *STRATEGIES)

SHARES = (1.0, 0.5, 0.25)  # tables that cost more than such a share of a rank's fair part are divided
SLACK = 1.05  # so much longer a step may take, for less work in all and less memory on the fullest rank
ROOM = 2  # times the fair part of the memory that a rank may hold before memory counts, where no limit is given
LEAST_ROOM_BYTES = 64 << 20  # below which it never counts
LEAST_DIM, LEAST_COLUMNS = 128, 32  # of a table that is divided column-wise, and of each of its parts
MOST_RANKS = 1024  # that the advice in an error looks at


@dataclass(frozen=True)
class _Item:
    """A table, divided but not yet placed."""

    strategy: str
    part_us: float
    part_bytes: list[int]


@dataclass(frozen=True)
class _Outcome:
    """All tables placed, what each costs, and what the fullest rank has by time and by memory."""

    placements: tuple[Placement, ...]
    costs: tuple[float, ...]
    peak_us: float
    peak_bytes: int


@dataclass(frozen=True)
class _Question:
    """What `plan` was asked, checked."""

    tables: tuple[EmbeddingTable, ...]
    costs: tuple[TableCost, ...]
    model: CostModel
    limit: float
    strategy: str
    small_bytes: int

    @property
    def ranks(self) -> range:
        return range(self.model.world_size)

    def item(self, index: int, strategy: str, parts: int) -> _Item:
        """Divide a table into up to `parts`; one part alone is the table, table-wise."""
        table, model = self.tables[index], self.model
        if self._is_small(table) or strategy == REPLICATED:
            strategy, parts = REPLICATED, model.world_size
        else:
            parts = min(parts, table.embedding_dim if strategy == COLUMN_WISE else table.num_embeddings)
            strategy = strategy if parts > 1 else TABLE_WISE
        part_us = model.part_us(table, self.costs[index], strategy, parts)
        return _Item(strategy, part_us, model.part_bytes(table, strategy, parts))

    def items(self, strategy: str) -> list[_Item]:
        """Divide all tables the same way, over as many ranks as can be."""
        parts = 1 if strategy == TABLE_WISE else self.model.world_size
        return [self.item(index, strategy, parts) for index in range(len(self.tables))]

    def room(self, total_bytes: int) -> float:
        """Return from how many bytes on memory counts."""
        return min(self.limit, max(ROOM * total_bytes / self.model.world_size, LEAST_ROOM_BYTES))

    def _is_small(self, table: EmbeddingTable) -> bool:
        wanted = self.strategy == BALANCED and self.model.world_size > 1
        return wanted and table.numel * self.model.element_bytes <= self.small_bytes


def plan(
    tables: Sequence[EmbeddingTable],
    world_size: int,
    costs: Mapping[str, TableCost] | None = None,
    memory_limit: int | None = None,
    strategy: str = BALANCED,
    *,
    optimizer: SparseOptimizer | None = None,
    batch_size: int = 2048,
    element_bytes: int = 4,
    replicate_below_bytes: int = 0,
) -> Plan:
    """Return where each table is to lie; a pure function, so that all ranks find the same.

    "balanced" tries some plans: tables dealt out whole, as they come and by cost; those divided that cost more than a
    share of a rank's fair part (`SHARES`) or need too much memory; all divided. It takes the one whose fullest rank is
    done first, or of those within `SLACK` of it, but no later than by "round-robin", one that keeps memory even
    (`ROOM`) with the least work in all. Tables are divided by hashed rows, or by columns where that is cheaper and the
    parts are wide (`LEAST_DIM`, `LEAST_COLUMNS`).

    Args:
        tables: what is to be placed.
        world_size: ranks; may be more than there are tables. With 1, all is table-wise on rank 0 (or replicated).
        costs: by name of the table; default `TableCost()` for each that is missing.
        memory_limit: bytes of weights and optimizer state that a rank may hold; default None: any number.
        strategy: "balanced" (default); "round-robin", tables dealt out in their order, for comparison; or a word of
            `placement.STRATEGIES` for all tables, over all ranks (a table that cannot be divided is table-wise).
        optimizer: whose state counts as memory; default None: without state, as `SGD`.
        batch_size: samples in a step of one rank.
        element_bytes: bytes of a weight and of a value of state.
        replicate_below_bytes: "balanced" replicates tables whose weights are no larger, if there is more than one rank.
            Default 0: none, for a replicated table is trained by the dense optimizer, not by the fused one.

    Raises:
        TypeError, ValueError: an argument is not what it should be, or the tables do not fit into `memory_limit`; says
            what would fit.
    """
    check_count("replicate_below_bytes", replicate_below_bytes, least=0)
    if memory_limit is not None:
        check_count("memory_limit", memory_limit, least=1)
    if optimizer is not None and not isinstance(optimizer, SparseOptimizer):
        raise TypeError(f"optimizer={optimizer!r} is no SparseOptimizer; give one such as RowWiseAdagrad(lr=0.01)")
    tables = check_tables(tables)
    question = _Question(
        tables=tables,
        costs=_checked_costs(tables, {} if costs is None else costs),
        model=CostModel(world_size, batch_size, element_bytes, optimizer.state_per_row if optimizer else (0, 0)),
        limit=INFINITY if memory_limit is None else memory_limit,
        strategy=choice("strategy", strategy, PLANNED),
        small_bytes=replicate_below_bytes,
    )
    fitting = [outcome for outcome in _outcomes(question) if outcome.peak_bytes <= question.limit]
    if not fitting:
        raise ValueError(_advice(question))
    best = _choose(question, fitting)
    return Plan(tables, world_size, best.placements, best.costs)


def _checked_costs(tables: Sequence[EmbeddingTable], costs: Mapping[str, TableCost]) -> tuple[TableCost, ...]:
    names = [table.name for table in tables]
    if unknown := sorted(set(costs) - set(names)):
        raise ValueError(f"costs has {unknown[0]!r}, which is no table; known are {', '.join(names)}")
    for name, cost in costs.items():
        if not isinstance(cost, TableCost):
            raise TypeError(f"costs[{name!r}]={cost!r} is no TableCost; give TableCost(pooling_factor=...)")
    return tuple(costs.get(name, TableCost()) for name in names)


def _outcomes(question: _Question) -> Iterator[_Outcome]:
    """Try what the strategy allows; the last is the one with the most even memory, whatever the limit."""
    if question.strategy == BALANCED:
        yield _dealt(question)
        whole = question.items(TABLE_WISE)
        for items in (whole, *(_divided(question, whole, share) for share in SHARES)):
            yield from _packed(question, items)
    elif question.strategy != ROUND_ROBIN:
        yield from _packed(question, question.items(question.strategy))
    yield _most_even(question)


def _choose(question: _Question, outcomes: list[_Outcome]) -> _Outcome:
    least = min(outcome.peak_us for outcome in outcomes)
    most = max(least, min(SLACK * least, _dealt(question).peak_us))
    room = question.room(sum(sum(item.part_bytes) for item in question.items(TABLE_WISE)))
    return min(
        (outcome for outcome in outcomes if outcome.peak_us <= most),
        key=lambda outcome: (max(outcome.peak_bytes - room, 0), sum(outcome.costs)),
    )


def _dealt(question: _Question) -> _Outcome:
    """Deal out whole tables in their order."""
    ranks = [(index % question.model.world_size,) for index in range(len(question.tables))]
    return _outcome(question, question.items(TABLE_WISE), ranks)


def _most_even(question: _Question) -> _Outcome:
    """Divide all that the strategy allows to divide, and deal it out by bytes; the limit makes no difference."""
    if question.strategy == ROUND_ROBIN:
        return _dealt(question)
    items = question.items(ROW_HASHED if question.strategy == BALANCED else question.strategy)
    return next(_packed(replace(question, limit=INFINITY), items, by_bytes=True))


def _divided(question: _Question, whole: list[_Item], share: float) -> list[_Item]:
    """Divide the tables that cost more than `share` of a rank's fair part, or that need too much memory."""
    fair_us = sum(item.part_us for item in whole) / question.model.world_size
    room = question.room(sum(sum(item.part_bytes) for item in whole))
    items = []
    for index, item in enumerate(whole):
        excess = max(item.part_us / max(fair_us, 1e-9), item.part_bytes[0] / room) / share
        parts = min(math.ceil(excess), question.model.world_size)
        items.append(_cheapest(question, index, parts) if parts > 1 else item)
    return items


def _cheapest(question: _Question, index: int, parts: int) -> _Item:
    found = [question.item(index, ROW_HASHED, parts)]
    if question.tables[index].embedding_dim >= max(LEAST_DIM, LEAST_COLUMNS * parts):
        found.append(question.item(index, COLUMN_WISE, parts))
    return min(found, key=lambda item: item.part_us)


def _packed(question: _Question, items: list[_Item], *, by_bytes: bool = False) -> Iterator[_Outcome]:
    """Deal out the heaviest first, each to the ranks that carry least; yields nothing where the limit is in the way."""
    weights = [float(max(item.part_bytes)) if by_bytes else item.part_us for item in items]
    held = dict.fromkeys(question.ranks, sum(item.part_bytes[0] for item in items if item.strategy == REPLICATED))
    carried = dict.fromkeys(question.ranks, 0.0)
    ranks: list[tuple[int, ...]] = [()] * len(items)
    for index in sorted(range(len(items)), key=lambda i: (-weights[i], -max(items[i].part_bytes), i)):
        sizes = items[index].part_bytes
        if items[index].strategy == REPLICATED:
            continue
        free = [rank for rank in question.ranks if held[rank] + max(sizes) <= question.limit]
        lightest = sorted(free, key=lambda rank: (carried[rank], held[rank], rank))[: len(sizes)]
        if len(lightest) < len(sizes):
            return
        ranks[index] = tuple(lightest)
        for size, rank in zip(sizes, ranks[index], strict=True):
            held[rank] += size
            carried[rank] += size if by_bytes else weights[index]
    yield _outcome(question, items, ranks)


def _outcome(question: _Question, items: list[_Item], ranks: Sequence[tuple[int, ...]]) -> _Outcome:
    held, busy = dict.fromkeys(question.ranks, 0), dict.fromkeys(question.ranks, 0.0)
    placements = []
    for item, owners in zip(items, ranks, strict=True):
        replicated = item.strategy == REPLICATED
        placements.append(Placement(item.strategy, () if replicated else owners))
        for size, rank in zip(item.part_bytes, question.ranks if replicated else owners, strict=True):
            held[rank] += size
            busy[rank] += item.part_us
    costs = tuple(item.part_us * len(item.part_bytes) for item in items)
    return _Outcome(tuple(placements), costs, max(busy.values()), max(held.values()))


def _advice(question: _Question) -> str:
    """Return why the tables do not fit, and what would; all that it names was tried."""
    sizes = [sum(item.part_bytes) for item in question.items(TABLE_WISE)]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    peak = _most_even(question).peak_bytes
    ranks = _fewest_ranks(question)
    remedies = [f"world_size={ranks}"] if ranks else []
    if _most_even(replace(question, strategy=BALANCED)).peak_bytes <= question.limit:
        remedies.append(f"strategy={BALANCED!r}")
    return (
        f"memory_limit={question.limit} bytes a rank is too little for strategy={question.strategy!r} with "
        f"world_size={question.model.world_size}: weights and optimizer state need {sum(sizes)} bytes in all, {peak} "
        f"on the fullest rank; the largest table is {question.tables[largest].name!r}, {sizes[largest]} bytes; give "
        + ", or ".join([*remedies, f"memory_limit={peak} or more"])
    )


def _fewest_ranks(question: _Question) -> int | None:
    """Return how many ranks it takes, found by doubling and bisection; None where `MOST_RANKS` are not enough."""

    def fits(world_size: int) -> bool:
        model = replace(question.model, world_size=world_size)
        return _most_even(replace(question, model=model)).peak_bytes <= question.limit

    low, high = question.model.world_size, 2 * question.model.world_size
    while not fits(high):
        low, high = high, 2 * high
        if high > MOST_RANKS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
