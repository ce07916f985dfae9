"""Who runs the rounds: the shadow thread in the background, or the training thread in the foreground."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hvd_shadowsync.ballot import CALLS, Intent, Verdict
from hvd_shadowsync.comm.poll import Poller, sleep_on_time
from hvd_shadowsync.errors import RankLostError, ShadowSyncError, StallError
from hvd_shadowsync.metrics import RoundMetrics
from hvd_shadowsync.pacing import Pacing
from hvd_shadowsync.rounds import Errand, Met, Rounds
from hvd_shadowsync.staged import Staged

logger = logging.getLogger(__name__)

SERVING_PAUSES = Poller(eager=1, shortest_s=0.0005, longest_s=0.004, growth=1.2)
SHARE_OF_A_ROUND, LONGEST_SERVING_PAUSE_S = 0.2, 0.02
MOST_COUNTED = 2.0
LOOK_S = 0.25
"""How long a thread that waits goes without looking whether all ranks are there, and whether it is to end."""


class Driver(ABC):
    """Runs the rounds of one replica. All methods but `rounds` are for the training thread."""

    def __init__(self, rounds: Rounds, pacing: Pacing, metrics: RoundMetrics) -> None:
        self.rounds, self.pacing, self.metrics = rounds, pacing, metrics
        self.ending: Callable[[], None] | None = None
        """Called now and then while the training thread waits in `meet` or `synchronize`; may raise, and end it."""
        self.mend: Callable[[], None] | None = None
        """Called in the training thread before live weights with bad numbers become the others'."""
        self.whereabouts = rounds.whereabouts
        self.whereabouts.steps = lambda: metrics.steps
        self.counted = True
        """Whether this rank's replica was in the last consolidation: not if it had long waited, or was bad."""
        self._consolidated: tuple[int, ...] = ()
        self._before: Callable[[], None] | None = None

    def _merge(self, staged: Staged, *, hogwild: bool = False) -> None:
        if staged.verdict is Verdict.CONSOLIDATE:
            self._consolidated, self.counted = staged.members, staged.counts
            if self._before is not None:
                self._before()
        merge_staged(staged, self.metrics, hogwild=hogwild, mend=self.mend)

    @abstractmethod
    def fail(self, error: StallError) -> None:
        """Raise `error` in the training thread, as soon as it looks; any thread may call this."""

    @abstractmethod
    def step_taken(self) -> None:
        """Take note of a training step: at its boundary results are merged and rounds begin."""

    @abstractmethod
    def restart(self) -> None:
        """Count steps from what the metrics say now, after they were loaded; no round is under way."""

    @abstractmethod
    def pause(self) -> None:
        """Begin no more rounds; the one under way is merged first."""

    @abstractmethod
    def resume(self) -> None:
        """Begin rounds again."""

    @abstractmethod
    def meet(self, errand: Errand | None = None) -> Any:
        """Wait until all ranks are here, taking part in the rounds of those that train; nothing is under way then.

        Return what `errand` returns, or raise what it raises, which all ranks run together, here or in the shadow
        thread; a second time, on the ranks that are left, where one is lost meanwhile.
        """

    @abstractmethod
    def synchronize(self, before: Callable[[], None] | None = None) -> None:
        """Wait until all ranks are here, then make all replicas bit-identical.

        `before` is called while the live tensors are what this rank brings, right before they become the others'.
        """

    @abstractmethod
    def end(self) -> tuple[int, ...]:
        """Like `synchronize`, beside whatever the others wait in: they go on until they end as well, or leave.

        Return the numbers of the ranks that were there, the first rank's first: the same on all of them.
        """

    @abstractmethod
    def leave(self, *, wait: bool = True) -> None:
        """Take part, without counting, until all ranks leave; with `wait=False` do so without blocking."""


class Foreground(Driver):
    """Rounds in the training thread, every `pacing.steps` steps."""

    def __init__(self, rounds: Rounds, pacing: Pacing, metrics: RoundMetrics) -> None:
        super().__init__(rounds, pacing, metrics)
        # one that replaces a lost rank comes to the round that the others wait in at the end of its first step
        self._steps_at_round = metrics.steps - (pacing.steps if rounds.joins else 0)
        self._paused = False
        self._stalled: StallError | None = None

    def fail(self, error: StallError) -> None:
        """See `Driver.fail`; a round under way is not interrupted."""
        self._stalled = error

    def step_taken(self) -> None:
        """See `Driver.step_taken`."""
        self.metrics.steps += 1
        if not self._paused and self.metrics.steps - self._steps_at_round >= self.pacing.steps:
            self._run(Intent.TRAIN)

    def restart(self) -> None:
        """See `Driver.restart`."""
        self._steps_at_round = self.metrics.steps

    def pause(self) -> None:
        """See `Driver.pause`; all ranks have to pause at the same step."""
        self._paused = self.whereabouts.paused = True

    def resume(self) -> None:
        """See `Driver.resume`."""
        self._paused = self.whereabouts.paused = False

    def meet(self, errand: Errand | None = None) -> Any:
        """See `Driver.meet`."""
        with self.whereabouts.calling(CALLS[Intent.MEET]):
            while True:
                met = self._run(Intent.MEET, errand)
                if isinstance(met, Met):
                    return met.get()
                self._look_for_the_end()

    def synchronize(self, before: Callable[[], None] | None = None) -> None:
        """See `Driver.synchronize`."""
        self._before = before
        try:
            with self.whereabouts.calling(CALLS[Intent.CONSOLIDATE]):
                while self._run(Intent.CONSOLIDATE) is not Verdict.CONSOLIDATE:
                    self._look_for_the_end()
        finally:
            self._before = None

    def end(self) -> tuple[int, ...]:
        """See `Driver.end`."""
        with self.whereabouts.calling(CALLS[Intent.END]):
            while self._run(Intent.END) is not Verdict.CONSOLIDATE:
                pass
        return self._consolidated

    def leave(self, *, wait: bool = True) -> None:
        """See `Driver.leave`; foreground rounds cannot be left without waiting, so `wait=False` does nothing."""
        with self.whereabouts.calling(CALLS[Intent.LEAVE]):
            while wait and self._run(Intent.LEAVE) is not Verdict.STOP:
                pass

    def _look_for_the_end(self) -> None:
        if self.ending is not None:
            self.ending()

    def _run(self, intent: Intent, errand: Errand | None = None) -> Verdict | Met:
        while True:
            if self._stalled is not None:
                self._stalled.raised = True
                raise self._stalled
            try:
                result = self.rounds.run(intent, self.metrics.steps - self._steps_at_round, errand=errand)
                break
            except RankLostError as lost:
                self.rounds.go_on(lost)
        self._steps_at_round = self.metrics.steps
        if not isinstance(result, Staged):
            return result
        self._merge(result)
        return result.verdict


class ShadowThread(Driver):
    """Rounds in a daemon thread of their own, merged by the training thread at its step boundaries.

    The two meet in one slot: the shadow thread stages a result and waits; the training thread merges it at its next
    step. With `hogwild` the shadow thread merges by itself, while the training thread may be computing.

    With `max_sync_gap` the training thread waits at the end of a step that is so many after the last snapshot that was
    merged; the round that it waits for is due at once, whatever paces them.
    """

    def __init__(
        self,
        rounds: Rounds,
        pacing: Pacing,
        metrics: RoundMetrics,
        *,
        hogwild: bool = False,
        max_sync_gap: int | None = None,
    ) -> None:
        super().__init__(rounds, pacing, metrics)
        self._hogwild = hogwild
        self._max_gap = math.inf if max_sync_gap is None else max_sync_gap
        self._steps_merged = metrics.steps
        self._held = self._mismatch = False
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._staged: Staged | None = None
        self._intent = Intent.TRAIN
        self._paused = False
        self._quiet_polls, self._pauses = 0, SERVING_PAUSES
        self._shortest_round_s = math.inf
        self._alone = False
        self._wake_at_step = math.inf
        self._steps_at_round = metrics.steps
        self._round_began = time.monotonic()
        self._spent_mark = self._counted_mark = 0.0
        self._ahead_s = pacing.head_start_s
        self._consolidations = 0
        self._errand: Errand | None = None
        self._met: Met | None = None
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="shadow", daemon=True)
        self._start()

    def _start(self) -> None:
        """Start the thread; torch's thread count is per thread, but a new thread takes over the last one set."""
        threads = torch.get_num_threads()
        ready = threading.Event()
        self._ready = ready
        self._thread.start()
        ready.wait()
        torch.set_num_threads(threads)

    # --- the training thread's side ---------------------------------------------------------------------------------

    def step_taken(self) -> None:
        """See `Driver.step_taken`; costs about a microsecond unless there is something to merge."""
        self.metrics.steps += 1
        if self._staged is not None or self._failure is not None:
            with self._changed:
                self._merge_if_staged()
        if self.metrics.steps >= self._wake_at_step:
            self._wake.set()
        if self.metrics.steps - self._steps_merged >= self._max_gap:
            self._wait_at_gap()

    def _wait_at_gap(self) -> None:
        """Return once the steps since the last merged snapshot are few enough, or no round would change that."""
        begun = time.monotonic()
        with self._changed:
            self._held = self.whereabouts.held = True
            self._wake.set()
            try:
                while self._is_too_far():
                    self._changed.wait(LOOK_S)
                    self._merge_if_staged()
            finally:
                self._held = self.whereabouts.held = False
        with self.metrics.lock:
            self.metrics.gap_wait_s += time.monotonic() - begun

    def _is_too_far(self) -> bool:
        goes_on = not (self._paused or self._alone or self._stopped or self._mismatch)
        return goes_on and self.metrics.steps - self._steps_merged >= self._max_gap

    def fail(self, error: StallError) -> None:
        """See `Driver.fail`."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def restart(self) -> None:
        """See `Driver.restart`."""
        self._steps_at_round = self._steps_merged = self.metrics.steps
        self._wake.set()

    def pause(self) -> None:
        """See `Driver.pause`."""
        with self._changed:
            self._paused = self.whereabouts.paused = True
            self._merge_if_staged()

    def resume(self) -> None:
        """See `Driver.resume`."""
        self._paused = self.whereabouts.paused = False
        self._wake.set()

    def meet(self, errand: Errand | None = None) -> Any:
        """See `Driver.meet`."""
        self._errand, self._met = errand, None
        self._wait_in(Intent.MEET, lambda: self._met is not None)
        met, self._errand, self._met = self._met, None, None
        return None if met is None else met.get()

    def synchronize(self, before: Callable[[], None] | None = None) -> None:
        """See `Driver.synchronize`."""
        target, self._before = self._consolidations + 1, before
        try:
            self._wait_in(Intent.CONSOLIDATE, lambda: self._consolidations >= target)
        finally:
            self._before = None

    def end(self) -> tuple[int, ...]:
        """See `Driver.end`."""
        target = self._consolidations + 1
        self._wait_in(Intent.END, lambda: self._consolidations >= target)
        return self._consolidated

    def leave(self, *, wait: bool = True) -> None:
        """See `Driver.leave`."""
        if not wait:
            with self._changed:
                self._alone, self._intent = True, Intent.LEAVE
                self._staged = None
                self._wake.set()
            return
        self._wait_in(Intent.LEAVE, lambda: self._stopped)
        self._thread.join()

    def _wait_in(self, intent: Intent, done: Callable[[], bool]) -> None:
        with self.whereabouts.calling(CALLS[intent]), self._changed:
            self._intent = intent
            self._wake.set()
            while True:
                self._merge_if_staged()
                if done():
                    break
                if self.ending is not None and intent in (Intent.MEET, Intent.CONSOLIDATE):
                    self.ending()
                self._changed.wait(LOOK_S)

    def _merge_if_staged(self, *, hogwild: bool = False) -> None:
        """Merge what is staged; `_changed` is held. Raises what the shadow thread failed with."""
        if isinstance(self._failure, StallError):
            self._failure.raised = True
            raise self._failure
        if self._failure is not None:
            raise ShadowSyncError(
                f"the shadow thread failed after {self.metrics.rounds} rounds, at step {self.metrics.steps}: "
                f"{type(self._failure).__name__}: {self._failure}"
            ) from self._failure
        if self._staged is None:
            return
        self._merge(self._staged, hogwild=hogwild)
        self._steps_merged = self._staged.steps
        if self._staged.verdict is Verdict.CONSOLIDATE:
            self._consolidations += 1
        if self._staged.heals:
            self._steps_at_round = self.metrics.steps  # the next round is to see what steps make of it
        self._staged = None
        self._wake.set()

    # --- the shadow thread's side -----------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            torch.set_num_threads(1)
            self._ready.set()
            sleep_on_time()
            self._spent_mark = self._counted_mark = self._spent_s()
            while self._failure is None and self._round_or_recovery() is not Verdict.STOP:
                pass
        except BaseException as failure:
            logger.debug("shadow thread failed", exc_info=True)
            self._failure = self._failure or failure
            self.whereabouts.failed = True
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _round_or_recovery(self) -> Verdict | None:
        try:
            return self._round()
        except RankLostError as lost:
            self._drop_staged()
            self.rounds.go_on(lost)
            return None

    def _drop_staged(self) -> None:
        """Leave the last round's result unmerged: its memory is needed, and the training thread may be far from it."""
        with self._changed:
            if self._staged is not None and self._staged.verdict is Verdict.ROUND:
                self._staged = None
        self._await_merge(check=False)

    def _round(self) -> Verdict | None:
        self._await_merge()
        intent = self._await_turn()
        spent_s = self._spent_s() - self._spent_mark
        self._round_began, self._spent_mark = time.monotonic(), self._spent_mark + spent_s
        result = self.rounds.run(intent, self.metrics.steps - self._steps_at_round, spent_s, self._errand)
        self.metrics.cpu_s = time.thread_time()
        self._mismatch = result is Verdict.MISMATCH
        if isinstance(result, Staged):
            self._steps_at_round = result.steps
            if result.verdict is Verdict.ROUND:  # others may have waited for the rest, and so did this rank
                self._shortest_round_s = min(self._shortest_round_s, time.monotonic() - self._round_began)
                self._pauses = serving_pauses(self._shortest_round_s)
            self._hand_over(result)
            return result.verdict
        if isinstance(result, Met):
            with self._changed:
                self._met = result
                if self._intent is Intent.MEET:  # else the training thread has left the call, to end
                    self._answer_call()
            return None
        return result

    def _answer_call(self) -> None:
        """Vote as one that trains from here on: the call that the training thread waits in has its answer."""
        self._intent = Intent.TRAIN
        self._changed.notify_all()

    def _await_turn(self) -> Intent:
        """Return once a round is due, with what the training thread is about by then.

        What the waiting itself costs is not waited for now: each look at the clock would put the round off by many
        looks. The next wait counts it, up to as much again as the round: answering others' requests costs about that.
        """
        now_s = self._spent_s()
        own_s = min(now_s - self._counted_mark, MOST_COUNTED * (now_s - self._spent_mark))
        self._counted_mark = now_s
        most_s = max(own_s, self.rounds.most_spent_s)
        spent_s, self._ahead_s = max(0.0, most_s - self._ahead_s), max(0.0, self._ahead_s - most_s)
        while True:
            self._wake.clear()
            self._wake_at_step = self._steps_at_round + self.pacing.steps
            if self._intent is not Intent.TRAIN or (self._held and not self._paused):
                return self._intent
            wait_s = math.inf if self._paused else self._wait_s(spent_s)
            if self._paused or math.isfinite(wait_s):
                self._wake_at_step = math.inf  # steps do not matter now: being woken by each would eat the budget
            if wait_s <= 0:
                return self._intent
            self._sleep(wait_s)

    def _wait_s(self, spent_s: float) -> float:
        steps, elapsed_s = self.metrics.steps - self._steps_at_round, time.monotonic() - self._round_began
        return self.pacing.wait_s(steps=steps, elapsed_s=elapsed_s, spent_s=spent_s)

    def _spent_s(self) -> float:
        return time.thread_time() + self.metrics.merge_s

    def _hand_over(self, staged: Staged) -> None:
        with self._changed:
            if self._alone:
                return
            self._wake.clear()
            self._staged = staged
            if self._hogwild and self._intent is Intent.TRAIN and not staged.heals:  # the optimizer's state as well
                self._merge_if_staged(hogwild=True)
                self._changed.notify_all()
                return
            if staged.verdict is Verdict.CONSOLIDATE and self._intent in (Intent.CONSOLIDATE, Intent.END):
                self._answer_call()
            self._changed.notify_all()

    def _await_merge(self, *, check: bool = True) -> None:
        """Return once the training thread has merged what was staged."""
        while self._staged is not None:
            self._sleep(math.inf, check=check)
            self._wake.clear()

    def _sleep(self, longest_s: float, *, check: bool = True) -> None:
        """Sleep until woken, answering other ranks' requests meanwhile, and looking whether one is lost."""
        if not (self.rounds.serves and check):
            if self.rounds.outlives_ranks and check:
                longest_s = min(longest_s, LOOK_S)
                self.rounds.check()
            self._wake.wait(None if math.isinf(longest_s) else longest_s)
            return
        self._quiet_polls = 0 if self.rounds.serve() else self._quiet_polls + 1
        self._wake.wait(min(longest_s, self._pauses.pause_s(self._quiet_polls)))


def serving_pauses(round_s: float) -> Poller:
    """Return how to look for other ranks' requests, which may wait for a part of `round_s`.

    That is the shortest round so far: a longer one may be so because its requests waited.
    """
    longest_s = min(max(SERVING_PAUSES.longest_s, SHARE_OF_A_ROUND * round_s), LONGEST_SERVING_PAUSE_S)
    return replace(SERVING_PAUSES, longest_s=longest_s)


def merge_staged(
    staged: Staged, metrics: RoundMetrics, *, hogwild: bool = False, mend: Callable[[], None] | None = None
) -> None:
    """Merge `staged` into the live weights and count it; `mend` is called before where it heals them."""
    begun = time.perf_counter()
    if staged.heals and mend is not None:
        mend()
    progress = staged.merge(hogwild=hogwild)
    with metrics.lock:
        metrics.merge_s += time.perf_counter() - begun
        metrics.times_healed += staged.heals
        if staged.verdict is not Verdict.ROUND:
            return
        metrics.rounds += 1
        metrics.steps_at_last_round = staged.steps
        metrics.progress = None if progress is None else progress.surviving
