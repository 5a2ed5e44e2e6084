"""Frames of a clip by timestamp: seek to the keyframe before the first one, decode no further than the last.

The frame of time t is the one on screen at t: the last whose timestamp is <= t. That is right for constant and variable
frame rates alike. A clip whose frames are missing or damaged is refused, never filled up in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import av

from vjepa.data.container import VideoFile
from vjepa.data.errors import ClipError
from vjepa.data.transform import FrameWriter

SEEK_BACK = (0.0, 1.0, 10.0)  # s before the wanted time, while a seek lands too late; then from the beginning
JUMP = 1.0  # s; timestamps that step back further start anew (files joined end to end), less is rounding
LATE = 0.1  # s (or 2.5 frames, if longer) by which the first frame may follow the time at which the header begins


@dataclass(frozen=True)
class Shown:
    """A decoded frame, when it appears (s from the start of the video), and whether damaged data went into it."""

    time: float
    frame: av.VideoFrame
    damaged: bool


@dataclass(frozen=True)
class Reached:
    """How far reading got.

    Attributes:
        complete: every wanted time has its own frame; otherwise the video ended first and its last frame stands in.
        end: when the last decoded frame leaves the screen, s from the start of the video.
        frames: frames decoded, from wherever decoding began.
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
    for back in SEEK_BACK:
        if times[0] <= back or not video.has_times:
            break
        video.seek(times[0] - back)
        frames = _frames(video)
        first = next(frames, None)
        if first is not None and first.time <= times[0]:
            reached = _write(chain([first], frames), times, writer, video)
            if reached.complete or video.has_index:
                return reached
            break  # without an index, a seek can land behind a jump of the timestamps
    video.rewind()
    frames = _frames(video)
    first = next(frames, None)
    if first is None:
        raise ClipError(video.path, "no frame could be decoded", whole_file=True)
    if first.time > times[0] + max(LATE, 2.5 / video.info.rate):
        raise ClipError(video.path, f"nothing can be decoded before {first.time:.2f} s, {times[0]:.2f} s was wanted")
    return _write(chain([first], frames), times, writer, video)


def _write(frames: Iterator[Shown], times: Sequence[float], writer: FrameWriter, video: VideoFile) -> Reached:
    """Write each wanted time's frame; `frames` holds at least one."""
    shown, done, count = next(frames), 0, 1
    for following in frames:
        stop = done
        while stop < len(times) and times[stop] < following.time:
            stop += 1
        _write_one(shown, done, stop, writer, video)
        if stop == len(times):
            return Reached(True, following.time, count)
        shown, done, count = following, stop, count + 1
    end = shown.time + 1 / video.info.rate
    _write_one(shown, done, len(times), writer, video)
    return Reached(times[-1] < end, end, count)


def _write_one(shown: Shown, done: int, stop: int, writer: FrameWriter, video: VideoFile) -> None:
    if stop == done:
        return
    if shown.damaged:
        raise ClipError(video.path, f"the data of the frame at {shown.time:.2f} s is damaged")
    writer.write(shown.frame, done, stop)


def _frames(video: VideoFile) -> Iterator[Shown]:
    """Frames in display order from where the file stands, with timestamps that never step back."""
    period = 1 / video.info.rate
    last, shift, damaged = -period, 0.0, False
    for packet in video.packets():
        video.deadline.check()
        for frame in packet.decode():
            time = video.time_of(frame)
            time = last + period if time is None else time + shift
            if time <= last:
                step = last + (period if last - time > JUMP else 1e-6) - time
                shift += step if last - time > JUMP else 0.0
                time += step
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            yield Shown(time, frame, damaged)
            last = time
