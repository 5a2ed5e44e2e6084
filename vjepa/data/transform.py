"""From a decoded frame to the pixels of a clip: crop, resize and colour in one FFmpeg filter graph.

The graph crops before it scales, so only the pixels that are kept are touched, and writes planar RGB, whose planes are
copied straight into the clip [C,T,H,W]. Rotation metadata and the flip cost nothing: they choose the direction of
that copy. Crops are fractions of the *displayed* frame, so they survive a change of frame size in mid-stream.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import av
import av.filter
import numpy as np

PLANES = {3: ("gbrp", (2, 0, 1)), 1: ("gray", (0,))}  # pixel format for a channel count, and where R, G, B lie in it
CROP_ATTEMPTS = 10  # draws of a random crop before falling back to the largest centred one, as is customary


@dataclass(frozen=True)
class Crop:
    """A rectangle as fractions (0..1) of the displayed frame: left, top, width, height."""

    x: float = 0.0
    y: float = 0.0
    width: float = 1.0
    height: float = 1.0

    def __post_init__(self) -> None:
        inside = self.x >= 0 and self.y >= 0 and self.x + self.width <= 1 + 1e-6 and self.y + self.height <= 1 + 1e-6
        if not (inside and self.width > 0 and self.height > 0):
            raise ValueError(f"crop must be (x, y, width, height) within the unit square, got {self}")


def largest_crop(aspect: float, view: float = 0.5) -> Crop:
    """The largest crop of a frame that keeps the output's shape.

    Args:
        aspect: output width/height divided by displayed frame width/height.
        view: where it lies along the axis that has room: 0 left or top, 0.5 centre, 1 right or bottom.
    """
    width, height = min(1.0, aspect), min(1.0, 1.0 / aspect)
    return Crop((1.0 - width) * view, (1.0 - height) * view, width, height)


def random_crop(draws: np.ndarray, aspect: float, scale: tuple[float, float], stretch: tuple[float, float]) -> Crop:
    """Random resized crop: area uniform in `scale`, log stretch uniform, position uniform.

    Args:
        draws: uniform numbers, [CROP_ATTEMPTS, 4] in 0..1.
        aspect: output width/height divided by displayed frame width/height.
        scale: smallest and largest area as a share of the frame.
        stretch: smallest and largest width/height relative to the output's.
    """
    for area_u, stretch_u, x_u, y_u in draws:
        area = scale[0] + (scale[1] - scale[0]) * area_u
        ratio = aspect * stretch[0] * (stretch[1] / stretch[0]) ** stretch_u
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= 1 and height <= 1:
            return Crop(float(x_u) * (1 - width), float(y_u) * (1 - height), width, height)
    return largest_crop(min(max(1.0, aspect * stretch[0]), aspect * stretch[1]))


@dataclass(frozen=True)
class Orientation:
    """How a coded frame is turned to be displayed: transpose first, then flip left-right and top-bottom."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """From the display matrix that travels with the frame (the decoder reports it and does not apply it)."""
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])  # displayed x = a x + c y, displayed y = b x + d y
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def coded(self, crop: Crop) -> Crop:
        """The crop of the displayed frame, as a crop of the coded frame."""
        x = 1 - crop.x - crop.width if self.flip_x else crop.x
        y = 1 - crop.y - crop.height if self.flip_y else crop.y
        x, y = max(0.0, x), max(0.0, y)
        return Crop(y, x, crop.height, crop.width) if self.transpose else Crop(x, y, crop.width, crop.height)


def colour_step(layout: av.VideoFormat) -> tuple[int, int]:
    """Pixels, across and down, that share one sample of colour."""
    return 4 // layout.chroma_width(4), 4 // layout.chroma_height(4)


def crop_rectangle(crop: Crop, width: int, height: int, step: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x, y, width, height) in pixels of what FrameWriter crops of a frame: whole samples of colour, unless it is all of it.

    Args:
        crop: fractions.
        width, height: of the frame.
        step: `colour_step` of its pixel format.
    """
    x, w = _pixels(crop.x, crop.width, width)
    y, h = _pixels(crop.y, crop.height, height)
    if (w, h) == (width, height):
        return 0, 0, w, h
    across, down = step
    return x - x % across, y - y % down, w - w % across, h - h % down


class FrameWriter:
    """Writes chosen frames of one video into a clip, uint8 [C,T,H,W].

    Args:
        num_frames, image_size, channels: T, (H, W) and C (3: RGB, 1: grey).
        choose_crop: called once, with the aspect (output width/height over displayed frame width/height) of the first
            frame written; returns the Crop for the whole clip.
        flip: flip the clip left to right.
    """

    def __init__(
        self,
        num_frames: int,
        image_size: tuple[int, int],
        channels: int,
        choose_crop: Callable[[float], Crop],
        flip: bool = False,
    ):
        self.clip = np.empty((channels, num_frames, *image_size), np.uint8)
        self.crop: Crop | None = None
        self._choose_crop, self._flip = choose_crop, flip
        self._pixel_format, self._planes = PLANES[channels]
        self._graph: av.filter.Graph | None = None
        self._made_for: tuple[object, ...] = ()
        self._transpose = False
        self._turn = (slice(None), slice(None))

    def write(self, frame: av.VideoFrame, first: int, stop: int) -> None:
        """Write `frame` to clip positions first..stop-1."""
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if self._graph is None or key != self._made_for:  # the first frame, or one of another size or colour
            self._graph, self._made_for = self._build(frame, Orientation.of(frame)), key
        self._graph.vpush(frame)
        planes = self._graph.vpull().planes
        for channel, index in enumerate(self._planes):
            plane: Any = planes[index]
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[self._turn]
            self.clip[channel, first] = pixels.T if self._transpose else pixels
        if stop > first + 1:
            self.clip[:, first + 1 : stop] = self.clip[:, first : first + 1]

    def _build(self, frame: av.VideoFrame, orientation: Orientation) -> av.filter.Graph:
        height, width = self.clip.shape[2:]
        shown = (frame.height, frame.width) if orientation.transpose else (frame.width, frame.height)
        if self.crop is None:
            self.crop = self._choose_crop((width / height) / (shown[0] / shown[1]))
        crop = orientation.coded(self.crop)
        x, w = _pixels(crop.x, crop.width, frame.width)
        y, h = _pixels(crop.y, crop.height, frame.height)
        flip_x, flip_y = orientation.flip_x != self._flip, orientation.flip_y
        self._transpose = orientation.transpose
        if self._transpose:  # the graph works on the coded frame, whose rows are the displayed columns
            height, width, flip_x, flip_y = width, height, flip_y, flip_x
        self._turn = (_along(height, flip_y), _along(width, flip_x))
        graph = av.filter.Graph()
        graph.threads = 1
        buffer = (
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000"
            f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        )
        steps = [graph.add("buffer", buffer)]
        if (w, h) != (frame.width, frame.height):
            steps.append(graph.add("crop", f"{w}:{h}:{x}:{y}"))
        steps.append(graph.add("scale", f"{width}:{height}:flags=bilinear"))
        steps.append(graph.add("format", self._pixel_format))
        steps.append(graph.add("buffersink"))
        graph.link_nodes(*steps).configure()
        return graph


def _along(size: int, backward: bool) -> slice:
    """The first `size` entries of a (padded) axis, forward or backward."""
    return slice(size - 1, None, -1) if backward else slice(0, size)


def _pixels(start: float, length: float, size: int) -> tuple[int, int]:
    """A fraction of an axis in whole pixels: (start, length), at least 2 of them so that subsampled chroma survives."""
    pixels = min(size, max(2, round(length * size)))
    return min(round(start * size), size - pixels), pixels
