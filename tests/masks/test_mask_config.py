"""`MaskConfig`: samplers from a configuration."""

import pytest
import torch

from vjepa.masks import CausalMultiBlock, MaskConfig, MultiBlock, RandomTube

GRID = (8, 14, 14)


def test_defaults_build_the_paper_masks() -> None:
    sampler = MaskConfig().build(GRID)
    assert type(sampler) is MultiBlock
    assert sampler.grid == GRID
    assert sampler.kinds == ((8, 0.15), (2, 0.7))
    assert sampler.aspect == (0.75, 1.5)
    assert sampler.packing == "exact"
    assert MaskConfig().num_kinds == 2


def test_fields_reach_the_samplers() -> None:
    blocks = MaskConfig(kinds=[[4, 0.3]], aspect=[1, 2], packing="budget", hidden_ratio=0.8).build(GRID)
    assert (blocks.kinds, blocks.aspect, blocks.packing, blocks.hidden_ratio) == (((4, 0.3),), (1, 2), "budget", 0.8)
    tube = MaskConfig(strategy="tube", tube_ratio=0.5, packing="truncate")
    assert isinstance(tube.build(GRID), RandomTube)
    assert (tube.build(GRID).ratio, tube.build(GRID).packing, tube.num_kinds) == (0.5, "truncate", 1)


@pytest.mark.parametrize(("frames", "tubelet", "steps"), [(6, 2, 3), (6, 1, 6), (16, 2, 8)])
def test_causal_frames_are_video_frames(frames: int, tubelet: int, steps: int) -> None:
    sampler = MaskConfig(strategy="causal", causal_frames=frames).build(GRID, tubelet_size=tubelet)
    assert isinstance(sampler, CausalMultiBlock)
    assert sampler.context_steps == steps
    masks = sampler(2, torch.Generator().manual_seed(0))
    assert masks.context.indices.max() < steps * 196


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "block"}, "strategy must be one of multiblock, tube, causal, got 'block'"),
        ({"kinds": ((8, 2.0),)}, "spatial scale"),
        ({"aspect": (2.0, 1.0)}, "aspect must be"),
        ({"packing": "pad"}, "packing must be one of"),
        ({"hidden_ratio": 0}, "hidden_ratio must be"),
        ({"tube_ratio": 1.2}, "tube_ratio must be"),
        ({"causal_frames": 0}, "causal_frames must be"),
    ],
)
def test_bad_fields_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskConfig(**arguments)


def test_causal_needs_frames_that_fit() -> None:
    config = MaskConfig(strategy="causal", causal_frames=5)
    with pytest.raises(ValueError, match="tubelet_size must be given"):
        config.build(GRID)
    with pytest.raises(ValueError, match=r"causal_frames must be a multiple of the tubelet's 2 frames .*, got 5"):
        config.build(GRID, tubelet_size=2)
    with pytest.raises(ValueError, match=r"at most the clip's 4, got 5"):
        config.build((4, 6, 6), tubelet_size=1)


def test_too_small_a_grid_is_named() -> None:
    with pytest.raises(ValueError, match="hides all of a 1 x 1 grid"):
        MaskConfig().build((8, 1, 1))
