"""What a person watching a run sees: one live line on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column


class ProgressLine:
    """Progress of a run from `done` to `total` steps.

    Args:
        total: Steps done when the run ends.
        done: Steps done when this process begins.
        console: Where to; standard output when not given. Not a terminal: a plain line per call of `update`.
        quiet: Shows nothing (all ranks but the first).
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None, quiet: bool = False) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._total, self._start, self._began = total, done, time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            counts = Column(no_wrap=True, min_width=2 * len(str(total)) + 1)
            self._bar = Progress(  # on a narrow terminal the end of the text is cut, not the count of steps
                MofNCompleteColumn(table_column=counts),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")),
                console=self._console,
            )
            self._task = self._bar.add_task("pretrain", total=total, completed=done, text="")
            self._bar.start()

    def advance(self, done: int) -> None:
        """Moves the bar, without a new line of numbers."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def update(self, done: int, metrics: dict[str, float]) -> None:
        """Shows the numbers of a log line: loss, clips per second, share of time spent waiting for data, time left."""
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, done - self._start) * (self._total - done)
        busy = metrics["data_wait_s"] + metrics["compute_s"]
        text = (
            f"loss {metrics['loss']:.4f}  {metrics['clips_per_s']:.1f} clips/s  "
            f"data wait {100 * metrics['data_wait_s'] / max(busy, 1e-9):.0f} %  "
            f"ETA {format_seconds(left)}  target std {metrics['target_std']:.2f}"
        )
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
        else:
            self._console.print(f"step {done}/{self._total}  {text}", markup=False)

    def message(self, text: str) -> None:
        """Prints a line above the live one."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Leaves the last state of the line on the terminal."""
        if self._bar:
            self._bar.stop()


def format_seconds(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
