"""Opening a video file: the stream to read, its times, and the decoder's words when something is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import av.error
import av.logging

from vjepa.data.errors import ClipError, ClipTimeout
from vjepa.data.h264 import is_disposable, length_bytes
from vjepa.data.stopwatch import Lap, no_lap

HIGHEST_RATE = 240.0  # frames/s; containers that know no rate claim their clock's instead (1000, 90000)
NOT_VIDEO = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
MATROSKA_TAG = "DURATION"  # when a stream ends, HH:MM:SS.nnnnnnnnn; the file's own duration is its longest stream's


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says (or, where it says nothing, what its packets say).

    Attributes:
        path: the file.
        duration: seconds from the first frame to the end of the last.
        rate: average frames per second.
        width, height: size of the coded frame in pixels, before any rotation.
        codec: name of the decoder.
    """

    path: str
    duration: float
    rate: float
    width: int
    height: int
    codec: str


class Deadline:
    """A time limit for reading one clip."""

    def __init__(self, path: str, seconds: float):
        self.path, self.seconds = path, seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise ClipTimeout when the limit has passed."""
        if time.monotonic() > self._end:
            raise self.error()

    def error(self) -> ClipTimeout:
        """The exception that says so."""
        return ClipTimeout(self.path, f"took longer than the limit of {self.seconds:g} s a clip")


@contextmanager
def decoder_errors(deadline: Deadline, whole_file: bool = False) -> Iterator[None]:
    """Turn FFmpeg's and the system's errors into ClipError, with what FFmpeg logged; keep that log off the terminal."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # or a second file with the same fault would be bad without a word
    try:
        with av.logging.Capture() as log:
            try:
                yield
            except ClipError as error:
                raise type(error)(error.path, error.reason + _words(log), error.whole_file) from None
            except av.error.ExitError:  # FFmpeg's own wait for data was cut off
                raise deadline.error() from None
            except (av.error.FFmpegError, OSError) as error:
                said = error.strerror or str(error) or type(error).__name__
                lasting = whole_file and not isinstance(error, OSError)  # a missing file or a network fault may pass
                raise ClipError(deadline.path, said + _words(log), lasting) from error
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)


def _words(log: list[tuple[int, str, str]]) -> str:
    """The last few different things the decoder logged, in brackets."""
    said = list(dict.fromkeys(f"{name}: {message.strip().rstrip('.')}" for _, name, message in log))[-3:]
    return f" [{'; '.join(said)}]" if said else ""


class VideoFile:
    """An open video; use as a context manager, so that the file and decoder are always closed.

    Args:
        deadline: names the file and the time limit for everything done with it.
        lap: told what each stretch of work was (see stopwatch).

    Raises:
        ClipError: the file cannot be opened, holds no video, or is known to be cut short.
    """

    def __init__(self, deadline: Deadline, lap: Lap = no_lap):
        self.path, self.deadline, self.lap = deadline.path, deadline, lap
        if os.path.isfile(self.path) and os.path.getsize(self.path) == 0:
            raise ClipError(self.path, "the file is empty", whole_file=True)
        self._open()
        try:
            self.has_times, self.has_index = True, bool(len(self.stream.index_entries))
            self._check_complete()
            start = self.stream.start_time
            self.time_base = float(self.stream.time_base or 0)
            self.origin = 0.0 if start is None else start * self.time_base
            self.info = self._read_info()
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.container.close()

    def packets(self) -> Iterator[av.Packet]:
        """The stream's packets from where the file stands."""
        self._untouched = False
        return self.container.demux(self.stream)

    def rewind(self) -> None:
        """Go to the beginning, by opening the file again: raw streams cannot seek even there."""
        if not self._untouched:
            self.container.close()
            self._open()

    def _open(self) -> None:
        self._untouched = True
        self.container = av.open(self.path, timeout=self.deadline.seconds, metadata_errors="replace")
        try:
            self.stream = self._choose_stream()
        except BaseException:
            self.container.close()
            raise
        self.stream.codec_context.thread_count = 1  # a worker is one thread: load does not depend on the machine
        self.stream.thread_type = "NONE"
        codec = self.stream.codec_context
        self._prefix = length_bytes(codec.extradata) if codec.name == "h264" and codec.has_b_frames else None
        self._avi = self.container.format.name == "avi"

    @property
    def knows_disposable(self) -> bool:
        """Whether `disposable` may find some: H.264 with B-frames in MP4, QuickTime or Matroska."""
        return self._prefix is not None

    def disposable(self, packet: av.Packet) -> bool:
        """Whether nothing but the packet's own frame needs it; False where that is not known."""
        return self._prefix is not None and is_disposable(packet, self._prefix)

    def seconds(self, stamp: int) -> float:
        """A timestamp of the stream, in seconds from the first frame."""
        return stamp * self.time_base - self.origin

    def time_of(self, frame: av.VideoFrame) -> float | None:
        """When a frame appears, in seconds from the first one; None where the file does not say."""
        if self._avi:  # stores decode times only; libavformat's guess at pts is out of order
            stamp = None if frame.dts is None else frame.dts - int(self.stream.codec_context.has_b_frames)
        else:
            stamp = frame.pts
        return None if stamp is None else self.seconds(stamp)

    @property
    def has_display_times(self) -> bool:
        """Whether the file says when each frame appears; AVI says only when it is decoded."""
        return self.has_times and not self._avi

    @property
    def needs_first_packet(self) -> bool:
        """Old x264 wrote 4:4:4 with a bug that the decoder undoes once it has read the version in the first packet."""
        return bool(self.stream.codec_context.name == "h264" and self.stream.format.name == "yuv444p")

    def seek(self, seconds: float) -> None:
        """Go to the keyframe at or before a time (seconds from the first frame)."""
        if self.needs_first_packet:
            next(self.packets()).decode()
        self._untouched = False
        self.container.seek(int((seconds + self.origin) / self.time_base), stream=self.stream)

    def _choose_stream(self) -> av.VideoStream:
        """The largest moving picture: neither cover art nor, when there are several, simply the first."""
        streams = [s for s in self.container.streams.video if not s.disposition & NOT_VIDEO and s.width and s.height]
        if not streams:
            kinds = sorted({s.type for s in self.container.streams if s.type != "video"})
            cover = " but cover art" if self.container.streams.video else ""
            found = ", ".join(kinds) or "none"
            raise ClipError(self.path, f"no video stream{cover} (streams: {found})", whole_file=True)
        return max(streams, key=lambda s: (s.width * s.height, s.frames, -s.index))

    def _check_complete(self) -> None:
        """An index that points past the end of the file proves that the file is cut short."""
        index = self.stream.index_entries
        if not self.has_index:
            return
        end, size = index[-1].pos + index[-1].size, os.path.getsize(self.path)
        if end > size:
            reason = f"cut short: its index runs to byte {end}, the file ends at {size}"
            raise ClipError(self.path, reason, whole_file=True)

    def _read_info(self) -> VideoInfo:
        stream = self.stream
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        duration = self._header_duration()
        if duration is None or not 0 < rate <= HIGHEST_RATE:
            duration, rate = self._scan(rate if 0 < rate <= HIGHEST_RATE else None)
        return VideoInfo(self.path, duration, rate, stream.width, stream.height, stream.codec_context.name)

    def _header_duration(self) -> float | None:
        stream, container = self.stream, self.container
        if stream.duration:
            return stream.duration * self.time_base
        matroska = "matroska" in container.format.name  # its durations count from time 0, not from the first frame
        offset = self.origin if matroska else 0.0
        tag = next((value for key, value in stream.metadata.items() if key.upper() == MATROSKA_TAG), None)
        if matroska and tag:
            hours, minutes, seconds = tag.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - offset
        if container.duration:
            return container.duration / av.time_base - offset
        return None

    def _scan(self, rate: float | None) -> tuple[float, float]:
        """(duration, rate) from the packets, for files whose header tells neither; nothing is decoded."""
        times = []
        count = 0
        for packet in self.packets():
            self.deadline.check()
            if packet.size:
                count += 1
                if packet.pts is not None:
                    times.append(packet.pts * self.time_base)
        self.rewind()
        self.has_times = bool(times)
        covered = max(times) - min(times) if len(times) > 1 else 0.0
        if rate is None:
            if covered <= 0:
                raise ClipError(self.path, "has neither a frame rate nor timestamps", whole_file=True)
            rate = (len(times) - 1) / covered
        return (covered + 1 / rate if covered > 0 else count / rate), rate


def probe_video(path: str | os.PathLike[str], timeout: float = 30.0) -> VideoInfo:
    """What a video file says about itself.

    Args:
        path: the file.
        timeout: time limit in seconds.

    Raises:
        ClipError: it cannot be opened or holds no video.
    """
    deadline = Deadline(os.fspath(path), timeout)
    with decoder_errors(deadline, whole_file=True), VideoFile(deadline) as video:
        return video.info
