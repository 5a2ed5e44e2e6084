"""Which pixels a clip holds: crop, size, flip, rotation metadata, colour."""

import av
import numpy as np
import pytest
import torch

from vjepa.data import ClipError, Crop, read_clip
from vjepa.data.clip import ClipSpec, RandomPlacement, load_clip
from vjepa.data.transform import CROP_ATTEMPTS, Orientation, largest_crop, random_crop

QUADRANTS = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [200, 200, 200]]], np.uint8)
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), lambda image: image),
    "clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "half turn": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "anticlockwise": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down mirrored": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
}


def paint_quadrants(number, width, height):
    return np.ascontiguousarray(QUADRANTS.repeat(height // 2, 0).repeat(width // 2, 1))


def paint_ramps(number, width, height):
    """Red rises from left to right, green from top to bottom, 20 to 220."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[..., 0] = np.linspace(20, 220, width)[None]
    image[..., 1] = np.linspace(20, 220, height)[:, None]
    return image


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_rotation_metadata_is_applied_to_frames_and_crops(name, make_video, rotate):
    matrix, turn = ORIENTATIONS[name]
    path = make_video("a.mp4", 9, size=(96, 64), paint=paint_quadrants)
    rotate(path, matrix)
    expected = turn(QUADRANTS).astype(int)
    height, width = (96, 64) if matrix[0] == 0 else (64, 96)
    clip = read_clip(path, 2, frame_stride=1, image_size=(height, width), crop="full").numpy()[:, 0].transpose(1, 2, 0)
    corners = clip[[height // 4, 3 * height // 4]][:, [width // 4, 3 * width // 4]].astype(int)
    assert np.abs(corners - expected).max() < 12
    for y in (0, 1):
        for x in (0, 1):
            part = read_clip(path, 1, image_size=16, crop=(0.05 + x / 2, 0.05 + y / 2, 0.4, 0.4))
            assert np.abs(part.float().mean((1, 2, 3)).numpy() - expected[y, x]).max() < 12, (x, y)


def test_rotated_crop_and_flip_commute(make_video, rotate):
    path = make_video("a.mp4", 9, size=(96, 64), paint=paint_ramps)
    rotate(path, (0, 1, -1, 0))
    crop = (0.25, 0.1, 0.5, 0.6)
    clip = read_clip(path, 2, image_size=(40, 24), crop=crop)
    assert torch.equal(read_clip(path, 2, image_size=(40, 24), crop=crop, flip=True), clip.flip(-1))
    # turned clockwise, green (coded from top to bottom) falls from left to right, red rises from top to bottom
    means = clip.float().mean((1, 2, 3))
    assert means[0] == pytest.approx(20 + 200 * 0.4, abs=6)
    assert means[1] == pytest.approx(220 - 200 * 0.5, abs=6)


def test_crop_takes_the_named_rectangle(make_video):
    path = make_video("a.mp4", 9, size=(128, 96), paint=paint_ramps)
    clip = read_clip(path, 2, image_size=(30, 50), crop=(0.5, 0.25, 0.25, 0.5)).float()
    assert clip[0].mean() == pytest.approx(20 + 200 * 0.625, abs=5)
    assert clip[1].mean() == pytest.approx(20 + 200 * 0.5, abs=5)
    assert clip[0, 0, :, -1].mean() - clip[0, 0, :, 0].mean() == pytest.approx(200 * 0.25, abs=8)


def test_views_of_wide_and_tall_videos(make_video):
    wide, tall = (make_video(f"{w}.mp4", 9, size=(w, h), paint=paint_ramps) for w, h in ((128, 64), (64, 128)))
    for path, channel in ((wide, 0), (tall, 1)):
        clips = [read_clip(path, 1, image_size=32, crop=view) for view in ("first", "center", "last")]
        means = [clip.float().mean((1, 2, 3)) for clip in clips]
        assert [float(m[channel]) for m in means] == pytest.approx([70, 120, 170], abs=5)
        assert [float(m[1 - channel]) for m in means] == pytest.approx([120] * 3, abs=5)


@pytest.mark.parametrize("space", ["bt601", "bt709", "full range", "4:4:4"])
def test_colours_survive(space, tmp_path):
    """The matrix and range a file names are the ones its colours are computed with."""
    colour = np.array([180, 60, 40], np.uint8)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4"})
        stream.width = stream.height = 32
        pixel_format = {"full range": "yuvj420p", "4:4:4": "yuv444p"}.get(space, "yuv420p")
        stream.pix_fmt = pixel_format
        stream.codec_context.colorspace = 1 if space == "bt709" else 5
        stream.codec_context.color_range = 2 if space == "full range" else 1
        for number in range(9):
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (32, 32, 3)).copy(), format="rgb24")
            frame = frame.reformat(format=pixel_format, dst_colorspace="ITU709" if space == "bt709" else "ITU601")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read_clip(path, 1, image_size=16).float().mean((1, 2, 3)).tolist() == pytest.approx(colour.tolist(), abs=5)


def test_grey_is_one_channel(make_video):
    path = make_video("a.mp4", 9, paint=paint_ramps)
    assert read_clip(path, 2, image_size=16, channels=1).shape == (1, 2, 16, 16)
    with pytest.raises(ClipError, match="3 or 1 channels, 12 were wanted"):
        read_clip(path, 2, image_size=16, channels=12)


def test_random_crops_have_the_recipe_s_areas_and_shapes():
    rng = np.random.default_rng(0)
    for aspect in (1.0, 9 / 16, 16 / 9, 4.0):
        crops = [random_crop(rng.random((CROP_ATTEMPTS, 4)), aspect, (0.3, 1.0), (0.75, 1.35)) for _ in range(2000)]
        stretch = np.array([crop.width / crop.height / aspect for crop in crops])
        area = np.array([crop.width * crop.height for crop in crops])
        assert stretch.min() >= 0.75 - 1e-9 and stretch.max() <= 1.35 + 1e-9
        if aspect in (1.0, 9 / 16):
            assert area.min() >= 0.3 - 1e-9 and area.max() <= 1.0
        places = [crop.x / (1 - crop.width) for crop in crops if crop.width < 0.9]
        places += [crop.y / (1 - crop.height) for crop in crops if crop.height < 0.9]
        assert np.mean(places) == pytest.approx(0.5, abs=0.03)
    areas = [random_crop(rng.random((CROP_ATTEMPTS, 4)), 1.0, (0.3, 0.6), (1.0, 1.0)) for _ in range(2000)]
    assert np.mean([crop.width * crop.height for crop in areas]) == pytest.approx(0.45, abs=0.01)


def test_flip_happens_to_half_the_clips_or_none(make_video):
    rng = np.random.default_rng(0)
    flips = [RandomPlacement(rng, (0.3, 1), (1, 1), True).flip for _ in range(1000)]
    assert 450 < sum(flips) < 550
    assert not any(RandomPlacement(rng, (0.3, 1), (1, 1), False).flip for _ in range(50))


def test_starts_cover_every_place_where_the_clip_fits(make_video, read_numbers):
    path = make_video("a.mp4", 14)
    spec = ClipSpec(3, (48, 64), frame_stride=4)
    firsts = set()
    for seed in range(60):
        clip = load_clip(str(path), spec, RandomPlacement(np.random.default_rng(seed), (1, 1), (1, 1), False))
        numbers = read_numbers(clip.pixels)
        assert numbers == [numbers[0] + 4 * i for i in range(3)]
        firsts.add(numbers[0])
    assert firsts == set(range(6))


@pytest.mark.parametrize("crop", ["middle", (0, 0, 1), (0.5, 0, 0.6, 1), (0, 0, 0, 1)])
def test_crop_that_makes_no_sense(crop, make_video):
    with pytest.raises(ValueError, match="crop"):
        read_clip("never opened.mp4", crop=crop)


def test_crop_of_a_turned_frame():
    assert Orientation(True, True, False).coded(Crop(0.0, 0.25, 0.5, 0.5)) == Crop(0.25, 0.5, 0.5, 0.5)
    assert largest_crop(2.0) == Crop(0.0, 0.25, 1.0, 0.5)
    assert largest_crop(0.5, view=1.0) == Crop(0.5, 0.0, 0.5, 1.0)
