"""Every healthy and every broken file of the shared collection of real videos."""

import csv

import av
import numpy as np
import pytest

from vjepa.data import ClipError, ClipLoader, DataConfig, SourceConfig, probe_video, read_clip
from vjepa.data.clip import ClipSpec, FixedPlacement, RandomPlacement, load_clip

CLIPS = [
    "asl_milk_short.mkv bikes_scope.mp4 bug_macro_640.mp4 carphone_qcif.mp4 cars_topdown_vp9.webm cat_portrait.mp4",
    "cockatoo_yuv444.mp4 face_mpeg4.avi flower_vp8.webm juggle_720p24.mp4 kickflip_screenrec_vfr.mp4 nasa_13013.mp4",
    "ollie_editlist.mov ollie_hevc_rotated.mov pancake_h264.mkv tears_of_steel_av1.mp4",
]
CLIPS = " ".join(CLIPS).split()
TRUE_LENGTH = {"nasa_13013.mp4": (390, 29.97)}  # the larger of its two streams; the list describes the first
TURNED = {"ollie_hevc_rotated.mov": -1}  # quarter turns anticlockwise that display it
BROKEN = {  # file: what is wrong, or "" where any clip of it is good
    "audio_only.mp4": "no video stream (streams: audio)",
    "audio_with_cover.m4a": "no video stream but cover art",
    "corrupt_middle_heavy.mp4": "Invalid data found when processing input [h264",
    "corrupt_middle_light.mp4": "is damaged",
    "gray_ffv1.mkv": "",
    "hevc_10bit.mp4": "",
    "no_first_keyframe.ts": "nothing can be decoded before 0.67 s",
    "odd_size_yuv444.mp4": "",
    "ok_reference.mp4": "",
    "png_renamed.mp4": "too short: 1 frame, at least 8 are needed",
    "raw_annexb.h264": "",
    "resolution_change.ts": "",
    "single_frame.mp4": "too short: 1 frame, at least 8 are needed",
    "text_renamed.mp4": "Invalid data found when processing input [mov,mp4",
    "three_frames.mp4": "too short: 3 frames, at least 8 are needed",
    "tiny_16x16.mp4": "",
    "truncated_half.mkv": "cut short: frames end at 1.73 s, the header promises 4.00 s",
    "truncated_half.mp4": "cut short: its index runs to byte 49763, the file ends at 24881",
    "truncated_moov_lost.mp4": "moov atom not found",
    "zero_byte.mp4": "the file is empty",
    "zeroed_middle.mp4": "Invalid data found when processing input [h264",
}


def all_frames(path, size):
    """(times in s from the first frame, RGB [N,H,W,3]) of a video, decoded from its beginning, without this project."""
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda s: s.width)
        stream.codec_context.thread_count = 2
        frames, times = [], []
        for frame in container.decode(stream):
            times.append(frame.time)
            frames.append(frame.reformat(*size, format="rgb24", interpolation="BILINEAR").to_ndarray())
    return np.sort(times) - min(times), np.stack(frames)


def test_the_list_is_complete(shared_videos):
    assert sorted(CLIPS) == sorted(path.name for path in (shared_videos / "clips").iterdir())
    assert sorted(BROKEN) == sorted(path.name for path in (shared_videos / "broken").iterdir())


@pytest.mark.parametrize("name", CLIPS)
def test_frames_after_a_seek_are_those_of_decoding_everything(name, shared_videos):
    path = shared_videos / "clips" / name
    turns = TURNED.get(name, 0)
    height, width = (64, 48) if turns else (48, 64)
    info = probe_video(path)
    times, frames = all_frames(path, (64, 48))
    with (shared_videos / "clips.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["file"].endswith(name))
    count, rate = TRUE_LENGTH.get(name, (int(row["frames_decoded"]), float(row["fps_avg"])))
    assert len(frames) == count and info.rate == pytest.approx(rate, rel=1e-3)
    assert info.duration == pytest.approx(times[-1] + 1 / info.rate, abs=0.1)
    start = round(0.6 * len(frames)) / info.rate
    spec = ClipSpec(6, (height, width), fps=info.rate / 2)
    clip = read_clip(path, 6, fps=info.rate / 2, start=start, image_size=(height, width), crop="full").numpy()
    wanted = load_clip(str(path), spec, FixedPlacement(start)).start + np.arange(6) * 2 / info.rate + 0.5 / info.rate
    chosen = np.searchsorted(times, wanted, side="right") - 1
    expected = np.rot90(frames[chosen], turns, (1, 2)).transpose(3, 0, 1, 2).astype(int)
    error = np.abs(clip.astype(int) - expected).mean((0, 2, 3))
    assert error.max() < 4, error
    later = np.rot90(frames[np.minimum(chosen + 6, len(frames) - 1)], turns, (1, 2)).transpose(3, 0, 1, 2).astype(int)
    assert error.mean() < np.abs(clip.astype(int) - later).mean() + 1e-9


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, shared_videos, capfd):
    path, spec = str(shared_videos / "broken" / name), ClipSpec(16, (32, 32), min_frames=8)
    if BROKEN[name]:
        with pytest.raises(ClipError) as caught:
            load_clip(path, spec, FixedPlacement(0.3 if name == "no_first_keyframe.ts" else None))
        assert BROKEN[name] in caught.value.reason
    else:
        for seed in range(3):
            placement = RandomPlacement(np.random.default_rng(seed), (0.3, 1.0), (0.75, 1.35), True)
            clip = load_clip(path, spec, placement)
            assert clip.pixels.shape == (3, 16, 32, 32) and clip.pixels.std() > 10
    assert capfd.readouterr() == ("", "")


def test_silently_short_file_is_good_where_it_has_frames(shared_videos):
    path = str(shared_videos / "broken" / "no_first_keyframe.ts")
    assert load_clip(path, ClipSpec(16, (32, 32)), FixedPlacement(1.0)).pixels.std() > 10


def test_a_run_over_good_and_broken_files(shared_videos):
    sources = [SourceConfig(str(shared_videos / "actions")), SourceConfig(str(shared_videos / "broken"))]
    config = DataConfig(sources=sources, num_workers=2, frame_stride=1)
    loader = ClipLoader(config, 4, (32, 32), 8, seed=0)
    batches = list(loader.batches(0, 10))
    assert loader.draws == 80 + loader.bad_draws and loader.bad_draws > 15
    always_bad = {name for name, why in BROKEN.items() if why} - {"audio_with_cover.m4a"}
    sometimes = {"no_first_keyframe.ts", "truncated_half.mkv", "corrupt_middle_heavy.mp4"}
    sometimes |= {"corrupt_middle_light.mp4", "zeroed_middle.mp4"}
    met = {path.rsplit("/", 1)[1] for path in loader.bad}
    assert always_bad - sometimes <= met <= always_bad
    assert all(batch.video.shape == (8, 3, 4, 32, 32) for batch in batches)
