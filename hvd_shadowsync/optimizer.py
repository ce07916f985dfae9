"""The handle: `ShadowSync` beside the user's own optimizer, attached to it by step hooks."""

from __future__ import annotations

import atexit
import logging
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync import arguments
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.arguments import Settings
from hvd_shadowsync.captured import Capture
from hvd_shadowsync.checks import check_flag
from hvd_shadowsync.comm import job
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.course import Course
from hvd_shadowsync.ending import note_training
from hvd_shadowsync.errors import CutOffError, ShadowSyncError
from hvd_shadowsync.metrics import merge
from hvd_shadowsync.names import checked_names, name_state
from hvd_shadowsync.pacing import Pacing
from hvd_shadowsync.replica import Replica

logger = logging.getLogger(__name__)

STATE_KEY = "shadow_sync"

_OPEN: weakref.WeakValueDictionary[int, ShadowSync] = weakref.WeakValueDictionary()
_TO_CLOSE: dict[int, ShadowSync] = {}
"""Handles that other processes wait for, whether or not the program has kept them; in the order of construction."""


class ShadowSync:
    """Keeps the replicas of a model together in the background while each rank trains its own.

    The optimizer stays the user's own object: its step hooks trigger rounds and merge their results, nothing else of
    it changes. All ranks construct and close their handles in the same order. At world size 1 there is no thread, no
    MPI traffic, and training is bit-identical to training without a handle.

    A replica with NaN or infinity is left out of the mean and takes over the others' numbers; state of its optimizer
    that is as bad becomes 0. The rank logs which parameter it was, and at which step. Where all replicas are bad, every
    rank raises `ShadowSyncError`. At world size 1 nobody looks.

    All methods are for the training thread. `synchronize`, `averaged_weights`, `state_dict`, `load_state_dict`,
    `metrics(merged=True)` and `close` are collective: every rank has to call them, at its own time (ranks with less
    data wait, and take part in rounds without counting).

    Args:
        optimizer: any `torch.optim.Optimizer`, with the parameters it optimises.
        algorithm: `ModelAveraging()` (default), `ElasticAveraging()` or `BMUF()`.
        model: the module, for the parameters' names, its buffers and its frozen parameters; without it buffers are
            not synchronised.
        named_parameters: names instead of `model`, as `model.named_parameters()` gives them.
        sync_every: a round every so many steps; None (default) leaves it to the others.
        sync_interval_ms: a round every so many milliseconds; with `sync_every` both have to have passed.
        cpu_budget: share of one core that synchronisation may take, in (0, 1]; rounds are as frequent as that allows.
            The first ones have ten seconds' worth more, and follow one another without a pause until it is spent.
            Default 0.02 where neither of the two above is given.
        warmup_steps: so many first steps average gradients in the training thread, as Horovod does; default 0. A NaN
            in one rank's gradients is in all replicas then, as with Horovod, and an error when the rounds begin.
        merge: "delta" (default): the replica moves by alpha (anchor - snapshot) and keeps the steps that it made
            meanwhile; "interpolate": the paper's w = (1-alpha) w + alpha anchor, which needs alpha < 1.
        foreground: rounds in the training thread every `sync_every` steps (FR-MA, FR-EASGD-k, FR-BMUF-k):
            in an order that does not depend on time; default False.
        deterministic: the same, for programs whose runs have to repeat bit by bit: what would let rounds depend on
            time is refused, `mode="served"` of sharded tables as well. All else is the program's to fix: seeds, the
            order of data, the numbers of ranks and threads, versions of libraries, the kind of processor,
            `torch.use_deterministic_algorithms`. Background rounds merge when they are done, so no setting makes
            them repeat. Default False.
        apply: "boundary" (default): the training thread merges at the end of a step; "hogwild": the shadow thread
            merges at once, without locks, while gradients may be computed.
        sync_buffers: average the model's floating-point buffers (batch-norm statistics) and take integer buffers from
            rank 0; default True where `model` is given.
        wire_dtype: torch.float16 or torch.bfloat16 for what travels, summed in float32; default None, no change.
        hierarchical: between hosts that have several ranks each, let those of a host average through memory that they
            share, and one of them go on the network: "auto" (default) where they can share, True (warns where they
            cannot), False. S-EASGD and foreground rounds know no hosts.
        max_distance: log a warning where a replica gets farther away from the anchor than this, in units of the
            anchor's norm (`metrics()["distance"]`), once each time; default None, never.
        max_sync_gap: training waits after so many steps since the last snapshot that was merged, until a round is; at
            least `sync_every`. The bound of what another rank's steps can be behind here; a rank waits for slower ones
            then, and for paused ones. Other calls in which ranks wait for one another between steps (allreduces of
            your own, tables in lockstep) do not go with it. Default None: never.
        stall_warning_s: after how many seconds of waiting for other ranks it is reported (logged as a warning) which
            are missing, and where they are; again at doubling intervals. None: never. Default 60. Not yet at the first
            calls of the construction, where MPI itself waits.
        stall_timeout_s: after how many seconds ranks are given up that do not answer (stopped, or cut off), or that
            have taken no step for so long while a round waits for them: longer than any step, evaluation or
            checkpoint. A paused rank is not. Default None: never.
        on_stall: what is done then. "end" (default): `StallError` on every rank that is there, and the job ends,
            with `end_job_on_exception=False` as well.
            "drop": the missing ranks are ended (SIGKILL, by another rank of their host), and the others go on; for
            jobs that outlive their ranks. Where their host cannot be reached, the side with more than half of the
            ranks goes on (of two halves, the one with the lowest rank), if mpirun's host is on it; the ranks of the
            other end themselves. Else the job ends.
        sparse_as_dense: leave gradients dense that were sparse before the warm-up averaged them; default False.
        initial_weights: "broadcast" (default) from rank 0, or "check" that they are equal.
        communicator: over which ranks; default all of MPI's. It is duplicated, and stays the caller's.
        end_job_on_exception: whether an uncaught exception on this rank ends the whole job; default True.

    Raises:
        TypeError, ValueError: an argument is not what it should be; names it and the remedy.
        TransportError: no usable MPI.
        ReplicaMismatchError: replicas, settings or initial weights differ; raised on every rank.

    Source: Zheng et al. 2020, "ShadowSync", arXiv 2003.03477.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        algorithm: Algorithm | None = None,
        model: torch.nn.Module | None = None,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        sync_every: int | None = None,
        sync_interval_ms: float | None = None,
        cpu_budget: float | None = None,
        warmup_steps: int = 0,
        merge: str = "delta",
        foreground: bool = False,
        deterministic: bool = False,
        apply: str = "boundary",
        sync_buffers: bool | None = None,
        wire_dtype: torch.dtype | None = None,
        sparse_as_dense: bool = False,
        hierarchical: bool | str = "auto",
        max_distance: float | None = None,
        max_sync_gap: int | None = None,
        stall_warning_s: float | None = 60.0,
        stall_timeout_s: float | None = None,
        on_stall: str = "end",
        initial_weights: str = "broadcast",
        communicator: Communicator | None = None,
        end_job_on_exception: bool = True,
    ) -> None:
        job.end_job_on_exception(end_job_on_exception)
        arguments.check_optimizer(optimizer)
        check_flag("foreground", foreground)
        check_flag("deterministic", deterministic)
        settings = Settings(
            options=arguments.round_options(
                algorithm, merge, wire_dtype, foreground or deterministic, hierarchical, max_distance
            ),
            pacing=Pacing(sync_every, sync_interval_ms, cpu_budget),
            stalls=arguments.stall_rules(stall_warning_s, stall_timeout_s, on_stall),
            apply=apply,
            initial_weights=initial_weights,
            sync_buffers=model is not None if sync_buffers is None else sync_buffers,
            warmup_steps=warmup_steps,
            sparse_as_dense=sparse_as_dense,
            max_sync_gap=max_sync_gap,
        )
        arguments.check_model(model, optimizer)
        arguments.check_communicator(communicator)
        arguments.check_combinations(settings, deterministic=deterministic, model=model)
        names = None if named_parameters is None else checked_names(named_parameters, optimizer)
        self.optimizer = optimizer
        self._end_job = end_job_on_exception
        self._averaged = self._skip_average = self._leave_out_rounds = self._closed = False
        self._course = Course(optimizer, model, names, settings, communicator)
        try:
            self._attach()
        except BaseException:
            self._course.stop()
            raise
        _OPEN[self._course.ordinal] = self

    # --- what a user asks for -----------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank, among those that synchronise: 0 is always there, even after ranks were lost."""
        return self._course.ranks.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks that synchronise; less than at first after ranks were lost."""
        return self._course.ranks.comm.size

    @property
    def shard(self) -> int:
        """The number of the part of the data that is this rank's, from 0 on, of `num_shards`.

        Its rank when the job began; that of the lost rank that it has taken the place of. It never changes.
        """
        return self._course.shard

    @property
    def num_shards(self) -> int:
        """The number of ranks when the job began; it never changes."""
        return self._course.num_shards

    def pause(self) -> None:
        """Begin no more rounds on this rank; the others train on, and their next round waits for `resume`."""
        self._require_open("pause()")
        self._course.pause()

    def resume(self) -> None:
        """Begin rounds again after `pause`."""
        self._require_open("resume()")
        self._course.resume()

    def synchronize(self) -> None:
        """Make all replicas bit-identical: their mean, which becomes the anchor as well (collective).

        A rank that waits here counts until its own steps have settled in the others' weights, and no longer: steps
        that the others take meanwhile are not divided by it.

        Call it before evaluation and before saving. Raises `ShadowSyncError` if the shadow thread failed, or if the
        optimizer has other parameters in place of those that are synchronised.
        """
        self._require_open("synchronize()")
        self._course.synchronize()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Evaluate on the mean of the replicas: `with sync.averaged_weights(): ...` (collective).

        Inside, the live weights and buffers are the mean; afterwards each rank has its own back, with the rounds in
        them that were under way. A rank that had waited here for others, until its steps were in theirs, has nothing of
        its own and keeps the mean: `synchronize()` right afterwards gives what the block saw. Needs one more copy of
        the weights meanwhile.
        """
        self._require_open("averaged_weights()")
        with self._course.averaged():
            yield

    def metrics(self, *, merged: bool = False) -> dict[str, float]:
        """Return what `metrics.RoundMetrics` documents, of this rank or, collectively, of all (`merged=True`)."""
        own = self._course.metrics.snapshot()
        if not merged or self._course.alone:
            return own
        self._require_open("metrics(merged=True)")
        return merge(self._course.exchange("metrics(merged=True)", own))

    def average_optimizer_state(self) -> None:
        """Replace floating-point optimizer state (momenta, sums of squares) by its mean over the ranks (collective).

        Only what all ranks have by the same name and shape; a rank that has not stepped yet has none.
        """
        self._require_open("average_optimizer_state()")
        if self._course.alone:
            return
        found = name_state(self.optimizer, self._course.replica.params)
        described = self._course.exchange("average_optimizer_state()", [each.describe() for each in found])
        everywhere = set.intersection(*map(set, described))
        shared = Replica([each for each in found if each.describe() in everywhere])
        own = shared.empty()
        shared.read(own)
        shared.write(self._course.mean(own))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, by rank (collective; pickles)."""
        self._require_open("gather")
        return self._course.exchange("gather()", value)

    def settle(self) -> None:
        """Consolidate if rounds have begun; until this rank's next step there is none under way (collective).

        For whoever replaces the weights of a training that goes on: what is merged afterwards was made of the old ones.
        """
        self._require_open("settle()")
        self._course.settle()

    # --- for the checkpointer -----------------------------------------------------------------------------------------

    def capture(self, wanted: Capture | None) -> bool:
        """Have the next round copied into `wanted` (None: no longer); False where there are no rounds (yet)."""
        if self._course.driver is None:
            return False
        self._course.driver.rounds.capture(wanted)
        return True

    def state_beside(self, rounds: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the optimizer's live state with what a copied round remembered; waits for no round under way."""
        self._leave_out_rounds = True
        try:
            state = self.optimizer.state_dict()
        finally:
            self._leave_out_rounds = False
        if rounds:
            state[STATE_KEY] = {**rounds, "counters": self._course.metrics.counters()}
        elif self._course.driver is None and (remembered := self._course.state()):
            state[STATE_KEY] = remembered
        return state

    @property
    def steps(self) -> int:
        """Training steps of this rank, those before the checkpoint that was loaded included."""
        return self._course.metrics.steps

    @property
    def has_joined(self) -> bool:
        """Whether this rank is one of those that synchronise; not yet, before its first step in a lost one's place."""
        return not self._course.is_new or self._course.driver is not None

    def name(self) -> str:
        """Return 12 hexadecimal digits that no other job has, the same on every rank, now and later (collective)."""
        own = self._course.lasting_name or uuid.uuid4().hex
        return str(self.gather(own[:12])[0])

    @property
    def is_closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    @property
    def number(self) -> int:
        """The number that `end()` has for this rank: whatever ranks are lost, it never changes."""
        comm = self._course.ranks.comm
        return comm.members[comm.rank]

    @property
    def has_ending(self) -> bool:
        """Whether somebody listens already: see `end_with`."""
        return self._course.has_ending

    def end_with(self, ending: Callable[..., None] | None) -> None:
        """Have `ending` called now and then while this rank waits in a collective call; it raises to end the wait.

        And with the exception by which the block of a `with` statement ends.
        """
        self._course.end_with(ending)

    def end(self) -> tuple[int, ...]:
        """Consolidate for the last time, whatever calls other ranks are in: they come, or leave (collective).

        Return the numbers of the ranks that were there, rank 0's first: the same on all of them.
        """
        self._require_open("end()")
        return self._course.end()

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Consolidate, then return everything that rounds remember, by parameter name (collective).

        It holds for any world size. `optimizer.state_dict()` contains the same under "shadow_sync", without
        consolidating: call `synchronize()` before.
        """
        self.synchronize()
        return self._course.state()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from the live weights, which were loaded, and `state`, or none, on every rank (collective).

        With `apply="hogwild"` call `settle()` before the weights are loaded, if rounds have begun.

        Of another algorithm's `state` the counters are taken over, with a warning.
        """
        self._require_open("load_state_dict()")
        self.check_state(state)
        self._course.begin_again(state)

    def check_state(self, state: Any) -> None:
        """Raise `ValueError` unless `state` is one of rounds, for these parameters, or none (local)."""
        arguments.check_rounds_state(state, self._course.replica.params)

    def close(self) -> None:
        """Take part until all ranks are here, merge the last result, detach (collective; idempotent).

        The replicas are as their last rounds left them: call `synchronize()` before, for identical ones.
        """
        if self._closed:
            return
        try:
            self._course.close()
        except BaseException:
            atexit.register(self._end_job_of_ranks)
            raise
        finally:
            self._detach()

    def __enter__(self) -> ShadowSync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception let the others train on and do not wait for them here: the handle stays."""
        if error is None:
            self.close()
        else:
            self._course.leave(error)

    # --- Horovod's gradient calls, for clipping recipes --------------------------------------------------------------

    def average_gradients(self) -> None:
        """Average gradients now if the next step is one of the warm-up; nothing otherwise."""
        if not self._course.alone and self._course.warmup.left:
            self._course.step_begins(average=True)
            self._averaged = True

    @contextmanager
    def skip_average(self) -> Iterator[None]:
        """Inside, `optimizer.step()` takes the gradients as they are: they were averaged by hand."""
        self._skip_average = True
        try:
            yield
        finally:
            self._skip_average = False

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        optimizer = self.optimizer
        optimizer.shadow = self  # type: ignore[attr-defined]
        optimizer.synchronize = self.average_gradients  # type: ignore[attr-defined]
        optimizer.skip_synchronize = self.skip_average  # type: ignore[attr-defined]
        self._hooks: list[Any] = []
        self._pre_hook: Any = None
        if self._course.alone:
            self._hooks = [
                optimizer.register_step_post_hook(_undisturbed(self._count_step)),
                optimizer.register_state_dict_post_hook(self._add_state),
                optimizer.register_load_state_dict_pre_hook(self._take_state),
            ]
        else:
            self._pre_hook = optimizer.register_step_pre_hook(_undisturbed(self._before_step))
            self._hooks = [
                self._pre_hook,
                optimizer.register_step_post_hook(_undisturbed(self._after_step)),
                optimizer.register_state_dict_post_hook(self._add_state),
                optimizer.register_load_state_dict_pre_hook(self._take_state),
            ]
            if self._course.ranks.comm.spans_processes:
                if not _TO_CLOSE:
                    atexit.unregister(_close_at_exit)
                    atexit.register(_close_at_exit)
                _TO_CLOSE[self._course.ordinal] = self

    def _detach(self) -> None:
        self._closed = True
        _OPEN.pop(self._course.ordinal, None)
        _TO_CLOSE.pop(self._course.ordinal, None)
        self._course.stop()
        for hook in self._hooks:
            hook.remove()
        for name in ("shadow", "synchronize", "skip_synchronize"):
            if name in vars(self.optimizer):
                delattr(self.optimizer, name)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        average = self._course.warmup.left > 0 and not self._skip_average
        if average and (len(args) > 1 or kwargs.get("closure") is not None):
            raise ValueError(
                f"warmup_steps={self._course.warmup.left} are left, but step() got a closure, whose gradients cannot "
                "be averaged in time; use warmup_steps=0 with such optimizers"
            )
        if self._course.warmup.left > 0 and self._skip_average and not self._averaged:
            raise ShadowSyncError(
                f"step() inside skip_synchronize(), with warmup_steps={self._course.warmup.left} left, but nobody has "
                "averaged this step's gradients; call optimizer.synchronize() before, on every rank"
            )
        self._course.step_begins(average=average and not self._averaged)
        self._averaged = False

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        had_begun = self._course.driver is not None
        self._course.step_ends()
        if had_begun and self._pre_hook is not None:
            self._pre_hook.remove()
            self._pre_hook = None

    def _count_step(self, *_: Any) -> None:
        note_training()
        self._course.metrics.steps += 1

    def _add_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if not self._leave_out_rounds and (found := self._course.state()):
            state[STATE_KEY] = found

    def _take_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        rounds = state.pop(STATE_KEY, None) or None
        self.check_state(rounds)
        self._course.take(rounds)
        if self._course.driver is not None and rounds is not None:
            logger.warning(
                "optimizer state was loaded after the first step, without what it says of rounds; for that call "
                "optimizer.shadow.load_state_dict(state['shadow_sync']) on every rank"
            )

    # --- odds and ends ------------------------------------------------------------------------------------------------

    def _require_open(self, call: str) -> None:
        if self._closed:
            raise ShadowSyncError(f"{call} came after close(); make a new ShadowSync to go on")

    def _close_at_exit(self) -> None:
        if job.is_forked():
            return
        logger.info("close() was not called; taking part until all ranks are done")
        try:
            self.close()
        except ShadowSyncError:
            logger.exception("synchronisation ended with an error")
            self._end_job_of_ranks()

    def _end_job_of_ranks(self) -> None:
        """End all ranks: after an error here they would wait for this one for ever, or for who is stopped."""
        if not self._course.ranks.comm.spans_processes:
            return
        if isinstance(self._course.stalled, CutOffError):
            job.leave_job("it is cut off from most of the others")
        if self._end_job or self._course.stalled is not None:
            job.end_job("synchronisation failed")


def _undisturbed(hook: Callable[..., None]) -> Callable[..., None]:
    """Return `hook` as a function that torch.compile calls and does not look into."""
    disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


def _open_handles() -> list[ShadowSync]:
    """Return the handles that work, in the order of their construction."""
    handles = [each for reference in _OPEN.valuerefs() if (each := reference()) is not None]
    return sorted(handles, key=lambda each: each._course.ordinal)


def _close_at_exit() -> None:
    """Close what is left, in the order of construction, in which programs are to close handles (collective)."""
    for handle in list(_TO_CLOSE.values()):
        handle._close_at_exit()


def close_all() -> None:
    """Close every handle of this process that is still open, in the order of their construction (collective)."""
    for handle in _open_handles():
        handle.close()
