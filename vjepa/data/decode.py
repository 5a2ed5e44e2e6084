"""Frames of a clip by timestamp: seek to the keyframe before the first one, decode no further than the last.

The frame of time t is the one on screen at t: the last whose timestamp is <= t. That is right for constant and variable
frame rates alike. A clip whose frames are missing or damaged is refused, never filled up in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vjepa.data.container import VideoFile
from vjepa.data.errors import ClipError
from vjepa.data.frames import AllFrames, IrregularTimes, Shown, ShownFrames
from vjepa.data.transform import FrameWriter

SEEK_BACK = (0.0, 1.0, 10.0)  # s before the wanted time, while a seek lands too late; then from the beginning
LATE = 0.1  # s (or 2.5 frames, if longer) by which the first frame may follow the time at which the header begins


@dataclass(frozen=True)
class Reached:
    """How far reading got.

    Attributes:
        complete: every wanted time has its own frame; otherwise the video ended first and its last frame stands in.
        end: when the last decoded frame leaves the screen, s from the start of the video.
        frames: frames passed, from wherever decoding began.
    """

    complete: bool
    end: float
    frames: int


def read_frames(video: VideoFile, times: Sequence[float], writer: FrameWriter) -> Reached:
    """Write the frames on screen at `times` into positions 0, 1, ... of a clip.

    Args:
        video: an open file.
        times: ascending, in seconds from the first frame.
        writer: takes the frames.

    Raises:
        ClipError: wanted frames are missing at the beginning or damaged, or the time limit has passed.
    """
    if video.knows_disposable:
        try:
            return _read(video, times, writer, partial(ShownFrames, times=times))
        except IrregularTimes:
            pass
    return _read(video, times, writer, AllFrames)


def _read(
    video: VideoFile, times: Sequence[float], writer: FrameWriter, decode: Callable[[VideoFile], AllFrames]
) -> Reached:
    for back in SEEK_BACK:
        if times[0] <= back or not video.has_times:
            break
        video.seek(times[0] - back)
        video.lap("seek")
        frames = decode(video)
        first = next(frames, None)
        if first is not None and first.time <= times[0]:
            reached = _write(first, frames, times, writer)
            if reached.complete or video.has_index:
                return reached
            break  # without an index, a seek can land behind a jump of the timestamps
    video.rewind()
    video.lap("seek")
    frames = decode(video)
    first = next(frames, None)
    if first is None:
        raise ClipError(video.path, "no frame could be decoded", whole_file=True)
    if first.time > times[0] + max(LATE, 2.5 / video.info.rate):
        raise ClipError(video.path, f"nothing can be decoded before {first.time:.2f} s, {times[0]:.2f} s was wanted")
    return _write(first, frames, times, writer)


def _write(first: Shown, frames: AllFrames, times: Sequence[float], writer: FrameWriter) -> Reached:
    """Write each wanted time's frame; `first` is on screen at the first one."""
    video, shown, done = frames.video, first, 0
    for following in frames:
        stop = done
        while stop < len(times) and times[stop] < following.time:
            stop += 1
        _write_one(shown, done, stop, writer, video)
        if stop == len(times):
            return Reached(True, following.time, frames.count - 1)
        shown, done = following, stop
    end = frames.following or max(shown.time, frames.left_out) + 1 / video.info.rate
    _write_one(shown, done, len(times), writer, video)
    return Reached(times[-1] < end, end, frames.count)


def _write_one(shown: Shown, done: int, stop: int, writer: FrameWriter, video: VideoFile) -> None:
    if stop == done:
        return
    if shown.damaged:
        raise ClipError(video.path, f"the data of the frame at {shown.time:.2f} s is damaged")
    writer.write(shown.frame, done, stop)
    video.lap("filter")
