"""A thread that does one thing after another, for those who need not wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from hvd_shadowsync.comm.poll import sleep_on_time

T = TypeVar("T")


class Worker:
    """Runs tasks in the order in which they were given, in a daemon thread that is there while it is needed.

    After a task that fails no other is begun: theirs fail with the same error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], Future[object]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Future[object] | None = None
        self._failure: BaseException | None = None

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Have `task` done after those before it, without gradients being recorded."""
        future: Future[T] = Future()
        self._tasks.put((task, future))  # type: ignore[arg-type]
        self._last = future  # type: ignore[assignment]
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return future

    def wait(self) -> None:
        """Return when all tasks are done; raise what the first of them that failed raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def stop(self) -> None:
        """Let go of the thread, after the tasks that it has."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        sleep_on_time()
        while (next_one := self._tasks.get()) is not None:
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
