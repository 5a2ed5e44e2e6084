"""One clip of a video: which frames (start, stride or fps), which pixels (crop, size, flip), read within a time limit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vjepa.data import torchcodec_frames
from vjepa.data.container import Deadline, VideoFile, VideoInfo, decoder_errors, probe_video
from vjepa.data.decode import Reached, read_frames
from vjepa.data.errors import ClipError
from vjepa.data.placement import FixedPlacement, Placement, RandomPlacement, whole_frames
from vjepa.data.stopwatch import Lap, no_lap
from vjepa.data.tensors import is_tensor_file, open_tensor, resize_frames
from vjepa.data.torchcodec_frames import Decoder, TensorWriter, check_decoder
from vjepa.data.transform import PLANES, Crop, FrameWriter

__all__ = [
    "Clip",
    "ClipSpec",
    "FixedPlacement",
    "Placement",
    "RandomPlacement",
    "fixed_crop",
    "load_clip",
    "read_clip",
    "segment_starts",
]

HEADER_SLACK = (0.5, 0.05)  # s, and share of its duration, by which a sound header may promise more than the file holds
VIEWS = {"center": 0.5, "first": 0.0, "last": 1.0}


@dataclass(frozen=True)
class ClipSpec:
    """What every clip of a data set has in common.

    Attributes:
        num_frames: T.
        image_size: (H, W) in pixels.
        frame_stride: source frames between sampled frames, at the average rate; not used when fps is given.
        fps: sampled frames per second, or None.
        channels: C; 3 (RGB) or 1 (grey) for video files, anything for tensor files.
        min_frames, short, timeout, tensor_fps, decoder: as in DataConfig.
    """

    num_frames: int
    image_size: tuple[int, int]
    frame_stride: int = 4
    fps: float | None = None
    channels: int = 3
    min_frames: int = 1
    short: Literal["pad", "skip"] = "pad"
    timeout: float = 30.0
    tensor_fps: float = 30.0
    decoder: Decoder = "pyav"

    def __post_init__(self) -> None:
        for name in ("num_frames", "frame_stride", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be (height, width), each at least 1, got {self.image_size}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")

    def interval(self, rate: float) -> float:
        """Seconds from one sampled frame to the next, in a video of `rate` frames per second."""
        return self.frame_stride / rate if self.fps is None else 1 / self.fps

    def span(self, rate: float) -> float:
        """Seconds of video a clip covers, from the start of its first frame to the end of its last."""
        return (self.num_frames - 1) * self.interval(rate) + 1 / rate

    def frames_needed(self, rate: float) -> int:
        """Source frames below which a video is too short."""
        return min(self.min_frames, round(self.span(rate) * rate))


@dataclass(frozen=True)
class Clip:
    """Pixels uint8 [C,T,H,W], and where they came from: start and interval in seconds, crop, flip."""

    pixels: np.ndarray
    start: float
    interval: float
    crop: Crop
    flip: bool


def load_clip(path: str, spec: ClipSpec, placement: Placement, lap: Lap = no_lap) -> Clip:
    """Read one clip.

    Args:
        path: a video or tensor file.
        spec: length, size and rate of the clip.
        placement: where it lies.
        lap: told what each stretch of work was (see stopwatch).

    Raises:
        ClipError: whatever is wrong with the file, in one line (ClipTimeout: it took too long).
        DataError: the decoder is not installed.
    """
    if is_tensor_file(path):
        return _load_tensor(path, spec, placement, lap)
    if spec.channels not in PLANES:
        raise ClipError(path, f"a video file gives 3 or 1 channels, {spec.channels} were wanted", whole_file=True)
    deadline = Deadline(path, spec.timeout)
    with decoder_errors(deadline, whole_file=True):
        video = VideoFile(deadline, lap)
    lap("open")
    with decoder_errors(deadline), video:
        clip = _load_video(video, spec, placement)
    lap("open")  # closing it belongs to that
    return clip


def _load_video(video: VideoFile, spec: ClipSpec, placement: Placement) -> Clip:
    info = video.info
    start = _place(video.path, info.duration, info.rate, spec, placement)
    read, writer = _reader(spec, placement)
    reached = read(video, _times(start, info.rate, spec), writer)
    if not reached.complete:
        _check_promise(info, reached.end)
        if start > 0:  # a sound header may promise a little too much: the last clip that really fits
            start = max(0, whole_frames(reached.end - spec.span(info.rate), info.rate)) / info.rate
            reached = read(video, _times(start, info.rate, spec), writer)
        if start == 0:
            _check_length(video.path, reached.frames, info.rate, spec)
    return Clip(writer.clip, start, spec.interval(info.rate), writer.crop or Crop(), placement.flip)


def _reader(spec: ClipSpec, placement: Placement) -> tuple[Callable[[VideoFile, list[float], Any], Reached], Any]:
    """The decoder's read_frames, and what it writes into."""
    shape = (spec.num_frames, spec.image_size, spec.channels)
    if spec.decoder == "pyav":
        return read_frames, FrameWriter(*shape, placement.crop, placement.flip)
    return torchcodec_frames.read_frames, TensorWriter(*shape, placement.crop, placement.flip, spec.decoder)


def _times(start: float, rate: float, spec: ClipSpec) -> list[float]:
    """Wanted times: the middle of each sampled frame's period, so that rounded timestamps cannot pick its neighbour."""
    return [start + i * spec.interval(rate) + 0.5 / rate for i in range(spec.num_frames)]


def _place(path: str, duration: float, rate: float, spec: ClipSpec, placement: Placement) -> float:
    start = placement.start(max(0.0, duration - spec.span(rate)), rate)
    if not 0 <= start < max(duration, 1 / rate):
        raise ClipError(path, f"start must lie within the video's {duration:.2f} s, got {start:g} s")
    return start


def _check_promise(info: VideoInfo, end: float) -> None:
    if info.duration - end > max(HEADER_SLACK[0], HEADER_SLACK[1] * info.duration):
        raise ClipError(info.path, f"cut short: frames end at {end:.2f} s, the header promises {info.duration:.2f} s")


def _check_length(path: str, frames: int, rate: float, spec: ClipSpec) -> None:
    """A video shorter than the clip: how many frames it has decides whether it is of use."""
    plural = "" if frames == 1 else "s"
    if frames < spec.frames_needed(rate):
        needed = spec.frames_needed(rate)
        raise ClipError(path, f"too short: {frames} frame{plural}, at least {needed} are needed", whole_file=True)
    if spec.short == "skip":
        span = round(spec.span(rate) * rate)
        raise ClipError(path, f"too short: {frames} frame{plural}, a clip spans {span}", whole_file=True)


def _load_tensor(path: str, spec: ClipSpec, placement: Placement, lap: Lap) -> Clip:
    frames, rate = open_tensor(path, spec.channels), spec.tensor_fps
    lap("open")
    total, stride = len(frames), spec.interval(rate) * rate
    if total / rate < spec.span(rate) - 1e-6:
        _check_length(path, total, rate, spec)
    start = _place(path, total / rate, rate, spec, placement)
    chosen = np.minimum(np.floor(start * rate + stride * np.arange(spec.num_frames) + 0.5).astype(np.int64), total - 1)
    height, width = spec.image_size
    crop = placement.crop((width / height) / (frames.shape[2] / frames.shape[1]))
    pixels = resize_frames(frames[chosen], crop, spec.image_size, placement.flip)
    lap("filter")
    return Clip(pixels, start, spec.interval(rate), crop, placement.flip)


def fixed_crop(crop: str | tuple[float, float, float, float] | Crop) -> Crop | float:
    """The crop a word or four numbers stand for (see `read_clip`); ValueError otherwise."""
    if isinstance(crop, Crop):
        return crop
    if isinstance(crop, str):
        if crop == "full":
            return Crop()
        if crop in VIEWS:
            return VIEWS[crop]
    elif len(crop) == 4:
        return Crop(*crop)
    raise ValueError(f"crop must be 'center', 'first', 'last', 'full' or (x, y, width, height), got {crop!r}")


def read_clip(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    *,
    image_size: int | tuple[int, int] = 224,
    frame_stride: int = 4,
    fps: float | None = None,
    start: float | None = None,
    crop: str | tuple[float, float, float, float] | Crop = "center",
    flip: bool = False,
    channels: int = 3,
    timeout: float = 30.0,
    tensor_fps: float = 30.0,
    decoder: Decoder = "pyav",
) -> Tensor:
    """Read one clip of a video or tensor file, for evaluation and pictures: nothing about it is random.

    Args:
        path: the file.
        num_frames: T.
        image_size: H and W in pixels, one number for a square.
        frame_stride: source frames between sampled frames (at the average rate, applied by timestamp).
        fps: sampled frames per second; overrides frame_stride.
        start: seconds from the first frame; None: the clip lies in the middle of the video. Where too little is left
            after it, the clip begins earlier; a video shorter than the clip is held at its last frame.
        crop: "center", "first" (left or top), "last" (right or bottom): the largest crop of the output's shape;
            "full": the whole frame, squeezed; or (x, y, width, height) as fractions of the displayed frame.
        flip: mirror left to right.
        channels: C: 3 is RGB, 1 is grey (tensor files: whatever they hold).
        timeout: time limit in seconds.
        tensor_fps: frames per second a tensor file is taken to have.
        decoder: as in DataConfig.

    Returns:
        uint8 [C,T,H,W].

    Raises:
        ClipError: the file cannot be read, holds no such clip, or took too long.
        DataError: the decoder cannot be used here.
        ValueError: an argument out of range.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    check_decoder(decoder)
    spec = ClipSpec(
        num_frames, size, frame_stride, fps, channels, timeout=timeout, tensor_fps=tensor_fps, decoder=decoder
    )
    return torch.from_numpy(load_clip(os.fspath(path), spec, FixedPlacement(start, fixed_crop(crop), flip)).pixels)


def segment_starts(
    path: str | os.PathLike[str],
    num_segments: int,
    num_frames: int = 16,
    *,
    frame_stride: int = 4,
    fps: float | None = None,
    timeout: float = 30.0,
    tensor_fps: float = 30.0,
) -> list[float]:
    """Start times that spread several clips evenly over a video: first at its beginning, last at its end.

    One segment lies in the middle. In a video with no room the clips overlap, down to all starting at 0.

    Returns:
        num_segments times in seconds, ascending, for `read_clip(start=...)`.

    Raises:
        ClipError: the file cannot be opened.
        ValueError: num_segments below 1.
    """
    if num_segments < 1:
        raise ValueError(f"num_segments must be at least 1, got {num_segments}")
    spec = ClipSpec(num_frames, (1, 1), frame_stride, fps, tensor_fps=tensor_fps)
    path = os.fspath(path)
    if is_tensor_file(path):
        rate = tensor_fps
        duration = len(open_tensor(path)) / rate
    else:
        info = probe_video(path, timeout)
        rate, duration = info.rate, info.duration
    latest = max(0.0, duration - spec.span(rate))
    if num_segments == 1:
        return [FixedPlacement().start(latest, rate)]
    return [whole_frames(latest * i / (num_segments - 1), rate) / rate for i in range(num_segments)]
