"""A folder of checkpoints: which are in it, how one gets there whole or not at all, and which are removed.

`step-<N>` is a checkpoint, `step-<N>.<k>` one of a step of which there was one already. What is under way has a hidden
name with the job's identifier in it. Nothing else in the folder is looked at or touched.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvd_shadowsync.checkpointing import manifest as manifests
from hvd_shadowsync.checkpointing.manifest import MANIFEST, Manifest, Written
from hvd_shadowsync.durable import flush
from hvd_shadowsync.errors import CheckpointError

logger = logging.getLogger(__name__)

COMPLETE = re.compile(r"step-(\d+)(?:\.(\d+))?")
UNDER_WAY = re.compile(r"\.step-\d+-[0-9a-f]{12}-\d+\.tmp")
STOP = re.compile(r"\.stop-[0-9a-f]{12}")


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose manifest is whole; its files need not be."""

    path: Path
    manifest: Manifest


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint in `folder` that is, bit by bit, as it was written; None where there is none.

    All its bytes are read. What is damaged is passed over, with a warning that says what is wrong. The weights are in
    `model.pt` below it, for `checkpoint.load`, or `torch.load(..., weights_only=True)` in a plain script.

    Raises:
        CheckpointError: the folder is there and cannot be listed.
    """
    return latest_but(Path(folder), ())


def latest_but(folder: Path, seals: Collection[str]) -> Path | None:
    """Return the same as `latest`, of those whose manifests have other seals.

    One may be removed while it is read, as there is a newer one by then: the folder is looked at again.
    """
    removed = True
    while removed:
        removed = False
        for stored in stored_in(folder):
            if stored.manifest.seal in seals:
                continue
            try:
                manifests.check(stored.path, stored.manifest)
            except CheckpointError as error:
                if removed := not os.path.exists(stored.path / MANIFEST):
                    break
                logger.warning("%s is passed over: %s", stored.path, error)
            else:
                return stored.path
    return None


def stored_in(folder: Path) -> list[Stored]:
    """Return what is in `folder`, the newest first; names damaged manifests in warnings.

    Raises:
        CheckpointError: the folder is there and cannot be listed.
    """
    found = []
    for path in _entries(folder, COMPLETE):
        try:
            found.append(Stored(path, manifests.read(path)))
        except CheckpointError as error:
            logger.warning("%s is passed over: %s", path, error)
    return sorted(found, key=lambda each: (each.manifest.number, each.manifest.step), reverse=True)


def prune(folder: Path, keep: int, job: str, written: Path) -> None:
    """Remove all but the newest `keep` checkpoints that have all their files, and never the one just `written`.

    They have the names of what `job` has under way before they are removed: what cannot be removed, or not wholly, or
    is cut short by a kill, is no checkpoint any more, and `clear_lost` and `clear` try again.
    """
    kept = 1
    for stored in stored_in(folder):
        if stored.path == written:
            continue
        if kept >= keep:
            _retire(stored, job)
        elif manifests.has_right_sizes(stored.path, stored.manifest):
            kept += 1


def _retire(stored: Stored, job: str) -> None:
    names = _hidden_names(stored.path.parent, job, stored.manifest.step, 0)
    hidden = next(path for path in names if not path.exists())
    try:
        os.rename(stored.path, hidden)
    except OSError as error:
        logger.warning("%s is not needed, and cannot be removed: %s", stored.path, error)
    else:
        _remove(hidden)


def clear(folder: Path) -> None:
    """Remove what writers that are dead had under way. One job at a time may use a folder."""
    for path in (*_entries(folder, UNDER_WAY), *_entries(folder, STOP)):
        _remove(path)


def under_way(folder: Path, job: str) -> list[Path]:
    """Return the folders in which `job` is writing."""
    return [path for path in _entries(folder, UNDER_WAY) if f"-{job}-" in path.name]


def clear_lost(folder: Path, job: str) -> None:
    """Remove what lost ranks of `job` had under way; on the rank that writes, which writes nothing at the moment."""
    for path in under_way(folder, job):
        _remove(path)


def stop_file(folder: Path, job: str) -> Path:
    """Return the file that tells all ranks of `job` to end."""
    return folder / f".stop-{job}"


class Draft:
    """A checkpoint under a hidden name, until `complete` gives it its own.

    The name's last number is `attempt`, or the next one of which there is nothing: what a lost rank has left may stay.

    Raises:
        OSError: as everything here where the file system refuses; `discard` removes what is there.
    """

    def __init__(self, folder: Path, job: str, step: int, attempt: int) -> None:
        self._folder, self._step = folder, step
        self.files: dict[str, Written] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.path = next(path for path in _hidden_names(folder, job, step, attempt) if not path.exists())
        self.path.mkdir()

    def complete(self, world_size: int, after: int = -1) -> Stored:
        """Write the manifest, have all on disk, give the checkpoint its name and return it.

        Its number is above those in the folder, and above `after`.
        """
        numbers = [each.manifest.number for each in stored_in(self._folder)]
        manifest = Manifest(max(numbers + [after]) + 1, self._step, world_size, self.files)
        write_whole(self.path / MANIFEST, manifest.encode())
        for below in {self.path / name for name in self.files}:
            flush(below.parent)
        flush(self.path)
        final = next(path for path in self._names() if not path.exists())
        os.rename(self.path, final)
        flush(self._folder)
        return Stored(final, manifest)

    def discard(self) -> None:
        """Remove what was written, as far as that is possible."""
        _remove(self.path)

    def _names(self) -> Iterator[Path]:
        yield self._folder / f"step-{self._step}"
        number = 0
        while number := number + 1:
            yield self._folder / f"step-{self._step}.{number}"


def _hidden_names(folder: Path, job: str, step: int, first: int) -> Iterator[Path]:
    return (folder / f".step-{step}-{job}-{number}.tmp" for number in itertools.count(first))


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file under another name, have it on disk, then give it its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:  # a link that somebody put there is not followed
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _entries(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error}); give a folder that all hosts may read") from error


def _remove(path: Path) -> None:
    """Remove what has a hidden name."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s is not needed, and cannot be removed: %s", path, error)
