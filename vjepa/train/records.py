"""What a run writes while it goes: JSON lines that survive a crash, and TensorBoard event files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class RunError(RuntimeError):
    """A run that cannot start, go on or be continued, with the reason in one sentence."""


class JsonLines:
    """A file of one JSON object per line, each with the number of steps done when it was written.

    Every line is handed to the operating system whole, so a killed process loses at most the line it was writing.

    Args:
        path: The file; it is created, or continued.
        steps_done: Lines of later steps, and what follows a line that a crash left broken, are cut off first.

    Raises:
        RunError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], steps_done: int = 0) -> None:
        self.path = Path(path)
        try:
            if self.path.exists():
                self._cut_after(steps_done)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"Cannot write {self.path}: {error.strerror}.") from error

    def _cut_after(self, steps_done: int) -> None:
        with self.path.open("rb+") as file:
            end = 0
            for line in file:
                step = _step_of(line)
                if step is None or step > steps_done:
                    break
                end += len(line)
            file.truncate(end)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line.

        Raises:
            RunError: The disk is full, or the file is not writable any more.
        """
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"Cannot write {self.path}: {error.strerror}.") from error

    def flush_to_disk(self) -> None:
        """Waits until the lines are on the disk.

        Raises:
            RunError: The disk is full or failing.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"Cannot write {self.path}: {error.strerror}.") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: bytes) -> int | None:
    """The step of a line, None for one that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return None


class BadFiles:
    """bad_files.jsonl: each file that was skipped, once, with the decoder's words.

    Args:
        path: The file.
        steps_done: Files met first in later steps are forgotten.
        clips: Clips skipped by the steps done.

    Attributes:
        clips: Clips skipped so far; a file can be met many times.
    """

    def __init__(self, path: str | os.PathLike[str], steps_done: int = 0, clips: int = 0) -> None:
        self._lines = JsonLines(path, steps_done)
        self._known = {json.loads(line)["path"] for line in self._lines.path.read_text(encoding="utf-8").splitlines()}
        self.clips = clips

    @property
    def files(self) -> int:
        """Different files skipped so far."""
        return len(self._known)

    def note(self, step: int, path: str, reason: str, clips: int = 1) -> None:
        """Counts `clips` skipped clips of step `step`, from 1; writes their file down when it is new.

        Raises:
            RunError: The file cannot be written.
        """
        self.clips += clips
        if path not in self._known:
            self._known.add(path)
            self._lines.write({"step": step, "path": path, "reason": reason})

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class TensorBoard:
    """Scalars of a run as TensorBoard event files.

    Args:
        directory: Where the event files go.
        steps_done: What an earlier attempt wrote for later steps is hidden.
    """

    def __init__(self, directory: str | os.PathLike[str], steps_done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=steps_done + 1 if steps_done else None)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds the value of each scalar after `step` steps."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        self._writer.close()
