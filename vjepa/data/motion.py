"""Generated motion clips: real H.264 files whose label is *how* things move, not what they look like.

Ten textured ellipses move alike over a textured background that drifts by itself. The eight kinds

    left, right, up, down      constant velocity
    clockwise, anticlockwise   each turns about its own centre at a constant rate
    shake_x, shake_y           to and fro along one axis

Textures, shades, sizes, places, speeds, phases and drift are drawn alike for every kind, and the world is a torus
(what leaves on one side comes back on the other), so the distribution of a *single* frame is the same for all: only the
change between frames tells them apart. Everything is a pure function of (seed, index).
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
OBJECTS = 10
CENTRE_DRIFT = 0.4  # px a frame at most, for kinds that stay in place: a resting centre would give them away
BACKGROUND_DRIFT = 0.5  # px a frame at most, any direction, for every kind


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth periodic noise, float32 [size, size], mean 0 and standard deviation 1: random phases, amplitude f^-1.2."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    amplitude = np.where(frequency > 0, 1.0 / np.maximum(frequency, 1.0 / size), 0.0) ** 1.2
    image = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * amplitude).real
    return (image / image.std()).astype(np.float32)


def _shift(texture: np.ndarray, y: float, x: float) -> np.ndarray:
    """The texture moved by (y, x) pixels on the torus, bilinear."""
    for axis, by in ((0, y), (1, x)):
        whole = int(np.floor(by))
        part = np.float32(by - whole)
        texture = (1 - part) * np.roll(texture, whole, axis) + part * np.roll(texture, whole + 1, axis)
    return texture


def _sample(texture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear lookup on a torus; y, x in pixels, of one shape, which is the result's."""
    size = texture.shape[0]
    y0, x0 = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    fy, fx = (y - y0).astype(np.float32), (x - x0).astype(np.float32)
    y0, x0 = y0 % size, x0 % size
    y1, x1 = (y0 + 1) % size, (x0 + 1) % size
    top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    return top * (1 - fy) + (texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx) * fy


def _within(rng: np.random.Generator, most: float) -> tuple[float, float]:
    """A point (y, x) drawn evenly from a disc of radius `most`."""
    length, angle = most * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
    return length * np.sin(angle), length * np.cos(angle)


def render_clip(seed: int, index: int, label: int, num_frames: int = 32, size: int = 48) -> np.ndarray:
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
    unit = size / 48  # lengths below are in pixels of a 48 x 48 frame
    background = 0.5 + 0.06 * _texture(rng, size)
    speed, spin = unit * rng.uniform(1.0, 2.0), rng.uniform(0.10, 0.20)  # px, rad a frame
    swing, period, start = unit * rng.uniform(3.0, 5.5), rng.uniform(8, 14), rng.uniform(0, 2 * np.pi)
    drift, scroll = _within(rng, unit * CENTRE_DRIFT), _within(rng, unit * BACKGROUND_DRIFT)

    name = CLASSES[label]
    velocity = {"left": (0, -speed), "right": (0, speed), "up": (-speed, 0), "down": (speed, 0)}.get(name, drift)
    turn = {"clockwise": spin, "anticlockwise": -spin}.get(name, 0.0)
    axis = {"shake_x": (0.0, 1.0), "shake_y": (1.0, 0.0)}.get(name, (0.0, 0.0))
    time = np.arange(num_frames)
    sway = swing * np.sin(2 * np.pi * time / period + start)

    video = np.stack([_shift(background, scroll[0] * t, scroll[1] * t) for t in time])
    for _ in range(OBJECTS):
        centre, angle = rng.uniform(0, size, size=2), rng.uniform(0, 2 * np.pi)
        radius, stretch, pace = unit * rng.uniform(3, 6), rng.uniform(1.4, 2.2), rng.uniform(0.85, 1.15)
        surface = np.clip(rng.choice([0.12, 0.88]) + 0.12 * _texture(rng, size), 0, 1)
        y_T = centre[0] + pace * (velocity[0] * time + axis[0] * sway)
        x_T = centre[1] + pace * (velocity[1] * time + axis[1] * sway)
        _paint(video, surface, y_T, x_T, angle + pace * turn * time, radius, stretch)
    return np.rint(255 * video.clip(0, 1)).astype(np.uint8)[..., None].repeat(3, axis=-1)


def _paint(
    video: np.ndarray,
    surface: np.ndarray,
    y_T: np.ndarray,
    x_T: np.ndarray,
    angle_T: np.ndarray,
    radius: float,
    stretch: float,
) -> None:
    """Lays an ellipse over video [T, S, S] in place: centres in px, angles in rad, half axes radius * stretch and radius."""
    size = video.shape[1]
    grid = np.arange(size)
    dy = (grid[None, :, None] - y_T[:, None, None] + size / 2) % size - size / 2  # nearest image on the torus
    dx = (grid[None, None, :] - x_T[:, None, None] + size / 2) % size - size / 2
    frame, row, column = np.nonzero(np.hypot(dy, dx) < radius * stretch + 1)
    dy, dx = dy[frame, row, 0], dx[frame, 0, column]
    cos, sin = np.cos(angle_T)[frame], np.sin(angle_T)[frame]
    own_x, own_y = cos * dx + sin * dy, -sin * dx + cos * dy  # the ellipse's own axes; y points down: + is clockwise
    edge = radius - np.hypot(own_x / stretch, own_y)
    alpha = np.clip(edge + 0.5, 0, 1).astype(np.float32)  # about a pixel of soft edge
    video[frame, row, column] += alpha * (_sample(surface, own_y, own_x) - video[frame, row, column])


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
    folder: str | os.PathLike[str], count: int, *, seed: int = 0, num_frames: int = 32, size: int = 48, workers: int = 2
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
