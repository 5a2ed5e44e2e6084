"""Random-tube masks."""

import pytest
import torch

from vjepa.masks import RandomTube


def test_a_share_of_positions_is_hidden_over_all_time() -> None:
    masks = RandomTube((8, 14, 14), 0.9)(6, torch.Generator().manual_seed(0))
    assert masks.context.lengths == (152,) * 6  # int(196 * 0.1) = 19 positions, 8 time steps
    assert masks.target.lengths == (1568 - 152,) * 6
    planes = set()
    for context, target in zip(masks.context.indices.split(152), masks.target.indices.split(1416), strict=True):
        assert sorted(context.tolist() + target.tolist()) == list(range(1568))
        steps = context.view(8, 19) - 196 * torch.arange(8)[:, None]
        assert (steps == steps[0]).all()
        planes.add(tuple(steps[0].tolist()))
    assert len(planes) == 6


def test_positions_are_visible_equally_often() -> None:
    sampler = RandomTube((1, 4, 5), 0.5)
    masks = sampler(2000, torch.Generator().manual_seed(0))
    counts = torch.bincount(masks.context.indices, minlength=20)
    # Each is binomial(2000, 1/2): standard deviation 22.4; 4.5 of them over 20 positions happen once in 7000 seeds.
    assert (counts - 1000).abs().max() < 100


def test_kinds_are_independent_masks_of_the_same_clips() -> None:
    masks = RandomTube((2, 6, 6), 0.5, num_kinds=2)(3, torch.Generator().manual_seed(0))
    assert masks.kind.tolist() == [0, 0, 0, 1, 1, 1]
    assert masks.context.clip.tolist() == [0, 1, 2, 0, 1, 2]
    assert len({tuple(ids.tolist()) for ids in masks.context.indices.split(36)}) == 6


def test_budget_hides_more_than_the_tube() -> None:
    masks = RandomTube((8, 14, 14), 0.5, "budget", hidden_ratio=0.9)(4, torch.Generator().manual_seed(0))
    assert masks.context.lengths == (157,) * 4
    assert masks.target.lengths == (784,) * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (8, 0, 14)}, "grid must be"),
        ({"grid": (1, 1 << 13, 1 << 13)}, "grid must have fewer than"),
        ({"ratio": 0.0}, "ratio must be between"),
        ({"ratio": 1.0}, "ratio must be between"),
        ({"grid": (8, 2, 2), "ratio": 0.9}, r"ratio must leave 1..3 visible positions on a grid of 2 x 2, got 0.9"),
        ({"num_kinds": 0}, "num_kinds must be"),
        ({"packing": "none"}, "packing must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomTube(**arguments)


def test_bad_draws_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        RandomTube()(0, torch.Generator())
