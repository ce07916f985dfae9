"""Checkpoints: consolidate, write atomically; load at any world size, from and into plain optimizers."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvd_shadowsync.arguments import check_rounds_state
from hvd_shadowsync.embedding import files
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag
from hvd_shadowsync.errors import CheckpointError
from hvd_shadowsync.optimizer import ShadowSync
from hvd_shadowsync.owned import is_owned


def save(path: str | os.PathLike[str], model: torch.nn.Module, sync: ShadowSync, *, extra: Any = None) -> None:
    """Consolidate the replicas and write one file, on rank 0 (collective).

    Weights become their mean on every rank (`ShadowSync.synchronize`), floating-point optimizer state as well. The
    file holds `{"model": ..., "optimizer": ..., "extra": ...}`, as scripts save it that never heard of us; the rounds'
    state is in the optimizer's part under "shadow_sync", which a plain optimizer passes over.

    Tables of a `ShardedEmbeddingBag` in the model go to a folder beside the file, `<path>.<name of the module>`, each
    rank's rows by itself (`embedding.files`); they are written before the file.

    Args:
        path: the file; written under a temporary name, flushed to disk, then renamed.
        model: whose weights `sync` keeps together.
        sync: the handle (`optimizer.shadow`).
        extra: anything of tensors, numbers, strings, lists and dicts; default None.

    Raises:
        CheckpointError: rank 0 could not write; raised on every rank.
    """
    sync.synchronize()
    sync.average_optimizer_state()
    for name, module in sharded_in(model):
        files.save(folder_of(path, name), module)
    failure = None
    if sync.rank == 0:
        try:
            require_loadable(extra)
            shared = {name: value for name, value in model.state_dict().items() if not _is_of_one_rank(value)}
            _write(Path(path), {"model": shared, "optimizer": sync.optimizer.state_dict(), "extra": extra})
        except OSError as error:
            failure = f"{path} cannot be written ({error}); give a folder that exists and has room"
        except CheckpointError as error:
            failure = str(error)
    _raise_everywhere(sync, failure)


def load(path: str | os.PathLike[str], model: torch.nn.Module, sync: ShadowSync) -> Any:
    """Read a file of `save`, or of a plain script with the same keys, on every rank; return its `extra` (collective).

    Raises:
        CheckpointError: a rank cannot read the file, or it does not fit; raised on every rank, nothing is half loaded
            into the rounds.
    """
    failure, content, weights = None, {}, {}
    try:
        content = read(path)
        state = dict(content["optimizer"])
        rounds = state.pop("shadow_sync", None)
        check_rounds_state(rounds)
        own = {name: value for name, value in model.state_dict().items() if _is_of_one_rank(value)}
        weights = {**content["model"], **own}
        model.load_state_dict(weights)
        sync.optimizer.load_state_dict(state)
    except (CheckpointError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        failure = str(error) if isinstance(error, CheckpointError) else f"{path} does not fit the model: {error}"
    _raise_everywhere(sync, failure)
    for name, module in sharded_in(model):
        files.load(folder_of(path, name), module)
    sync.settle()
    model.load_state_dict(weights)  # again: a round that was under way has been merged
    sync.load_state_dict(rounds or None)
    return content.get("extra")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint file; loads tensors and plain values only, never code.

    Raises:
        CheckpointError: the file is missing, truncated or not a checkpoint; names it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; check the path, on every host") from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); is it whole?") from error
    if not isinstance(content, Mapping) or not {"model", "optimizer"} <= set(content):
        raise CheckpointError(f"{path} is no checkpoint: it has no 'model' and 'optimizer'; save with checkpoint.save")
    return dict(content)


def sharded_in(model: torch.nn.Module) -> list[tuple[str, ShardedEmbeddingBag]]:
    """Return the sharded tables in `model`, by the names of their modules."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ShardedEmbeddingBag)]


def folder_of(path: str | os.PathLike[str], name: str) -> Path:
    """Return where the tables of the module `name` are, beside the file `path`."""
    return Path(f"{os.fspath(path)}.{name or 'tables'}")


def _is_of_one_rank(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and is_owned(value)


def require_loadable(extra: Any) -> None:
    """Raise now what would be found out at loading, where nothing but tensors and plain values is taken."""
    buffer = io.BytesIO()
    try:
        torch.save(extra, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"extra has something that could not be loaded again ({type(error).__name__}); give tensors, numbers, "
            "strings, lists and dicts: float(x) for a numpy number, torch.from_numpy(x) for an array"
        ) from error


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _raise_everywhere(sync: ShadowSync, failure: str | None) -> None:
    failures = sync.gather(failure)
    for rank, message in enumerate(failures):
        if message is not None:
            raise CheckpointError(f"rank {rank}: {message}" if len(failures) > 1 else message)
