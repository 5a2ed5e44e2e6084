"""Finding videos: a folder, a manifest, or a single file."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from vjepa.data.errors import DataError
from vjepa.data.manifest import MANIFEST_ENDINGS, read_manifest
from vjepa.data.tensors import TENSOR_ENDINGS

# fmt: off
VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".flv", ".wmv", ".asf",
    ".ogv", ".3gp", ".3g2", ".mxf", ".y4m", ".gif", ".h264", ".264", ".hevc", ".h265", ".265", ".ivf", ".obu",
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Video:
    """A video or tensor file, and its label.

    Attributes:
        path: absolute path.
        label: class index from 0, or None.
        class_name: the label's name where the source gives one.
    """

    path: str
    label: int | None = None
    class_name: str | None = None


def find_videos(path: str | os.PathLike[str], folder_labels: bool = False) -> list[Video]:
    """All videos of a source, in a fixed order. No file is opened: what is unreadable shows when it is read.

    Args:
        path: a folder, searched recursively for video and tensor files by their endings (hidden files are left out); a
            manifest (see `read_manifest`); or one video or tensor file.
        folder_labels: label each video of a folder by the first-level sub-folder it lies in.

    Raises:
        DataError: the path does not exist, holds no video, or is a malformed manifest; with folder_labels, a video that
            lies in no sub-folder.
    """
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not os.path.exists(path):
        raise DataError(f"data path does not exist: {path}")
    if os.path.isdir(path):
        return _find_in_folder(path, folder_labels)
    ending = os.path.splitext(path)[1].lower()
    if ending in MANIFEST_ENDINGS:
        rows = read_manifest(path)
        if not rows:
            raise DataError(f"the manifest lists no video: {path}")
        base = _base(path, rows[0][0])
        return _label([(os.path.normpath(os.path.join(base, entry)), label) for entry, label in rows], path)
    if ending in VIDEO_ENDINGS or ending in TENSOR_ENDINGS:
        return [Video(path)]
    known = ", ".join((*MANIFEST_ENDINGS, *VIDEO_ENDINGS, *TENSOR_ENDINGS))
    raise DataError(f"neither a folder nor a manifest nor a video by its ending ({known}): {path}")


def _find_in_folder(root: str, folder_labels: bool) -> list[Video]:
    endings = {*VIDEO_ENDINGS, *TENSOR_ENDINGS}
    found: list[str] = []
    files = 0
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to where we have been
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += len(names)
        found.extend(
            os.path.join(folder, name)
            for name in sorted(names)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
        )
    if not found:
        raise DataError(
            f"no video found in {root}: looked through it and its sub-folders ({files} files) for names ending in "
            f"{', '.join((*VIDEO_ENDINGS, *TENSOR_ENDINGS))}"
        )
    if not folder_labels:
        return [Video(path) for path in found]
    parts = [os.path.relpath(path, root).split(os.sep) for path in found]
    loose = next((path for path, part in zip(found, parts, strict=True) if len(part) < 2), None)
    if loose is not None:
        raise DataError(f"folder_labels needs every video of {root} in a sub-folder named after its class, not {loose}")
    return _label([(path, part[0]) for path, part in zip(found, parts, strict=True)], root, named=True)


def _label(rows: list[tuple[str, str]], source: str, named: bool = False) -> list[Video]:
    """Integers are class indices as they stand; anything else are names, numbered in sorted order."""
    labels = {label for _, label in rows if label}
    if not named and all(label.removeprefix("-").isdecimal() for label in labels):
        negative = min((int(label) for label in labels), default=0)
        if negative < 0:
            raise DataError(f"labels of {source} must be class indices from 0, got {negative}")
        return [Video(path, int(label) if label else None) for path, label in rows]
    index = {name: number for number, name in enumerate(sorted(labels))}
    return [Video(path, index[label], label) if label else Video(path) for path, label in rows]


def _base(manifest: str, first: str) -> str:
    """What relative paths of a manifest are relative to: its own folder, or where the program was started."""
    folder = os.path.dirname(manifest)
    return os.getcwd() if not os.path.exists(os.path.join(folder, first)) and os.path.exists(first) else folder


class VideoTable:
    """Paths and labels of many videos, in two arrays: a list of millions of strings would be copied into each worker."""

    def __init__(self, videos: list[Video]):
        encoded = [os.fsencode(video.path) for video in videos]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)
        self._labels = np.array([-1 if video.label is None else video.label for video in videos], np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """(path, label) of a video; label -1 where there is none."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])]), int(self._labels[index])
