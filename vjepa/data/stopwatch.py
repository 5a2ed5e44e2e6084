"""Where the time of reading a clip goes: the reading code says at the end of each stretch of work what it was."""

from __future__ import annotations

import time
from collections.abc import Callable

Lap = Callable[[str], None]

PARTS = ("open", "seek", "read", "decode", "filter", "collate")  # in the order in which a clip passes through them


def no_lap(part: str) -> None:
    """Measures nothing: what reading uses unless it is being timed."""


class Stopwatch:
    """A Lap that adds up the seconds of each part; what happens between `start` and the first lap belongs to that lap.

    Attributes:
        seconds: part -> seconds so far, for the parts in PARTS.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.start()

    def start(self) -> None:
        """Forget the time since the last lap."""
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now
