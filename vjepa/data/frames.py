"""Decoded frames of an open video in display order, leaving out the work on frames that nobody will see.

A clip shows one frame in four or so. In H.264 a frame says of itself whether others refer to it; those that are neither
shown nor referred to (most B-frames) are never handed to the decoder, and the others come out the same, bit for bit.
(HEVC says less: that no frame of the same temporal layer does.) Which frames are shown is known from the packets' times,
which are read a little ahead; where those could mislead, everything is decoded.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import av

from vjepa.data.container import VideoFile

JUMP = 1.0  # s; timestamps that step back further start anew (files joined end to end), less is rounding
OVERTAKEN = 32  # pictures (fields) of H.264 that may precede one in the file and follow it on the screen


class IrregularTimes(Exception):
    """Packets' times do not tell which frames are shown: decode them all."""


@dataclass(frozen=True)
class Shown:
    """A decoded frame, when it appears (s from the start of the video), and whether damaged data went into it."""

    time: float
    frame: av.VideoFrame
    damaged: bool


class AllFrames(Iterator[Shown]):
    """Every frame from where the file stands, with timestamps that never step back.

    Attributes:
        count: frames passed so far, whether they were decoded or left out.
        following: when the frame after the last one appears, where iteration ended before the file did; else None.
        left_out: when the last frame that was left out appears; minus infinity if none was.
    """

    def __init__(self, video: VideoFile):
        self.video, self.count, self.left_out = video, 0, -inf
        self.following: float | None = None
        self._frames = self._decode()

    def __next__(self) -> Shown:
        shown = next(self._frames)
        self.count += 1
        return shown

    def _decode(self) -> Iterator[Shown]:
        video, period = self.video, 1 / self.video.info.rate
        last, shift, damaged = -period, 0.0, False
        for packet in video.packets():
            video.deadline.check()
            video.lap("read")
            decoded = packet.decode()
            video.lap("decode")
            for frame in decoded:
                time = video.time_of(frame)
                time = last + period if time is None else time + shift
                if time <= last:
                    step = last + (period if last - time > JUMP else 1e-6) - time
                    shift += step if last - time > JUMP else 0.0
                    time += step
                damaged = frame.is_corrupt or (damaged and not frame.key_frame)
                yield Shown(time, frame, damaged)
                last = time


class ShownFrames(AllFrames):
    """The frames on screen at some times, and those that others refer to.

    Args:
        video: an open file for which `knows_disposable` is true.
        times: wanted times, ascending, in seconds from the first frame.

    Raises:
        IrregularTimes: while iterating; AllFrames must be used instead, from the beginning.
    """

    def __init__(self, video: VideoFile, times: Sequence[float]):
        super().__init__(video)
        self._wanted = times
        self._seen: list[float] = []  # when the frames of the packets read so far appear, sorted

    def _decode(self) -> Iterator[Shown]:
        last, damaged = -1 / self.video.info.rate, False
        for packet in self._packets():
            self.video.deadline.check()
            self.video.lap("read")
            decoded = self.video.stream.codec_context.decode(packet)
            self.video.lap("decode")
            for frame in decoded:
                time = self.video.time_of(frame)
                if time is None or time <= last or frame.interlaced_frame:  # each field may be a packet of its own
                    raise IrregularTimes
                damaged = frame.is_corrupt or (damaged and not frame.key_frame)
                yield Shown(time, frame, damaged)
                last = time

    def _packets(self) -> Iterator[av.Packet | None]:
        """The packets to decode, up to the last that matters; None at the end, for the frames the decoder holds back."""
        ahead: deque[tuple[float, av.Packet]] = deque()
        for time, packet in self._timed():
            ahead.append((time, packet))
            if len(ahead) <= OVERTAKEN:
                continue
            earliest = min(time for time, _ in ahead)
            if earliest > self._wanted[-1]:
                self.following = earliest
                yield None
                return
            time, packet = ahead.popleft()
            if self._needed(time, packet):
                yield packet
        yield from (packet for time, packet in ahead if self._needed(time, packet))
        yield None

    def _timed(self) -> Iterator[tuple[float, av.Packet]]:
        """The rest of the file's packets, and when their frames appear."""
        last_dts = None
        for packet in self.video.packets():
            self.video.deadline.check()
            if not packet.size:  # the end of the file
                return
            if packet.pts is None or (packet.dts is not None and last_dts is not None and packet.dts <= last_dts):
                raise IrregularTimes
            last_dts, time = packet.dts, self.video.seconds(packet.pts)
            if not packet.is_discard:  # by an edit list
                insort(self._seen, time)
            if len(self._seen) - bisect_right(self._seen, time) > OVERTAKEN:
                raise IrregularTimes
            yield time, packet

    def _needed(self, time: float, packet: av.Packet) -> bool:
        """Whether a packet must be decoded. What is still to come can only shorten its frame's time on screen."""
        if not self.video.disposable(packet):
            return True
        if packet.is_discard:
            return False
        later = bisect_right(self._seen, time)
        until = self._seen[later] if later < len(self._seen) else inf
        if bisect_left(self._wanted, time) < bisect_left(self._wanted, until):  # time <= t < until for some wanted t
            return True
        self.count += 1
        self.left_out = max(self.left_out, time)
        return False
