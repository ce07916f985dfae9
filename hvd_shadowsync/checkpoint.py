"""Checkpoints: consolidate, write atomically; load at any world size, from and into plain optimizers."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import uuid
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hvd_shadowsync.embedding import files
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag
from hvd_shadowsync.errors import CheckpointError
from hvd_shadowsync.optimizer import ShadowSync
from hvd_shadowsync.owned import is_owned

ZIP_HEAD = b"PK\3\4"
PLAIN_VALUES = "only tensors, numbers, strings, lists and dicts are read, for all else may be code; is it a checkpoint?"


def save(path: str | os.PathLike[str], model: torch.nn.Module, sync: ShadowSync, *, extra: Any = None) -> None:
    """Consolidate the replicas and write one file, on rank 0 (collective).

    Weights become their mean on every rank (`ShadowSync.synchronize`), floating-point optimizer state as well. The
    file holds `{"model": ..., "optimizer": ..., "extra": ...}`, as scripts save it that never heard of us; the rounds'
    state is in the optimizer's part under "shadow_sync", which a plain optimizer passes over.

    Tables of a `ShardedEmbeddingBag` in the model go to a folder beside the file, `<path>.<name of the module>`, each
    rank's rows by itself (`embedding.files`). The file is written before them, gets its name after them, and says under
    "tables" which save they are of: a kill in between makes no mixture that could be loaded. (`Checkpointer` keeps the
    earlier ones.)

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
    tables = sharded_in(model)
    generations = {name: uuid.uuid4().hex[:12] for name, _ in tables}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")

    def write() -> None:
        require_loadable(extra)
        shared = {name: value for name, value in model.state_dict().items() if not _is_of_one_rank(value)}
        content = {"model": shared, "optimizer": sync.optimizer.state_dict(), "extra": extra}
        _write(temporary, content | ({"tables": generations} if tables else {}))

    try:
        _on_rank_0(sync, path, write)
        for name, module in tables:
            files.save(folder_of(path, name), module, generation=generations[name])
        _on_rank_0(sync, path, lambda: os.replace(temporary, path))
    finally:
        if sync.rank == 0:
            with suppress(OSError):
                temporary.unlink()


def _on_rank_0(sync: ShadowSync, path: Path, task: Callable[[], None]) -> None:
    """Do `task` there; raise `CheckpointError` on every rank if it failed (collective)."""
    failure = None
    if sync.rank == 0:
        try:
            task()
        except OSError as error:
            failure = f"{path} cannot be written ({error}); give a folder that exists and has room"
        except CheckpointError as error:
            failure = str(error)
    _raise_everywhere(sync, failure)


def load(path: str | os.PathLike[str], model: torch.nn.Module, sync: ShadowSync) -> Any:
    """Read a file of `save`, or of a plain script with the same keys, on every rank; return its `extra` (collective).

    Raises:
        CheckpointError: a rank cannot read the file, or it does not fit; raised on every rank. Model, optimizer and
            rounds are as they were then (of several `ShardedEmbeddingBag`s some may have been loaded).
    """
    failure, content, weights, state, rounds, generations = None, {}, {}, {}, None, {}
    try:
        content = read(path)
        generations = dict(content.get("tables", {}))
        state = dict(content["optimizer"])
        rounds = state.pop("shadow_sync", None)
        sync.check_state(rounds)
        own = {name: value for name, value in model.state_dict().items() if _is_of_one_rank(value)}
        weights = {**content["model"], **own}
        _require_fit(model, weights, sync.optimizer, state)
    except CheckpointError as error:
        failure = str(error)
    except Exception as error:  # whatever a damaged file provokes, the other ranks have to hear of it
        failure = f"{path} does not fit the model: {error}"
    _raise_everywhere(sync, failure)
    for name, module in sharded_in(model):
        files.load(folder_of(path, name), module, generation=generations.get(name))
    sync.settle()  # a round that was under way has been merged
    model.load_state_dict(weights)
    sync.optimizer.load_state_dict(state)
    sync.load_state_dict(rounds or None)
    return content.get("extra")


def _require_fit(
    model: torch.nn.Module, weights: dict[str, Any], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Load for a trial, and take it back; raises what loading raises."""
    before = {
        name: value if _is_of_one_rank(value) else copy.deepcopy(value) for name, value in model.state_dict().items()
    }
    copy.copy(optimizer).load_state_dict(state)  # a plain one, which shares no more than it reads
    try:
        model.load_state_dict(weights)
    finally:
        model.load_state_dict(before)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint file; loads tensors and plain values only, never code.

    Raises:
        CheckpointError: the file is missing, truncated or not a checkpoint; names it.
    """
    try:
        _require_plain(Path(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; check the path, on every host") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} cannot be read ({_said(error)}); {PLAIN_VALUES}") from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); is it whole?") from error
    if not isinstance(content, Mapping) or not {"model", "optimizer"} <= set(content):
        raise CheckpointError(f"{path} is no checkpoint: it has no 'model' and 'optimizer'; save with checkpoint.save")
    return dict(content)


def _require_plain(path: Path) -> None:
    """Raise where `path` is no regular file, or an archive that is damaged, or that unpacks to more than it is."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; give the file that checkpoint.save wrote")
    with open(path, "rb") as file:
        if file.read(len(ZIP_HEAD)) != ZIP_HEAD:
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(each.file_size for each in members) > path.stat().st_size:
            raise CheckpointError(f"{path} is compressed, which torch.save does not do; save with checkpoint.save")
        if any(each.CRC for each in members) and (damaged := archive.testzip()):  # torch can leave checksums out
            raise CheckpointError(f"{path} is damaged: {damaged} has another checksum; use another checkpoint")


def _said(error: pickle.UnpicklingError) -> str:
    """Return what torch says is in the file, without its advice to load code all the same."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {found[1]}" if found else "UnpicklingError"


def sharded_in(model: torch.nn.Module) -> list[tuple[str, ShardedEmbeddingBag]]:
    """Return the sharded tables in `model`, by the names of their modules."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ShardedEmbeddingBag)]


def folder_of(path: str | os.PathLike[str], name: str) -> Path:
    """Return where the tables of the module `name` are, beside the file `path`."""
    part = name.replace("%", "%25").replace("/", "%2F")  # names of modules may have a slash
    return Path(f"{os.fspath(path)}.{part or 'tables'}")


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
    with open(path, "xb") as file:  # a link that somebody put there is not followed
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _raise_everywhere(sync: ShadowSync, failure: str | None) -> None:
    failures = sync.gather(failure)
    for rank, message in enumerate(failures):
        if message is not None:
            raise CheckpointError(f"rank {rank}: {message}" if len(failures) > 1 else message)
