"""Generated motion clips: real H.264 files whose label is *how* the picture moves, not what it shows.

A textured background and six textured ellipses before it move together, each at its own pace (parallax):

    left, right, up, down      constant velocity
    clockwise, anticlockwise   all turn at a constant rate, about a point near the middle that drifts slowly
    shake_x, shake_y           to and fro along one axis

Textures, shapes, places, orientations, speeds and phases are drawn alike for every kind, and every layer is an endless
plane, so the distribution of a *single* rendered frame is the same for all: only the change between frames tells them
apart. All textures share one spectrum and one contrast: the motion is nearly the only thing that one part of a clip tells
of another. Everything is a pure function of seed, index, label and size.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from numbers import Integral
from pathlib import Path

import numpy as np

CLASSES = ("left", "right", "up", "down", "clockwise", "anticlockwise", "shake_x", "shake_y")
SIZE = 64  # px; lengths below are for frames of this size and grow with it
OBJECTS = 6
CONTRAST = 0.2  # standard deviation of every texture, of a range of 0..1
LONGEST_WAVE = 17.0  # px: about a patch of the demo, so that the look of one hardly tells that of its neighbours
SPEED = (1.0, 2.0)  # px a frame
SPIN = (0.04, 0.08)  # rad a frame: 1.3 to 2.6 px a frame at the middle of an edge
SWING, PERIOD = (3.0, 5.5), (8.0, 14.0)  # px either way, frames
DRIFT = 0.3  # px a frame at most, any direction, for kinds that stay in place: nothing rests
PACE = (0.7, 1.3)  # of an object, relative to the background


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Periodic filtered noise around grey, float32 [size, size]: amplitude f^-2 on average, up to the longest wave."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    lowest = SIZE / size / LONGEST_WAVE
    amplitude = np.where(frequency >= lowest, 1.0 / np.maximum(frequency, lowest), 0.0) ** 2
    image = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * amplitude).real
    return (0.5 + CONTRAST * image / image.std()).astype(np.float32)


def _sample(texture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear lookup on the plane that the texture tiles; y, x in pixels, of one shape, which is the result's."""
    size = texture.shape[0]
    below_y, below_x = np.floor(y), np.floor(x)
    fy, fx = y - below_y, x - below_x
    y0, x0 = below_y.astype(np.int32) % size, below_x.astype(np.int32) % size
    y1, x1 = (y0 + 1) % size, (x0 + 1) % size
    top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    return top * (1 - fy) + (texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx) * fy


def _plane(size: int, shift_T2: np.ndarray, angle_T: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of each frame lies on a layer's own plane: y, x in px, float32 [T, size, size].

    The layer has been turned by `angle_T` (rad, + is clockwise, as y points down) about `origin`, the point of the plane
    that lies in the middle of the picture, and then moved by `shift_T2` (y, x in px).
    """
    pixel = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    shift_T2, origin = shift_T2.astype(np.float32), origin.astype(np.float32)
    dy = pixel[None, :, None] - shift_T2[:, 0, None, None]
    dx = pixel[None, None, :] - shift_T2[:, 1, None, None]
    cos, sin = (part.astype(np.float32)[:, None, None] for part in (np.cos(angle_T), np.sin(angle_T)))
    return cos * dy - sin * dx + origin[0], sin * dy + cos * dx + origin[1]


def render_clip(seed: int, index: int, label: int, num_frames: int = 24, size: int = SIZE) -> np.ndarray:
    """One clip as uint8 [num_frames, size, size, 3] (grey RGB); `label` indexes CLASSES, `size` is in pixels.

    Raises ValueError or TypeError naming the argument: seed and index at least 0, num_frames at least 1, size at least 16.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("index", index, 0),
        ("num_frames", num_frames, 1),
        ("size", size, 16),
    ):
        _check_int(name, value, least)
    _check_int("label", label, 0)
    if label >= len(CLASSES):
        raise ValueError(f"label must be within 0..{len(CLASSES) - 1}, got {label}")
    rng = np.random.default_rng([seed, index])  # every draw below is made for every label, in one order
    shift_T2, turn_T = _motion(rng, CLASSES[label], num_frames, size / SIZE)

    def layer(pace: float) -> tuple[np.ndarray, np.ndarray]:
        return _plane(size, pace * shift_T2, rng.uniform(0, 2 * np.pi) + pace * turn_T, rng.uniform(0, size, 2))

    video = _sample(_texture(rng, size), *layer(1.0))
    for _ in range(OBJECTS):
        radius, stretch = size / SIZE * rng.uniform(6, 11), rng.uniform(1.0, 1.8)
        surface = _texture(rng, size)
        y, x = ((part + size / 2) % size - size / 2 for part in layer(rng.uniform(*PACE)))  # one on each tile
        alpha = np.clip(radius + 0.5 - np.hypot(x / stretch, y), 0, 1)  # about a pixel of soft edge
        inside = np.nonzero(alpha)
        video[inside] += alpha[inside] * (_sample(surface, y[inside], x[inside]) - video[inside])
    return np.rint(255 * video.clip(0, 1)).astype(np.uint8)[..., None].repeat(3, axis=-1)


def _motion(rng: np.random.Generator, name: str, num_frames: int, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """The background's shift [T, 2] (y, x in px) and turn [T] (rad) since the first frame; `unit` scales lengths."""
    speed, spin = unit * rng.uniform(*SPEED), rng.uniform(*SPIN)
    swing, period, start = unit * rng.uniform(*SWING), rng.uniform(*PERIOD), rng.uniform(0, 2 * np.pi)
    drift, direction = unit * DRIFT * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)  # evenly from a disc
    drifting = (drift * np.sin(direction), drift * np.cos(direction))
    velocity = {"left": (0, -speed), "right": (0, speed), "up": (-speed, 0), "down": (speed, 0)}.get(name, drifting)
    axis = {"shake_x": (0.0, 1.0), "shake_y": (1.0, 0.0)}.get(name, (0.0, 0.0))
    turn = {"clockwise": spin, "anticlockwise": -spin}.get(name, 0.0)
    time = np.arange(num_frames)
    sway = swing * np.sin(2 * np.pi * time / period + start)
    return np.outer(time, velocity) + np.outer(sway, axis), turn * time


def encode_clip(path: str | os.PathLike[str], frames: np.ndarray, fps: int = 24) -> None:
    """Write uint8 frames [T, H, W, 3] (RGB, even H and W) as an H.264 mp4 (yuv420p, crf 20), complete or not at all.

    `fps` in frames a second. Raises ValueError where the frames are not as above.
    """
    import av

    _check_int("fps", fps, 1)
    whole = frames.ndim == 4 and frames.shape[0] > 0 and frames.shape[3] == 3 and min(frames.shape[1:3]) > 0
    if frames.dtype != np.uint8 or not whole or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] with even H and W, got {frames.dtype} {list(frames.shape)}"
        )
    partial_path = Path(f"{os.fspath(path)}.part")
    with av.open(str(partial_path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.time_base = Fraction(1, fps)
        # Without mbtree: on frames this small x264's macroblock tree reads memory it never set, so that bytes vary by run.
        stream.options = {"crf": "20", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    partial_path.replace(path)


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _write(index: int, folder: Path, seed: int, num_frames: int, size: int) -> tuple[str, int]:
    label = index % len(CLASSES)
    name = f"{CLASSES[label]}/{index:05d}.mp4"
    encode_clip(folder / name, render_clip(seed, index, label, num_frames, size))
    return name, label


def write_motion_clips(
    folder: str | os.PathLike[str],
    count: int,
    *,
    seed: int = 0,
    num_frames: int = 24,
    size: int = SIZE,
    workers: int = 2,
) -> Iterator[int]:
    """Write `count` clips as folder/<class>/<index>.mp4 and folder/labels.csv (path,label); classes take turns.

    Yields the number written so far (an iterator, so that the caller can show progress: nothing is written until it is
    consumed). `size` in pixels, even and at least 16; `num_frames` at 24 frames a second, at least 2; `workers` processes.
    Raises ValueError or TypeError naming the argument.
    """
    least = {"count": (count, 1), "seed": (seed, 0), "num_frames": (num_frames, 2), "size": (size, 16)}
    for name, (value, low) in {**least, "workers": (workers, 1)}.items():
        _check_int(name, value, low)
    if size % 2:
        raise ValueError(f"size must be even, got {size}")
    return _write_all(Path(folder), count, seed, num_frames, size, workers)


def _write_all(folder: Path, count: int, seed: int, num_frames: int, size: int, workers: int) -> Iterator[int]:
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    job = partial(_write, folder=folder, seed=seed, num_frames=num_frames, size=size)
    rows = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for row in pool.map(job, range(count), chunksize=8):
            rows.append(row)
            yield len(rows)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        writer.writerows(rows)
