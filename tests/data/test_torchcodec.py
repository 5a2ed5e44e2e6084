"""The torchcodec decoder gives the clips that PyAV gives; where it cannot run it says what is missing.

Comparisons run where torchcodec can be loaded: pip install torchcodec, with FFmpeg's shared libraries on the loader's path.
"""

import importlib

import numpy as np
import pytest
import torch

from vjepa.data import ClipError, ClipLoader, ClipTimeout, DataConfig, DataError, iterate_clips, read_clip
from vjepa.data.clip import ClipSpec, FixedPlacement, RandomPlacement, load_clip
from vjepa.data.torchcodec_frames import TensorWriter, check_decoder, video_decoder
from vjepa.data.transform import Crop

# Both resize the same rectangle with a triangle filter, one as YUV in 14-bit fixed point before the colours are made, one as
# RGB after: colours of half the resolution are interpolated twice in another order. Luma rounds to half a level in each.
LEVELS = 2.0
KINDS = {
    "h264 with B-frames": ("a.mp4", {"options": {"bf": "3", "g": "12"}}),
    "h264 in mkv": ("a.mkv", {"options": {"g": "12"}}),
    "mpeg4 in mp4": ("a.mp4", {"codec": "mpeg4", "options": {"g": "12", "b": "2M"}}),
    "vp9 in webm": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}),
}
REAL = [  # not ollie_editlist.mov and face_mpeg4.avi: see the module's list
    "asl_milk_short.mkv",
    "bikes_scope.mp4",
    "bug_macro_640.mp4",
    "carphone_qcif.mp4",
    "cars_topdown_vp9.webm",
    "cat_portrait.mp4",
    "cockatoo_yuv444.mp4",
    "flower_vp8.webm",
    "juggle_720p24.mp4",
    "kickflip_screenrec_vfr.mp4",
    "nasa_13013.mp4",
    "ollie_hevc_rotated.mov",
    "pancake_h264.mkv",
    "tears_of_steel_av1.mp4",
]
ALSO_BAD = ["no_first_keyframe.ts", "raw_annexb.h264", "resolution_change.ts"]  # good by PyAV
HIDDEN = "corrupt_middle_light.mp4"  # damage that PyAV tells of and torchcodec does not


@pytest.fixture
def torchcodec():
    try:
        video_decoder()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture
def absent(monkeypatch):
    """Makes importing torchcodec raise an error."""
    real = importlib.import_module

    def fail(error):
        video_decoder.cache_clear()
        monkeypatch.setattr(
            importlib,
            "import_module",
            lambda name, *rest: _raise(error) if "torchcodec." in name else real(name, *rest),
        )

    yield fail
    monkeypatch.undo()
    video_decoder.cache_clear()


def _raise(error):
    raise error


def test_what_is_missing_is_said(absent, make_video):
    path = make_video("a.mp4", 30)
    absent(ModuleNotFoundError("No module named 'torchcodec'", name="torchcodec"))
    words = r"needs the package torchcodec, which is not installed; get it with: pip install 'vjepa\[torchcodec\]'"
    with pytest.raises(DataError, match=words):
        read_clip(path, 4, decoder="torchcodec")
    with pytest.raises(DataError, match=words):
        ClipLoader(DataConfig(str(path), decoder="torchcodec"), 4, (16, 16), 2)
    absent(OSError("libavutil.so.60: cannot open shared object file"))
    with pytest.raises(DataError, match=r"does not load: libavutil\.so\.60: cannot open.*FFmpeg's shared libraries"):
        check_decoder("torchcodec")


def test_unknown_decoders_and_settings_are_refused(make_video):
    with pytest.raises(ValueError, match="decoder must be one of pyav, torchcodec, torchcodec:cuda, got 'decord'"):
        read_clip(make_video("a.mp4", 30), 4, decoder="decord")
    with pytest.raises(ValueError, match="decoder must be 'pyav', 'torchcodec' or 'torchcodec:cuda', got 'decord'"):
        DataConfig("x", decoder="decord")
    with pytest.raises(ValueError, match="needs start_method 'forkserver' or 'spawn', got 'fork'"):
        DataConfig("x", decoder="torchcodec:cuda", start_method="fork")
    with pytest.raises(ValueError, match="needs start_method 'forkserver' or 'spawn', got 'fork'"):
        iterate_clips([], 4, 16, decoder="torchcodec:cuda", start_method="fork")


def test_writer_crops_resizes_and_flips():
    """A frame whose red says x and whose green says y."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    frame = torch.stack([2 * x, 2 * y, torch.full_like(x, 7)]).to(torch.uint8)
    writer = TensorWriter(3, (16, 16), 3, lambda aspect: Crop(0.25, 0.5, 0.5, 0.5), True, "torchcodec")
    writer.write(frame, 0, 1)
    writer.write(frame, 1, 3)
    red, green, blue = writer.clip[:, 2].astype(float)
    np.testing.assert_array_equal(writer.clip[:, 0], writer.clip[:, 2])
    inner = slice(1, -1)  # at its edges a resize has nothing to look at beyond the crop
    expected = 2 * (24 + 3 * (np.arange(16)[::-1] + 0.5) - 0.5)
    assert np.abs(red[:, inner] - expected[None, inner]).max() <= 1
    assert np.abs(green[inner] - 2 * (32 + 2 * (np.arange(16)[inner, None] + 0.5) - 0.5)).max() <= 1
    assert (blue == 7).all()
    grey = TensorWriter(1, (16, 16), 1, lambda aspect: Crop(0.25, 0.5, 0.5, 0.5), True, "torchcodec")
    grey.write(frame, 0, 1)
    assert np.abs(grey.clip[0, 0] - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_exact_from_any_start(kind, torchcodec, make_video, read_numbers):
    name, how = KINDS[kind]
    path = make_video(name, 60, **how)
    whole = {"image_size": (48, 64), "crop": "full"}
    for first, stride in ((0, 1), (1, 4), (11, 3), (25, 1), (52, 1)):
        clip = read_clip(path, 8, frame_stride=stride, start=first / 30, decoder="torchcodec", **whole)
        assert read_numbers(clip) == [first + stride * i for i in range(8)], (first, stride)
    for options in ({"fps": 60, "start": 0.1}, {"frame_stride": 4, "start": 1.9}):  # frames twice; too late a start
        ours, theirs = (read_clip(path, 5, **options, decoder=name, **whole) for name in ("pyav", "torchcodec"))
        assert read_numbers(theirs) == read_numbers(ours)


def test_short_videos_and_bad_ones(torchcodec, make_video, read_numbers, tmp_path):
    path = str(make_video("a.mp4", 10))
    spec = ClipSpec(6, (48, 64), 4, decoder="torchcodec")
    assert read_numbers(load_clip(path, spec, FixedPlacement(0.0)).pixels) == [0, 4, 8, 9, 9, 9]
    with pytest.raises(ClipError, match="too short: 10 frames, at least 12 are needed"):
        load_clip(path, ClipSpec(6, (48, 64), 4, min_frames=12, decoder="torchcodec"), FixedPlacement())
    with pytest.raises(ClipTimeout):
        read_clip(path, 4, timeout=1e-7, decoder="torchcodec")
    (tmp_path / "text.mp4").write_text("hello" * 100)
    with pytest.raises(ClipError, match="Invalid data"):
        read_clip(tmp_path / "text.mp4", 4, decoder="torchcodec")
    with pytest.raises(ClipError, match=r"does not say when frames are shown.*decoder pyav reads it"):
        read_clip(make_video("a.h264", 30), 4, decoder="torchcodec")


def test_grey_and_batches(torchcodec, make_video):
    path = str(make_video("a.mp4", 60))
    clips = [read_clip(path, 4, image_size=32, channels=1, decoder=name) for name in ("pyav", "torchcodec")]
    assert clips[1].shape == (1, 4, 32, 32)
    assert (clips[0].float() - clips[1].float()).abs().mean() < LEVELS
    batches = []
    for name in ("pyav", "torchcodec"):
        loader = ClipLoader(DataConfig(path, decoder=name, num_workers=1), 4, (32, 32), 3, seed=1)
        batches.extend(loader.batches(0, 1))
    assert batches[0].clips == batches[1].clips
    assert (batches[0].video.float() - batches[1].video.float()).abs().mean() < LEVELS


@pytest.mark.parametrize("name", REAL)
def test_real_videos(name, torchcodec, shared_videos):
    path = str(shared_videos / "clips" / name)
    for seed in range(2):
        clips = []
        for decoder in ("pyav", "torchcodec"):
            placement = RandomPlacement(np.random.default_rng(seed), (0.3, 1.0), (0.75, 1.35), True)
            clips.append(load_clip(path, ClipSpec(8, (96, 128), decoder=decoder), placement))
        ours, theirs = clips
        assert (ours.start, ours.crop, ours.flip) == (theirs.start, theirs.crop, theirs.flip)
        assert np.abs(ours.pixels.astype(int) - theirs.pixels).mean() < LEVELS


def test_broken_files(torchcodec, shared_videos):
    spec = {decoder: ClipSpec(16, (32, 32), min_frames=8, decoder=decoder) for decoder in ("pyav", "torchcodec")}
    for path in sorted((shared_videos / "broken").iterdir()):
        bad = {}
        for decoder in spec:
            try:
                load_clip(str(path), spec[decoder], FixedPlacement())
            except ClipError as error:
                bad[decoder] = error.reason
        expected = {"pyav", "torchcodec"} if "pyav" in bad else set()
        if path.name in ALSO_BAD:
            expected = {"torchcodec"}
        if path.name == HIDDEN:
            expected = {"pyav"}
        assert set(bad) == expected, (path.name, bad)


@pytest.mark.gpu
def test_nvdec_gives_the_same_clips(torchcodec, make_video):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = str(make_video("a.mp4", 60, size=(256, 192)))
    clips = [read_clip(path, 8, image_size=96, decoder=name) for name in ("torchcodec", "torchcodec:cuda")]
    assert (clips[0].float() - clips[1].float()).abs().mean() < LEVELS
