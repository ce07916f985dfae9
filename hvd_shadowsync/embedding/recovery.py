"""Tables of which a rank was lost: those that are left take its parts over, and read their rows from a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding.holding import Group, of_shards
from hvd_shadowsync.embedding.placement import Plan, Shard
from hvd_shadowsync.embedding.saved import Saved
from hvd_shadowsync.embedding.shards import Shards
from hvd_shadowsync.errors import CheckpointError, EmbeddingError

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]
Source = Folder | Callable[[], Folder | None] | None
"""A folder of `files.save`, or what returns the newest one, None where there is none yet; None: there is no such."""


def take_over(comm: Communicator, before: Group, copies: Shards | None, source: Source) -> tuple[Plan, Shards]:
    """Return where the parts lie from now on, and this rank's, with all their rows (collective over those left).

    Parts of lost ranks go to those that have copies of them; others have the rows and the optimizer state of the
    checkpoint. All that was not lost is as it was, in the same memory.

    Args:
        comm: the ranks that are left.
        before: who held what.
        copies: those that this rank has and could go on with.
        source: of a checkpoint.

    Raises:
        EmbeddingError: there is none that has the rows; raised on every rank.
    """
    members, plan, shards = before.comm.members, before.plan, before.shards
    ranks = [comm.members.index(number) if number in comm.members else None for number in members]
    lost = [shard for shard in plan.shards if ranks[shard.rank] is None]
    kept = {**({} if copies is None else copies.by_extent()), **shards.by_extent()}
    heirs = {extent: rank for rank, held in enumerate(comm.allgather_object(list(kept))) for extent in held}
    after = plan.handed_on(ranks, heirs)
    taken = Shards(after, comm.rank, shards.rule, shards.dtype, None, kept)
    if inherited := [shard for shard in lost if shard.extent in heirs]:
        if comm.rank == 0:
            _tell(inherited, members, plan, "the copies")
        lost = [shard for shard in lost if shard.extent not in heirs]
    if lost:
        wanted = [shard for shard in taken.owned if shard.extent not in kept]
        folder = _read(comm, source, taken, wanted, after)
        if comm.rank == 0:
            _tell(lost, members, plan, str(folder))
    return after, taken


def _read(comm: Communicator, source: Source, taken: Shards, wanted: Sequence[Shard], plan: Plan) -> Path | None:
    """Read the rows of `wanted`, on all ranks from the same checkpoint; return where that is (collective).

    The newest one may give way to one that is just being finished: then that is read.
    """
    before: Path | None = None
    folder: Path | None
    while True:
        folder, failure = comm.allgather_object(_find(source) if comm.rank == 0 else None)[0]
        generation = None
        if failure is None:
            failure, generation = _fill(folder, taken, wanted, plan)
        try:
            _agree(comm, folder, failure, generation)
        except EmbeddingError:
            if folder in (None, before):
                raise
            before = folder
            continue
        return folder


def _find(source: Source) -> tuple[Path | None, str | None]:
    """Return the folder to read, or why there is none."""
    try:
        found = source() if callable(source) else source
    except Exception as error:  # the user's
        return None, f"recover_from() raised {error!r}"
    if found is None:
        return None, "no checkpoint has them yet" if callable(source) else "no checkpoint is known that has them"
    if not isinstance(found, (str, os.PathLike)):
        return None, f"recover_from gives a {type(found).__name__}; let it give the folder of a checkpoint"
    return Path(found), None


def _fill(folder: Path, taken: Shards, wanted: Sequence[Shard], plan: Plan) -> tuple[str | None, str | None]:
    """Read the rows of `wanted`; return what went wrong, and which checkpoint it is."""
    try:
        saved = Saved(folder)
        saved.require_sizes(plan.tables)
        saved.fill_some(plan.tables, taken.rule, [each for each in of_shards(taken) if each.shard in wanted])
    except CheckpointError as error:
        return str(error), None
    except (OSError, SafetensorError) as error:
        return f"{folder} cannot be read ({error})", None
    if anew := set(saved.without_state(plan, taken.rule)) & {plan.tables[shard.table].name for shard in wanted}:
        logger.warning(
            "the optimizer's state begins anew for %s: %s has none that fits", ", ".join(sorted(anew)), folder
        )
    return None, saved.generation


def _agree(comm: Communicator, folder: Path | None, failure: str | None, generation: str | None) -> None:
    """Raise on every rank unless all have read the same checkpoint."""
    everyone = comm.allgather_object((failure, generation))
    for number, (message, _) in zip(comm.members, everyone, strict=True):
        if message is not None:
            raise EmbeddingError(f"rank {number}: {message}")
    for number, (_, theirs) in zip(comm.members, everyone, strict=True):
        if theirs != everyone[0][1]:
            raise EmbeddingError(
                f"rank {comm.members[0]} and rank {number} find different checkpoints in {folder}, which all hosts "
                "have to see"
            )


def _tell(lost: Sequence[Shard], members: Sequence[int], plan: Plan, where: str) -> None:
    by_rank: Mapping[int, set[str]] = {members[shard.rank]: set() for shard in lost}
    for shard in lost:
        by_rank[members[shard.rank]].add(plan.tables[shard.table].name)
    for number, names in by_rank.items():
        logger.warning(
            "rows of %s, which rank %d held, are now those of %s, on the ranks that are left",
            ", ".join(sorted(names)), number, where,
        )  # fmt: skip
