"""`mask_generator`: a pure function of seed, rank and step."""

import pytest
import torch

from vjepa.masks import MultiBlock, mask_generator, mask_seed


def test_known_values() -> None:
    """These numbers are part of a run's identity: changing them breaks the resume of runs made before."""
    assert mask_seed(0, 0, 0) == 3910012753625025838
    assert mask_seed(234, 7, 89999) == 2012391543428711565


def test_seeds_differ_between_seeds_ranks_and_steps() -> None:
    seeds = {mask_seed(seed, rank, step) for seed in (0, 1, -1) for rank in range(16) for step in range(200)}
    assert len(seeds) == 3 * 16 * 200
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_generator_is_fresh_and_reproducible() -> None:
    before = torch.random.get_rng_state()
    sampler = MultiBlock((2, 6, 6))
    first, again, rank, step = (
        sampler(4, mask_generator(*arguments)).context.indices.tolist()
        for arguments in ((1, 0, 5), (1, 0, 5), (1, 1, 5), (1, 0, 6))
    )
    assert first == again
    assert first != rank
    assert first != step
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
        mask_generator(0, -1, 0)
    with pytest.raises(ValueError, match="step must be at least 0, got -3"):
        mask_generator(0, 0, -3)
    with pytest.raises(TypeError, match=r"seed must be an int, got 1\.5"):
        mask_generator(1.5)
