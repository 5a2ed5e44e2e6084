"""The loader: every batch a pure function of (seed, rank, world size, step); workers that fail, fail loudly."""

import dataclasses
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vjepa.data import ClipLoader, DataConfig, DataError, SourceConfig
from vjepa.data.sampling import BLOCK, VideoSampler
from vjepa.data.workers import Workers, read_in_workers
from vjepa.masks import MultiBlock

MASKS = MultiBlock(grid=(2, 4, 4))


@pytest.fixture
def folder(make_video):
    paths = [make_video(f"videos/{index}.mp4", 12 + 3 * index) for index in range(5)]
    return paths[0].parent


def loader(path, *, num_workers=0, batch_size=4, masks=MASKS, seed=3, rank=0, world_size=1, **options):
    config = DataConfig(path=str(path), num_workers=num_workers, frame_stride=2, **options)
    return ClipLoader(config, 4, (32, 32), batch_size, masks, seed=seed, rank=rank, world_size=world_size)


def same(a, b):
    return (
        torch.equal(a.video, b.video)
        and torch.equal(a.labels, b.labels)
        and a.clips == b.clips
        and a.bad == b.bad
        and (a.step, a.draws) == (b.step, b.draws)
        and torch.equal(a.masks.context.indices, b.masks.context.indices)
        and torch.equal(a.masks.target.indices, b.masks.target.indices)
    )


def test_batch(folder):
    (batch,) = loader(folder).batches(7, 8)
    assert batch.step == 7 and batch.draws == 4 and batch.bad == [] and batch.seconds > 0
    assert batch.video.shape == (4, 3, 4, 32, 32) and batch.video.dtype == torch.uint8 and batch.video.is_contiguous()
    assert batch.labels.tolist() == [-1] * 4 and batch.labels.dtype == torch.int64
    assert len(batch.clips) == 4 and batch.masks.context.num_sets == 8
    assert all(clip.interval == pytest.approx(2 / 30) and os.path.isfile(clip.path) for clip in batch.clips)


def test_workers_change_nothing_and_resuming_continues(folder):
    (folder / "bad.mp4").write_text("no video")
    batches = list(loader(folder, max_bad_share=1.0).batches(0, 6))
    assert any(batch.bad for batch in batches)
    for workers in (1, 2):
        again = list(loader(folder, num_workers=workers, max_bad_share=1.0).batches(0, 6))
        assert len(again) == 6 and all(map(same, batches, again))
    resumed = list(loader(folder, num_workers=2, max_bad_share=1.0).batches(4, 6))
    assert all(map(same, batches[4:], resumed)) and len(resumed) == 2


def test_seeds_steps_and_ranks_differ(folder):
    def clips_and_masks(**which):
        batches = list(loader(folder, **which).batches(1, 4))
        return {tuple(b.clips) for b in batches}, {tuple(b.masks.context.indices.tolist()) for b in batches}

    one, other = clips_and_masks(seed=1), clips_and_masks(seed=2)
    ranks = [clips_and_masks(seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for a, b in ((one, other), ranks):
        assert len(a[0] | b[0]) == len(a[1] | b[1]) == 6


def test_ranks_share_each_pass(folder):
    """Two ranks, five videos: of ten consecutive clips of the run each video gives two."""
    seen = []
    ranks = [loader(folder, batch_size=1, rank=rank, world_size=2).batches(0, 5) for rank in (0, 1)]
    for both in zip(*ranks, strict=True):
        seen += [batch.clips[0].path for batch in both]
    assert len(set(seen[:5])) == len(set(seen[5:])) == 5
    assert seen[:5] != seen[5:]


def test_sampler_visits_every_video_once_in_a_pass():
    sampler = VideoSampler([7], [1.0], seed=5)
    draws = [sampler.draw(n) for n in range(2 * BLOCK + 10)]
    passes = [[video for _, video in draws[i : i + 7]] for i in range(0, 2002, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 200
    again = VideoSampler([7], [2.0], seed=5)
    assert all(again.draw(n) == draws[n] for n in (1500, 0, 999, 1000))


def test_sources_take_turns_by_weight():
    sampler = VideoSampler([3, 100, 8], [6.0, 3.0, 1.0], seed=0)
    draws = [sampler.draw(n) for n in range(3 * BLOCK)]
    for source, share in enumerate((0.6, 0.3, 0.1)):
        assert sum(s == source for s, _ in draws) == round(3 * BLOCK * share)
        assert abs(sum(s == source for s, _ in draws[:200]) - 200 * share) < 30
    order = [video for source, video in draws if source == 2]
    assert all(sorted(order[i : i + 8]) == list(range(8)) for i in range(0, 296, 8))


def test_tiny_weights_still_count():
    sampler = VideoSampler([1, 1, 1], [1e-9, 1.0, 1.0], seed=0)
    assert sum(sampler.draw(n)[0] == 0 for n in range(BLOCK)) == 1


def test_sources_with_weights_and_labels(make_video):
    for name in ("one/run/a.mp4", "one/walk/b.mp4", "two/c.mp4"):
        make_video(name, 12)
    root = make_video("two/d.mp4", 12).parents[1]
    (root / "list.csv").write_text("two/c.mp4 7\ntwo/d.mp4 9\n")
    sources = [SourceConfig(str(root / "one"), 3.0, folder_labels=True), SourceConfig(str(root / "list.csv"), 1.0)]
    config = DataConfig(sources=sources, num_workers=0, frame_stride=1)
    assert ClipLoader(config, 2, (16, 16), 4).num_videos == 4
    labels = torch.cat([batch.labels for batch in ClipLoader(config, 2, (16, 16), 20).batches(0, 2)])
    assert set(labels.tolist()) == {0, 1, 7, 9}
    assert 22 <= int((labels < 2).sum()) <= 38


def test_starting_workers_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    list(loader(folder, num_workers=1).batches(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bad_file_is_replaced_counted_and_logged_once(folder, caplog):
    (folder / "bad.mp4").write_text("no video")
    source = loader(folder, batch_size=6, masks=None, judge_after=10_000)
    with caplog.at_level(logging.WARNING, "vjepa.data"):
        batches = list(source.batches(0, 4))
    skipped = [bad for batch in batches for bad in batch.bad]
    assert len(skipped) >= 4 and {os.path.basename(bad.path) for bad in skipped} == {"bad.mp4"}
    assert "moov atom not found" in skipped[0].reason and "Invalid data" in skipped[0].reason
    assert source.draws == 24 + len(skipped) and list(source.bad) == [str(folder / "bad.mp4")]
    assert sum("bad.mp4" in record.getMessage() for record in caplog.records) == 1
    assert all("bad.mp4" not in clip.path for batch in batches for clip in batch.clips)


def test_too_many_bad_files_stop_the_run(folder):
    for index in range(5):
        (folder / f"bad{index}.mp4").write_bytes(b"")
    source = loader(folder, batch_size=10, max_bad_share=0.1, judge_after=30)
    with pytest.raises(DataError, match=r"\d+ of \d+ files .*max_bad_share = 10%.*bad\d\.mp4: the file is empty"):
        list(source.batches(0, 20))
    assert 30 <= source.draws < 60
    assert len(list(loader(folder, batch_size=10, max_bad_share=0.9, judge_after=30).batches(0, 5))) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_files_bad_is_an_error_and_no_hang(num_workers, tmp_path):
    for index in range(7):
        (tmp_path / f"{index}.mp4").write_text("no video")
    with pytest.raises(DataError, match=rf"no readable video in {tmp_path}: all of the 7 files.*and 2 more") as error:
        list(loader(tmp_path, num_workers=num_workers).batches(0, 3))
    assert "Traceback" not in str(error.value)


def test_no_batch_ever_is_an_error():
    class Stuck(torch.utils.data.Dataset):
        def __getitem__(self, index):
            time.sleep(60)

    workers = Workers(1, start_method="fork")  # a local class cannot be pickled
    with pytest.raises(DataError, match=r"no batch has come for 0\.1 s"):
        next(read_in_workers(Stuck(), range(3), workers, patience=0.1))


def test_time_limit(make_video):
    folder = make_video("0.mp4", 12).parent
    for index in range(1, 9):
        (folder / f"{index}.mp4").write_bytes((folder / "0.mp4").read_bytes())
    with pytest.raises(DataError, match=r"all of the 5 files tried, of 9,.*longer than the limit of 1e-06 s a clip"):
        list(loader(folder, clip_timeout=1e-6).batches(0, 1))


def test_short_videos_can_be_skipped(make_video):
    make_video("long.mp4", 40)
    folder = make_video("short.mp4", 6).parent
    config = DataConfig(path=str(folder), num_workers=0, min_frames=5)
    names = {os.path.basename(c.path) for b in ClipLoader(config, 4, (16, 16), 8).batches(0, 2) for c in b.clips}
    assert names == {"long.mp4", "short.mp4"}
    for options in ({"short": "skip"}, {"min_frames": 8}):
        source = ClipLoader(dataclasses.replace(config, **options), 4, (16, 16), 8)
        assert {os.path.basename(c.path) for b in source.batches(0, 2) for c in b.clips} == {"long.mp4"}
        assert "too short: 6 frames" in source.bad[str(folder / "short.mp4")]


def test_an_exception_in_a_worker_arrives_with_its_message(folder):
    with pytest.raises(TypeError, match="exactly one argument"):
        list(loader(folder, num_workers=1, masks=len).batches(0, 2))


def test_a_killed_worker_is_an_error_and_an_interrupted_one_carries_on(folder):
    before = {child.pid for child in multiprocessing.active_children()}
    batches = loader(folder, num_workers=1).batches(0, 10_000)
    next(batches)
    (worker,) = [child.pid for child in multiprocessing.active_children() if child.pid not in before]
    os.kill(worker, signal.SIGINT)
    for _ in range(8):
        next(batches)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(DataError, match=r"reading clips failed: .*worker.*; was it killed"):
        list(itertools.islice(batches, 100))


LOADS_FOREVER = """
import multiprocessing, sys, time
from vjepa.data import ClipLoader, DataConfig
if __name__ == "__main__":
    config = DataConfig(path=sys.argv[1], num_workers=1, frame_stride=2, start_method=sys.argv[2], max_bad_share=1.0)
    batches = ClipLoader(config, 4, (16, 16), 2).batches(0, 10_000)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("start_method", ["forkserver", "fork", "spawn"])
def test_workers_end_when_the_training_process_is_killed(folder, tmp_path, start_method):
    script = tmp_path / "loads.py"
    script.write_text(LOADS_FOREVER)
    command = [sys.executable, str(script), str(folder), start_method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 1
    deadline = time.monotonic() + 30
    while alive(workers[0]):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


def alive(pid):
    """Running, and not merely waiting to be reaped."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_stopping_early_ends_the_workers(folder):
    before = set(multiprocessing.active_children())
    batches = loader(folder, num_workers=2).batches(0, 10_000)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"batch_size": 0}, "batch_size"), ({"rank": 2, "world_size": 2}, "rank"), ({"rank": -1}, "rank")],
)
def test_arguments_out_of_range(wrong, message, folder):
    with pytest.raises(ValueError, match=message):
        loader(folder, **wrong)
    with pytest.raises(ValueError, match="start"):
        list(loader(folder).batches(3, 2))
