"""Generated motion clips: each kind moves as its name says, single frames do not tell the kinds apart, files decode back."""

import csv

import av
import numpy as np
import pytest

from vjepa.data import find_videos
from vjepa.data.motion import CLASSES, encode_clip, render_clip, write_motion_clips

FRAMES, CLIPS = 24, 4


@pytest.fixture(scope="module")
def luma():
    """For each kind CLIPS videos, float [FRAMES, S, S] in 0..1."""
    return {
        name: [render_clip(5, index, label, FRAMES).mean(-1) / 255 for index in range(CLIPS)]
        for label, name in enumerate(CLASSES)
    }


EDGE = 8  # px that the estimates leave out: filters wrap around there


def blurred(images, sigma):
    """[..., S, S] under a Gaussian of `sigma` pixels, wrapping around."""
    f = np.fft.fftfreq(images.shape[-1])
    gain = np.exp(-2 * (np.pi * sigma) ** 2 * (f[:, None] ** 2 + f**2))
    return np.fft.ifft2(np.fft.fft2(images) * gain).real


def gradient(images):
    """Central differences of [..., S, S] along y and x, wrapping around."""
    return tuple((np.roll(images, -1, axis) - np.roll(images, 1, axis)) / 2 for axis in (-2, -1))


def inner(images):
    return images[..., EDGE:-EDGE, EDGE:-EDGE]


def flow(video):
    """Motion of each step, [FRAMES - 1, 3]: (y, x) in px and clockwise turn about the middle in rad.

    Least squares of change + (shift + turn * (x, -y)) . gradient = 0 over the inner pixels; y points down.
    """
    smooth = blurred(video, 2.0)
    y, x = (inner(part) for part in gradient((smooth[1:] + smooth[:-1]) / 2))
    change = inner(smooth[1:] - smooth[:-1])
    place = inner(np.mgrid[: video.shape[1], : video.shape[2]]) - (video.shape[1] - 1) / 2
    slopes = np.stack([y, x, y * place[1] - x * place[0]])
    normal = np.einsum("ityx,jtyx->tij", slopes, slopes)
    return np.linalg.solve(normal, -np.einsum("ityx,tyx->ti", slopes, change)[..., None])[..., 0]


@pytest.mark.parametrize(
    ("name", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)], ids=CLASSES[:4]
)
def test_constant_motion_along_one_axis(luma, name, axis, sign):
    for video in luma[name]:
        steps = flow(video)
        assert (sign * steps[:, axis] > 0.6).all()
        assert steps[:, axis].std() < 0.3 * abs(steps[:, axis].mean())
        assert abs(steps[:, 1 - axis].mean()) < 0.25 * abs(steps[:, axis].mean())
        assert abs(steps[:, 2].mean()) < 0.01


@pytest.mark.parametrize(("name", "axis"), [("shake_y", 0), ("shake_x", 1)])
def test_to_and_fro_along_one_axis(luma, name, axis):
    for video in luma[name]:
        steps = flow(video)
        assert steps[:, axis].max() > 0.6
        assert steps[:, axis].min() < -0.6
        assert steps[:, axis].std() > 3 * steps[:, 1 - axis].std()
        assert abs(steps[:, 2].mean()) < 0.01


@pytest.mark.parametrize(("name", "sign"), [("clockwise", 1), ("anticlockwise", -1)])
def test_turning_in_place(luma, name, sign):
    for video in luma[name]:
        steps = flow(video)
        assert (sign * steps[:, 2] > 0.02).all()
        assert np.abs(steps[:, :2].mean(0)).max() < 0.6


def test_a_single_frame_looks_alike_in_all_kinds(luma):
    """Brightness, contrast and sharpness of one frame: the spread between kinds is small beside that between clips."""
    frames = np.stack([[video[FRAMES // 2] for video in luma[name]] for name in CLASSES])  # [kinds, clips, S, S]
    sharpness = np.hypot(*gradient(frames)).mean((2, 3))
    for values in (frames.mean((2, 3)), frames.std((2, 3)), sharpness):
        assert values.mean(1).std() < 0.5 * values.std(1).mean()


def test_first_frames_are_those_of_other_kinds():
    """Up to where a shake begins, kinds of one seed and index differ in their motion alone."""
    first = [render_clip(5, 3, label, 1) for label in range(6)]
    assert all(np.array_equal(frame, first[0]) for frame in first)


def test_clips_are_a_function_of_seed_index_and_label():
    state = np.random.get_state()[1].copy()
    clip = render_clip(3, 7, 2, 8, 32)
    assert (clip.shape, clip.dtype) == ((8, 32, 32, 3), np.uint8)
    assert np.array_equal(render_clip(3, 7, 2, 8, 32), clip)
    assert not np.array_equal(render_clip(4, 7, 2, 8, 32), clip)
    assert not np.array_equal(render_clip(3, 8, 2, 8, 32), clip)
    assert not np.array_equal(render_clip(3, 7, 3, 8, 32), clip)
    assert np.array_equal(np.random.get_state()[1], state)


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context.name, stream.average_rate, stream.codec_context.pix_fmt
        return codec, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion") / "clips"
    counts = list(write_motion_clips(folder, 10, seed=2, num_frames=12, size=32, workers=2))
    return folder, counts


def test_files_decode_back(written):
    folder, _ = written
    codec, frames = decoded(folder / "right" / "00001.mp4")
    assert codec == ("h264", 24, "yuv420p")
    clip = render_clip(2, 1, 1, 12, 32)
    assert frames.shape == clip.shape
    error = np.abs(frames.astype(float) - clip).mean((1, 2, 3))
    shuffled = np.abs(np.roll(frames, 1, 0).astype(float) - clip).mean((1, 2, 3))
    assert error.max() < 12  # levels of 255
    assert (error < 0.6 * shuffled).all()  # every frame in its place


def test_classes_take_turns_and_labels_csv_names_every_file(written):
    folder, counts = written
    assert counts == list(range(1, 11))
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.reader(file))
    labels = [index % len(CLASSES) for index in range(10)]
    names = [f"{CLASSES[label]}/{index:05d}.mp4" for index, label in enumerate(labels)]
    assert rows == [["path", "label"], *([name, str(label)] for name, label in zip(names, labels, strict=True))]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == sorted([*names, "labels.csv"])
    videos = find_videos(folder / "labels.csv")
    assert [(video.path, video.label) for video in videos] == [
        (str(folder / name), label) for name, label in zip(names, labels, strict=True)
    ]


def test_encoding_is_a_function_of_the_frames(tmp_path):
    frames = render_clip(2, 0, 0)
    files = set()
    for length in range(1, 300_000, 20_000):  # memory that an encoder reads unset holds something else each time
        scribble = np.random.default_rng(length).bytes(length)
        del scribble
        encode_clip(tmp_path / "clip.mp4", frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1


def test_files_do_not_depend_on_the_number_of_workers(written, tmp_path):
    folder, _ = written
    list(write_motion_clips(tmp_path, 2, seed=2, num_frames=12, size=32, workers=1))
    for name in ("left/00000.mp4", "right/00001.mp4"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"label": len(CLASSES)}, ValueError, "label must be within 0..7, got 8"),
        ({"label": -1}, ValueError, "label must be at least 0, got -1"),
        ({"label": "left"}, TypeError, "label must be an int, got 'left'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"index": -1}, ValueError, "index must be at least 0, got -1"),
        ({"num_frames": 0}, ValueError, "num_frames must be at least 1, got 0"),
        ({"size": 8}, ValueError, "size must be at least 16, got 8"),
    ],
)
def test_bad_clips_are_named(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        render_clip(**{"seed": 0, "index": 0, "label": 0, "num_frames": 2, "size": 16, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"size": 33}, ValueError, "size must be even, got 33"),
        ({"size": 8}, ValueError, "size must be at least 16, got 8"),
        ({"num_frames": 1}, ValueError, "num_frames must be at least 2, got 1"),
        ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ({"count": 2.0}, TypeError, r"count must be an int, got 2\.0"),
    ],
)
def test_bad_sets_of_clips_are_named_at_once_and_write_nothing(tmp_path, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        write_motion_clips(tmp_path / "clips", **{"count": 1, **arguments})
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 16, 15, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((2, 16, 16), np.uint8),
        np.zeros((2, 16, 16, 3), np.float32),
    ],
    ids=["odd", "empty", "grey", "float"],
)
def test_frames_that_cannot_be_encoded_are_named_and_leave_no_file(tmp_path, frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[T, H, W, 3\] with even H and W, got"):
        encode_clip(tmp_path / "clip.mp4", frames)
    assert not list(tmp_path.iterdir())
