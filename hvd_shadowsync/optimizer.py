"""The handle: `ShadowSync` beside the user's own optimizer, attached to it by step hooks."""

from __future__ import annotations

import atexit
import itertools
import logging
import platform
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync import agree, arguments
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.alike import values_everywhere, values_of, whole_model
from hvd_shadowsync.average import mean_of
from hvd_shadowsync.captured import Capture
from hvd_shadowsync.checks import check_count, check_flag, choice
from hvd_shadowsync.comm import job, mpi
from hvd_shadowsync.comm.attendance import Attendance, Person
from hvd_shadowsync.comm.base import Communicator, Reserve
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.comm.whereabouts import START, WARMUP
from hvd_shadowsync.embedding.sharded import join_all
from hvd_shadowsync.ending import note_training
from hvd_shadowsync.errors import CutOffError, ReplicaMismatchError, ShadowSyncError, StallError
from hvd_shadowsync.health import forget_bad_state
from hvd_shadowsync.legacy import TrainingState
from hvd_shadowsync.metrics import RoundMetrics, merge
from hvd_shadowsync.names import checked_names, name_state, name_tensors
from hvd_shadowsync.pacing import Pacing
from hvd_shadowsync.replica import Replica
from hvd_shadowsync.rounds import Errand, Rounds
from hvd_shadowsync.shadow import Driver, Foreground, ShadowThread
from hvd_shadowsync.warmup import Warmup

logger = logging.getLogger(__name__)

APPLIES = ("boundary", "hogwild")
INITIALS = ("broadcast", "check")
STATE_KEY = "shadow_sync"

_OPEN: weakref.WeakValueDictionary[int, ShadowSync] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


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
            are missing, and where they are; again at doubling intervals. None: never. Default 60.
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
        for name, flag in (
            ("foreground", foreground),
            ("deterministic", deterministic),
            ("sparse_as_dense", sparse_as_dense),
        ):
            check_flag(name, flag)
        self._options = arguments.round_options(
            algorithm, merge, wire_dtype, foreground or deterministic, hierarchical, max_distance
        )
        self._pacing = Pacing(sync_every, sync_interval_ms, cpu_budget)
        self._apply = choice("apply", apply, APPLIES)
        self._initial = choice("initial_weights", initial_weights, INITIALS)
        check_count("warmup_steps", warmup_steps, least=0)
        arguments.check_model(model, optimizer)
        arguments.check_communicator(communicator)
        arguments.check_combinations(self._options, apply, self._pacing, deterministic=deterministic, model=model)
        arguments.check_gap(max_sync_gap, self._options, self._pacing, model)
        self._max_sync_gap = max_sync_gap
        self._stalls = arguments.stall_rules(stall_warning_s, stall_timeout_s, on_stall)
        if sync_buffers and model is None:
            raise ValueError("sync_buffers=True needs model=..., whose buffers they are; give it")
        self.optimizer = optimizer
        self._model = model
        self._sync_buffers = model is not None if sync_buffers is None else sync_buffers
        self._names = checked_names(named_parameters, optimizer) if named_parameters is not None else None
        self._metrics = RoundMetrics()
        self._poller = Poller()
        self._driver: Driver | None = None
        self._loaded: dict[str, Any] | None = None
        self._averaged = self._skip_average = self._leave_out_rounds = False
        self._ending: Callable[..., None] | None = None
        self._closed = self._paused = self._started = False
        self._number, self._owner = next(_NUMBERS), threading.current_thread()
        self._end_job = end_job_on_exception
        comm = mpi.world() if communicator is None else communicator.dup()
        self._reserve = comm.reserve(self._number) if comm.size > 1 else None
        self._ranks = _survivors(comm, self._metrics.note_lost, self._reserve)
        self._shard, self._num_shards = (comm.rank, comm.size) if self._reserve is None else self._reserve.shard
        self._ranks.greet = self._greet if self._reserve is not None else None
        self._alone = self.size == 1 and not self._is_new
        arguments.check_dropping(self._stalls, self._ranks.comm)
        self._attendance: Attendance | None = None
        self._stalled: StallError | None = None
        warmup = 0 if self._is_new else warmup_steps
        self._warmup = Warmup(self._ranks, self._poller, warmup, sparse_as_dense=sparse_as_dense)
        self._groups = _group_sizes(optimizer)
        self._replica = self._make_replica()
        if not self._alone:
            self._require_same(warmup_steps=warmup_steps, sparse_as_dense=sparse_as_dense)
            self._start()
            self._started = False
        self._attach()
        _OPEN[self._number] = self
        if self._stalls.active and not self._alone and not self._is_new:
            self._attend()

    # --- what a user asks for -----------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank, among those that synchronise: 0 is always there, even after ranks were lost."""
        return self._ranks.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks that synchronise; less than at first after ranks were lost."""
        return self._ranks.comm.size

    @property
    def shard(self) -> int:
        """The number of the part of the data that is this rank's, from 0 on, of `num_shards`.

        Its rank when the job began; that of the lost rank that it has taken the place of. It never changes.
        """
        return self._shard

    @property
    def num_shards(self) -> int:
        """The number of ranks when the job began; it never changes."""
        return self._num_shards

    def pause(self) -> None:
        """Begin no more rounds on this rank; the others train on, and their next round waits for `resume`."""
        self._require_open("pause()")
        self._paused = True
        if self._driver is not None:
            self._driver.pause()

    def resume(self) -> None:
        """Begin rounds again after `pause`."""
        self._require_open("resume()")
        self._paused = False
        if self._driver is not None:
            self._driver.resume()

    def synchronize(self) -> None:
        """Make all replicas bit-identical: their mean, which becomes the anchor as well (collective).

        A rank that waits here counts until its own steps have settled in the others' weights, and no longer: steps
        that the others take meanwhile are not divided by it.

        Call it before evaluation and before saving. Raises `ShadowSyncError` if the shadow thread failed, or if the
        optimizer has other parameters in place of those that are synchronised.
        """
        self._require_open("synchronize()")
        if not self._alone:
            self._require_own_parameters()
            self._finish_warmup(leaving=False)
            if self._warmup.left:
                self._start_alike()
            else:
                self._begun().synchronize()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Evaluate on the mean of the replicas: `with sync.averaged_weights(): ...` (collective).

        Inside, the live weights and buffers are the mean; afterwards each rank has its own back, with the rounds in
        them that were under way. Needs one more copy of the weights meanwhile.
        """
        self._require_open("averaged_weights()")
        if self._alone:
            yield
            return
        self._meet()
        own, integers = self._replica.empty(), self._replica.empty_integers()
        self._replica.read(own, integers)
        self.synchronize()
        try:
            yield
        finally:
            self._replica.write(own, integers)

    def metrics(self, *, merged: bool = False) -> dict[str, float]:
        """Return what `metrics.RoundMetrics` documents, of this rank or, collectively, of all (`merged=True`)."""
        if not merged or self._alone:
            return self._metrics.snapshot()
        self._require_open("metrics(merged=True)")
        return merge(self._exchange("metrics(merged=True)", self._metrics.snapshot()))

    def average_optimizer_state(self) -> None:
        """Replace floating-point optimizer state (momenta, sums of squares) by its mean over the ranks (collective).

        Only what all ranks have by the same name and shape; a rank that has not stepped yet has none.
        """
        self._require_open("average_optimizer_state()")
        if self._alone:
            return
        found = name_state(self.optimizer, self._replica.params)
        described = self._exchange("average_optimizer_state()", [each.describe() for each in found])
        everywhere = set.intersection(*map(set, described))
        shared = Replica([each for each in found if each.describe() in everywhere])
        own = shared.empty()
        shared.read(own)
        shared.write(self._meet(lambda comm: mean_of(comm, self._poller, own, (1.0,) * comm.size)))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, by rank (collective; pickles)."""
        self._require_open("gather")
        if self._alone:
            return [value]
        return self._exchange("gather()", value)

    def settle(self) -> None:
        """Consolidate if rounds have begun; until this rank's next step there is none under way (collective).

        For whoever replaces the weights of a training that goes on: what is merged afterwards was made of the old ones.
        """
        self._require_open("settle()")
        if self._driver is not None:
            self._driver.synchronize()

    # --- for the checkpointer: local, while training goes on ----------------------------------------------------------

    def capture(self, wanted: Capture | None) -> bool:
        """Have the next round copied into `wanted` (None: no longer); False where there are no rounds (yet)."""
        if self._driver is None:
            return False
        self._driver.rounds.capture(wanted)
        return True

    def state_beside(self, rounds: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the optimizer's live state with what a copied round remembered; waits for no round under way."""
        self._leave_out_rounds = True
        try:
            state = self.optimizer.state_dict()
        finally:
            self._leave_out_rounds = False
        if rounds:
            state[STATE_KEY] = {**rounds, "counters": self._metrics.counters()}
        elif self._driver is None and (remembered := self._state()):
            state[STATE_KEY] = remembered
        return state

    @property
    def steps(self) -> int:
        """Training steps of this rank, those before the checkpoint that was loaded included."""
        return self._metrics.steps

    @property
    def has_joined(self) -> bool:
        """Whether this rank is one of those that synchronise; not yet, before its first step in a lost one's place."""
        return not self._is_new or self._driver is not None

    def name(self) -> str:
        """Return 12 hexadecimal digits that no other job has, the same on every rank, now and later (collective)."""
        own = uuid.uuid4().hex if self._reserve is None else self._reserve.name
        return str(self.gather(own[:12])[0])

    @property
    def is_closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    @property
    def number(self) -> int:
        """The number that `end()` has for this rank: whatever ranks are lost, it never changes."""
        comm = self._ranks.comm
        return comm.members[comm.rank]

    def end_with(self, ending: Callable[..., None] | None) -> None:
        """Have `ending` called now and then while this rank waits in a collective call; it raises to end the wait.

        And with the exception by which the block of a `with` statement ends.
        """
        self._ending = ending
        if self._driver is not None:
            self._driver.ending = ending

    def end(self) -> tuple[int, ...]:
        """Consolidate for the last time, whatever calls other ranks are in: they come, or leave (collective).

        Return the numbers of the ranks that were there, rank 0's first: the same on all of them.
        """
        self._require_open("end()")
        if self._alone:
            return (self.number,)
        self._finish_warmup(leaving=False)
        if not self._warmup.left:
            return self._begun().end()
        self._start_alike()
        return tuple(self._ranks.comm.members)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Consolidate, then return everything that rounds remember, by parameter name (collective).

        It holds for any world size. `optimizer.state_dict()` contains the same under "shadow_sync", without
        consolidating: call `synchronize()` before.
        """
        self.synchronize()
        return self._state()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from the live weights, which were loaded, and `state`, or none, on every rank (collective).

        With `apply="hogwild"` call `settle()` before the weights are loaded, if rounds have begun.

        Of another algorithm's `state` the counters are taken over, with a warning.
        """
        self._require_open("load_state_dict()")
        arguments.check_rounds_state(state, self._replica.params)
        if self._alone:
            self._take(state)
            return
        loaded = self._replica.empty()
        self._replica.read(loaded)
        self.settle()
        self._replica.write(loaded)
        self._take(state)
        self._start()
        if self._driver is not None:
            self._driver.meet(partial(self._begin_again, self._driver.rounds))
            self._loaded = None
            self._driver.restart()

    def close(self) -> None:
        """Take part until all ranks are here, merge the last result, detach (collective; idempotent).

        The replicas are as their last rounds left them: call `synchronize()` before, for identical ones.
        """
        if self._closed:
            return
        try:
            if not self._alone:
                self._finish_warmup(leaving=True)
                driver = self._begun()
                driver.leave()
                driver.rounds.free()
            if self._attendance is not None:
                self._attendance.close()
            self._ranks.free()
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
        """Close; after an exception let the others train on and do not wait for them here."""
        if error is None:
            self.close()
        elif self._driver is not None:
            if self._ending is not None:
                self._ending(error)
            self._driver.leave(wait=False)

    # --- Horovod's gradient calls, for clipping recipes --------------------------------------------------------------

    def average_gradients(self) -> None:
        """Average gradients now if the next step is one of the warm-up; nothing otherwise."""
        if not self._alone and self._warmup.left:
            self._notice_new_parameters()
            self._get_ready(needed=True)
            self._average_in_warmup()
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
        if self._alone:
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
            if self._ranks.comm.spans_processes:
                atexit.register(self._close_at_exit)

    def _detach(self) -> None:
        self._closed = True
        _OPEN.pop(self._number, None)
        if self._attendance is not None:
            self._attendance.stop()
        for hook in self._hooks:
            hook.remove()
        for name in ("shadow", "synchronize", "skip_synchronize"):
            if name in vars(self.optimizer):
                delattr(self.optimizer, name)
        atexit.unregister(self._close_at_exit)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._notice_new_parameters()
        self._get_ready(needed=True)
        note_training()
        if self._warmup.left and not self._skip_average:
            if len(args) > 1 or kwargs.get("closure") is not None:
                raise ValueError(
                    f"warmup_steps={self._warmup.left} are left, but step() got a closure, whose gradients cannot be "
                    "averaged in time; use warmup_steps=0 with such optimizers"
                )
            if not self._averaged:
                self._average_in_warmup()
        self._averaged = False

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._notice_new_parameters()
        if self._driver is None:
            self._metrics.steps += 1
            if not self._warmup.left:
                self._begun()
            return
        self._driver.step_taken()
        if self._pre_hook is not None:
            self._pre_hook.remove()
            self._pre_hook = None

    def _average_in_warmup(self) -> None:
        with self._ranks.whereabouts.waiting(WARMUP):
            self._warmup.average(self._replica.params)

    def _notice_new_parameters(self) -> None:
        if self._groups != (sizes := _group_sizes(self.optimizer)):
            self._groups = sizes
            self._replica = self._make_replica()
            if self._driver is not None:
                self._driver.rounds.wanted_replica = self._replica

    def _count_step(self, *_: Any) -> None:
        note_training()
        self._metrics.steps += 1

    def _require_own_parameters(self) -> None:
        """Raise where parameters were replaced (not added), which no step looks for."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        known = self._replica.params
        replaced = [each.name for each, param in zip(known, params, strict=False) if each.tensor is not param]
        if len(params) == len(known) and replaced:
            raise ShadowSyncError(
                f"the optimizer has another parameter in place of {replaced[0]} ({len(replaced)} of {len(known)} were "
                "replaced), which is not synchronised; close() the handle and make a new one after such a change"
            )

    def _add_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if not self._leave_out_rounds and (found := self._state()):
            state[STATE_KEY] = found

    def _take_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        rounds = state.pop(STATE_KEY, None) or None
        arguments.check_rounds_state(rounds, self._replica.params)
        self._take(rounds)
        if self._driver is not None and self._loaded is not None:
            logger.warning(
                "optimizer state was loaded after the first step, without what it says of rounds; for that call "
                "optimizer.shadow.load_state_dict(state['shadow_sync']) on every rank"
            )

    # --- stalls -------------------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        """Begin to look who is missing (collective)."""
        self._attend_to(*self._ranks.together(_roll))

    def _greet(self, comm: Communicator) -> None:
        """Take note of ranks that have joined (collective, on the thread that makes rounds)."""
        self._ranks.hosts.update(comm.allgather_object((comm.members[comm.rank], platform.node())))
        if self._stalls.active:
            comm, people = _roll(comm)
            if self._attendance is not None:
                self._attendance.stop()
            self._attend_to(comm, people)

    def _attend_to(self, comm: Communicator, people: list[Person]) -> None:
        ranks, metrics, handle = self._ranks, self._metrics, weakref.ref(self)
        ranks.whereabouts.steps = lambda: metrics.steps

        def fail(error: StallError) -> None:
            if (still := handle()) is not None:
                still._fail(error)

        self._attendance = Attendance(
            comm, people, ranks.whereabouts, self._stalls, lost=lambda: ranks.lost, fail=fail
        )  # fmt: skip
        self._attendance.start()

    def _fail(self, error: StallError) -> None:
        self._stalled = error
        if self._driver is not None:
            self._driver.fail(error)

    # --- beginnings ---------------------------------------------------------------------------------------------------

    def _make_replica(self) -> Replica:
        params, buffers = name_tensors(self.optimizer, self._model, self._names)
        return Replica(params, buffers if self._sync_buffers else [])

    def _require_same(self, **more: Any) -> None:
        settings = {"pacing": self._pacing, "options": self._options, "stalls": self._stalls, **more}
        settings |= {"max_sync_gap": self._max_sync_gap}
        settings |= {"apply": self._apply, "initial_weights": self._initial, "sync_buffers": self._sync_buffers}
        tensors = self._replica.tensors + self._replica.integers
        lines = agree.describe_settings(settings) + agree.describe_tensors(tensors)
        lines += agree.describe_optimizer(self.optimizer)
        self._collectively(lambda comm: agree.require_same(comm, lines))

    def _get_ready(self, *, needed: bool) -> None:
        """Start all handles of this thread, in order, where a rank needs it: it trains, or waits for those that do.

        Together, because a rank without data goes to its first call of one handle while the others start them all.
        Weights may be loaded until then. Buffers are left alone: by then the first batch has gone into the batch-norm
        statistics of each rank. Collective at the first calls.
        """
        if self._driver is not None:
            return
        for handle in _open_handles(self._owner):
            if not (handle._alone or handle._started) and any(handle._collectively(_everyones(needed))):
                handle._start(buffers=False)
            if handle._started and not handle._warmup.left:
                handle._begun()

    def _start(self, *, buffers: bool = True) -> None:
        """Begin with the weights of rank 0 everywhere, or check that they are the same (collective)."""
        self._started = True
        if self._initial == "check":
            for replica in whole_model(self._replica, self._model, buffers=buffers):
                lines = agree.describe_values(replica.tensors)
                self._collectively(partial(agree.require_same, lines=lines))
        else:
            self._start_alike(buffers=buffers)

    def _start_alike(self, *, buffers: bool = True) -> None:
        """Give every rank the weights of one that has trained in the warm-up, or of rank 0 (collective)."""
        everything = whole_model(self._replica, self._model, buffers=buffers)
        own = values_of(everything)
        given = self._collectively(lambda comm: values_everywhere(comm, self._poller, own, root=self._first(comm)))
        for replica, values in zip(everything, given, strict=True):
            replica.write(*values)

    def _first(self, comm: Communicator) -> int:
        return next((rank for rank, member in enumerate(comm.members) if member in self._warmup.trained), 0)

    def _collectively(self, errand: Errand) -> Any:
        """Return what `errand` returns, which all ranks run now, each in the same call (collective)."""
        if self._driver is not None:
            return self._driver.meet(errand)
        with self._ranks.whereabouts.waiting(START):
            return self._ranks.together(errand)

    def _meet(self, errand: Errand | None = None) -> Any:
        """Run `errand` once all ranks are in a call such as this one; take part in what they do before (collective)."""
        join_all(self._owner)
        self._get_ready(needed=False)
        if self._started:
            self._warmup.finish(self._replica.params, leaving=False)
            if not self._warmup.left:
                return self._begun().meet(errand)
        return None if errand is None else self._collectively(errand)

    def _exchange(self, call: str, value: Any) -> list[Any]:
        """Return every rank's `value` in the same call (collective).

        Raises:
            ShadowSyncError: the ranks are in different calls; raised on every rank.
        """
        calls, values = zip(*self._meet(_everyones((call, value))), strict=True)
        if len(set(calls)) > 1:
            where = ", ".join(f"rank {rank} in {each}" for rank, each in enumerate(calls))
            raise ShadowSyncError(f"the ranks meet in different calls: {where}; make them everywhere in the same order")
        return list(values)

    def _finish_warmup(self, *, leaving: bool) -> None:
        join_all(self._owner)
        self._get_ready(needed=True)
        self._warmup.finish(self._replica.params, leaving=leaving)

    def _begun(self) -> Driver:
        """Return the driver, made at the first step after the warm-up (collective at its first call)."""
        if self._driver is None:
            if self._warmup.steps:
                self._start_alike()
            with self._ranks.whereabouts.waiting(START):
                rounds = self._join() if self._is_new else self._ranks.together(self._begin)
            self._loaded = None
            self._driver = self._make_driver(rounds)
            self._driver.ending = self._ending
            self._driver.mend = partial(forget_bad_state, self.optimizer)
            if self._stalled is not None:
                self._driver.fail(self._stalled)
            job.spare_others_on_exception()
            if self._paused:
                self._driver.pause()
        return self._driver

    def _begin(self, comm: Communicator) -> Rounds:
        rounds = self._make_rounds()
        self._recall(rounds, comm)
        return rounds

    @property
    def _is_new(self) -> bool:
        """Whether this rank takes the place of a lost one; until its first step it does what it does for itself."""
        return self._reserve is not None and self._reserve.is_new

    def _join(self) -> Rounds:
        """Wait for the others to take this rank in, in the place of a lost one, and go on as they do."""
        assert self._reserve is not None, "it is new"
        whereabouts, everyone = self._ranks.whereabouts, range(self._num_shards)
        self._ranks = Survivors(self._reserve.join(), self._metrics.note_lost, self._reserve, everyone)
        self._ranks.whereabouts, self._ranks.greet = whereabouts, self._greet
        try:
            return self._make_rounds(joins=True)
        except Exception:
            logger.exception("this rank cannot go on in the place of a lost one")
            job.leave_job("it could not join")
            raise

    def _make_rounds(self, *, joins: bool = False) -> Rounds:
        _, rest = whole_model(self._replica, self._model, buffers=True)
        legacy = None if self._reserve is None else TrainingState(self.optimizer, rest)
        return Rounds(
            self._ranks, self._replica, self._options, self._metrics, self._poller,
            cpu_budget=self._pacing.cpu_budget, legacy=legacy, joins=joins,
        )  # fmt: skip

    def _begin_again(self, rounds: Rounds, comm: Communicator) -> None:
        rounds.begin(self._replica)
        self._recall(rounds, comm)

    def _make_driver(self, rounds: Rounds) -> Driver:
        if self._options.foreground:
            return Foreground(rounds, self._pacing, self._metrics)
        hogwild = self._apply == "hogwild"
        return ShadowThread(rounds, self._pacing, self._metrics, hogwild=hogwild, max_sync_gap=self._max_sync_gap)

    def _recall(self, rounds: Rounds, comm: Communicator) -> None:
        """Begin from the live weights and what was loaded (collective)."""
        loaded = comm.allgather_object(self._loaded is not None)
        if len(set(loaded)) > 1:
            raise ReplicaMismatchError(
                f"optimizer state with rounds in it was loaded on ranks {[r for r, has in enumerate(loaded) if has]} "
                "only; load it on every rank, or call broadcast_optimizer_state"
            )
        if self._loaded is not None:
            rounds.load_state(self._loaded)
        comm.allgather_object(None)

    def _take(self, rounds: dict[str, Any] | None) -> None:
        """Begin with what was loaded of rounds, at the first step; and count from there at once."""
        self._loaded = rounds or None
        if rounds and self._driver is None:
            self._metrics.restore(rounds["counters"])

    def _state(self) -> dict[str, Any]:
        if self._alone:  # what rounds remembered of the weights is void once they are trained alone
            counters = self._metrics.counters()
            of = self._options.algorithm.describe() if self._loaded is None else self._loaded["algorithm"]
            return {"algorithm": of, "state": {}, "counters": counters} if counters["steps"] else {}
        if self._driver is None:
            return self._loaded if self._loaded is not None else {}
        return self._driver.rounds.state_dict()

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
        if not self._ranks.comm.spans_processes:
            return
        if isinstance(self._stalled, CutOffError):
            job.leave_job("it is cut off from most of the others")
        if self._end_job or self._stalled is not None:
            job.end_job("synchronisation failed")


def _undisturbed(hook: Callable[..., None]) -> Callable[..., None]:
    """Return `hook` as a function that torch.compile calls and does not look into."""
    disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


def _everyones(value: Any) -> Errand:
    """Return an errand that gathers every rank's `value`."""
    return lambda comm: comm.allgather_object(value)


def _roll(comm: Communicator) -> tuple[Communicator, list[Person]]:
    """Return a communicator that outlasts lost ranks, and who its ranks are (collective)."""
    return comm.dup(linked=False), comm.allgather_object(Person.here(comm.members[comm.rank]))


def _survivors(comm: Communicator, on_change: Callable[[int, int, float], None], reserve: Reserve | None) -> Survivors:
    """Return the ranks of `comm` under the names that messages call them by (collective)."""
    ranks = Survivors(comm, on_change, reserve)
    if comm.outlives_ranks:
        ranks.hosts = dict(ranks.together(_everyones((comm.members[comm.rank], platform.node()))))
    return ranks


def _group_sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _open_handles(owner: threading.Thread | None = None) -> list[ShadowSync]:
    """Return the handles that work, in the order of their construction; of the thread `owner`, or of all."""
    handles = [each for reference in _OPEN.valuerefs() if (each := reference()) is not None]
    return sorted((each for each in handles if owner in (None, each._owner)), key=lambda each: each._number)


def close_all() -> None:
    """Close every handle of this process that is still open, in the order of their construction (collective)."""
    for handle in _open_handles():
        handle.close()
