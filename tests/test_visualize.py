"""Pictures: masks cover exactly the tokens they hide, PCA colours lie where the features are, PNG files are pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from vjepa.kernels import TokenIndices
from vjepa.masks import Masks, MultiBlock, mask_generator
from vjepa.visualize import (
    CONTEXT,
    DARKEN,
    DROPPED,
    GAP,
    MARGIN,
    TARGET,
    mask_figure,
    mask_overlay,
    pca_figure,
    pca_rgb,
    png_bytes,
    save_png,
    to_frames,
    token_states,
)

GRID = (4, 3, 5)
TOKENS = 4 * 3 * 5


def grey_clip(value: int, frames: int = 8, height: int = 120, width: int = 200) -> torch.Tensor:
    return torch.full((3, frames, height, width), value, dtype=torch.uint8)


def two_clips_one_kind(context: list[list[int]], target: list[list[int]]) -> Masks:
    to_sets = [TokenIndices.from_sets([torch.tensor(ids) for ids in sets]) for sets in (context, target)]
    return Masks(*to_sets, torch.zeros(len(context), dtype=torch.int64))


def test_token_states_name_every_token_of_the_asked_clip():
    masks = two_clips_one_kind([[0, 7], [1, 59]], [[2, 3], [0]])
    (state,) = token_states(masks, GRID, clip=1)
    expected = np.full(TOKENS, DROPPED)
    expected[[1, 59]] = CONTEXT
    expected[0] = TARGET
    assert state.shape == GRID
    assert np.array_equal(state.reshape(-1), expected)
    with pytest.raises(ValueError, match="a set of clip 2"):
        token_states(masks, GRID, clip=2)


def test_token_states_of_a_sampler_give_one_array_per_kind():
    masks = MultiBlock(grid=(4, 6, 6))(3, mask_generator(0))
    states = token_states(masks, (4, 6, 6), clip=2)
    assert len(states) == 2
    for state in states:
        assert not (state == DROPPED).any()
        assert (state == state[:1]).all(), "a block covers all time steps"
        assert (state == TARGET).any() and (state == CONTEXT).any()


def test_overlay_leaves_context_darkens_targets_and_tints_dropped_tokens():
    frame = np.full((30, 50, 3), 200, dtype=np.uint8)
    state = np.full((3, 5), CONTEXT, dtype=np.uint8)
    state[1, 2], state[2, 4] = TARGET, DROPPED
    picture = mask_overlay(frame, state, grid_lines=False)
    assert (picture[:10] == 200).all()
    assert (picture[10:20, 20:30] == int(200 * DARKEN)).all()
    red, green = picture[20:, 40:, 0], picture[20:, 40:, 1]
    assert (red > green).all() and (green < 200).all()
    changed = (picture != 200).any(axis=2)
    assert changed.sum() == 2 * 10 * 10


def test_overlay_draws_lines_on_token_borders_only():
    frame = np.full((30, 50, 3), 100, dtype=np.uint8)
    picture = mask_overlay(frame, np.zeros((3, 5), dtype=np.uint8))
    assert (picture[10] > 100).all() and (picture[:, 20] > 100).all()
    assert (picture[11:20, 21:30] == 100).all()


def test_overlay_refuses_a_frame_that_is_no_multiple_of_the_grid():
    with pytest.raises(ValueError, match="multiple of the token grid 3 x 5, got 31 x 50"):
        mask_overlay(np.zeros((31, 50, 3), dtype=np.uint8), np.zeros((3, 5), dtype=np.uint8))


def test_mask_figure_shows_the_mask_under_its_frames():
    """Reads the pixels back: the dark tokens of the last row are the target tokens of each shown time step."""
    target = [k * 15 + k for k in range(4)]  # another token in each time step
    masks = two_clips_one_kind([[t for t in range(TOKENS) if t not in target]], [target])
    picture = mask_figure(grey_clip(200), masks, GRID, kinds=["blocks"], columns=4)
    dark = (picture == int(200 * DARKEN)).all(axis=2)
    rows = np.flatnonzero(dark.any(axis=1))
    top = rows[0] - 1  # token row 0, below its grid line
    assert rows[-1] - rows[0] < 40
    for step in range(4):
        left = MARGIN + step * (200 + GAP)
        tile = dark[top : top + 120, left : left + 200].reshape(3, 40, 5, 40)
        hidden = tile[:, 1:, :, 1:].all(axis=(1, 3)).reshape(-1)
        assert np.flatnonzero(hidden).tolist() == [step]


def test_mask_figure_enlarges_small_frames_by_a_whole_factor():
    masks = MultiBlock(grid=(4, 8, 8))(1, mask_generator(0))
    picture = mask_figure(grey_clip(90, height=64, width=64), masks, (4, 8, 8), columns=2)
    assert picture.dtype == np.uint8
    assert picture.shape[0] > 3 * 128 and picture.shape[1] >= 2 * 128


def test_mask_figure_needs_a_clip_that_fits_the_grid():
    masks = MultiBlock(grid=(4, 6, 6))(1, mask_generator(0))
    with pytest.raises(ValueError, match=r"multiples of the token grid \(4, 6, 6\), got \(8, 100, 120\)"):
        mask_figure(grey_clip(0, height=100, width=120), masks, (4, 6, 6))


def test_frames_of_grey_and_many_channel_clips():
    grey = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(1, 2, 4, 6)
    assert np.array_equal(to_frames(grey), np.repeat(grey[0][..., None], 3, axis=3))
    many = np.stack([grey[0] + channel for channel in range(5)])
    assert np.array_equal(to_frames(many)[..., 2], grey[0] + 2)
    with pytest.raises(ValueError, match=r"uint8 \[C,T,H,W\], got float32 \[3, 2, 4, 6\]"):
        to_frames(np.zeros((3, 2, 4, 6), dtype=np.float32))


def pattern_features(bright: list[tuple[int, int, int, int]], clips: int = 2) -> torch.Tensor:
    """Features of one direction, large at the given (clip, t, h, w), with a little noise everywhere."""
    generator = torch.Generator().manual_seed(0)
    features = 0.01 * torch.randn(clips, *GRID, 16, generator=generator)
    direction = torch.randn(16, generator=generator)
    for place in bright:
        features[place] += direction
    return features.reshape(clips, TOKENS, 16)


def test_pca_puts_a_known_pattern_where_it_is():
    bright = [(0, 0, 0, 0), (0, 1, 2, 4), (1, 3, 1, 2), (1, 3, 1, 3)]
    colours = pca_rgb(pattern_features(bright), GRID)
    assert colours.shape == (2, *GRID, 3)
    first = colours[..., 0].astype(int)
    distance = np.abs(first - np.median(first))
    found = sorted(map(tuple, np.argwhere(distance > 127).tolist()))
    assert found == sorted(bright)


def test_pca_figure_is_aligned_with_the_frames():
    """A square that moves by a token a step: bright in the frames and marked in the features, at the same pixels."""
    clip, features = grey_clip(10), torch.zeros(1, TOKENS, 8)
    features += 0.001 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        clip[:, 2 * step : 2 * step + 2, 40:80, 40 * step : 40 * step + 40] = 250
        features[0, step * 15 + 5 + step] += 1.0
    picture = pca_figure(clip[None], features, GRID, columns=4, labels=["moving"]).astype(int)
    bright = (picture == 250).all(axis=2)
    top = np.flatnonzero(bright[:, MARGIN : MARGIN + 40].all(axis=1))[0] - 40
    for step in range(4):
        left = MARGIN + step * (200 + GAP)
        frame, below = picture[top : top + 120, left : left + 200], picture[top + 120 + GAP :][:120, left : left + 200]
        square = (frame == 250).all(axis=2)
        red = below[..., 0]
        marked = np.abs(red - np.median(red)) > 100
        assert square.sum() == 40 * 40
        assert np.array_equal(square, marked)


def test_pca_is_one_for_all_clips_and_repeatable():
    features = pattern_features([(0, 1, 1, 1), (1, 1, 1, 1)])
    colours = pca_rgb(features, GRID)
    assert np.abs(colours[0, 1, 1, 1].astype(int) - colours[1, 1, 1, 1])[0] <= 3
    assert np.array_equal(colours, pca_rgb(features.numpy(), GRID))


def test_pca_scaling_is_robust_to_an_outlier():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(4, TOKENS, 8, generator=generator)
    features[0, 0] *= 1000
    red = pca_rgb(features, GRID, percentile=2)[..., 0].reshape(-1)[1:]
    assert len(np.unique(red)) > 60


def test_pca_without_position_shows_what_differs_between_clips():
    """All clips share a strong pattern over positions; one token of one clip differs."""
    generator = torch.Generator().manual_seed(3)
    shared = 10 * torch.randn(1, TOKENS, 8, generator=generator)
    features = shared.repeat(3, 1, 1) + 0.01 * torch.randn(3, TOKENS, 8, generator=generator)
    features[2, 17] += 1.0
    red = pca_rgb(features, GRID, remove_position=True, percentile=0)[..., 0].reshape(3, -1).astype(int)
    assert np.abs(red - np.median(red)).argmax() == 2 * TOKENS + 17
    with pytest.raises(ValueError, match="at least 2 clips, got 1"):
        pca_rgb(features[:1], GRID, remove_position=True)


def test_pca_of_constant_features_is_grey():
    assert (pca_rgb(torch.ones(1, TOKENS, 8), GRID) == 128).all()
    assert pca_rgb(torch.randn(1, TOKENS, 2, generator=torch.Generator().manual_seed(0)), GRID).shape[-1] == 3


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 7, 8), r"L = 4\*3\*5 = 60, got \[1, 7, 8\]"),
        (torch.full((1, TOKENS, 8), float("nan")), "finite numbers, got 480"),
    ],
)
def test_pca_refuses_unfit_features(features, message):
    with pytest.raises(ValueError, match=message):
        pca_rgb(features, GRID)


def test_png_round_trip(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = save_png(tmp_path / "new" / "picture.png", picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert path.read_bytes() == png_bytes(picture)
