"""Frames of a clip by torchcodec, on the CPU or by NVDEC, in place of `decode` and `transform`.

The header is read by PyAV as ever: it says which stream, how long and how fast, so a clip lies where it would with
decoder "pyav", and its frames are the same ones by timestamp. Differences:
  - the same rectangle is resized (antialiased, bilinear) as RGB by PyTorch, not as YUV by FFmpeg: pixels of real videos
    differ by less than 2 levels of 255 on average; grey is a weighted sum of red, green and blue;
  - all packets of a file are read once to learn their times, so opening costs more the longer the video is;
  - files without presentation times (AVI, raw streams) are refused, as are most that begin without a keyframe or change
    their frame size, and clips at a beginning that an edit list cut off in the middle of a group of frames; damage that
    the decoder hides is not noticed;
  - the time limit is looked at between frames only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vjepa.data.container import VideoFile
from vjepa.data.decode import LATE, Reached
from vjepa.data.errors import ClipError, DataError
from vjepa.data.transform import Crop, colour_step, crop_rectangle

Decoder = Literal["pyav", "torchcodec", "torchcodec:cuda"]
DECODERS: tuple[Decoder, ...] = ("pyav", "torchcodec", "torchcodec:cuda")
GREY = {"bt709": (0.2126, 0.7152, 0.0722), "bt2020nc": (0.2627, 0.678, 0.0593)}  # luma of red, green, blue
GREY_ELSE = (0.299, 0.587, 0.114)  # BT.601
LONGEST = 200  # characters of a message
ROUNDING = 1e-6  # s; torchcodec gives times as floats


@cache
def video_decoder() -> Any:
    """torchcodec's VideoDecoder; DataError where it is missing or cannot be loaded."""
    try:
        decoder = importlib.import_module("torchcodec.decoders").VideoDecoder
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchcodec":
            raise
        get = "get it with: pip install 'vjepa[torchcodec]', or use decoder pyav"
        raise DataError(f"decoder torchcodec needs the package torchcodec, which is not installed; {get}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise DataError(_not_loaded(error)) from error
    try:
        decoder(b"no video")  # some versions look for FFmpeg only now
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if "libtorchcodec" in str(error):
            raise DataError(_not_loaded(error)) from error
    return decoder


def _not_loaded(error: Exception) -> str:
    cause = error.__cause__ or error.__context__ or error  # "could not load this library" comes of what is said there
    need = "it needs FFmpeg's shared libraries and the torch it was built for; decoder pyav needs neither"
    return f"torchcodec does not load: {_first_line(cause)}; {need}"


def check_decoder(decoder: Decoder) -> None:
    """ValueError for an unknown decoder; DataError, with what is missing, for one that cannot run here."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    if decoder == "pyav":
        return
    video_decoder()
    if decoder == "torchcodec:cuda" and not torch.cuda.is_available():
        raise DataError(
            "decoder torchcodec:cuda needs a CUDA device, and this torch finds none; use torchcodec or pyav"
        )


class TensorWriter:
    """Writes chosen frames of one video into a clip, uint8 [C,T,H,W], as FrameWriter does.

    Args:
        num_frames, image_size, channels, choose_crop, flip: as for FrameWriter.
        decoder: "torchcodec" or "torchcodec:cuda"; frames are cropped and resized where they are decoded.
    """

    def __init__(
        self,
        num_frames: int,
        image_size: tuple[int, int],
        channels: int,
        choose_crop: Callable[[float], Crop],
        flip: bool,
        decoder: Decoder,
    ):
        self.device = decoder.partition(":")[2] or "cpu"
        self.crop: Crop | None = None
        self.luma, self.step = GREY_ELSE, (1, 1)
        self._size, self._choose_crop, self._flip = image_size, choose_crop, flip
        self._clip = torch.empty((channels, num_frames, *image_size), dtype=torch.uint8, device=self.device)

    @property
    def clip(self) -> np.ndarray:
        """The clip on the host."""
        return self._clip.cpu().numpy()

    def write(self, frame: Tensor, first: int, stop: int) -> None:
        """Write `frame`, uint8 RGB [3,h,w], to clip positions first..stop-1."""
        (height, width), (shown_h, shown_w) = self._size, frame.shape[1:]
        if self.crop is None:
            self.crop = self._choose_crop((width / height) / (shown_w / shown_h))
        x, y, w, h = crop_rectangle(self.crop, shown_w, shown_h, self.step)
        pixels = frame[None, :, y : y + h, x : x + w].contiguous(memory_format=torch.channels_last)
        if len(self._clip) == 1:
            pixels = torch.einsum("nchw,c->nhw", pixels.float(), pixels.new_tensor(self.luma, dtype=torch.float32))[
                :, None
            ]
        elif self.device != "cpu":  # only there can bytes be interpolated
            pixels = pixels.float()
        pixels = interpolate(pixels, self._size, mode="bilinear", antialias=True, align_corners=False)
        if pixels.is_floating_point():
            pixels = pixels.round_().clamp_(0, 255).to(torch.uint8)
        self._clip[:, first:stop] = (pixels.flip(-1) if self._flip else pixels)[0][:, None]


def read_frames(video: VideoFile, times: Sequence[float], writer: TensorWriter) -> Reached:
    """Write the frames on screen at `times` into positions 0, 1, ... of a clip; as `decode.read_frames`.

    Raises:
        ClipError: the file cannot be read, wanted frames are missing, or the time limit has passed.
        DataError: torchcodec cannot be used.
    """
    make = video_decoder()
    if not video.has_display_times:
        reason = "it does not say when frames are shown, which torchcodec needs; decoder pyav reads it"
        raise ClipError(video.path, reason, whole_file=True)
    try:
        source = make(
            video.path,
            stream_index=video.stream.index,
            num_ffmpeg_threads=1,
            device=writer.device,
            seek_mode="exact",
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        lasting = writer.device == "cpu"  # a GPU may only be short of something for a while
        raise ClipError(video.path, f"torchcodec: {_first_line(error)}", whole_file=lasting) from error
    video.lap("open")
    try:
        return _read(source, video, times, writer)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise ClipError(video.path, f"torchcodec: {_first_line(error)}") from error


def _read(source: Any, video: VideoFile, times: Sequence[float], writer: TensorWriter) -> Reached:
    about = source.metadata
    writer.luma = GREY.get(about.color_space, GREY_ELSE)
    step = colour_step(video.stream.format)
    writer.step = step if about.width == video.info.width else step[::-1]  # the other way round where it is turned
    if video.needs_first_packet:
        source.get_frame_at(0)
    begin, end = about.begin_stream_seconds - video.origin, about.end_stream_seconds - video.origin
    if begin > times[0] + max(LATE, 2.5 / video.info.rate):
        raise ClipError(video.path, f"nothing can be decoded before {begin:.2f} s, {times[0]:.2f} s was wanted")
    done = 0
    while done < len(times):
        video.deadline.check()
        if times[done] < end:
            wanted = max(begin, times[done]) + video.origin
            # get_frame_played_at, for a single time, takes a later frame where the frames' durations leave a gap
            found = source.get_frames_played_at([wanted])
            if found.pts_seconds[0] > wanted + ROUNDING:
                gives = f"torchcodec gives the frame of {found.pts_seconds[0]:.2f} s for {wanted:.2f} s"
                raise ClipError(video.path, gives)
        else:  # the video is over: its last frame stays
            found = source.get_frames_at([len(source) - 1])
        video.lap("decode")
        until = float(found.pts_seconds[0] + found.duration_seconds[0]) - video.origin - ROUNDING
        until = until if times[done] < end else inf
        stop = done + 1
        while stop < len(times) and times[stop] < until:
            stop += 1
        writer.write(found.data[0], done, stop)
        video.lap("filter")
        done = stop
    return Reached(times[-1] < end, end, len(source))


def _first_line(error: BaseException) -> str:
    """What torchcodec says, without the place in its sources that it puts before it."""
    text = " ".join(str(error).split()) or type(error).__name__
    _, place, after = text.rpartition(".cpp:")  # "function, file.cpp:358, what is wrong"
    said = after.partition(", ")[2] if place else text
    return (said if len(said) <= LONGEST else said[:LONGEST].rpartition(" ")[0] + " ...").rstrip(". ")
