"""Finding videos: folders, manifests, single files, tensors."""

import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from vjepa.data import ClipError, DataConfig, DataError, SourceConfig, Video, find_videos, read_clip, segment_starts
from vjepa.data.sources import VideoTable


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    for name in ("walk/b.MP4", "walk/a.mkv", "run/deep/c.npy", "run/.hidden.mp4", ".cache/d.mp4", "run/notes.doc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_folder_is_searched_recursively_in_a_fixed_order(folder):
    found = find_videos(folder)
    assert [os.path.relpath(video.path, folder) for video in found] == ["run/deep/c.npy", "walk/a.mkv", "walk/b.MP4"]
    assert {video.label for video in found} == {None}


def test_folder_names_become_labels_when_asked(folder):
    found = [(video.label, video.class_name) for video in find_videos(folder, folder_labels=True)]
    assert found == [(0, "run"), (1, "walk"), (1, "walk")]
    (folder / "loose.mp4").touch()
    with pytest.raises(DataError, match=r"sub-folder.*loose\.mp4"):
        find_videos(folder, folder_labels=True)


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "walk" / "up").symlink_to(folder)
    assert len(find_videos(folder)) == 3


def test_nothing_found_says_where_and_for_what(tmp_path):
    (tmp_path / "picture.jpg").touch()
    with pytest.raises(DataError, match=rf"no video found in {tmp_path}.*1 files.*\.mp4.*\.npy"):
        find_videos(tmp_path)
    with pytest.raises(DataError, match=r"does not exist: /no/such/place"):
        find_videos("/no/such/place")
    with pytest.raises(DataError, match=r"neither a folder nor a manifest nor a video.*picture\.jpg"):
        find_videos(tmp_path / "picture.jpg")


MANIFESTS = {
    "header.csv": "label,Path\n3,x/a.mp4\n1,b.mp4\n",
    "bare.csv": "x/a.mp4,3\nb.mp4,1\n",
    "released.csv": "x/a.mp4 3\nb.mp4 1\n",
    "lines.txt": "# comment\n\nx/a.mp4 3\nb.mp4 1\n",
    "header.txt": "path label\nx/a.mp4 3\nb.mp4 1\n",
    "tabs.tsv": "path\tlabel\nx/a.mp4\t3\nb.mp4\t1\n",
    "bom.csv": "\ufefffile,cls,extra\nx/a.mp4,3,9\nb.mp4,1,9\n",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_forms(name, tmp_path):
    (tmp_path / name).write_text(MANIFESTS[name], encoding="utf-8")
    assert find_videos(tmp_path / name) == [Video(f"{tmp_path}/x/a.mp4", 3), Video(f"{tmp_path}/b.mp4", 1)]


def test_manifest_without_labels_and_with_blanks_in_names(tmp_path):
    (tmp_path / "a.txt").write_text("my holiday 2.mp4\nother one.mp4\n")
    assert find_videos(tmp_path / "a.txt") == [
        Video(f"{tmp_path}/my holiday 2.mp4"),
        Video(f"{tmp_path}/other one.mp4"),
    ]
    (tmp_path / "a.csv").write_text('path,label\n"a, b.mp4",run\nc.mp4,\nd.mp4,jump\n')
    assert [(v.path[-8:], v.label, v.class_name) for v in find_videos(tmp_path / "a.csv")] == [
        ("a, b.mp4", 1, "run"),
        (f"{tmp_path}/c.mp4"[-8:], None, None),
        (f"{tmp_path}/d.mp4"[-8:], 0, "jump"),
    ]


def test_manifest_paths_may_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "a.mp4").touch()
    (tmp_path / "lists" / "m.csv").write_text("path\na.mp4\n")
    monkeypatch.chdir(tmp_path)
    assert find_videos("lists/m.csv") == [Video(f"{tmp_path}/a.mp4")]


def test_parquet(tmp_path):
    table = pyarrow.table({"video": ["a.mp4", "/abs/b.mp4"], "label": [2, None]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    assert find_videos(tmp_path / "m.parquet") == [Video(f"{tmp_path}/a.mp4", 2), Video("/abs/b.mp4")]
    pyarrow.parquet.write_table(pyarrow.table({"clips_of_mine": ["a.mp4"]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"no path column.*clips_of_mine"):
        find_videos(tmp_path / "n.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "lists no video"),
        ("header.csv", b"path,label\n", "lists no video"),
        ("hole.csv", b"path,label\na.mp4,1\n,2\n", "row 2 .* has no path"),
        ("binary.csv", b"\xff\xfe\x00\x01", "cannot read the manifest"),
        ("negative.csv", b"a.mp4,-1\n", "class indices from 0, got -1"),
        ("junk.parquet", b"PAR1junk", "cannot read the manifest"),
    ],
)
def test_malformed_manifests(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_videos(tmp_path / name)


def test_table_keeps_paths_and_labels():
    videos = [Video("/a/ü.mp4", 3), Video("/b\udcff.mp4"), Video("/c.mp4", 0)]
    table = VideoTable(videos)
    assert [table[i] for i in range(len(table))] == [("/a/ü.mp4", 3), ("/b\udcff.mp4", -1), ("/c.mp4", 0)]


def test_tensor_files_are_videos(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (40, 12, 16, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", frames)
    torch.save(torch.from_numpy(frames), tmp_path / "a.pt")
    for path in (tmp_path / "a.npy", tmp_path / "a.pt"):
        clip = read_clip(path, 4, frame_stride=3, start=6 / 30, image_size=(12, 16), crop="full", channels=5)
        assert torch.equal(clip, torch.from_numpy(frames[6:18:3].transpose(3, 0, 1, 2).copy()))
        part = read_clip(path, 1, start=0, image_size=(6, 4), crop=(0.5, 0.25, 0.25, 0.5), channels=5, flip=True)
        assert torch.equal(part[:, 0], torch.from_numpy(frames[0, 3:9, 8:12, :].transpose(2, 0, 1).copy()).flip(-1))
        fast = read_clip(path, 4, fps=5, tensor_fps=10, start=0, image_size=(12, 16), crop="full", channels=5)
        assert torch.equal(fast[0, :, 0, 0], torch.from_numpy(frames[0:8:2, 0, 0, 0].copy()))
        assert segment_starts(path, 3, 4, frame_stride=3) == [0.0, 0.5, 1.0]
        assert read_clip(path, 4, image_size=8, channels=5).shape == (5, 4, 8, 8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"expected frames as uint8 \[T,H,W,C\], got float32 \[4, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"uint8 \[0, 8, 8, 3\]"),
        (np.zeros((4, 8, 8, 4), np.uint8), "expected 3 channels, got 4"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ],
)
def test_unusable_tensors(value, message, tmp_path):
    np.save(tmp_path / "a.npy", value, allow_pickle=True)
    with pytest.raises(ClipError, match=message):
        read_clip(tmp_path / "a.npy", 2)


def test_unusable_pt_files(tmp_path):
    torch.save({"frames": torch.zeros(2)}, tmp_path / "dict.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "junk.npy").write_bytes(b"junk")
    messages = {"dict.pt": "one tensor, got dict", "junk.pt": "cannot be read", "junk.npy": "cannot be read"}
    for name, message in messages.items():
        with pytest.raises(ClipError, match=message):
            read_clip(tmp_path / name, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"frame_stride": 0},
        {"fps": 0.0},
        {"scale": (0.5, 1.5)},
        {"aspect": (2.0, 1.0)},
        {"num_workers": -1},
        {"prefetch": 0},
        {"clip_timeout": 0.0},
        {"max_bad_share": 1.5},
        {"short": "loop"},
        {"start_method": "thread"},
        {"min_frames": 0},
        {"judge_after": 0},
    ],
)
def test_config_refuses_nonsense_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        DataConfig(path="x", **wrong)


def test_config_needs_exactly_one_kind_of_source():
    with pytest.raises(ValueError, match="either path or sources"):
        DataConfig(path="x", sources=[SourceConfig("y")])
    with pytest.raises(ValueError, match=r"data\.path"):
        DataConfig().all_sources()
    for wrong in ({"path": ""}, {"path": "x", "weight": 0.0}, {"path": "x", "weight": float("nan")}):
        with pytest.raises(ValueError, match=r"path|weight"):
            SourceConfig(**wrong)
    assert DataConfig(path="x").all_sources() == [SourceConfig("x")]
