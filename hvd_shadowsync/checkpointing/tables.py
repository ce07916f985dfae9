"""Sharded tables in a checkpoint: each rank writes its own rows, asked and answered through files in the folder.

Nobody sends a message for it: a rank that has died or is slow holds no training up. The rank that writes the dense file
puts `request.json` into the folder of the checkpoint under way; the others look for it now and then, write their
shards, then `done-<rank>.json`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hvd_shadowsync.checkpointing.content import require_finite
from hvd_shadowsync.checkpointing.folder import Draft, under_way, write_whole
from hvd_shadowsync.checkpointing.manifest import Written
from hvd_shadowsync.embedding import files
from hvd_shadowsync.embedding.holding import Group
from hvd_shadowsync.embedding.saved import INDEX
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag
from hvd_shadowsync.errors import CheckpointError, RankLostError

REQUEST = "request.json"
FILE_BYTES = 1 << 28
PAUSE_S = 0.1
TIMEOUT_S = 600.0
Done = dict[str, Any]


class Tables:
    """The sharded tables of a model, on one rank.

    Args:
        modules: by the folder's name below a checkpoint's.
    """

    def __init__(self, modules: dict[str, ShardedEmbeddingBag]) -> None:
        self._modules = modules
        self._answers: dict[str, Done | None] = {}
        """What there is to say to each request, by its generation; None once it is said."""

    def __bool__(self) -> bool:
        return bool(self._modules)

    def write(self, draft: Draft, still_wanted: Callable[[], bool]) -> None:
        """Have all ranks write their rows into `draft`, then write the indexes; on the rank that has the draft.

        Raises:
            CheckpointError: a rank could not, or has not within `TIMEOUT_S`, or was lost, or it is not wanted any more.
            OSError, SafetensorError: this rank could not.
        """
        groups = self._groups()
        comm = next(iter(groups.values())).comm
        generation = uuid.uuid4().hex[:12]
        for name in self._modules:
            (draft.path / name).mkdir()
        write_whole(draft.path / REQUEST, json.dumps({"generation": generation}).encode())
        own = self._write_own(draft.path, generation, groups)
        everyone = {number: own if rank == comm.rank else {} for rank, number in enumerate(comm.members)}
        deadline = time.monotonic() + TIMEOUT_S
        while missing := [number for number, done in everyone.items() if not done]:
            for number in missing:
                everyone[number] = _read_done(draft.path / _name(number))
            if not all(everyone.values()):
                _require(time.monotonic() < deadline and still_wanted(), missing[0])
                time.sleep(PAUSE_S)
                _require_whole(groups.values())
            if self._groups() != groups or any(done["members"] != own["members"] for done in everyone.values() if done):
                raise CheckpointError("a rank with rows of the sharded tables was lost meanwhile")
        self._bring_together(draft, generation, everyone)

    def answer(self, folder: Path, job: str) -> None:
        """Write this rank's rows wherever `job` is writing a checkpoint and waits for them; on the other ranks.

        Raises:
            OSError: this rank could not say so; the next call tries again.
        """
        for path in under_way(folder, job):
            if (generation := _requested_in(path)) is None:
                continue
            if generation not in self._answers:
                self._answers[generation] = self._answer_to(path, generation)
            if (done := self._answers[generation]) is not None:
                comm = next(iter(self._modules.values())).group.comm
                write_whole(path / _name(comm.members[comm.rank]), json.dumps(done).encode())
                self._answers[generation] = None

    def _answer_to(self, path: Path, generation: str) -> Done:
        groups = self._groups()
        try:
            return self._write_own(path, generation, groups)
        except (OSError, CheckpointError, SafetensorError) as error:
            return {"failure": str(error), "members": _members(groups)}

    def _write_own(self, path: Path, generation: str, groups: dict[str, Group]) -> Done:
        """Write what this rank holds in `groups`: another thread may take over more meanwhile, in others."""
        tables, written = {}, {}
        for name, group in groups.items():
            tables[name] = files.write_shards(
                path / name, generation, self._modules[name], group, file_bytes=FILE_BYTES, look_at=_copied_if_finite
            )
            for file in files.files_of(tables[name]):
                found = Written.of(path / name / file)
                written[f"{name}/{file}"] = [found.num_bytes, found.sha256]
        return {"tables": tables, "files": written, "members": _members(groups)}

    def _groups(self) -> dict[str, Group]:
        return {name: module.group for name, module in self._modules.items()}

    def _bring_together(self, draft: Draft, generation: str, everyone: dict[int, Done]) -> None:
        for rank, done in everyone.items():
            if "failure" in done:
                raise CheckpointError(f"rank {rank}: {done['failure']}")
            draft.files.update({name: Written(*each) for name, each in done["files"].items()})
            (draft.path / _name(rank)).unlink(missing_ok=True)
        (draft.path / REQUEST).unlink()
        for name, module in self._modules.items():
            files.write_index(
                draft.path / name, generation, module, [done["tables"][name] for done in everyone.values()]
            )
            index = f"{name}/{INDEX}"
            draft.files[index] = Written.of(draft.path / index)


def _members(groups: dict[str, Group]) -> dict[str, list[int]]:
    return {name: list(group.comm.members) for name, group in groups.items()}


def _requested_in(path: Path) -> str | None:
    """Return the generation that is asked for; a folder may have the name of an earlier one that a lost rank began."""
    try:
        return str(json.loads((path / REQUEST).read_bytes())["generation"])
    except FileNotFoundError:
        return None


def _name(rank: int) -> str:
    return f"done-{rank}.json"


def _read_done(path: Path) -> Done:
    """Return what a rank says, or nothing where it has not said it yet."""
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}


def _require(in_time: bool, rank: int) -> None:
    if not in_time:
        raise CheckpointError(
            f"rank {rank} has not written its rows of the sharded tables in time; does it see the folder, and run?"
        )


def _require_whole(groups: Iterable[Group]) -> None:
    """Raise where a rank is lost, which nobody else may have noticed: its rows would be waited for in vain."""
    try:
        for group in groups:
            group.comm.check()
    except RankLostError as error:
        raise CheckpointError(f"a rank with rows of the sharded tables was lost meanwhile ({error})") from error


def _copied_if_finite(name: str, rows: Tensor) -> Tensor:
    """Return a copy of live rows, which training may change at any moment."""
    with torch.no_grad():
        copy = rows.clone()
    require_finite(name, copy)
    return copy
