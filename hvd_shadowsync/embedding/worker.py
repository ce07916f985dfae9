"""A thread that does one thing after another, for those who need not wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from hvd_shadowsync.comm.base import Request
from hvd_shadowsync.comm.poll import Poller, sleep_on_time

T = TypeVar("T")


LOOK_S = 0.002
AWAY = Poller(spin_s=0.0, eager=0, longest_s=0.0003)
"""Never without a pause: a thread that spins beside one that computes uses up its turn, and waits for the next."""


@dataclass(frozen=True)
class HomePoller(Poller):
    """Spins for long in the thread that made it, which can do nothing else meanwhile; in others it spares the core.

    Attributes:
        home: that thread's ident.
    """

    home: int = field(default_factory=threading.get_ident)
    spin_s: float = 0.002

    def wait(self, requests: Iterable[Request], meanwhile: Callable[[], bool] | None = None) -> None:
        """See `Poller.wait`."""
        if threading.get_ident() == self.home:
            super().wait(requests, meanwhile)
        else:
            AWAY.wait(requests, meanwhile)


class Worker:
    """Runs tasks in the order in which they were given, in a daemon thread that is there while it is needed.

    After a task that fails no other is begun: theirs fail with the same error.

    Args:
        name: of the thread.
        meanwhile: done again and again while there is no task, with pauses where it returns that it did nothing; with
            it the thread is there from the beginning.
    """

    def __init__(self, name: str, meanwhile: Callable[[], bool] | None = None) -> None:
        self._name, self._meanwhile, self._poller = name, meanwhile, Poller()
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], Future[object]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Future[object] | None = None
        self._failure: BaseException | None = None
        self._wanted = threading.Event()
        if meanwhile is not None:
            self._start()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Have `task` done after those before it, without gradients being recorded."""
        self._wanted.set()
        return self._put(task)

    def watch(self, look: Callable[[], object]) -> None:
        """Have `look` done now and then, from when the tasks before it are done until the thread is wanted again."""

        def watch() -> None:
            while not self._wanted.wait(LOOK_S):
                look()

        self._wanted.clear()
        self._put(watch)

    def _put(self, task: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._tasks.put((task, future))  # type: ignore[arg-type]
        self._last = future  # type: ignore[assignment]
        if self._thread is None:
            self._start()
        return future

    def wait(self) -> None:
        """Return when all tasks are done; raise what the first thing that failed raised."""
        self._wanted.set()
        last, self._last = self._last, None
        if last is not None:
            last.result()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let go of the thread, after the tasks that it has."""
        if self._thread is not None:
            self._wanted.set()
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()

    def _next(self) -> tuple[Callable[[], object], Future[object]] | None:
        polls = 0
        while self._meanwhile is not None and self._failure is None:
            try:
                return self._tasks.get_nowait()
            except queue.Empty:
                polls = 0 if self._try(self._meanwhile) else polls + 1
                self._poller.pause(polls)
        return self._tasks.get()

    def _try(self, meanwhile: Callable[[], bool]) -> bool:
        try:
            with torch.no_grad():
                return meanwhile()
        except BaseException as error:
            self._failure = error
            return False

    def _work(self) -> None:
        sleep_on_time()
        while (next_one := self._next()) is not None:
            task, future = next_one
            if self._failure is None:
                try:
                    with torch.no_grad():
                        future.set_result(task())
                except BaseException as error:
                    self._failure = error
            if self._failure is not None:
                future.set_exception(self._failure)
            del next_one, task, future
