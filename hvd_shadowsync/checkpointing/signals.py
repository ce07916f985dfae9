"""Signals that ask a process to end, noted for whoever looks at the next step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any


class EndSignals:
    """Notes signals instead of dying of them; handlers that were there before are called as well.

    A handler may only be set in the main thread: in others signals are left as they are.

    Args:
        numbers: which signals.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self.came = False
        """Whether one has come."""
        self._before: dict[signal.Signals, Any] = {}
        self.numbers: frozenset[signal.Signals] = frozenset()
        """Those that it listens to."""
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._before[number] = signal.signal(number, self._note)
            self.numbers = frozenset(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        before: Callable[[int, FrameType | None], Any] | Any = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def restore(self) -> None:
        """Give the signals back their handlers, where nobody has set others meanwhile (idempotent; main thread)."""
        while self._before and threading.current_thread() is threading.main_thread():
            number, before = self._before.popitem()
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if before is None else before)
