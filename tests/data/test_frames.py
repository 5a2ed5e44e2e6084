"""Frames that are neither shown nor referred to are left out, and what is shown stays the same, bit for bit."""

from fractions import Fraction

import av
import numpy as np
import pytest

from vjepa.data.clip import ClipSpec, FixedPlacement, RandomPlacement, load_clip
from vjepa.data.container import Deadline, VideoFile
from vjepa.data.frames import OVERTAKEN, AllFrames, IrregularTimes, ShownFrames
from vjepa.data.h264 import is_disposable, length_bytes

KINDS = {
    "B-frames in mp4": ("a.mp4", {"bf": "3", "g": "30", "b-pyramid": "none"}),
    "B-pyramid in mp4": ("a.mp4", {"bf": "3", "g": "30", "b-pyramid": "normal", "b_strategy": "0"}),
    "B-frames in mkv": ("a.mkv", {"bf": "3", "g": "30", "b_strategy": "0"}),
    "open groups in mov": ("a.mov", {"x264-params": "open-gop=1:bframes=3:keyint=20"}),
}


@pytest.fixture
def everything(monkeypatch):
    """Makes reading decode every frame."""
    return lambda: monkeypatch.setattr(VideoFile, "knows_disposable", property(lambda _: False))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_frames_are_decoded_and_those_shown_are_all_there(kind, make_video):
    name, options = KINDS[kind]
    path = str(make_video(name, 100, options=options))
    with VideoFile(Deadline(path, 30.0)) as video:
        assert video.knows_disposable
        wanted = range(3, 64, 4)
        frames = ShownFrames(video, [(number + 0.5) / video.info.rate for number in wanted])
        decoded = [round(shown.time * video.info.rate) for shown in frames]
    with av.open(path) as container:  # FFmpeg's own opinion of what others refer to
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        referred_to = {round(frame.time * 30) for frame in container.decode(video=0)}
    assert decoded == sorted({*wanted, *(number for number in referred_to if number <= decoded[-1])})
    assert 64 - len(decoded) >= 10, "at least a sixth is left out"
    assert 64 <= frames.count < 64 + OVERTAKEN, "and counted"
    assert wanted[-1] < frames.following * 30 - 0.5 <= 64 + OVERTAKEN


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_decoding_everything(kind, make_video, everything):
    name, options = KINDS[kind]
    noise = np.random.default_rng(0).integers(0, 256, (160, 48, 64, 3), np.uint8)
    path = str(make_video(name, 70, options=options, paint=lambda number, w, h: noise[number]))
    cases = [(stride, seed) for stride in (1, 2, 4, 7) for seed in range(5)]

    def read():
        clips = []
        for stride, seed in cases:
            placement = RandomPlacement(np.random.default_rng(seed), (0.3, 1.0), (0.75, 1.35), True)
            clips.append(load_clip(path, ClipSpec(8, (32, 40), stride), placement))
        return clips

    fast = read()
    everything()
    for ours, expected in zip(fast, read(), strict=True):
        assert ours.start == expected.start
        np.testing.assert_array_equal(ours.pixels, expected.pixels)


def test_a_video_shorter_than_its_clip_counts_the_frames_left_out(make_video, read_numbers):
    path = str(make_video("a.mp4", 21, options={"bf": "3", "b_strategy": "0"}))
    clip = load_clip(path, ClipSpec(8, (48, 64), 4, min_frames=21), FixedPlacement(0.0))
    assert read_numbers(clip.pixels) == [0, 4, 8, 12, 16, 20, 20, 20]


def test_a_frame_left_out_at_the_end_shows_until_when_the_one_before_it_was_there(
    make_video, read_numbers, monkeypatch
):
    times = [*range(0, 400, 20), 2400]  # ms; the last frame but one stays for two seconds
    path = str(make_video("v.mkv", 21, times=times, time_base=Fraction(1, 1000), options={"bf": "2"}))
    told = VideoFile.disposable
    monkeypatch.setattr(
        VideoFile, "disposable", lambda self, packet: self.seconds(packet.pts) > 2 or told(self, packet)
    )
    spec = ClipSpec(5, (48, 64), 4, fps=5)
    clip = load_clip(path, spec, FixedPlacement(1.0))
    assert read_numbers(clip.pixels) == [19] * 5
    with VideoFile(Deadline(path, 30.0)) as video:
        frames = ShownFrames(video, [1.0, 2.3])
        assert round(max(shown.time for shown in frames), 2) == 0.38
        assert round(frames.left_out, 2) == 2.4


@pytest.mark.parametrize("name", ["a.ts", "a.avi", "a.h264"])
def test_containers_that_do_not_time_every_packet_are_decoded_whole(name, make_video):
    with VideoFile(Deadline(str(make_video(name, 30, options={"bf": "3"})), 30.0)) as video:
        assert not video.knows_disposable


def test_interlaced_video_is_decoded_whole(make_video, everything):
    """Of two fields each may be a packet of its own, so that one alone must not be left out."""
    path = str(make_video("a.mp4", 60, options={"x264-params": "tff=1:bframes=3"}))
    with VideoFile(Deadline(path, 30.0)) as video, pytest.raises(IrregularTimes):
        list(ShownFrames(video, [0.5]))
    clip = load_clip(path, ClipSpec(8, (48, 64), 4), FixedPlacement(0.5)).pixels
    everything()
    np.testing.assert_array_equal(clip, load_clip(path, ClipSpec(8, (48, 64), 4), FixedPlacement(0.5)).pixels)


def test_without_b_frames_nothing_is_looked_for(make_video):
    with VideoFile(Deadline(str(make_video("a.mp4", 30, options={"bf": "0"})), 30.0)) as video:
        assert not video.knows_disposable
        assert len(list(AllFrames(video))) == 30


def unit(kind, importance, size=10, prefix=4):
    """A NAL unit with its length before it."""
    return size.to_bytes(prefix, "big") + bytes([importance << 5 | kind]) + bytes(size - 1)


@pytest.mark.parametrize(
    ("units", "disposable"),
    [
        ([unit(1, 0)], True),
        ([unit(1, 2)], False),
        ([unit(5, 3)], False),
        ([unit(9, 0), unit(6, 0), unit(1, 0), unit(1, 0)], True),
        ([unit(1, 0), unit(1, 1)], False),
        ([unit(7, 3), unit(1, 0)], False),
        ([unit(2, 0)], False),
        ([unit(6, 0)], False),
        ([unit(1, 0)[:-1]], False),
        ([unit(1, 0) + b"\0"], False),
        ([b""], False),
    ],
)
def test_disposable_pictures(units, disposable):
    assert is_disposable(b"".join(units), 4) is disposable


def test_length_of_the_lengths():
    record = bytes([1, 100, 0, 31, 0xFD, 0xE1, 0])
    assert length_bytes(record) == 2
    assert is_disposable(unit(1, 0, prefix=2), 2) and not is_disposable(unit(1, 3, prefix=2), 2)
    assert length_bytes(b"\0\0\0\1\x67\x64\0\x1f") is None
    assert length_bytes(None) is None and length_bytes(b"\1") is None
