"""Signals that ask a process to end, noted for whoever looks at the next step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

from hvd_shadowsync.ending import let_pass

logger = logging.getLogger(__name__)

ONE_BY_ONE_S = 5.0
"""How long whoever signals the processes of a job one by one may take from one to the next."""

Handler = Callable[[int, FrameType | None], Any]


class EndSignals:
    """Notes signals instead of dying of them; handlers that were there before are called as well.

    Processes that are forked from this one do with them what they did before. A handler may only be set in the main
    thread: in others signals are left as they are.

    Once one has come, what a handler of SIGCHLD raises is logged: batch systems signal children as well, and torch
    raises there that a DataLoader's worker is dead, in the middle of whatever this process does then.

    Args:
        numbers: which signals.
        for_ranks: one of them that is meant for ranks alone: children let it pass, and this process when it listens no
            more, as other ranks may.
    """

    def __init__(self, numbers: Iterable[signal.Signals], for_ranks: signal.Signals | None = None) -> None:
        self.came = False
        """Whether one has come."""
        self._before: dict[signal.Signals, Any] = {}
        self._of_children: Any = None
        self._for_ranks = for_ranks
        self.numbers: frozenset[signal.Signals] = frozenset()
        """Those that it listens to."""
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._before[number] = signal.signal(number, self._note)
            self.numbers = frozenset(self._before)
            _LISTENING.append(weakref.ref(self))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if callable(of_children := signal.getsignal(signal.SIGCHLD)) and of_children != self._note_child:
            self._of_children = of_children
            signal.signal(signal.SIGCHLD, self._note_child)
        before: Handler | Any = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def _note_child(self, number: int, frame: FrameType | None) -> None:
        try:
            self._of_children(number, frame)
        except Exception as error:
            logger.warning("after the signal to end: %s", error)

    def comes_after(self, error: BaseException) -> bool:
        """Tell whether a signal comes within `ONE_BY_ONE_S`, where `error` says that a DataLoader's worker got it."""
        said = " ".join(map(str, _with_causes(error)))
        if not any(f"killed by signal: {signal.strsignal(number)}" in said for number in self.numbers):
            return False
        deadline = time.monotonic() + ONE_BY_ONE_S
        while not self.came and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.came

    def restore(self) -> None:
        """Give the signals back their handlers, where nobody has set others meanwhile (idempotent; main thread).

        But for SIGCHLD: if one has come this process is about to end, and its children may die later than that.
        """
        if threading.current_thread() is threading.main_thread():
            self._restore()

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            if signal.getsignal(number) == self._note:
                ranks_own = number == self._for_ranks and before is signal.SIG_DFL
                signal.signal(number, let_pass if ranks_own else signal.SIG_DFL if before is None else before)

    def forget(self) -> None:
        """Leave the signals alone in this process, which was forked from the one that listens."""
        self._restore()
        if self._of_children is not None and signal.getsignal(signal.SIGCHLD) == self._note_child:
            signal.signal(signal.SIGCHLD, self._of_children)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_LISTENING: list[weakref.ref[EndSignals]] = []
_MASK = threading.local()


def _before_fork() -> None:
    """Put signals off: one that came to a child before `_after_fork` would be noted, and forgotten."""
    numbers = {number for each in _LISTENING if (listens := each()) is not None for number in listens.numbers}
    _MASK.blocked = numbers - signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _MASK.blocked)


def _after_fork() -> None:
    for each in reversed(_LISTENING):
        if (listens := each()) is not None:
            with suppress(ValueError):  # an interpreter below the main one
                listens.forget()
    _LISTENING.clear()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _MASK.blocked)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)
