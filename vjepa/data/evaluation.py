"""Clips in a fixed order for evaluation: every video, one or more temporal segments and spatial views of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vjepa.data.clip import ClipSpec, FixedPlacement, load_clip, segment_starts
from vjepa.data.errors import BadFile, ClipError, DataError
from vjepa.data.sources import Video, VideoTable
from vjepa.data.torchcodec_frames import Decoder, check_decoder
from vjepa.data.workers import StartMethod, Workers, read_in_workers

SPATIAL_VIEWS = {1: (0.5,), 3: (0.0, 0.5, 1.0)}


@dataclass(frozen=True, eq=False)
class EvalClip:
    """One clip of one video.

    Attributes:
        video: uint8 [C,T,H,W].
        label: class index, -1 where there is none.
        path: the file.
        index: position of the video in the list given.
        segment, view: which temporal segment and spatial view, from 0.
    """

    video: Tensor
    label: int
    path: str
    index: int
    segment: int = 0
    view: int = 0


class _AllClips(Dataset[list[EvalClip] | BadFile]):
    """All clips of a video, or why there are none."""

    def __init__(self, videos: Sequence[Video], spec: ClipSpec, segments: int, views: int):
        self.table, self.spec = VideoTable(list(videos)), spec
        self.segments, self.views = segments, SPATIAL_VIEWS[views]

    def __getitem__(self, index: int) -> list[EvalClip] | BadFile:
        path, label = self.table[index]
        spec = self.spec
        try:
            starts = segment_starts(
                path,
                self.segments,
                spec.num_frames,
                frame_stride=spec.frame_stride,
                fps=spec.fps,
                timeout=spec.timeout,
                tensor_fps=spec.tensor_fps,
            )
            clips = []
            for segment, start in enumerate(starts):
                for number, view in enumerate(self.views):
                    pixels = torch.from_numpy(load_clip(path, spec, FixedPlacement(start, view)).pixels)
                    clips.append(EvalClip(pixels, label, path, index, segment, number))
            return clips
        except ClipError as error:
            return BadFile(path, error.reason)


def iterate_clips(
    videos: Sequence[Video],
    num_frames: int,
    image_size: int | tuple[int, int],
    *,
    frame_stride: int = 4,
    fps: float | None = None,
    segments: int = 1,
    views: Literal[1, 3] = 1,
    channels: int = 3,
    min_frames: int = 1,
    timeout: float = 30.0,
    tensor_fps: float = 30.0,
    decoder: Decoder = "pyav",
    num_workers: int = 2,
    start_method: StartMethod = "forkserver",
    bad: list[BadFile] | None = None,
) -> Iterator[EvalClip]:
    """Clips of each video in turn, read by worker processes; nothing about them is random.

    Args:
        videos: what `find_videos` returned, or a part of it.
        num_frames: T.
        image_size: H and W in pixels, one number for a square.
        frame_stride, fps: as in `read_clip`.
        segments: clips of each video, spread evenly over its length (1: the middle).
        views: spatial views of each segment: 1 (centre) or 3 (left, centre, right; top to bottom in a portrait video).
        channels, timeout, tensor_fps, decoder: as in `read_clip`.
        min_frames: a video with fewer frames than this counts as bad.
        num_workers: processes; 0 reads in this one.
        start_method: how workers start, as in DataConfig.
        bad: unreadable videos are appended to this list and left out; without it, the first one raises.

    Yields:
        EvalClip in the order of `videos`, then segment, then view.

    Raises:
        DataError: an unreadable video when `bad` is None; a worker that died; the decoder cannot be used here.
        ValueError: an argument out of range.
    """
    if views not in SPATIAL_VIEWS:
        raise ValueError(f"views must be 1 or 3, got {views}")
    if segments < 1:
        raise ValueError(f"segments must be at least 1, got {segments}")
    if decoder == "torchcodec:cuda" and start_method == "fork" and num_workers:
        raise ValueError("decoder torchcodec:cuda needs start_method 'forkserver' or 'spawn', got 'fork'")
    check_decoder(decoder)
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    spec = ClipSpec(num_frames, size, frame_stride, fps, channels, min_frames, "pad", timeout, tensor_fps, decoder)
    clips = _AllClips(videos, spec, segments, views)
    return _iterate(clips, len(videos), Workers(num_workers, start_method=start_method), bad)


def _iterate(clips: _AllClips, count: int, workers: Workers, bad: list[BadFile] | None) -> Iterator[EvalClip]:
    patience = clips.spec.timeout * (clips.segments * len(clips.views) + 2)
    for item in read_in_workers(clips, range(count), workers, patience):
        if not isinstance(item, BadFile):
            yield from item
        elif bad is None:
            raise DataError(f"cannot read {item.path}: {item.reason}")
        else:
            bad.append(item)
