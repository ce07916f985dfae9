"""The synchronisation round: vote, then snapshot, reduce, update, merge."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_shadowsync import ballot
from hvd_shadowsync.algorithms import ElasticAveraging
from hvd_shadowsync.algorithms.base import State, named, slices
from hvd_shadowsync.alike import bytes_everywhere
from hvd_shadowsync.ballot import Ballot, Intent, Verdict
from hvd_shadowsync.captured import Capture
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.comm.whereabouts import ROUND, VOTE, Whereabouts
from hvd_shadowsync.errors import RankLostError, ReplicaMismatchError, ShadowSyncError
from hvd_shadowsync.finite import all_finite
from hvd_shadowsync.health import Health
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.reducers import ElasticCenter, ElasticInTurn, OwnerMean, Reducer, gather_center
from hvd_shadowsync.reducers.base import Fill, as_it_is
from hvd_shadowsync.reduction import Reduction, RoundOptions
from hvd_shadowsync.replica import Merge, Replica
from hvd_shadowsync.staged import Stage, Staged

logger = logging.getLogger(__name__)

SETTLED = 0.01
ADMITTING = (Intent.TRAIN, Intent.MEET, Intent.CONSOLIDATE)
MISMATCH_TIMEOUT_S = 30.0
SAMPLE = 256
STATE_CHUNK = 1 << 18
VOTING = Poller(spin_s=0.0, growth=1.1)  # the others may be far from their votes


Errand = Callable[[Communicator], Any]
"""What all ranks do together in a collective call; once more, on those that are left, where a rank is lost in it."""


class Legacy(Protocol):
    """What a rank that takes a lost one's place gets besides the weights and what rounds remember of them."""

    def give(self) -> bytes:
        """Return what this rank has, while its training thread goes on; on the thread that makes rounds."""

    def take(self, given: bytes) -> None:
        """Have what another rank gave; on the training thread."""


@dataclass(frozen=True)
class Met:
    """What came of an errand."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        """Return the errand's result, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.value


class Rounds:
    """Makes rounds for one replica, on whichever thread calls `run`; one thread at a time.

    Owns the snapshot buffer, the algorithm's state and the reducers; `lock` is held while they change.

    Args:
        ranks: who takes part; used by these rounds alone while they are made, and freed by the caller.
        replica: what is synchronised.
        options: how.
        metrics: where it is counted.
        poller: how to wait.
        cpu_budget: share of a core by which rounds are paced, None where they are not: the search for the best way to
            send reckons with it.
        legacy: what a rank that takes a lost one's place gets besides.
        joins: whether this is such a rank, which the others have just taken in: its weights become theirs.
    """

    def __init__(
        self,
        ranks: Survivors,
        replica: Replica,
        options: RoundOptions,
        metrics: RoundMetrics,
        poller: Poller,
        *,
        cpu_budget: float | None = None,
        legacy: Legacy | None = None,
        joins: bool = False,
    ) -> None:
        self._legacy = legacy
        self._ranks, self._poller, self._options, self._metrics = ranks, poller, options, metrics
        self._cpu_budget = cpu_budget
        self._health = Health(ranks.comm.members[ranks.comm.rank], ranks.comm.size, metrics, options.max_distance)
        self._last_cost_s: float | None = None
        self._idle_rounds = 0
        self._others_progress = True
        self._steps = 0
        self._consolidated_at = -1
        self.owes = False
        """Whether the last result that counted this replica was not kept: it counts again, without another step."""
        self._intent = Intent.TRAIN
        self._called_at = metrics.steps
        self.joins = joins
        """Whether this rank has taken a lost one's place: its first step is the others' last one."""
        self._mismatch_since: float | None = None
        self._wanted: Capture | None = None
        self.lock = threading.Lock()
        self.most_spent_s = 0.0
        """CPU seconds of the rank that had spent most by this round's vote; 0 without a vote."""
        self.replica = self.wanted_replica = replica
        if joins:
            self._owners: tuple[int, ...] = ()
            self._reducer: Reducer = OwnerMean(ranks.comm, poller)
            with self.lock:
                ranks.join(self._reform)
                replica.write(self._snapshot, self._integers)
                self._health.note_good(self._metrics.steps)
            return
        self._reduction = Reduction(ranks.comm, replica, options, metrics, poller)
        self._mean = OwnerMean(ranks.comm, poller)
        self.begin(replica)

    # --- what the rounds start from ---------------------------------------------------------------------------------

    def begin(self, replica: Replica) -> None:
        """Start anew from the live weights of `replica`, which are the same on every rank (collective).

        Its buffers may differ already; rank 0's are what all ranks reckon from. No result is waiting to be merged.

        Raises:
            ShadowSyncError: the weights have NaN or infinity; raised on every rank.
        """
        with self.lock:
            self.replica = self.wanted_replica = replica
            self._allocate()
            replica.snapshot(self._snapshot)
            self._poller.wait([self._comm.ibcast(self._snapshot)])
            if self._health.examine(replica, self._snapshot, self._metrics.steps, slice(0, replica.num_weights)):
                raise self._health.nobody_is_left()
            self._health.note_good(self._metrics.steps)
            self._set_anchor(self._snapshot)

    def _allocate(self) -> None:
        self._snapshot: Tensor = self._reduction.snapshot_of(self.replica)
        self._integers: Tensor = self.replica.empty_integers()

    def _set_anchor(self, anchor: Tensor) -> None:
        self._state = self._options.algorithm.init(anchor[: self.replica.num_weights])
        self._begin_reductions(anchor)

    def _begin_reductions(self, anchor: Tensor) -> None:
        self._reducer = self._reduction.begin(anchor)
        self._owners = self._comm.members

    def free(self) -> None:
        """Give memory and communicators back, but for `ranks` (collective)."""
        self._snapshot = torch.empty(0, dtype=self.replica.dtype)
        self._reducer = self._mean
        self._reduction.free()

    @property
    def _comm(self) -> Communicator:
        return self._ranks.comm

    @property
    def whereabouts(self) -> Whereabouts:
        """What this rank waits in for the others."""
        return self._ranks.whereabouts

    # --- lost ranks -------------------------------------------------------------------------------------------------

    @property
    def outlives_ranks(self) -> bool:
        """Whether rounds go on when a rank is lost, with `go_on`."""
        return self._comm.outlives_ranks

    def check(self) -> None:
        """Raise `RankLostError` if a rank is lost, or comes back; for whoever waits between rounds."""
        self._comm.check()
        self._ranks.admits = self._admits
        self._ranks.call_back()

    @property
    def _admits(self) -> bool:
        """Whether a lost rank can be replaced now, such that it makes the next collective call with the others.

        After its first step it has as many as this rank has. So there was to be no call since this rank's last step: it
        would make that again, or, with a step more, miss what this rank calls before its next one.
        """
        return self._intent in ADMITTING and self._called_at < self._metrics.steps

    def go_on(self, lost: RankLostError) -> None:
        """Go on with the ranks that are left, and with who takes the place of lost ones (collective over all of them).

        No result is waiting to be merged.

        What rounds remember is made anew: the replicas' mean is the anchor, momentum is that of the first rank that is
        left, and so are the shards of an elastic center, but for lost ones. Live weights stay as they are.

        Raises:
            RankLostError: `lost`, where the job does not outlive its ranks.
        """
        if not self.outlives_ranks:
            raise lost
        with self.lock:
            self._ranks.admits = self._admits
            self._ranks.go_on(self._reform)
            self._idle_rounds, self._last_cost_s, self._mismatch_since, self._consolidated_at = 0, None, None, -1

    def _reform(self, comm: Communicator) -> None:
        self._reduction = Reduction(comm, self.replica, self._options, self._metrics, self._poller)
        self._mean = OwnerMean(comm, self._poller)
        self._allocate()
        self._take_snapshot()
        if self._is_new:
            self._state = self._options.algorithm.init(self._snapshot[: self.replica.num_weights])
        self._average(self._only_good((1.0,) * comm.size))
        self._poller.wait([comm.ibcast(tensor) for _, tensor in named(self._state)])
        self._rebase_state(self._snapshot)
        owners = self._pass_on(comm)
        if isinstance(self._options.algorithm, ElasticAveraging):
            elastic = None if self._is_new else self._reducer
            center = elastic.center if isinstance(elastic, ElasticCenter | ElasticInTurn) else None
            gather_center(center, owners, comm, self._poller, self._snapshot)
        self._begin_reductions(self._snapshot)

    @property
    def _is_new(self) -> bool:
        return self._comm.members[self._comm.rank] in self._ranks.new

    def _pass_on(self, comm: Communicator) -> tuple[int, ...]:
        """Give ranks that have just joined what the first one has; return whose the shards of the center are."""
        if self._ranks.reserve is None:
            return self._owners
        everyones = comm.allgather_object((self._ranks.new, self._owners, self._metrics.counters(), self._fit()))
        new, (_, owners, counters, fit) = set[int]().union(*(each[0] for each in everyones)), everyones[0]
        if new and self._legacy is not None:
            given = bytes_everywhere(comm, self._poller, self._legacy.give() if comm.rank == 0 else b"")
            if self._is_new:
                if fit != self._fit():
                    raise ReplicaMismatchError(
                        "this rank, in the place of a lost one, has other parameters than the others; build the same "
                        "model and optimizer on every rank"
                    )
                self._called_at = counters["steps"] - 1
                self._metrics.restore({**counters, "steps": self._called_at})  # and its first step is to come
                self._legacy.take(given)
        return tuple(-1 if each in new else each for each in owners)

    def _fit(self) -> int:
        return self.replica.fingerprint

    # --- a round ----------------------------------------------------------------------------------------------------

    def run(
        self, intent: Intent, new_steps: int, spent_s: float = 0.0, errand: Errand | None = None
    ) -> Staged | Met | Verdict:
        """Take part in the next round; return its result, or the verdict if there is nothing to merge.

        Args:
            intent: what the training thread is about.
            new_steps: training steps since the last round's snapshot.
            spent_s: CPU seconds that this rank has spent on synchronisation since the last call.
            errand: what to do once all ranks vote `Intent.MEET`; its result is returned then.

        Raises:
            RankLostError: a rank is lost; what has a result has it on all that are left. `go_on` comes next.
            ShadowSyncError: all replicas have NaN or infinity; raised on every rank.
        """
        self._idle_rounds = 0 if new_steps or self.owes or intent is Intent.TRAIN else self._idle_rounds + 1
        self._intent = intent
        self._ranks.admits = self._admits
        self._ranks.call_back()
        if self._meets(intent):
            spent_us, cost_us = round(1e6 * spent_s), round(1e6 * (self._last_cost_s or 0.0))
            own = Ballot(
                intent, self._counts(), self.wanted_replica.fingerprint, spent_us, cost_us, self._is_out_of_patience(),
                self._bad_in_a_row(),
            )  # fmt: skip
            count = self._vote(own)
            if count.all_bad:
                raise self._health.nobody_is_left()
            verdict, weights, self._others_progress = count.verdict, count.weights, count.any_progress
            if self._last_cost_s is not None:
                self._reduction.observe(count.most_cost_us)
            self._last_cost_s = None
            self._watch_mismatch(count)
            self.most_spent_s = count.most_spent_us / 1e6
            if verdict is Verdict.CONFLICT:
                raise ShadowSyncError(ballot.conflict(count.intents))
        else:
            verdict, weights = Verdict.ROUND, (1.0,) * self._comm.size
            self._others_progress = True  # or the center's owners will know
            self.most_spent_s = 0.0
        if verdict is Verdict.MEET:
            met = self._ranks.agreed(partial(_run_errand, errand))
            self._called_at = self._metrics.steps
            return met
        if verdict is Verdict.STOP:
            return self._ranks.agreed(lambda _: verdict)
        with self.lock:
            if verdict is Verdict.ROUND:
                with self.whereabouts.waiting(ROUND):
                    return self._round(weights)
            if verdict is Verdict.CONSOLIDATE:
                consolidated = self._ranks.agreed(lambda _: self._consolidate(weights))
                self._called_at = self._metrics.steps
                return consolidated
            return self._regroup_or_not() if verdict is Verdict.REGROUP else verdict

    def serve(self) -> bool:
        """Answer other ranks' requests; tell whether there were any. To be called all the time if `serves`."""
        if not isinstance(self._reducer, ElasticCenter):
            return False
        answered = self._reducer.serve()
        if self._reducer.is_hopeless:
            raise self._health.nobody_is_left()
        return answered

    @property
    def serves(self) -> bool:
        """Whether other ranks' requests have to be answered between rounds."""
        return isinstance(self._reducer, ElasticCenter)

    def _meets(self, intent: Intent) -> bool:
        return not self.serves or intent is not Intent.TRAIN or self.wanted_replica is not self.replica

    def _cost_s(self, took_s: float, spent_s: float) -> float:
        """Return how long after a round began the next could, by what it took and by what it spent."""
        return max(took_s, spent_s / self._cpu_budget if self._cpu_budget is not None else 0.0)

    def _counts(self) -> bool:
        """A waiting rank counts until what it contributed has settled in the others' weights."""
        alpha = self._options.algorithm.alpha
        rounds = 1 if alpha == 1 else math.ceil(math.log(SETTLED) / math.log(1 - alpha))
        return self._idle_rounds < rounds

    def _vote(self, own: Ballot) -> ballot.Count:
        votes = torch.empty(self._comm.size, ballot.NUM_FIELDS, dtype=torch.int64)
        with self.whereabouts.waiting(VOTE):
            VOTING.wait([self._comm.iallgather(own.encode(), votes)], meanwhile=self.serve if self.serves else None)
        return ballot.count(votes, self.replica.fingerprint)

    def _bad_in_a_row(self) -> int:
        """Return how often the replica has had bad numbers, as far as is known; one that often has is looked at."""
        if self._health.is_watched:
            with self.lock:
                steps = self._metrics.steps
                self.replica.snapshot(self._snapshot)
                self._health.examine(self.replica, self._snapshot, steps)
        return self._health.bad_in_a_row

    def _round(self, weights: tuple[float, ...]) -> Staged:
        begun, spent, sent = time.monotonic(), time.thread_time(), self._reducer.bytes_sent
        fill = self._begin_snapshot()
        self._metrics.settle()  # a snapshot from a GPU has waited for the last merge by now
        if isinstance(self._options.algorithm, ElasticAveraging) and self._examine_snapshot():
            self._snapshot.fill_(math.nan)  # which is answered with the center, and does not move it
        stage = Stage(self.replica, self._snapshot, self._how(), self._options.algorithm.alpha, self._suspect)
        sample: Tensor | None = None
        copy = self._begin_capture()
        for part, reduced in self._reducer.reduce(self._snapshot, weights, fill):
            self.whereabouts.get_on()
            if part.start == 0:
                sample = self._snapshot[: min(SAMPLE, part.stop)].clone()
            for piece, values in self._weights_and_buffers(part, reduced):
                anchor = self._update(piece, values)
                if anchor is None:
                    stage.leave_alone(piece)
                    continue
                if copy is not None:
                    copy.add(piece, anchor)
                stage.add(piece, anchor)
        self._finish_capture(copy if stage.is_whole else None)
        staged = self._staged(stage.how, Verdict.ROUND, None if stage.how is Merge.ASSIGN else sample)
        staged.still = frozenset(stage.still)
        staged.heals = self._settle_health(stage, counted=weights[self._comm.rank] > 0)
        self.owes = False
        took_s = time.monotonic() - begun
        self._last_cost_s = self._cost_s(took_s, time.thread_time() - spent)
        with self._metrics.lock:
            self._metrics.in_flight_s += took_s
            self._metrics.bytes_sent += self._reducer.bytes_sent - sent
            self._metrics.distance = stage.distance()
        self._health.watch_distance(self._metrics.distance, self._steps)
        return staged

    def _how(self) -> Merge:
        """Return how this round is merged: by its rule, or in place of a replica that has bad numbers."""
        if self._health.bad is not None:
            return Merge.ASSIGN
        return Merge.ADD if self._options.merge == "delta" else Merge.PULL

    def _settle_health(self, stage: Stage, *, counted: bool) -> bool:
        """Take note of how the replica was in this round; tell whether its result heals it."""
        if isinstance(self._reducer, ElasticCenter) and self._reducer.is_hopeless:
            raise self._health.nobody_is_left()
        if stage.how is Merge.ASSIGN and stage.is_whole:
            self._health.note_healed(others_progress=self._others_progress)
            return True
        if self._health.bad is None and counted:
            self._health.note_good(self._steps)
        return False

    def _suspect(self, part: slice) -> None:
        self._health.examine(self.replica, self._snapshot, self._steps, part)

    def _examine_snapshot(self) -> bool:
        return self._health.examine(self.replica, self._snapshot, self._steps)

    def _only_good(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Return `weights` without the ranks whose snapshots, just taken, have bad numbers (collective).

        Raises:
            ShadowSyncError: all have; raised on every rank.
        """
        bad = torch.empty(self._comm.size, dtype=torch.int64)
        own = torch.tensor([self._is_new or self._examine_snapshot()], dtype=torch.int64)
        self._poller.wait([self._comm.iallgather(own, bad)])
        if bool(bad.all()):
            raise self._health.nobody_is_left()
        return ballot.weights_of(weights, bad.tolist())

    def _begin_snapshot(self) -> Fill:
        """Take the snapshot, or leave it to the reducer to take each slice just before it is on the wire."""
        if not self._reducer.sliced or self.replica.gpus:
            self._take_snapshot()
            return as_it_is
        self._steps = self._metrics.steps
        self._take_integers()
        return partial(self.replica.snapshot_part, self._snapshot)

    def _take_snapshot(self) -> None:
        self._steps = self._metrics.steps
        self.replica.snapshot(self._snapshot)
        self._take_integers()

    def _take_integers(self) -> None:
        self.replica.snapshot_integers(self._integers)
        if self._integers.numel() and not (self._options.algorithm.asynchronous and not self._options.foreground):
            self._poller.wait([self._comm.ibcast(self._integers)])

    def _weights_and_buffers(self, part: slice, values: Tensor) -> list[tuple[slice, Tensor]]:
        border = min(max(self.replica.num_weights, part.start), part.stop)
        pieces = [slice(part.start, border), slice(border, part.stop)]
        return [(p, values[p.start - part.start : p.stop - part.start]) for p in pieces if p.stop > p.start]

    def _update(self, piece: slice, reduced: Tensor) -> Tensor | None:
        """Return the anchor; None for weights that have none, because a replica had bad numbers there."""
        if piece.start >= self.replica.num_weights:
            return reduced
        anchor, state = self._options.algorithm.update(reduced, slices(self._state, piece))
        if not all_finite(anchor):
            return None
        self._keep(piece, state)
        return anchor

    def _keep(self, piece: slice, state: State) -> None:
        for target, value in zip(slices(self._state, piece), state, strict=True):
            target.copy_(value)

    def _weight_parts(self) -> Iterator[slice]:
        for start in range(0, self.replica.num_weights, STATE_CHUNK):
            yield slice(start, min(start + STATE_CHUNK, self.replica.num_weights))

    def _consolidate(self, weights: tuple[float, ...]) -> Staged:
        self._take_snapshot()
        weights = self._only_good(weights)
        self._average(weights)
        self._rebase_state(self._snapshot)
        self._reducer.rebase(self._snapshot)
        self._consolidated_at = self._steps
        if (copy := self._begin_capture()) is not None:
            copy.add(slice(0, self._snapshot.numel()), self._snapshot)
            self._finish_capture(copy)
        staged = self._staged(Merge.ASSIGN, Verdict.CONSOLIDATE, None)
        staged.members = tuple(self._comm.members)
        staged.counts, self.owes = weights[self._comm.rank] > 0, False
        if self._health.bad is not None:
            self._health.note_healed(others_progress=False)  # nobody trains
            staged.heals = True
        return staged

    def _rebase_state(self, mean: Tensor) -> None:
        for part in self._weight_parts():
            self._keep(part, self._options.algorithm.rebase(mean[part], slices(self._state, part)))

    def _average(self, weights: tuple[float, ...]) -> None:
        sent = self._mean.bytes_sent
        for part, mean in self._mean.reduce(self._snapshot, weights):
            self.whereabouts.get_on()
            self._snapshot[part].copy_(mean)
        self._mean.forget()
        if self._integers.numel():
            self._poller.wait([self._comm.ibcast(self._integers)])
        with self._metrics.lock:
            self._metrics.bytes_sent += self._mean.bytes_sent - sent

    def _staged(self, how: Merge, verdict: Verdict, sample: Tensor | None) -> Staged:
        alpha, integers = self._options.algorithm.alpha, self._integers_from(verdict)
        self.replica.upload(self._snapshot, integers)
        return Staged(self.replica, self._snapshot, integers, how, alpha, verdict, self._steps, sample)

    def _integers_from(self, verdict: Verdict) -> Tensor | None:
        """Return what integer buffers are set to; None where they are this rank's own, and have gone on meanwhile."""
        owned = self._comm.rank == 0 and verdict is not Verdict.CONSOLIDATE
        return None if owned or (self.serves and verdict is Verdict.ROUND) else self._integers

    # --- parameters that were added later ---------------------------------------------------------------------------

    def _regroup_or_not(self) -> Staged:
        """Make a new layout on all ranks, or on none of them."""
        before = (self.replica, self._snapshot, self._integers, self._state, self._reducer)
        try:
            return self._ranks.agreed(lambda _: self._regroup())
        except RankLostError:
            self.replica, self._snapshot, self._integers, self._state, self._reducer = before
            raise

    def _regroup(self) -> Staged:
        """Lay out the vectors for `wanted_replica`: known weights keep their state, new ones start from rank 0's."""
        known = {each.name for each in self.replica.tensors}
        memory = {name: self.replica.by_name(tensor) for name, tensor in named(self._state)}
        self.replica = self.wanted_replica
        self._allocate()
        self._take_snapshot()
        weights = self._only_good((1.0,) * self._comm.size)
        start = self._snapshot.clone()
        self._poller.wait([self._comm.ibcast(start)])
        for segment in self.replica.segments:
            part = slice(segment.start, segment.stop)
            if segment.name in known:
                start[part] = self._snapshot[part]
        moves = (start - self._snapshot).masked_fill_(start == self._snapshot, 0.0)  # infinite buffers as well
        self._snapshot.copy_(start)
        self._average(weights)
        self._set_anchor(self._snapshot)
        self._state = self._recalled(memory)
        self._snapshot.copy_(moves)
        return self._staged(Merge.ADD, Verdict.REGROUP, None)

    def _recalled(self, memory: Mapping[str, dict[str, Tensor]]) -> Any:
        recalled = (self.replica.from_names(memory.get(name, {}), tensor) for name, tensor in named(self._state))
        return type(self._state)(*recalled)

    def _is_out_of_patience(self) -> bool:
        return self._mismatch_since is not None and time.monotonic() - self._mismatch_since > MISMATCH_TIMEOUT_S

    def _watch_mismatch(self, count: ballot.Count) -> None:
        """Raise, in the same vote on every rank, once one of them has waited too long for the replicas to match."""
        if count.verdict is not Verdict.MISMATCH:
            self._mismatch_since = None
            return
        self._mismatch_since = self._mismatch_since or time.monotonic()
        if count.gives_up:
            raise ReplicaMismatchError(
                f"for {MISMATCH_TIMEOUT_S:.0f} s the ranks have optimised different parameters (here: "
                f"{len(self.wanted_replica.params)}); call add_param_group with the same parameters on every rank"
            )
        time.sleep(0.01)

    # --- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return algorithm, state by parameter name and counters; local, consistent between rounds.

        The elastic center, which no rank has as a whole, is in it after a consolidation, when it is the weights.
        """
        algorithm = self._options.algorithm
        with self.lock:
            center = None
            if isinstance(algorithm, ElasticAveraging) and self._consolidated_at == self._metrics.steps:
                center = self.replica.by_name(self._snapshot[: self.replica.num_weights])
            return {**self._remembered(center), "counters": self._metrics.counters()}

    def capture(self, wanted: Capture | None) -> None:
        """Have the next round, or consolidation, copied into `wanted` on its way; None: no longer. Training thread.

        Where that round breaks off (a rank was lost), or has nothing for some weights, the one after it is copied.
        """
        self._wanted = wanted

    def _begin_capture(self) -> Capture | None:
        copy = self._wanted
        if copy is None or copy.done:
            return None
        copy.begin(self.replica)
        return copy

    def _finish_capture(self, copy: Capture | None) -> None:
        if copy is not None:
            center = copy.weights() if isinstance(self._options.algorithm, ElasticAveraging) else None
            copy.finish(self._integers, self._remembered(center))

    def _remembered(self, center: dict[str, Tensor] | None) -> dict[str, Any]:
        state = {name: self.replica.by_name(tensor) for name, tensor in named(self._state)}
        if center is not None:
            state["center"] = center
        return {"algorithm": self._options.algorithm.describe(), "state": state}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Take over state and counters of `saved`; what the algorithm does not know, or lacks, stays as it is."""
        with self.lock:
            memory, was = saved["state"], saved["algorithm"]["name"]
            if was != (now := type(self._options.algorithm).__name__):
                logger.warning("the checkpoint's rounds were %s; %s goes on from the loaded weights", was, now)
            if "center" in memory:
                anchor = self._snapshot.clone()
                anchor[: self.replica.num_weights] = self.replica.from_names(memory["center"], anchor)
                self._reducer.rebase(anchor)
            self._state = self._recalled(memory)
            self._metrics.restore(saved["counters"])


def _run_errand(errand: Errand | None, comm: Communicator) -> Met:
    try:
        return Met(None if errand is None else errand(comm))
    except RankLostError:
        raise
    except Exception as error:  # the training thread's, which waits for what comes of it
        return Met(error=error)
