"""`vjepa masks` and `vjepa pretrain` as a user runs them, on small pre-decoded clips and on real files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vjepa.cli import main

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "pretrain" / "demo.yaml")
VIDEOS = ROOT.parent / "shared" / "videos"
needs_videos = pytest.mark.skipif(not VIDEOS.is_dir(), reason="needs the real videos in ../shared/videos")

TINY = [
    *("--model.image_size", "32", "--model.num_frames", "4", "--model.embed_dim", "24", "--model.depth", "1"),
    *("--model.num_heads", "1", "--model.predictor_embed_dim", "24", "--model.predictor_depth", "1"),
    *("--train.batch_size", "2", "--train.total_steps", "6", "--train.warmup_steps", "1", "--data.num_workers", "0"),
    *("--run.log_every", "1", "--run.tensorboard", "false", "--model.predictor_num_heads", "1"),
    *("--data.frame_stride", "1"),
]


@pytest.fixture
def clips(tmp_path):
    """A folder of two clips uint8 [T,H,W,C], brighter to the right."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(2):
        ramp = np.linspace(60, 250, 48, dtype=np.uint8)
        frames = np.broadcast_to(ramp[None, None, :, None], (12, 48, 48, 3))
        np.save(folder / f"clip{number}.npy", np.ascontiguousarray(frames))
    return folder


def test_masks_draws_a_picture_and_prints_what_is_hidden(clips, tmp_path, capsys):
    out = tmp_path / "pictures" / "masks.png"
    assert main(["masks", "--config", DEMO, "--data.path", str(clips), "--out", str(out), "--columns", "3"]) == 0
    text = capsys.readouterr().out
    assert "8 blocks of scale 0.15" in text and "2 blocks of scale 0.7" in text
    assert text.rstrip().endswith(f"wrote {out}")
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    tiles = picture[:, 12 : 12 + 128]  # the first column of tiles
    dark = (tiles.max(axis=2) < 70) & (tiles.max(axis=2) > 5)
    assert 0.05 < dark.mean() < 0.9, "hidden tokens are dark but still visible"


def test_masks_is_the_same_for_the_same_seed(clips, tmp_path):
    pictures = []
    for number, seed in enumerate(("1", "1", "2")):
        out = tmp_path / f"{number}.png"
        assert main(["masks", "--config", DEMO, "--data.path", str(clips), "--out", str(out), "--run.seed", seed]) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--masks.strategy", "tube"], "random tube, 0.9 hidden"),
        (["--masks.strategy", "causal", "--masks.causal_frames", "4"], "context in the first 4 frames"),
        (["--masks.packing", "budget", "--masks.hidden_ratio", "0.75"], "75.0%"),
        (["--masks.packing", "truncate", "--draws", "8"], "over 8 clips"),
    ],
)
def test_masks_of_every_strategy_and_packing(options, words, clips, tmp_path, capsys):
    out = str(tmp_path / "m.png")
    assert main(["masks", "--config", DEMO, "--data.path", str(clips), "--out", out, *options]) == 0
    assert words in capsys.readouterr().out


def test_masks_skips_what_it_cannot_read(clips, tmp_path, capsys):
    (clips / "a_broken.mp4").write_bytes(b"no video")
    assert main(["masks", "--config", DEMO, "--data.path", str(clips), "--out", str(tmp_path / "m.png")]) == 0
    assert "skipped" in capsys.readouterr().err
    for clip in clips.glob("*.npy"):
        clip.unlink()
    assert main(["masks", "--config", DEMO, "--data.path", str(clips), "--out", str(tmp_path / "n.png")]) == 1
    assert "none of the 1 videos" in capsys.readouterr().err
    assert not (tmp_path / "n.png").exists()


def test_masks_needs_data_and_draws(clips, capsys):
    assert main(["masks", "--config", DEMO]) == 1
    assert "data.path" in capsys.readouterr().err
    assert main(["masks", "--config", DEMO, "--data.path", str(clips), "--draws", "0"]) == 1
    assert "--draws: expected at least 1 clip, got 0" in capsys.readouterr().err


@needs_videos
def test_masks_over_a_real_video(tmp_path):
    out = tmp_path / "m.png"
    clip = str(VIDEOS / "clips" / "carphone_qcif.mp4")
    assert main(["masks", "--config", DEMO, "--data.path", clip, "--out", str(out), "--draws", "4"]) == 0
    assert np.asarray(Image.open(out)).std() > 20


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_pretrain_runs_refuses_to_overwrite_and_resumes(clips, tmp_path, capsys):
    run_dir = tmp_path / "run"
    argv = ["pretrain", "--config", DEMO, "--data.path", str(clips), "--run.dir", str(run_dir), *TINY]
    assert main([*argv, "--train.steps", "2"]) == 0
    assert steps(run_dir) == [1, 2]
    capsys.readouterr()
    assert main([*argv, "--train.steps", "3"]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert steps(run_dir) == [1, 2]
    assert main([*argv, "--train.steps", "3", "--resume"]) == 0
    assert main([*argv, "--train.steps", "4", "--run.resume", "true"]) == 0
    assert steps(run_dir) == [1, 2, 3, 4]
    assert main([*argv, "--train.steps", "5", "--resume", "--train.lr", "0.125"]) == 1
    assert re.search(r"train.lr was \S+, is now 0.125", capsys.readouterr().err)


def test_pretrain_takes_several_paths(clips, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.npy").write_bytes(b"no array")
    (clips / "clip1.npy").rename(tmp_path / "broken" / "1.npy")
    run_dir = tmp_path / "run"
    paths = ["--data.path", str(clips), str(tmp_path / "broken")]
    assert main(["pretrain", "--config", DEMO, *paths, "--run.dir", str(run_dir), *TINY]) == 0
    assert json.loads((run_dir / "config.json").read_text())["data"]["path"] == [str(clips), str(tmp_path / "broken")]
    assert "0.npy" in (run_dir / "bad_files.jsonl").read_text()
    assert main(["masks", "--config", DEMO, *paths, "--out", str(tmp_path / "m.png")]) == 0
    assert main(["pretrain", "--config", DEMO, "--data.path", "--run.dir", str(run_dir)]) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.path", "{clips}", "{empty}"], "no video found in {empty}"),
        (["--data.path", "{empty}"], "no video found in {empty}"),
        (["--data.path", "{empty}/nothing"], "data path does not exist: {empty}/nothing"),
        ([], "data.path"),
        (["--data.path", "{clips}", "--model.num_heads", "5"], "num_heads=5"),
        (["--data.path", "{clips}", "--train.warmup_steps", "100"], "warmup_steps"),
        (["--data.path", "{clips}", "--model.preset", "vit_larg"], "did you mean 'vit_large'?"),
    ],
)
def test_pretrain_explains_what_it_cannot_do(options, words, clips, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"clips": clips, "empty": empty}
    argv = [option.format(**places) for option in options]
    assert main(["pretrain", "--config", DEMO, "--run.dir", str(tmp_path / "run"), *TINY, *argv]) == 1
    err = capsys.readouterr().err
    assert words.format(**places) in err and "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_exit_code_is_that_of_the_run(clips, tmp_path, monkeypatch):
    import vjepa.train.loop

    seen = []

    def interrupted(config):
        seen.append(config)
        return vjepa.train.loop.RunResult(tmp_path, 1, {}, signal=2)

    monkeypatch.setattr(vjepa.train.loop, "pretrain", interrupted)
    argv = ["pretrain", "--config", DEMO, "--data.path", str(clips), "--run.dir", "some/where"]
    assert main(argv) == 130
    assert seen[0].run.dir == "some/where" and seen[0].data.path == str(clips)
    assert seen[0].run.resume is False
