"""Clips from real video files: finding them, choosing frames by timestamp, reading them in worker processes.

Names are imported when first used, so that a configuration can be read where PyAV is not installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa.data.batch import Batch, ClipRef
    from vjepa.data.clip import read_clip, segment_starts
    from vjepa.data.config import DataConfig, SourceConfig
    from vjepa.data.container import VideoInfo, probe_video
    from vjepa.data.errors import BadFile, ClipError, ClipTimeout, DataError
    from vjepa.data.evaluation import EvalClip, iterate_clips
    from vjepa.data.loader import ClipLoader
    from vjepa.data.sources import Video, find_videos
    from vjepa.data.transform import Crop

_HOME = {
    "batch": ("Batch", "ClipRef"),
    "clip": ("read_clip", "segment_starts"),
    "config": ("DataConfig", "SourceConfig"),
    "container": ("VideoInfo", "probe_video"),
    "errors": ("BadFile", "ClipError", "ClipTimeout", "DataError"),
    "evaluation": ("EvalClip", "iterate_clips"),
    "loader": ("ClipLoader",),
    "sources": ("Video", "find_videos"),
    "transform": ("Crop",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BadFile",
    "Batch",
    "ClipError",
    "ClipLoader",
    "ClipRef",
    "ClipTimeout",
    "Crop",
    "DataConfig",
    "DataError",
    "EvalClip",
    "SourceConfig",
    "Video",
    "VideoInfo",
    "find_videos",
    "iterate_clips",
    "probe_video",
    "read_clip",
    "segment_starts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
