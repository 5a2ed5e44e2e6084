"""What can go wrong with data: one bad clip (skipped and counted) or a data set that cannot be used (an error)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DataError(RuntimeError):
    """The data as a whole cannot be used: nothing found, a malformed manifest, or too large a share of bad files.

    Attributes:
        bad: the bad files met by the batch that could not be made.
    """

    def __init__(self, message: str, bad: Sequence[BadFile] = ()):
        super().__init__(message)
        self.bad = tuple(bad)


class ClipError(Exception):
    """One clip could not be read.

    Attributes:
        path: the file.
        reason: why, in one line, with the decoder's own words where it said something.
        whole_file: True when no other clip of this file can succeed either (it cannot be opened, holds no video ...).
    """

    def __init__(self, path: str, reason: str, whole_file: bool = False):
        super().__init__(path, reason, whole_file)
        self.path, self.reason, self.whole_file = path, reason, whole_file

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ClipTimeout(ClipError):
    """Reading a clip took longer than its time limit."""


@dataclass(frozen=True)
class BadFile:
    """A file that was skipped, and why."""

    path: str
    reason: str
