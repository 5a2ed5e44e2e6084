"""What the data section of a configuration file can say."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal


@dataclass(frozen=True)
class SourceConfig:
    """One source of videos.

    Attributes:
        path: a folder (searched recursively), a manifest (.csv, .parquet, or one `path label` a line), or a single file.
        weight: share of the clips drawn from this source, relative to the other sources' weights; above 0.
        folder_labels: label each video by the first-level sub-folder it lies in (sub-folders in sorted order: 0, 1 ...).
    """

    path: str
    weight: float = 1.0
    folder_labels: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a folder, a manifest or a video, got an empty string")
        if not (isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight must be a finite number above 0, got {self.weight}")


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from, how their frames are chosen, and how they are read.

    Attributes:
        path: a folder (searched recursively), a manifest or a video, or several of them, each then giving an equal share
            of the clips. On the command line: --data.path FOLDER MANIFEST ...
        sources: instead of `path`, sources with sampling weights: a list of {path, weight, folder_labels}.
        frame_stride: source frames from one sampled frame to the next, counted at the video's average frame rate and
            applied by timestamp. Not used when `fps` is given.
        fps: sampled frames per second of video; overrides `frame_stride`. None: use `frame_stride`.
        scale: smallest and largest area of the random crop, as a share of the frame's area.
        aspect: smallest and largest stretch (width over height, relative to the output's) of the random crop.
        hflip: flip half of the clips left to right.
        min_frames: a video with fewer frames than this counts as bad (never more than the clip spans).
        short: what to do with a good video shorter than a clip spans: `pad` holds its last frame, `skip` counts it as bad.
        tensor_fps: frames per second that .npy and .pt files are taken to have (they carry no times); used with `fps`.
        decoder: what decodes video files: `pyav` (default); `torchcodec`, if it is installed: the same frames, pixels to
            within a few levels; `torchcodec:cuda`: by the GPU's video engine (NVDEC), in workers; not measured yet.
        num_workers: processes that read clips, per training process; 0 reads in the training process.
        prefetch: batches each worker prepares ahead.
        start_method: how workers start. `forkserver` (default) copies a clean process that has no threads; `fork` copies
            the training process, threads' locks and all; `spawn` starts from nothing (slow).
        clip_timeout: longest time in seconds that reading one clip may take; a slower file counts as bad.
        max_bad_share: stop when more than this share (0..1) of the files read is bad.
        judge_after: number of files read before `max_bad_share` is judged.
    """

    path: list[str] | str | None = None
    sources: list[SourceConfig] = field(default_factory=list)
    frame_stride: int = 4
    fps: float | None = None
    scale: tuple[float, float] = (0.3, 1.0)
    aspect: tuple[float, float] = (0.75, 1.35)
    hflip: bool = True
    min_frames: int = 8
    short: Literal["pad", "skip"] = "pad"
    tensor_fps: float = 30.0
    decoder: Literal["pyav", "torchcodec", "torchcodec:cuda"] = "pyav"
    num_workers: int = 2
    prefetch: int = 2
    start_method: Literal["forkserver", "fork", "spawn"] = "forkserver"
    clip_timeout: float = 30.0
    max_bad_share: float = 0.5
    judge_after: int = 64

    def __post_init__(self) -> None:
        if self.path is not None and self.sources:
            raise ValueError("data: give either path or sources, got both")
        if self.path == []:
            raise ValueError("data.path must name at least one folder, manifest or video, got an empty list")
        lowest = {"frame_stride": 1, "min_frames": 1, "num_workers": 0, "prefetch": 1, "judge_after": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("fps", "tensor_fps", "clip_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name, top in (("scale", 1.0), ("aspect", float("inf"))):
            given = getattr(self, name)
            if len(given) != 2 or not 0 < given[0] <= given[1] <= top:
                raise ValueError(f"{name} must be (smallest, largest), 0 < smallest <= largest <= {top}, got {given}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}")
        if self.short not in ("pad", "skip"):
            raise ValueError(f"short must be 'pad' or 'skip', got {self.short!r}")
        if self.decoder not in ("pyav", "torchcodec", "torchcodec:cuda"):
            raise ValueError(f"decoder must be 'pyav', 'torchcodec' or 'torchcodec:cuda', got {self.decoder!r}")
        if self.decoder == "torchcodec:cuda" and self.start_method == "fork" and self.num_workers:
            raise ValueError("decoder torchcodec:cuda needs start_method 'forkserver' or 'spawn', got 'fork'")
        if self.start_method not in ("forkserver", "fork", "spawn"):
            raise ValueError(f"start_method must be 'forkserver', 'fork' or 'spawn', got {self.start_method!r}")

    def all_sources(self) -> list[SourceConfig]:
        """The sources, `path` included; ValueError when there is none."""
        if self.path is not None:
            return [SourceConfig(path) for path in ([self.path] if isinstance(self.path, str) else self.path)]
        if not self.sources:
            raise ValueError("no data given: set data.path to a folder of videos or a manifest, or list data.sources")
        return list(self.sources)
