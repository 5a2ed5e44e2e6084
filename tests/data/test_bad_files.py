"""Files that are not what they seem: each is refused with a reason, in the decoder's words, and the terminal stays clean."""

import os

import av
import numpy as np
import pytest

from vjepa.data import BadFile, ClipError, ClipTimeout, DataError, Video, iterate_clips, probe_video, read_clip
from vjepa.data.clip import ClipSpec, FixedPlacement, load_clip

SPEC = ClipSpec(8, (32, 32), frame_stride=4, min_frames=8)


def reason(path, spec=SPEC, start=None):
    with pytest.raises(ClipError) as caught:
        load_clip(str(path), spec, FixedPlacement(start))
    assert caught.value.path == str(path) and str(path) in str(caught.value)
    return caught.value.reason


def test_not_a_video(tmp_path, capfd):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello" * 100)
    (tmp_path / "folder.mp4").mkdir()
    for _ in range(2):  # the second time too: FFmpeg keeps quiet about a message that repeats
        assert reason(tmp_path / "empty.mp4") == "the file is empty"
        assert reason(tmp_path / "text.mp4").startswith("Invalid data found when processing input [")
        assert "moov atom not found" in reason(tmp_path / "text.mp4")
    assert reason(tmp_path / "folder.mp4") == "Is a directory"
    assert reason(tmp_path / "none.mp4") == "No such file or directory"
    assert capfd.readouterr() == ("", "")


def test_no_video_in_it(tmp_path, make_video):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(tmp_path / "a.mp4") == "no video stream (streams: audio)"


def test_too_few_frames(make_video):
    assert reason(make_video("one.mp4", 1)) == "too short: 1 frame, at least 8 are needed"
    assert reason(make_video("seven.mkv", 7)) == "too short: 7 frames, at least 8 are needed"
    assert load_clip(str(make_video("eight.mp4", 8)), SPEC, FixedPlacement()).start == 0
    two = ClipSpec(2, (16, 16), frame_stride=1, min_frames=8)  # a clip of two frames needs no more than two
    assert load_clip(str(make_video("two.mp4", 2)), two, FixedPlacement()).start == 0


def test_cut_short(make_video):
    whole = make_video("a.mp4", 120, size=(128, 96), muxer={"movflags": "faststart"})
    cut = whole.with_name("cut.mp4")
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    for start in (0.0, 2.0):
        assert reason(cut, start=start).startswith("cut short: its index runs to byte")


def test_frames_the_header_promises_are_missed_and_those_there_are_used(make_video, read_numbers):
    """No index tells that a Matroska file is cut: clips of the part that is there are good, others are refused."""
    whole = make_video("a.mkv", 120, size=(128, 96), options={"g": "10"})
    cut = whole.with_name("cut.mkv")
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.5)])
    assert reason(cut, start=3.0).startswith("cut short: frames end at ")
    assert "the header promises 4.00 s" in reason(cut)
    clip = load_clip(str(cut), ClipSpec(8, (96, 128), frame_stride=2), FixedPlacement(0.5))
    assert read_numbers(clip.pixels) == list(range(15, 31, 2))


def test_damage_is_refused_where_it_is_and_nowhere_else(make_video, read_numbers):
    path = make_video("a.mp4", 120, size=(128, 96), options={"g": "10", "bf": "0"})
    with av.open(str(path)) as container:
        entries = [(entry.pos, entry.size) for entry in container.streams.video[0].index_entries]
    data = bytearray(path.read_bytes())
    position, size = entries[64]
    data[position + 4 : position + size] = b"\x41" + b"\xff" * (size - 5)
    bad = path.with_name("bad.mp4")
    bad.write_bytes(data)
    spec = ClipSpec(4, (96, 128), frame_stride=1)
    for start in (0, 20, 56, 70, 100):
        clip = load_clip(str(bad), spec, FixedPlacement(start / 30))
        assert read_numbers(clip.pixels) == list(range(start, start + 4))
    for start in (62, 64, 66):
        words = reason(bad, spec, start=start / 30)
        assert ("damaged" in words or "Invalid data" in words) and "h264" in words


def test_beginning_without_a_keyframe(make_video, tmp_path, read_numbers):
    """The first frames of a stream that begins in the middle of a group cannot be decoded."""
    whole = make_video("a.ts", 60, size=(128, 96), options={"g": "30", "bf": "0"})
    data = whole.read_bytes()
    with av.open(str(whole)) as container:
        packets = [packet.pos for packet in container.demux(video=0) if packet.size]
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[: packets[0]] + data[packets[8] :])
    assert "nothing can be decoded before 0.73 s" in reason(cut, ClipSpec(8, (32, 32), frame_stride=2), start=0.0)
    clip = load_clip(str(cut), ClipSpec(8, (96, 128), frame_stride=2), FixedPlacement(25 / 30))
    assert read_numbers(clip.pixels) == list(range(33, 49, 2))


def test_time_limit_of_a_clip(make_video):
    path = make_video("a.mp4", 30)
    for start in (0.0, 0.5):
        with pytest.raises(ClipTimeout, match=r"longer than the limit of 1e-07 s a clip"):
            read_clip(path, 4, start=start, timeout=1e-7)


def test_time_limit_between_frames(make_video, monkeypatch):
    """The limit is looked at between packets: a slow decoder is stopped in mid-clip."""
    path = make_video("a.mp4", 60, options={"bf": "0"})
    now, looks = [0.0], []

    def clock():
        looks.append(now[0])
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("vjepa.data.container.time.monotonic", clock)
    with pytest.raises(ClipTimeout, match="limit of 10 s"):
        load_clip(str(path), ClipSpec(8, (16, 16), timeout=10.0), FixedPlacement(0.0))
    assert 8 < len(looks) < 14


def test_iterating_over_videos(make_video):
    paths = [make_video(f"{index}.mp4", 20 + index) for index in range(3)]
    (paths[0].parent / "bad.mp4").write_text("no video")
    bad_path = str(paths[0].parent / "bad.mp4")
    videos = [Video(str(paths[0]), 4), Video(bad_path, 1), Video(str(paths[1])), Video(str(paths[2]), 0)]
    options = {"frame_stride": 1, "segments": 2, "views": 3}
    runs = []
    for workers in (0, 2):
        bad: list[BadFile] = []
        clips = list(iterate_clips(videos, 4, (16, 24), num_workers=workers, bad=bad, **options))
        assert [(c.index, c.segment, c.view) for c in clips] == [
            (i, s, v) for i in (0, 2, 3) for s in (0, 1) for v in range(3)
        ]
        assert [clip.label for clip in clips[::6]] == [4, -1, 0]
        assert [file.path for file in bad] == [bad_path]
        assert all(clip.video.shape == (3, 4, 16, 24) for clip in clips)
        runs.append([clip.video for clip in clips])
    assert all(bool((a == b).all()) for a, b in zip(*runs, strict=True))
    with pytest.raises(DataError, match=r"cannot read .*bad\.mp4: Invalid data"):
        list(iterate_clips(videos, 4, 16, num_workers=0, **options))
    with pytest.raises(ValueError, match="views"):
        iterate_clips(videos, 4, 16, views=2)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"frame_stride": 0}, "frame_stride"),
        ({"fps": -1.0}, "fps"),
        ({"image_size": 0}, "size"),
    ],
)
def test_arguments_out_of_range(wrong, name):
    with pytest.raises(ValueError, match=name):
        read_clip("never opened.mp4", **wrong)


def test_memory_and_descriptors_stay_bounded(make_video):
    """400 clips, a third of them bad: nothing of a video outlives its clip."""
    paths = [make_video(f"{index}.mp4", 24) for index in range(2)]
    bad = paths[0].with_name("bad.mp4")
    bad.write_bytes(paths[0].read_bytes()[:800])
    spec = ClipSpec(8, (64, 64), frame_stride=2)

    def read(count):
        for index in range(count):
            try:
                load_clip(str([*paths, bad][index % 3]), spec, FixedPlacement(index % 5 / 30))
            except ClipError:
                assert index % 3 == 2

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    read(60)
    memory, files = resident(), len(os.listdir("/proc/self/fd"))
    read(400)
    assert resident() - memory < 12  # MiB; one clip holds 2 MiB or more while it is read
    assert len(os.listdir("/proc/self/fd")) == files


def test_probe(make_video):
    info = probe_video(make_video("a.mp4", 45, size=(128, 64)))
    assert (info.rate, info.width, info.height, info.codec) == (30.0, 128, 64, "h264")
    assert info.duration == pytest.approx(1.5, abs=0.005)
    with pytest.raises(ClipError, match="No such file"):
        probe_video("/no/such.mp4")
