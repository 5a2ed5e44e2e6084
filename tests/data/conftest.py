"""Small real videos, made here: each frame carries its number as black and white stripes, to be read back by a test."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BITS = 8  # stripes: numbers up to 255
SHARED = Path(__file__).parents[2].parent / "shared" / "videos"
MakeVideo = Callable[..., Path]


def number_frame(number: int, width: int, height: int) -> np.ndarray:
    """RGB [height, width, 3]: BITS vertical stripes, the highest bit on the left, white for 1."""
    bits = (number >> np.arange(BITS)[::-1]) & 1
    row = np.where(bits, 235, 20).astype(np.uint8).repeat(width // BITS)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (height, width, 3)))


@pytest.fixture
def read_numbers() -> Callable[[object], list[int]]:
    """The numbers of a clip [C,T,H,W] that shows whole frames."""

    def read(clip: object) -> list[int]:
        pixels = np.asarray(clip)[0].astype(np.float32)
        stripes = pixels.reshape(*pixels.shape[:2], BITS, -1).mean((1, 3)) > 128
        return [int(n) for n in (stripes << np.arange(BITS)[::-1]).sum(-1)]

    return read


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """make_video(name, frames, ...) -> path of a video whose frames carry the numbers 0, 1, ..."""

    def make(
        name: str,
        frames: int,
        *,
        rate: int = 30,
        times: Sequence[int] | None = None,
        time_base: Fraction | None = None,
        size: tuple[int, int] = (64, 48),
        codec: str = "libx264",
        pixel_format: str = "yuv420p",
        options: dict[str, str] | None = None,
        muxer: dict[str, str] | None = None,
        audio: float = 0.0,
        paint: Callable[[int, int, int], np.ndarray] = number_frame,
    ) -> Path:
        """times: presentation times in units of time_base; size: (width, height); audio: seconds of silence."""
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        base = time_base or Fraction(1, rate)
        quality = {"preset": "ultrafast", "crf": "18", "bf": "2"} if codec == "libx264" else {}
        with av.open(str(path), "w", options=muxer or {}) as container:
            stream = container.add_stream(codec, rate=rate, options={**quality, **(options or {})})
            stream.width, stream.height = size
            stream.pix_fmt = pixel_format
            stream.codec_context.time_base = base
            stream.codec_context.thread_count = 1
            if audio:
                _add_silence(container, audio)
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(paint(number, *size), format="rgb24").reformat(format=pixel_format)
                frame.pts, frame.time_base = number if times is None else times[number], base
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


def _add_silence(container: av.container.OutputContainer, seconds: float) -> None:
    stream = container.add_stream("aac", rate=16000)
    for start in range(0, int(seconds * 16000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture
def rotate() -> Callable[[Path, tuple[int, int, int, int]], None]:
    """rotate(path, (a, b, c, d)) writes a display matrix (x' = a x + c y, y' = b x + d y) into an mp4's track header."""

    def write(path: Path, matrix: tuple[int, int, int, int]) -> None:
        data = bytearray(path.read_bytes())
        at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
        a, b, c, d = (value << 16 for value in matrix)
        data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(data)

    return write


@pytest.fixture
def shared_videos() -> Path:
    """The folder of real videos beside the checkout; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"no real videos at {SHARED}")
    return SHARED
