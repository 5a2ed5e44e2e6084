"""Which frames a clip holds: proved on videos whose frames carry their number."""

from fractions import Fraction

import numpy as np
import pytest

from vjepa.data import ClipError, read_clip, segment_starts
from vjepa.data.container import VideoFile, probe_video

WHOLE = {"image_size": (48, 64), "crop": "full"}
KINDS = {
    "h264 without B-frames": ("a.mp4", {"options": {"bf": "0", "g": "12"}}),
    "h264 with B-frames": ("a.mp4", {"options": {"bf": "3", "b-pyramid": "normal", "g": "12"}}),
    "h264 with one keyframe": ("a.mp4", {"options": {"g": "500"}}),
    "h264 with open groups": ("a.mp4", {"options": {"g": "12", "x264-params": "open-gop=1:bframes=3"}}),
    "h264 in mkv (times rounded to ms, no frame count)": ("a.mkv", {"options": {"g": "12"}}),
    "h264 in ts (no index)": ("a.ts", {"options": {"g": "12"}}),
    "h264 in a raw stream (no times)": ("a.h264", {"options": {"g": "12"}, "rate": 25}),
    "mpeg4 in avi (decode times only)": ("a.avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "12", "b": "2M"}}),
    "vp9 in webm": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}),
    "av1 in mp4": ("a.mp4", {"codec": "libsvtav1", "options": {"preset": "12", "g": "12"}}),
    "hevc 10 bit": ("a.mp4", {"codec": "libx265", "pixel_format": "yuv420p10le", "options": {"preset": "ultrafast"}}),
    "h264 4:4:4": ("a.mp4", {"pixel_format": "yuv444p", "options": {"g": "12"}}),
    "grey ffv1": ("a.mkv", {"codec": "ffv1", "pixel_format": "gray"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_exact_from_any_start(kind, make_video, read_numbers):
    """Seeking or not, B-frames or not: start k and stride s give frames k, k + s, k + 2 s, ..."""
    name, how = KINDS[kind]
    path, rate = make_video(name, 60, **how), how.get("rate", 30)
    for first, stride in ((0, 1), (1, 4), (11, 3), (12, 2), (13, 5), (25, 1), (40, 2), (52, 1)):
        clip = read_clip(path, 8, frame_stride=stride, start=first / rate, **WHOLE)
        assert read_numbers(clip) == [first + stride * i for i in range(8)], (first, stride)
        assert clip.shape == (3, 8, 48, 64) and clip.dtype.is_floating_point is False and clip.is_contiguous()


def test_frame_on_screen_of_a_variable_rate_video(make_video, read_numbers):
    """Times in ms, 10 to 400 ms apart: each wanted time gets the last frame that began before it."""
    gaps = np.random.default_rng(0).choice([10, 17, 33, 50, 120, 400], size=80)
    times = np.concatenate([[0], np.cumsum(gaps)])
    for name in ("v.mkv", "v.mp4"):
        path = make_video(name, 81, times=times.tolist(), time_base=Fraction(1, 1000), options={"g": "10"})
        info = probe_video(path)
        for start in (0.0, 1.0, 3.21, 4.0):
            wanted = start + np.arange(10) / 7 + 0.5 / info.rate
            expected = np.searchsorted(times / 1000, wanted, side="right") - 1
            clip = read_clip(path, 10, fps=7, start=start, **WHOLE)
            assert read_numbers(clip) == expected.tolist(), (name, start)


def test_fps_sets_the_spacing_in_seconds(make_video, read_numbers):
    path = make_video("a.mp4", 60, rate=30)
    assert read_numbers(read_clip(path, 5, fps=10, start=0, **WHOLE)) == [0, 3, 6, 9, 12]
    assert read_numbers(read_clip(path, 5, fps=60, start=0.1, **WHOLE)) == [3, 4, 4, 5, 5]


def test_middle_and_segments(make_video, read_numbers):
    path = make_video("a.mp4", 41)
    assert read_numbers(read_clip(path, 3, frame_stride=5, **WHOLE)) == [15, 20, 25]
    starts = segment_starts(path, 4, 3, frame_stride=5)
    firsts = [read_numbers(read_clip(path, 3, frame_stride=5, start=start, **WHOLE))[0] for start in starts]
    assert firsts == [0, 10, 20, 30]
    assert segment_starts(path, 1, 3, frame_stride=5) == [0.5]
    with pytest.raises(ValueError, match="num_segments"):
        segment_starts(path, 0)


def test_short_video_holds_its_last_frame_and_a_late_start_moves_back(make_video, read_numbers):
    path = make_video("a.mp4", 10)
    assert read_numbers(read_clip(path, 6, frame_stride=4, **WHOLE)) == [0, 4, 8, 9, 9, 9]
    assert read_numbers(read_clip(path, 3, frame_stride=2, start=0.3, **WHOLE)) == [5, 7, 9]
    with pytest.raises(ClipError, match=r"start must lie within the video's 0\.33 s, got 2 s"):
        read_clip(path, 3, start=2.0)


def test_audio_longer_than_the_video_is_no_fault(make_video, read_numbers):
    path = make_video("a.mkv", 30, audio=1.4)
    assert probe_video(path).duration == pytest.approx(1.0, abs=0.02)
    assert read_numbers(read_clip(path, 4, frame_stride=2, start=0.99, **WHOLE)) == [23, 25, 27, 29]


def test_decoding_stops_at_the_last_wanted_frame(make_video, monkeypatch):
    """A clip in the middle of a video with keyframes every 10 frames decodes neither its beginning nor its end."""
    path = make_video("a.mp4", 200, options={"g": "10", "bf": "0"})
    decoded = []
    time_of = VideoFile.time_of
    monkeypatch.setattr(VideoFile, "time_of", lambda self, frame: decoded.append(frame) or time_of(self, frame))
    read_clip(path, 4, frame_stride=2, start=105 / 30)
    assert 7 <= len(decoded) <= 14  # 5 from the keyframe, 7 of the clip, one beyond, one in the decoder


def test_frame_size_changes_in_mid_stream(make_video, read_numbers, tmp_path):
    parts = [make_video(f"{w}.ts", 30, size=(w, h)).read_bytes() for w, h in ((64, 48), (128, 96))]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    clip = read_clip(path, 12, frame_stride=4, start=0, timeout=20, **WHOLE)
    numbers = read_numbers(clip)
    assert numbers[:7] == [0, 4, 8, 12, 16, 20, 24]
    assert clip.shape == (3, 12, 48, 64)
