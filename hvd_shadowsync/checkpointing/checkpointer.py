"""`Checkpointer`: checkpoints beside training, and a last one where a batch system asks the job to end."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

from hvd_shadowsync import checkpoint, ending
from hvd_shadowsync.captured import Capture
from hvd_shadowsync.checkpointing import folder as folders
from hvd_shadowsync.checkpointing import manifest as manifests
from hvd_shadowsync.checkpointing.content import take
from hvd_shadowsync.checkpointing.folder import Stored
from hvd_shadowsync.checkpointing.signals import EndSignals
from hvd_shadowsync.checkpointing.tables import Tables
from hvd_shadowsync.checkpointing.writer import DENSE, Writer
from hvd_shadowsync.checks import check_count, check_folder, check_interval
from hvd_shadowsync.comm import job
from hvd_shadowsync.embedding.sharded import ShardedEmbeddingBag
from hvd_shadowsync.errors import CheckpointError, ShadowSyncError
from hvd_shadowsync.optimizer import ShadowSync

logger = logging.getLogger(__name__)

EVERY_S = 600.0
EXIT_WAIT_S = 300.0
EXIT_WAIT_FOR_ROWS_S = 10.0
WAIT_WARNING_S = 60.0

Folder = str | os.PathLike[str]

_IN_USE: weakref.WeakValueDictionary[str, Checkpointer] = weakref.WeakValueDictionary()
"""Who writes into a folder, in this process."""


class Checkpointer:
    """Writes checkpoints in the background while training goes on, and finds the newest good one again.

        checkpointer = Checkpointer("checkpoints", model, sync, every_s=600, keep=3)
        extra = checkpointer.load_latest()
        for epoch in range(0 if extra is None else extra["epoch"], 10):
            checkpointer.extra = {"epoch": epoch}
            ...                                             # the loop as it was: a hook of the optimizer does the rest
        checkpointer.save_now()

    What is written is the consolidated model as a round of synchronisation has it anyway (S-MA: the mean of the
    replicas, S-BMUF: the global model or its look-ahead, S-EASGD: the center as this rank met it), so training waits
    for nobody and nothing is sent. It goes into the first round that begins once a checkpoint is due; at world size 1
    and in the warm-up it is the live weights. At the next step boundary rank 0's training thread copies its optimizer's
    state (every rank starts again from that), the only pause; a thread writes. Rows of a `ShardedEmbeddingBag` are
    written by their owners' threads, each row as it is at that moment.

    A checkpoint is a folder `step-<N>` with `model.pt`, as `checkpoint.save` writes it, a folder for each
    `ShardedEmbeddingBag`, and `manifest.json` with sizes and checksums. The bags have the rows of lost ranks from there
    (`recover_from`): from what this job has written, or loaded with `load_latest`, never from another run's. A
    checkpoint is written under a hidden name and renamed once all of it is on disk, so a kill at any moment leaves the
    earlier ones. A copy with NaN or infinity is not written. What cannot be written, for that or for a full disk or a
    folder that is missing or read-only, or because `extra` raises, is logged as an error and counted; training goes on,
    and the next interval tries again, at construction as well. Where no round ends for a minute (`pause()`, a network
    that is away) that is logged: the checkpoint waits.

    A signal to end (SIGTERM, from batch systems) on any rank makes all ranks come together at the end of their steps,
    or out of the collective call they wait in; a last checkpoint of the consolidated replicas is written and
    `SystemExit` raised, with code 0, or 1 where it could not be written. So it is if all processes get the signal and a
    DataLoader then raises that its workers are dead, unless the script deals with that. Where rank 0 has not trained
    at all, or not since a checkpoint was loaded, none is needed, nor written. Nor is one where it is through with its
    steps; ranks that wait in the handle's `close()` wait on. To a whole job send it by `shadowrun`, which
    has Open MPI pass it on as SIGUSR2 (but with `--emulated`, `--horovod`, from a terminal, or where the program has
    another handler for that); at the second SIGTERM the job ends without. Open MPI's own mpirun, if it gets SIGTERM,
    passes it on and kills the ranks a quarter of a second later: have the ranks signalled (Slurm's srun does that), or
    give `end_signals=[signal.SIGTERM, signal.SIGUSR2]` and send mpirun SIGUSR2, which it passes on without killing.

    Construction and `load_latest` are collective, and so are `save_now` and, with sharded tables, `close`; all methods
    are for the training thread. Only one job at a time may use a folder.

    Args:
        dir: of this job's checkpoints, on a file system that all ranks see; made where it is missing. What else is in
            it is never touched. No other open Checkpointer of this process may have it.
        model: whose weights `sync` keeps together.
        sync: the handle, which has no other Checkpointer. Of a model with several optimizers give each its own folder
            and Checkpointer, the last one to step the only one with `end_signals`.
        every_s: seconds from one checkpoint's beginning to the next; default 600 where `every_steps` is not given.
        every_steps: steps of rank 0 from one to the next; with both, whichever has passed first.
        keep: how many good ones are kept; older ones are removed once a new one is there. Default 3.
        extra: tensors, numbers, strings, lists and dicts to be stored as well, or a function that returns them, called
            on rank 0 at the step boundary; may be assigned later. Default None.
        end_signals: signals that ask the job to end; default SIGTERM. Earlier handlers are called as well. They are set
            where this is the main thread.

    Raises:
        TypeError, ValueError: an argument is not what it should be; names it and the remedy.
    """

    latest = staticmethod(folders.latest)

    def __init__(
        self,
        dir: Folder,
        model: torch.nn.Module,
        sync: ShadowSync,
        *,
        every_s: float | None = None,
        every_steps: int | None = None,
        keep: int = 3,
        extra: Any | Callable[[], Any] = None,
        end_signals: Iterable[int] = (signal.SIGTERM,),
    ) -> None:
        check_folder("dir", dir)
        _check(model, sync, every_s, every_steps, keep)
        if sync.has_ending:
            raise ValueError(
                "sync has a Checkpointer already, and a round is copied for one only; close() that one first"
            )
        self._folder, self._model, self._sync = Path(dir).absolute(), model, sync
        self._every_s = EVERY_S if every_s is None and every_steps is None else every_s
        self._every_steps = every_steps
        self.extra = extra
        self.loaded: Path | None = None
        """The checkpoint that `load_latest` has loaded."""
        numbers = _signals_of(end_signals)
        tables = _tables_of(model)
        self._others: list[set[str]] = []
        """The seals of other runs' checkpoints, in a set; nothing until all ranks know them."""
        ours = [module for module in tables.values() if module.recover_from is None]
        for name, module in tables.items():
            if module in ours:  # a rank may be lost from here on
                module.recover_from = partial(_newest, self._folder, name, self._others)
        others = _seals_in(self._folder) if tables and self._writes else set()
        self._job = sync.name()
        known, is_taken = sync.gather((others, self._writes and _is_taken(self._folder)))[0]
        if is_taken:
            for module in ours:
                module.recover_from = None
            raise ValueError(f"dir={str(dir)!r} is another Checkpointer's, which is open; give each its own folder")
        if known is not None:
            self._others.append(known)
        self._capture: Capture | None = None
        self._said_that_it_waits = False
        self._told_to_end = self._others_told = self._ending = self._left = False
        self._trouble: str | None = None
        self._begun_at_s = time.monotonic()
        self._begun_at_step: int | None = None
        if self._writes:
            _IN_USE[os.path.realpath(self._folder)] = self
            self._prepare()
        self._tables = Tables(tables)
        self._signals = self._listen(numbers)
        look = self._look if sync.size > 1 else None
        self._writer = Writer(self._folder, self._job, sync.size, keep, self._tables, look)
        self._began_with, self._is_new = (0, 0.0), True
        sync.end_with(self._end_if_told)
        job.end_otherwise(self._end_if_told)
        hook: Callable[..., None] = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._hook = sync.optimizer.register_step_post_hook(hook)
        atexit.register(self._close_at_exit)

    def _listen(self, numbers: list[signal.Signals]) -> EndSignals:
        """Listen to the signals, and where `shadowrun` passes SIGTERM on as another one, to that as well."""
        another = ending.end_signal() if signal.SIGTERM in numbers else None
        signals = EndSignals(numbers if another is None else [*numbers, another], for_ranks=another)
        self._is_passed_on = another in signals.numbers
        if self._is_passed_on and self._writes:
            ending.note_last_checkpoint()
        return signals

    # --- what a user asks for ---------------------------------------------------------------------------------------

    def load_latest(self) -> Any:
        """Load the newest good checkpoint on every rank and return its extra; None where there is none (collective).

        At any world size. What is damaged is passed over, with a warning that says what is wrong; `loaded` says which
        one it was, None if there was none.

        Raises:
            CheckpointError: the folder is there and cannot be listed, or a rank does not see what rank 0 sees, or the
                checkpoint does not fit the model; raised on every rank.
        """
        alone = not self._sync.has_joined  # a rank in the place of a lost one looks for itself
        found, failure = self._sync.gather(_listed(self._folder) if self._writes or alone else None)[0]
        if failure is not None:
            raise CheckpointError(failure)
        for stored in found:
            if self._is_good(stored):
                extra = checkpoint.load(stored.path / DENSE, self._model, self._sync)
                self.loaded = stored.path
                if self._writes:
                    logger.info("%s was loaded; it goes on from step %d", stored.path, self._sync.steps)
                for seals in self._others:
                    seals.discard(stored.manifest.seal)
                self._begun_at_s, self._begun_at_step = time.monotonic(), None
                self._began_with = self._progress()
                return extra
        return None

    def save_now(self) -> Path | None:
        """Consolidate, write a checkpoint and wait for it; return its path on every rank, or None (collective).

        None where it could not be written, which is logged as an error. If rank 0 is lost meanwhile the next one does.
        """
        self._require_open("save_now()")
        self._sync.synchronize()
        self._sync.average_optimizer_state()
        self._drop_capture()
        while True:
            writes = self._writes
            everyone = self._sync.gather((writes, self._write_live() if writes else None))
            if found := [path for wrote, path in everyone if wrote]:
                first: Path | None = found[0]
                return first

    def stop(self) -> None:
        """Do what a signal to end does: a last checkpoint, and `SystemExit` on every rank (one rank is enough)."""
        self._require_open("stop()")
        self._signals.came = True

    def metrics(self) -> dict[str, float]:
        """Return what has become of checkpoints, on rank 0; the others have zeros and nan.

        | key | meaning |
        |---|---|
        | checkpoints | written so far |
        | checkpoint_failures | attempts that failed, for whatever reason; `last_error` has the last one's |
        | checkpoint_step | step of the last one; -1 before it |
        | checkpoint_write_s | how long its writing took, in the background |
        | checkpoint_pause_ms | how long the training thread copied for it |
        """
        counters = self._writer.counters
        return {
            "checkpoints": counters.written,
            "checkpoint_failures": counters.failures,
            "checkpoint_step": counters.step,
            "checkpoint_write_s": counters.write_s,
            "checkpoint_pause_ms": 1000 * counters.pause_s,
        }

    @property
    def last_error(self) -> str | None:
        """Why the last attempt that failed did so; None where none has failed."""
        return self._writer.counters.last_error

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and begin no more (idempotent).

        One that waits for its round is dropped: call `save_now()` before for a last one. With sharded tables all ranks
        wait here for one another, as their threads write for rank 0, if `sync` is not closed yet.
        """
        atexit.unregister(self._close_at_exit)
        if not self._left:
            self._leave()
            if self._tables and not self._sync.is_closed:
                self._writer.wait()
                self._sync.gather(None)
        self._writer.hurried = self._sync.is_closed
        self._writer.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception leave that to the end of the process, and do not wait for others here.

        But if it came after a signal to end, the last checkpoint is made, and `SystemExit` raised.
        """
        if error is None:
            self.close()
        else:
            _IN_USE.pop(os.path.realpath(self._folder), None)  # the program may try again, and has no name for this one
            self._end_if_told(error)

    @property
    def _writes(self) -> bool:
        """Whether this is the rank that writes: the first of those that are left."""
        return self._sync.rank == 0

    # --- at the end of a step ---------------------------------------------------------------------------------------

    def _after_step(self, *_: Any) -> None:
        if self._sync.is_closed:
            self._outlive_the_handle()
            return
        if self._told_to_end or self._signals.came:
            self._end()
        if not self._writes or self._writer.busy:
            return
        if self._capture is not None:
            if self._capture.done:
                self._hand_over(self._capture)
            elif not self._said_that_it_waits:
                self._watch_the_wait()
        elif self._is_due():
            self._begin()

    def _is_due(self) -> bool:
        steps = self._sync.steps
        if self._begun_at_step is None or steps < self._begun_at_step:  # it goes on from what was loaded
            self._begun_at_step = steps - 1
        if self._every_steps is not None and steps - self._begun_at_step >= self._every_steps:
            return True
        return self._every_s is not None and time.monotonic() - self._begun_at_s >= self._every_s

    def _watch_the_wait(self) -> None:
        """Say once of each checkpoint that it is long in coming."""
        if (waited_s := time.monotonic() - self._begun_at_s) >= WAIT_WARNING_S:
            self._said_that_it_waits = True
            logger.warning(
                "a checkpoint has waited for the end of a round for %.0f s, and there is none meanwhile: are rounds "
                "paused, or a rank or the network away?", waited_s,
            )  # fmt: skip

    def _count_from_here(self) -> None:
        self._begun_at_s = time.monotonic()
        self._begun_at_step = self._sync.steps

    def _begin(self) -> None:
        self._count_from_here()
        self._said_that_it_waits = False
        capture = Capture()
        if self._sync.size > 1 and self._sync.capture(capture):
            self._capture = capture
        else:
            self._hand_over(None)

    def _hand_over(self, capture: Capture | None) -> None:
        begun = time.perf_counter()
        self._drop_capture()
        try:
            extra = self.extra() if callable(self.extra) else self.extra
            content = take(self._model, self._sync, capture, extra)
        except Exception as error:  # the user's, or there is no memory
            self._writer.note_failure(self._sync.steps, error)
            return
        self._writer.counters.pause_s = time.perf_counter() - begun
        self._writer.submit(content)

    def _drop_capture(self) -> None:
        if self._capture is not None:
            self._capture = None
            self._sync.capture(None)

    def _write_live(self) -> Path | None:
        """Write the live weights, after a consolidation, and wait; return where they are now, None if they are not."""
        self._writer.wait()
        written = self._writer.counters.written
        self._count_from_here()
        self._hand_over(None)
        self._writer.wait()
        return self._writer.counters.last_path if self._writer.counters.written > written else None

    # --- the end of the job -----------------------------------------------------------------------------------------

    def _end_if_told(self, error: BaseException | None = None) -> None:
        """End where a rank was told to, rather than wait on in a call, or die of `error`.

        Batch systems signal all processes: a DataLoader whose workers are dead raises before the next step boundary.
        """
        told = self._told_to_end or self._signals.came or (error is not None and self._signals.comes_after(error))
        if not told or self._ending or self._left or self._sync.is_closed or job.is_forked():
            return
        if error is None:
            self._end()
        if isinstance(error, Exception) and not isinstance(error, ShadowSyncError):
            logger.warning("rank %d ends as it was told to, not by this error", self._sync.rank, exc_info=error)
            self._end()

    def _end(self) -> NoReturn:
        """Come together with the other ranks, write a last checkpoint and leave the program."""
        self._ending = True
        self._tell_to_end()
        logger.warning(
            "rank %d was told to end at step %d, and tries to make a last checkpoint", self._sync.rank, self._sync.steps
        )
        self._drop_capture()
        self._is_new = self._progress() != self._began_with
        written = self._write_last()
        self._leave()
        raise SystemExit(0 if written else 1)

    def _outlive_the_handle(self) -> None:
        """Take no further part: without the handle there is no consolidated model."""
        told = self._told_to_end or self._signals.came
        logger.warning(
            "rank %d trains on after its handle was closed: no more checkpoints, nor a last one at a signal; close() "
            "the Checkpointer before the handle", self._sync.rank,
        )  # fmt: skip
        self._leave()
        if told:
            raise SystemExit(1)

    def _write_last(self) -> bool:
        """Have the first rank write the last checkpoint, or the next one if it is lost; False where this one could not.

        Until all come together again this rank's thread writes rows for the one that writes.
        """
        present = self._sync.end()
        while True:
            writes = present[0] == self._sync.number
            path = self._write_live() if writes and self._is_new else None
            if path is not None:
                logger.warning("%s is the last checkpoint", path)
            elif writes and not self._is_new:
                logger.warning("no last checkpoint is needed: nothing was trained, or not since one was loaded")
            first, present = present[0], self._sync.end()
            if present[0] == first:
                return path is not None or not (writes and self._is_new)

    def _progress(self) -> tuple[int, float]:
        """Return how many steps this rank has taken, and rounds: where it has no data, others may have trained."""
        return self._sync.steps, self._sync.metrics()["rounds"]

    def _tell_to_end(self) -> None:
        """Let the others know, where only this rank got the signal; they look for this file."""
        self._told_to_end = True
        try:
            self._tell_others()
        except OSError as error:
            self._note_trouble(error)

    def _tell_others(self) -> None:
        if self._sync.size > 1 and not self._others_told:
            folders.stop_file(self._folder, self._job).touch()
            self._others_told = True

    def _look(self) -> None:
        """Look into the folder, in the writer's thread: are all to end, are rows wanted? The next look tries again."""
        self._told_to_end = self._told_to_end or self._signals.came
        try:
            if self._told_to_end:
                self._tell_others()
            elif folders.stop_file(self._folder, self._job).exists():
                self._told_to_end = self._others_told = True
            if self._tables and not self._writes:
                self._tables.answer(self._folder, self._job)
        except Exception as error:
            self._note_trouble(error)
        else:
            self._trouble = None

    def _note_trouble(self, error: Exception) -> None:
        """Log what is wrong with the folder, once until it is another thing."""
        if (trouble := repr(error)) != self._trouble:
            logger.error(
                "rank %d has trouble with %s: %s; it tries again", self._sync.rank, self._folder, error,
                exc_info=None if isinstance(error, OSError) else error,
            )  # fmt: skip
        self._trouble = trouble

    def _leave(self) -> None:
        """Begin no more; the thread lives on, for what it is writing and for other ranks' checkpoints."""
        self._left = True
        self._drop_capture()
        self._hook.remove()
        self._sync.end_with(None)
        job.end_as_ever(self._end_if_told)
        if self._is_passed_on and self._writes:  # where the one that said so is lost this is the next one
            ending.note_last_checkpoint(made=False)
        self._is_passed_on = False
        self._signals.restore()

    def _close_at_exit(self) -> None:
        """Finish what is being written; other ranks that need this one's rows are served until the process ends."""
        if job.is_forked():
            return
        if not self._left:
            self._leave()
        if self._tables and not self._writer.wait(EXIT_WAIT_FOR_ROWS_S):
            self._writer.hurried = True
        if not self._writer.wait(EXIT_WAIT_S):
            logger.error("the checkpoint that was being written is given up after %.0f s", EXIT_WAIT_S)

    # --- odds and ends ----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the folder and remove what dead writers left; checkpoints try again to make it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.error("%s cannot be made (%s); it is tried again with each checkpoint", self._folder, error)
            return
        try:
            folders.clear(self._folder)
        except CheckpointError as error:
            logger.error("what earlier jobs left behind stays, as %s", error)

    def _is_good(self, stored: Stored) -> bool:
        """Tell whether all files are as they were written; ranks share the reading, each reads the dense file."""
        names = sorted(stored.manifest.files)
        mine = set(names[self._sync.rank :: self._sync.size]) | {DENSE} & set(names)
        failure, seal = None, None
        try:
            seal = manifests.read(stored.path).seal
            manifests.check(stored.path, stored.manifest, sorted(mine))
        except CheckpointError as error:
            failure = str(error)
        everyone = self._sync.gather((failure, seal))
        for rank, (message, theirs) in enumerate(everyone):
            if theirs != stored.manifest.seal:
                raise CheckpointError(
                    f"rank {rank} does not see {stored.path} as rank 0 does ({message or 'it is another'}); give a "
                    "folder that all hosts see"
                )
        wrong = [message for message, _ in everyone if message is not None]
        if wrong and self._writes:
            logger.warning("%s is passed over: %s", stored.path, wrong[0])
        return not wrong

    def _require_open(self, call: str) -> None:
        if self._left:
            raise ShadowSyncError(f"{call} came after close(); make a new Checkpointer to go on")


def _check(model: Any, sync: Any, every_s: float | None, every_steps: int | None, keep: int) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the torch.nn.Module itself")
    if not isinstance(sync, ShadowSync):
        raise TypeError(f"sync is a {type(sync).__name__}; pass the handle, such as optimizer.shadow")
    if every_s is not None:
        check_interval("every_s", every_s, low=0.0, high=float("inf"), low_included=False, high_included=False)
    if every_steps is not None:
        check_count("every_steps", every_steps, least=1)
    check_count("keep", keep, least=1)


def _signals_of(numbers: Any) -> list[signal.Signals]:
    if not isinstance(numbers, Iterable) or isinstance(numbers, (str, bytes)):
        raise TypeError(f"end_signals={numbers!r} is no list of signals; give such as [signal.SIGTERM], or () for none")
    return [_signal_of(number) for number in numbers]


def _signal_of(number: Any) -> signal.Signals:
    try:
        found = signal.Signals(number)
    except ValueError as error:
        raise ValueError(f"end_signals has {number!r}, which is no signal; give such as signal.SIGTERM") from error
    if found in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"end_signals has {number!r}, which no process can wait for; give such as signal.SIGTERM")
    return found


def _is_taken(folder: Path) -> bool:
    """Tell whether a Checkpointer of this process writes there: each would remove what the other has written."""
    other = _IN_USE.get(os.path.realpath(folder))
    return other is not None and not (other._left or other._sync.is_closed)


def _listed(folder: Path) -> tuple[list[Stored], str | None]:
    """Return what is in `folder`, or why that is not known."""
    try:
        return folders.stored_in(folder), None
    except CheckpointError as error:
        return [], str(error)


def _seals_in(folder: Path) -> set[str] | None:
    """Return the seals of all checkpoints in `folder`, None where it cannot be listed."""
    found, failure = _listed(folder)
    if failure is None:
        return {each.manifest.seal for each in found}
    logger.error("rows of a rank that is lost could not be restored from a checkpoint, as %s", failure)
    return None


def _newest(folder: Path, name: str, others: Sequence[Set[str]]) -> Path | None:
    """Return where the newest checkpoint has the tables `name`, but for those with seals of `others`: other runs'.

    None as long as those are not known.
    """
    latest = folders.latest_but(folder, others[0]) if others else None
    return None if latest is None else latest / name


def _tables_of(model: torch.nn.Module) -> dict[str, ShardedEmbeddingBag]:
    """Return the sharded tables by the names of their folders, which `checkpoint.load` finds beside the dense file."""
    return {checkpoint.folder_of(DENSE, name).name: module for name, module in checkpoint.sharded_in(model)}
