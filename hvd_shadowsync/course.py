"""The course that the replicas take together: the same start on every rank, the warm-up, then rounds."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync import agree, arguments
from hvd_shadowsync.alike import values_everywhere, values_of, whole_model
from hvd_shadowsync.arguments import Settings
from hvd_shadowsync.average import mean_of
from hvd_shadowsync.ballot import Intent
from hvd_shadowsync.comm import job, mpi
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.comm.whereabouts import START, WARMUP
from hvd_shadowsync.embedding.sharded import join_all
from hvd_shadowsync.ending import note_training
from hvd_shadowsync.errors import ReplicaMismatchError, ShadowSyncError, StallError
from hvd_shadowsync.health import forget_bad_state
from hvd_shadowsync.legacy import TrainingState
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.names import name_tensors
from hvd_shadowsync.replica import Replica
from hvd_shadowsync.rounds import Errand, Rounds
from hvd_shadowsync.shadow import Driver, Foreground, ShadowThread
from hvd_shadowsync.warmup import Warmup
from hvd_shadowsync.watch import Watch, host_names

logger = logging.getLogger(__name__)

_OPEN: weakref.WeakValueDictionary[int, Course] = weakref.WeakValueDictionary()
_ORDINALS = itertools.count()


class Course:
    """One replica's way through a job, in step with the other ranks: an equal start, the warm-up, rounds.

    At world size 1 (`alone`) it counts steps and keeps what was loaded, and collective methods wait for nobody. All
    methods are for the training thread.

    Args:
        optimizer: with the parameters.
        model: for names, buffers and frozen parameters; or None.
        names: of parameters, in place of the model's; or None.
        settings: the same on every rank.
        communicator: over which ranks; None: all of MPI's.

    Attributes:
        ordinal: how many there were before this one, the same on every rank.
        alone: whether there are no other ranks, nor were any.
        ranks: those that take part.
        shard, num_shards: this rank's number and how many there were when the job began.
        replica, metrics, warmup, watch: what is synchronised; what is counted; averaged gradients; who is missing.

    Raises:
        ReplicaMismatchError: replicas, settings or initial weights differ; raised on every rank.
        TransportError: no usable MPI.
        TypeError, ValueError: tensors that cannot be synchronised; settings that do not go with the communicator.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | None,
        names: Mapping[str, Tensor] | None,
        settings: Settings,
        communicator: Communicator | None,
    ) -> None:
        self._optimizer, self._model, self._names, self.settings = optimizer, model, names, settings
        self.ordinal, self._owner = next(_ORDINALS), threading.current_thread()
        self.metrics = RoundMetrics()
        self.driver: Driver | None = None
        """Runs the rounds, once they have begun."""
        self.stalled: StallError | None = None
        """Why this rank waits for others no longer."""
        self._ending: Callable[..., None] | None = None
        self._loaded: dict[str, Any] | None = None
        self._paused = self._started = False
        self._poller = Poller()
        comm = mpi.world() if communicator is None else communicator.dup()
        self._reserve = comm.reserve(self.ordinal) if comm.size > 1 else None
        self.ranks = Survivors(comm, self.metrics.note_lost, self._reserve)
        if comm.outlives_ranks:
            self.ranks.hosts = self.ranks.together(host_names)
        self.shard, self.num_shards = (comm.rank, comm.size) if self._reserve is None else self._reserve.shard
        self.watch = Watch(settings.stalls, self.metrics, _weakly(self._fail))
        self._greet_who_joins(self.ranks)
        self.alone = self.ranks.comm.size == 1 and not self.is_new
        arguments.check_dropping(settings.stalls, self.ranks.comm)
        warmup_steps = 0 if self.is_new else settings.warmup_steps
        self.warmup = Warmup(self.ranks, self._poller, warmup_steps, sparse_as_dense=settings.sparse_as_dense)
        self._groups = _group_sizes(optimizer)
        self.replica = self._make_replica()
        if not self.alone:
            self._begin_alike()
        _OPEN[self.ordinal] = self

    @property
    def is_new(self) -> bool:
        """Whether this rank takes the place of a lost one; until its first step it does what it does for itself."""
        return self._reserve is not None and self._reserve.is_new

    @property
    def lasting_name(self) -> str | None:
        """A name for these ranks, the same for those that join later; None where none can."""
        return None if self._reserve is None else self._reserve.name

    # --- steps --------------------------------------------------------------------------------------------------------

    def step_begins(self, *, average: bool) -> None:
        """Get ready for a step; `average` gradients, in the warm-up (collective until rounds have begun)."""
        self._notice_new_parameters()
        self._get_ready(needed=True)
        note_training()
        if average:
            with self.ranks.whereabouts.waiting(WARMUP):
                self.warmup.average(self.replica.params)

    def step_ends(self) -> None:
        """Count a step; merge, or begin rounds where the warm-up is over (then collective)."""
        self._notice_new_parameters()
        if self.driver is not None:
            self.driver.step_taken()
            return
        self.metrics.steps += 1
        if not self.warmup.left:
            self._begun()

    def _notice_new_parameters(self) -> None:
        """Look for parameters that were added to the optimizer."""
        if self._groups != (sizes := _group_sizes(self._optimizer)):
            self._groups = sizes
            self.replica = self._make_replica()
            if self.driver is not None:
                self.driver.rounds.wanted_replica = self.replica

    # --- pauses and ends ----------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Begin no more rounds on this rank."""
        self._paused = True
        if self.driver is not None:
            self.driver.pause()

    def resume(self) -> None:
        """Begin rounds again."""
        self._paused = False
        if self.driver is not None:
            self.driver.resume()

    @property
    def has_ending(self) -> bool:
        """Whether `end_with` was given something to call."""
        return self._ending is not None

    def end_with(self, ending: Callable[..., None] | None) -> None:
        """Have `ending` called now and then where this thread waits, in any course; it may raise, and end the wait."""
        self._ending = ending

    def leave(self, error: BaseException) -> None:
        """Let the others train on after `error`, without waiting for them."""
        if self.driver is not None:
            if self._ending is not None:
                self._ending(error)
            self.driver.leave(wait=False)

    def _look_for_the_end(self) -> None:
        """Let this thread end, if it was told to: by whoever listens, whichever course it waits in."""
        for course in _open_courses(self._owner):
            if course._ending is not None:
                course._ending()

    def close(self) -> None:
        """Take part until all ranks are here, and give back what there is (collective)."""
        if not self.alone:
            self._finish_warmup(Intent.LEAVE)
            driver = self._begun()
            driver.leave()
            driver.rounds.free()
        self.watch.close()
        self.ranks.free()

    def stop(self) -> None:
        """Take no further part, however it ended (local)."""
        _OPEN.pop(self.ordinal, None)
        self.watch.stop()

    # --- calls that ranks make together -------------------------------------------------------------------------------

    def synchronize(self, before: Callable[[], None] = lambda: None) -> None:
        """Make all replicas the same; `before` is called right before this one changes (collective)."""
        if self.alone:
            return
        self._require_own_parameters()
        self._finish_warmup(Intent.CONSOLIDATE)
        if self.warmup.left:
            before()
            self._start_alike()
        else:
            self._begun().synchronize(before)

    def end(self) -> tuple[int, ...]:
        """Make all replicas the same for the last time; return the numbers of who was there (collective)."""
        if not self.alone:
            self._finish_warmup(Intent.END)
            if not self.warmup.left:
                return self._begun().end()
            self._start_alike()
        return tuple(self.ranks.comm.members)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Make all replicas the same for the block, then give those that count their own back (collective).

        One that does not has nothing that is not in the others: it stays as it is in the block. So what comes next, be
        it a round or a consolidation, is of what the block saw.
        """
        if self.alone:
            yield
            return
        own: list[tuple[Tensor, Tensor]] = []
        self.synchronize(lambda: own.extend(values_of([self.replica])))
        replica = self.replica
        try:
            yield
        finally:
            if self.driver is None or self.driver.counted:
                replica.write(*own[-1])
            if self.driver is not None:
                self.driver.rounds.owes = self.driver.counted

    def settle(self) -> None:
        """Consolidate if rounds have begun (collective)."""
        if not self.alone:
            self.meet()  # a rank that has not come to its first step begins with those that have
            if self.driver is not None:
                self.driver.synchronize()

    def meet(self, errand: Errand | None = None) -> Any:
        """Run `errand` once all ranks are in a call such as this one; take part in what they do before (collective)."""
        join_all(self._owner)
        self._notice_new_parameters()
        self._get_ready(needed=False)
        if self._started:
            self.warmup.finish(self.replica.params, Intent.MEET, self._look_for_the_end)
            if not self.warmup.left:
                return self._begun().meet(errand)
        return None if errand is None else self._collectively(errand)

    def exchange(self, call: str, value: Any) -> list[Any]:
        """Return every rank's `value` in the same call (collective).

        Raises:
            ShadowSyncError: the ranks are in different calls; raised on every rank.
        """
        if self.alone:
            return [value]
        calls, values = zip(*self.meet(_everyones((call, value))), strict=True)
        if len(set(calls)) > 1:
            where = ", ".join(f"rank {rank} in {each}" for rank, each in enumerate(calls))
            raise ShadowSyncError(f"the ranks meet in different calls: {where}; make them everywhere in the same order")
        return list(values)

    def mean(self, flat: Tensor) -> Tensor:
        """Return the mean of a float32 vector over the ranks (collective)."""
        mean: Tensor = self.meet(lambda comm: mean_of(comm, self._poller, flat, (1.0,) * comm.size))
        return mean

    # --- what rounds remember -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what rounds remember, or would if they had begun."""
        if self.driver is not None:
            return self.driver.rounds.state_dict()
        counters, loaded = self.metrics.counters(), self._loaded
        if loaded is None:
            of = self.settings.options.algorithm.describe()
            return {"algorithm": of, "state": {}, "counters": counters} if counters["steps"] else {}
        if self.alone:  # what rounds remembered of the weights is void once they are trained alone
            loaded = {**loaded, "state": {}}
        return {**loaded, "counters": counters}

    def take(self, state: dict[str, Any] | None) -> None:
        """Begin with `state` of rounds, or none, at the first step; and count from there at once (local)."""
        self._loaded = state or None
        if state and self.driver is None:
            self.metrics.restore(state["counters"])

    def begin_again(self, state: dict[str, Any] | None) -> None:
        """Go on from the live weights, which were loaded, and `state` of rounds, or none (collective)."""
        if self.alone:
            self.take(state)
            return
        loaded = self.replica.empty()
        self.replica.read(loaded)
        self.settle()
        self.replica.write(loaded)
        self.take(state)
        self._start()
        if self.driver is not None:
            self.driver.meet(partial(self._rounds_again, self.driver.rounds))
            self._loaded = None
            self.driver.restart()

    def _rounds_again(self, rounds: Rounds, comm: Communicator) -> None:
        rounds.begin(self.replica)
        self._recall(rounds, comm)

    def _recall(self, rounds: Rounds, comm: Communicator) -> None:
        """Begin from the live weights and what was loaded (collective)."""
        loaded = comm.allgather_object(self._loaded is not None)
        if len(set(loaded)) > 1:
            raise ReplicaMismatchError(
                f"optimizer state with rounds in it was loaded on ranks {[r for r, has in enumerate(loaded) if has]} "
                "only; load it on every rank, or call broadcast_optimizer_state"
            )
        if self._loaded is not None:  # and the warm-up has gone on counting from there
            counters = self.metrics.counters() if self.driver is None else self._loaded["counters"]
            rounds.load_state({**self._loaded, "counters": counters})
        comm.allgather_object(None)

    # --- the start ----------------------------------------------------------------------------------------------------

    def _make_replica(self) -> Replica:
        params, buffers = name_tensors(self._optimizer, self._model, self._names)
        return Replica(params, buffers if self.settings.sync_buffers else [])

    def _begin_alike(self) -> None:
        """Begin to look who is missing, then require the same of all ranks and give them the same weights (collective).

        Once more at the first step, for what is loaded in between.
        """
        if not self.is_new:
            self.watch.begin(self.ranks)
        try:
            self._require_same()
            self._start()
        except BaseException:
            self.watch.stop()
            raise
        self._started = False

    def _require_same(self) -> None:
        tensors = self.replica.tensors + self.replica.integers
        lines = agree.describe_settings(vars(self.settings)) + agree.describe_tensors(tensors)
        lines += agree.describe_optimizer(self._optimizer)
        self._collectively(lambda comm: agree.require_same(comm, lines))

    def _require_own_parameters(self) -> None:
        """Raise where parameters were replaced (not added), which no step looks for."""
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        known = self.replica.params
        replaced = [each.name for each, param in zip(known, params, strict=False) if each.tensor is not param]
        if len(params) == len(known) and replaced:
            raise ShadowSyncError(
                f"the optimizer has another parameter in place of {replaced[0]} ({len(replaced)} of {len(known)} were "
                "replaced), which is not synchronised; close() the handle and make a new one after such a change"
            )

    def _get_ready(self, *, needed: bool) -> None:
        """Start all courses of this thread, in order, where a rank needs it: it trains, or waits for those that do.

        Together, because a rank without data goes to its first call in one of them while the others start them all.
        Weights may be loaded until then. Buffers are left alone: by then the first batch has gone into the batch-norm
        statistics of each rank. Collective at the first calls.
        """
        if self.driver is not None:
            return
        for course in _open_courses(self._owner):
            if not (course.alone or course._started) and any(course._collectively(_everyones(needed))):
                course._start(buffers=False)
            if course._started and not course.warmup.left:
                course._begun()

    def _start(self, *, buffers: bool = True) -> None:
        """Begin with the weights of rank 0 everywhere, or check that they are the same (collective)."""
        self._started = True
        if self.settings.initial_weights == "check":
            for replica in whole_model(self.replica, self._model, buffers=buffers):
                lines = agree.describe_values(replica.tensors)
                self._collectively(partial(agree.require_same, lines=lines))
        else:
            self._start_alike(buffers=buffers)

    def _start_alike(self, *, buffers: bool = True) -> None:
        """Give every rank the weights of one that has trained in the warm-up, or of rank 0 (collective)."""
        everything = whole_model(self.replica, self._model, buffers=buffers)
        own = values_of(everything)
        given = self._collectively(lambda comm: values_everywhere(comm, self._poller, own, root=self._first(comm)))
        for replica, values in zip(everything, given, strict=True):
            replica.write(*values)

    def _first(self, comm: Communicator) -> int:
        return next((rank for rank, member in enumerate(comm.members) if member in self.warmup.trained), 0)

    def _collectively(self, errand: Errand) -> Any:
        """Return what `errand` returns, which all ranks run now, each in the same call (collective)."""
        if self.driver is not None:
            return self.driver.meet(errand)
        with self.ranks.whereabouts.waiting(START):
            return self.ranks.together(errand)

    def _finish_warmup(self, intent: Intent) -> None:
        join_all(self._owner)
        self._notice_new_parameters()
        self._get_ready(needed=True)
        ending = self._look_for_the_end if intent is Intent.CONSOLIDATE else None
        self.warmup.finish(self.replica.params, intent, ending)

    # --- rounds -------------------------------------------------------------------------------------------------------

    def _begun(self) -> Driver:
        """Return the driver, made where the warm-up is over (collective at its first call)."""
        if self.driver is None:
            if self.warmup.steps:
                self._start_alike()
            with self.ranks.whereabouts.waiting(START):
                rounds = self._join() if self.is_new else self.ranks.together(self._begin)
            self._loaded = None
            self.driver = self._make_driver(rounds)
            self.driver.ending = self._look_for_the_end
            self.driver.mend = partial(forget_bad_state, self._optimizer)
            if self.stalled is not None:
                self.driver.fail(self.stalled)
            job.spare_others_on_exception()
            if self._paused:
                self.driver.pause()
        return self.driver

    def _begin(self, comm: Communicator) -> Rounds:
        rounds = self._make_rounds()
        self._recall(rounds, comm)
        return rounds

    def _join(self) -> Rounds:
        """Wait for the others to take this rank in, in the place of a lost one, and go on as they do."""
        assert self._reserve is not None, "it is new"
        whereabouts, everyone = self.ranks.whereabouts, range(self.num_shards)
        self.ranks = Survivors(self._reserve.join(), self.metrics.note_lost, self._reserve, everyone)
        self.ranks.whereabouts = whereabouts
        self._greet_who_joins(self.ranks)
        try:
            return self._make_rounds(joins=True)
        except Exception:
            logger.exception("this rank cannot go on in the place of a lost one")
            job.leave_job("it could not join")
            raise

    def _fail(self, error: StallError) -> None:
        """Raise `error` in the training thread, as soon as it looks; any thread may call this."""
        self.stalled = error
        if self.driver is not None:
            self.driver.fail(error)

    def _greet_who_joins(self, ranks: Survivors) -> None:
        """Have ranks that join `ranks` taken note of."""
        if self._reserve is not None:
            ranks.greet = partial(self.watch.greet, ranks)

    def _make_rounds(self, *, joins: bool = False) -> Rounds:
        _, rest = whole_model(self.replica, self._model, buffers=True)
        legacy = None if self._reserve is None else TrainingState(self._optimizer, rest)
        return Rounds(
            self.ranks, self.replica, self.settings.options, self.metrics, self._poller,
            cpu_budget=self.settings.pacing.cpu_budget, legacy=legacy, joins=joins,
        )  # fmt: skip

    def _make_driver(self, rounds: Rounds) -> Driver:
        settings = self.settings
        if settings.options.foreground:
            return Foreground(rounds, settings.pacing, self.metrics)
        hogwild = settings.apply == "hogwild"
        return ShadowThread(
            rounds, settings.pacing, self.metrics, hogwild=hogwild, max_sync_gap=settings.max_sync_gap
        )  # fmt: skip


def _everyones(value: Any) -> Errand:
    """Return an errand that gathers every rank's `value`."""
    return lambda comm: comm.allgather_object(value)


def _group_sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _open_courses(owner: threading.Thread) -> list[Course]:
    """Return the courses that the thread `owner` takes, in the order of their construction."""
    courses = [each for reference in _OPEN.valuerefs() if (each := reference()) is not None]
    return sorted((each for each in courses if each._owner is owner), key=lambda each: each.ordinal)


def _weakly(method: Callable[[StallError], None]) -> Callable[[StallError], None]:
    """Return `method` as a function that does not keep its object."""
    reference = weakref.WeakMethod(method)

    def call(error: StallError) -> None:
        if (found := reference()) is not None:
            found(error)

    return call
