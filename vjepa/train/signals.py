"""Ctrl-C and SIGTERM as a request to stop after the step; a second one means at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Context manager that notes SIGINT and SIGTERM instead of dying of them.

    The first signal sets `.received`; the loop then finishes its step, saves and ends. From then on both signals do
    again what they did before, so a second one ends the process at once. Outside the main thread, where Python delivers
    no signals, it does nothing.

    Attributes:
        received: Number of the signal that came, 0 while none has.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
