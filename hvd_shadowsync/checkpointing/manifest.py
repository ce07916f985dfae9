"""What a checkpoint's manifest says, and whether what lies beside it is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hvd_shadowsync.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT, VERSION = "hvd_shadowsync.checkpoint", 1
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Written:
    """Size and SHA-256 of a file."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Written:
        """Read the file."""
        digest, num_bytes = hashlib.sha256(), 0
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                num_bytes += len(block)
        return cls(num_bytes, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint.

    Attributes:
        number: how many checkpoints were written into the folder before this one; the highest is the latest.
        step: steps of the rank that wrote it.
        world_size: ranks that it is of.
        files: by path below the checkpoint's folder, with "/".
    """

    number: int
    step: int
    world_size: int
    files: dict[str, Written] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the content of the file: JSON in one form only, with a checksum of its own."""
        files = {name: {"bytes": each.num_bytes, "sha256": each.sha256} for name, each in sorted(self.files.items())}
        numbers = {"number": self.number, "step": self.step, "world_size": self.world_size}
        return _sealed({"format": FORMAT, "version": VERSION, **numbers, "files": files})

    @property
    def seal(self) -> str:
        """A checksum of everything that it says."""
        return hashlib.sha256(self.encode()).hexdigest()


def read(folder: Path) -> Manifest:
    """Return the manifest of the checkpoint `folder`.

    Raises:
        CheckpointError: there is none, or it is not, bit by bit, one that was written; says what is wrong.
    """
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file; use another checkpoint")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is missing: {folder} is no checkpoint, or none that was completed") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from error
    try:
        manifest = _decoded(data)
        whole = manifest.encode() == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); use another checkpoint") from error
    if not whole:
        raise CheckpointError(f"{path} is damaged, or of another version than {VERSION}; use another checkpoint")
    return manifest


def check(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raise unless the files `names` (default: all) of the checkpoint `folder` are what was written.

    Raises:
        CheckpointError: one is missing, cannot be read, or has other bytes; names it.
    """
    for name in manifest.files if names is None else names:
        path, expected = folder / name, manifest.files[name]
        try:
            found_bytes = path.stat().st_size
            found = Written.of(path) if found_bytes == expected.num_bytes else None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from error
        if found is None:
            raise CheckpointError(f"{path} has {found_bytes} bytes, not {expected.num_bytes}; use another checkpoint")
        if found != expected:
            raise CheckpointError(f"{path} has other content than was written (SHA-256); use another checkpoint")


def has_right_sizes(folder: Path, manifest: Manifest) -> bool:
    """Tell whether all files are there with their sizes: what can be told of large files without reading them."""
    try:
        return all((folder / name).stat().st_size == each.num_bytes for name, each in manifest.files.items())
    except OSError:
        return False


def _sealed(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def _decoded(data: bytes) -> Manifest:
    content = json.loads(data)
    files = {str(name): Written(int(each["bytes"]), str(each["sha256"])) for name, each in content["files"].items()}
    if outside := [name for name in files if not _is_below(name)]:
        raise ValueError(f"{outside[0]!r} is not below the checkpoint's folder")
    return Manifest(int(content["number"]), int(content["step"]), int(content["world_size"]), files)


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()
