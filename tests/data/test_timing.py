"""What `vjepa bench data` measures: the parts, the naive loop on the same clips, the workers a step needs."""

import json
import math

import numpy as np
import pytest
import torch

from vjepa.data import ClipLoader, DataConfig, DataError
from vjepa.data.batch import ClipRef
from vjepa.data.clip import ClipSpec, FixedPlacement, load_clip
from vjepa.data.naive import naive_clip
from vjepa.data.stopwatch import PARTS, Stopwatch
from vjepa.data.timing import SAME, Timing, time_clips
from vjepa.data.transform import Crop


def test_naive_clip_is_the_same_clip(make_video, read_numbers):
    path = str(make_video("a.mp4", 90, options={"g": "20"}))
    for start, stride, flip in ((0, 4, False), (1.0, 2, True), (0.5, 1, False)):
        ref = ClipRef(path, start, stride / 30, Crop(), flip)
        naive = naive_clip(ref, 8, (48, 64))
        assert naive.shape == (3, 8, 48, 64) and naive.dtype == torch.uint8 and naive.is_contiguous()
        numbers = [round(start * 30) + stride * i for i in range(8)]
        assert read_numbers(naive.flip(-1) if flip else naive) == numbers
        ours = load_clip(path, ClipSpec(8, (48, 64), stride), FixedPlacement(start, Crop(), flip)).pixels
        assert np.abs(ours.astype(int) - naive.numpy()).mean() < SAME / 2


def test_naive_clip_of_real_videos(shared_videos):
    """Also turned by metadata, with variable rate, several streams, an edit list: the same pixels but for resampling."""
    names = ["ollie_hevc_rotated.mov", "kickflip_screenrec_vfr.mp4", "nasa_13013.mp4", "ollie_editlist.mov"]
    config = DataConfig([str(shared_videos / "clips" / name) for name in names], num_workers=0)
    batch = next(ClipLoader(config, 8, (96, 96), 8).batches(0, 1))
    assert len({ref.path for ref in batch.clips}) == 4
    for ref, ours in zip(batch.clips, batch.video, strict=True):
        naive = naive_clip(ref, 8, (96, 96))
        assert (ours.float() - naive.float()).abs().mean() < SAME / 2, ref.path


def test_laps_add_up():
    watch = Stopwatch()
    assert list(watch.seconds) == list(PARTS)
    watch("seek")
    watch("decode")
    watch("decode")
    watch.start()
    assert watch.seconds["seek"] > 0 and watch.seconds["decode"] > 0 and watch.seconds["open"] == 0
    with pytest.raises(KeyError):
        watch("sleep")


def test_workers_for_a_step():
    timing = Timing(clips=10, seconds=0.5, cpu_seconds=0.25)
    assert timing.rate == 20 and timing.core_rate == 40 and timing.busy == 0.5
    assert [timing.workers_for(seconds, 24) for seconds in (0.1, 0.6, 1.2, 1.21, 9.0)] == [12, 2, 1, 1, 1]
    assert math.isnan(timing.ratio) and timing.summary()["ratio"] is None


def test_time_clips(make_video, tmp_path):
    for number in range(3):
        make_video(f"v/{number}.mp4", 60, size=(320, 240), options={"bf": "3"})
    (tmp_path / "v" / "bad.mp4").write_text("no video")
    threads = torch.get_num_threads()
    timing = time_clips(DataConfig(str(tmp_path / "v"), num_workers=1, max_bad_share=1.0), 8, (64, 64), 4, 6)
    assert torch.get_num_threads() == threads
    assert timing.clips == timing.compared == 6 and timing.files == 3
    assert timing.bytes == sum((tmp_path / "v" / f"{number}.mp4").stat().st_size for number in range(3))
    assert list(timing.bad) == [str(tmp_path / "v" / "bad.mp4")]
    assert 0 <= timing.difference[0] <= timing.difference[1] < SAME
    assert 0.5 * timing.seconds < sum(timing.parts.values()) <= timing.seconds
    assert all(timing.parts[part] > 0 for part in ("open", "read", "decode", "filter", "collate"))
    assert timing.ours == timing.cpu_seconds > 0 and timing.naive > 0
    assert timing.workers == 1 and timing.workers_rate > 0
    assert json.loads(json.dumps(timing.summary()))["seconds_a_clip"].keys() == set(PARTS)


def test_tensor_files_are_timed_and_not_compared(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((70, 48, 48, 3), np.uint8))
    timing = time_clips(DataConfig(str(tmp_path), num_workers=0), 8, (32, 32), 2, 3)
    assert timing.clips == 3 and timing.compared == 0 and timing.parts["filter"] > 0


def test_nothing_to_time(tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(DataError, match="no readable video"):
        time_clips(DataConfig(str(tmp_path), num_workers=0), 8, (32, 32), 2, 3)
    with pytest.raises(ValueError, match="clips must be at least 1, got 0"):
        time_clips(DataConfig(str(tmp_path), num_workers=0), 8, (32, 32), 2, 0)
