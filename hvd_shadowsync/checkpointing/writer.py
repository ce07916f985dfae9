"""The thread that writes checkpoints, and looks after the folder, while training goes on."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError

from hvd_shadowsync.checkpointing.content import Content
from hvd_shadowsync.checkpointing.folder import Draft, clear_lost, prune
from hvd_shadowsync.checkpointing.manifest import Written
from hvd_shadowsync.checkpointing.tables import Tables
from hvd_shadowsync.errors import CheckpointError

logger = logging.getLogger(__name__)

DENSE = "model.pt"
LOOK_S = 0.5
NICENESS = 10


@dataclass
class Counters:
    """What has become of checkpoints so far."""

    written: int = 0
    failures: int = 0
    step: int = -1
    write_s: float = 0.0
    pause_s: float = math.nan
    last_error: str | None = None
    last_path: Path | None = None


class Writer:
    """Writes one checkpoint at a time in a daemon thread, on the rank that writes; looks around twice a second.

    Whatever ends the thread, nobody waits for it any more: what is submitted then is a failure at once.

    Args:
        folder: of checkpoints.
        job: identifier of this job, 12 hexadecimal digits.
        size: ranks.
        keep: how many checkpoints are kept.
        tables: sharded tables, of which every rank writes its own rows.
        look: called twice a second in the thread, None where nobody needs that; deals with its errors itself.
    """

    def __init__(
        self, folder: Path, job: str, size: int, keep: int, tables: Tables, look: Callable[[], None] | None
    ) -> None:
        self._folder, self._job, self._size, self._keep = folder, job, size, keep
        self._tables, self._look = tables, look
        self.counters = Counters()
        self.hurried = False
        """Whether the process is about to end: no other rank's rows are waited for then."""
        self._changed = threading.Condition()
        self._content: Content | None = None
        self._attempt, self._closing, self._ended = 0, False, False
        self._number = -1
        self._thread = threading.Thread(target=self._main, name="checkpointer", daemon=True)
        self._start()

    def _start(self) -> None:
        """Start the thread; torch's thread count is per thread, but a new thread takes over the last one set."""
        threads = torch.get_num_threads()
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait()
        torch.set_num_threads(threads)

    # --- the training thread's side ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._content is not None

    def submit(self, content: Content) -> None:
        """Have `content` written."""
        with self._changed:
            if not self._ended:
                self._content = content
                self._changed.notify_all()
                return
        self.note_failure(content.step, CheckpointError("the thread that writes has ended; its error is above"))

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return when nothing is being written any more, or after `timeout_s`; tell which."""
        with self._changed:
            return self._changed.wait_for(lambda: self._content is None, timeout_s)

    def close(self) -> None:
        """Wait for what is being written, and end the thread (idempotent)."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def note_failure(self, step: int, error: Exception) -> None:
        """Log that there is no checkpoint of `step`, and count it."""
        self.counters.failures += 1
        self.counters.last_error = str(error) if isinstance(error, CheckpointError) else repr(error)
        expected = isinstance(error, (OSError, CheckpointError, SafetensorError))
        logger.error(
            "no checkpoint of step %d in %s: %s; earlier ones stay",
            step, self._folder, self.counters.last_error, exc_info=None if expected else error,
        )  # fmt: skip

    # --- the thread's side ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        torch.set_num_threads(1)
        self._ready.set()
        try:
            _give_way()
            while self._await_work():
                if self._content is not None:
                    self._write(self._content)
                    with self._changed:
                        self._content = None
                        self._changed.notify_all()
                if self._look is not None:
                    self._look()
        finally:
            with self._changed:
                self._content, self._ended = None, True
                self._changed.notify_all()

    def _await_work(self) -> bool:
        with self._changed:
            if self._content is None and not self._closing:
                self._changed.wait(None if self._look is None else LOOK_S)
            return self._content is not None or not self._closing

    def _write(self, content: Content) -> None:
        """Write, or say why not; whatever goes wrong here, training goes on."""
        begun = time.monotonic()
        try:
            path = self._written(content)
        except Exception as error:
            self.note_failure(content.step, error)
            return
        self.counters.written += 1
        self.counters.step, self.counters.last_path = content.step, path
        self.counters.write_s = time.monotonic() - begun
        try:
            prune(self._folder, self._keep, self._job, path)
        except Exception:
            logger.exception("earlier checkpoints in %s are not removed; the next one tries again", self._folder)

    def _is_wanted(self) -> bool:
        """Tell whether other ranks' rows are still waited for; whoever waits looks around."""
        if self._look is not None:
            self._look()
        return not self.hurried

    def _written(self, content: Content) -> Path:
        content.examine()
        self._attempt += 1
        clear_lost(self._folder, self._job)
        draft = Draft(self._folder, self._job, content.step, self._attempt)
        try:
            with DigestedFile(draft.path / DENSE) as file:
                torch.save(content.by_name(), cast(IO[bytes], file))
            draft.files[DENSE] = file.written
            if self._tables:
                self._tables.write(draft, self._is_wanted)
            stored = draft.complete(self._size, self._number)
            self._number = stored.manifest.number
            return stored.path
        except BaseException:
            draft.discard()
            raise


class DigestedFile:
    """A new file whose SHA-256 is formed while it is written; on disk when its block is left without an error.

    What goes wrong is raised at the end of the block: torch's writer ends the process where a `write` raises.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115
        self._digest, self._num_bytes = hashlib.sha256(), 0
        self._failure: OSError | None = None

    @property
    def written(self) -> Written:
        """What there is so far."""
        return Written(self._num_bytes, self._digest.hexdigest())

    def write(self, data: Any) -> int:
        """Write bytes, unless that has failed before."""
        num_bytes = memoryview(data).nbytes
        if self._failure is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._failure = error
            self._digest.update(data)
            self._num_bytes += num_bytes
        return num_bytes

    def flush(self) -> None:
        """Do nothing: the end of the block does it."""

    def __enter__(self) -> DigestedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._failure is None and kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            with suppress(OSError):  # the same again: what could not be written is still in the buffer
                self._file.close()
        if self._failure is not None:
            raise self._failure


def _give_way() -> None:
    """Let training have the cores before this thread, where the system has priorities for single threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
