"""Multi-block masks: partition, blocks, packings, redraws, errors."""

import pytest
import torch

from vjepa.masks import CausalMultiBlock, Masks, MultiBlock

GRID = (8, 14, 14)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sets(masks: Masks) -> list[tuple[list[int], list[int]]]:
    pairs = zip(*(t.indices.split(list(t.lengths)) for t in (masks.context, masks.target)), strict=True)
    return [(context.tolist(), target.tolist()) for context, target in pairs]


@pytest.mark.parametrize("grid", [GRID, (1, 14, 14), (4, 6, 10), (8, 4, 4)])
def test_exact_sets_partition_the_clip(grid: tuple[int, int, int]) -> None:
    masks = MultiBlock(grid)(5, _generator())
    tokens = list(range(grid[0] * grid[1] * grid[2]))
    for context, target in _sets(masks):
        assert context
        assert target
        assert context == sorted(context)
        assert target == sorted(target)
        assert sorted(context + target) == tokens


def test_set_order_is_kind_major_clip_minor() -> None:
    masks = MultiBlock(GRID, kinds=((8, 0.15), (2, 0.7), (1, 0.3)))(4, _generator())
    assert masks.kind.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert masks.context.clip.tolist() == masks.target.clip.tolist() == [0, 1, 2, 3] * 3
    assert (masks.num_clips, masks.num_kinds, masks.num_sets) == (4, 3, 12)


def test_masks_span_the_whole_duration() -> None:
    for context, _ in _sets(MultiBlock(GRID)(6, _generator())):
        planes = [{i % 196 for i in context if i // 196 == t} for t in range(8)]
        assert all(plane == planes[0] for plane in planes)


def test_one_block_is_a_rectangle_of_the_drawn_size_at_every_position() -> None:
    sampler = MultiBlock((2, 6, 8), kinds=((1, 0.3),), aspect=(0.75, 1.5))
    corners = set()
    for seed in range(40):
        sizes = set()
        for _, target in _sets(sampler(12, _generator(seed))):
            rows = sorted({i % 48 // 8 for i in target})
            columns = sorted({i % 8 for i in target})
            assert rows == list(range(rows[0], rows[-1] + 1))
            assert columns == list(range(columns[0], columns[-1] + 1))
            assert len(target) == 2 * len(rows) * len(columns)
            sizes.add((len(rows), len(columns)))
            corners.add((rows[0], columns[0]))
        assert len(sizes) == 1  # one block size for the whole batch
        assert sizes <= {sampler.block_size(0.3, aspect / 100) for aspect in range(75, 151)}
    assert {top for top, _ in corners} == {0, 1, 2, 3}
    assert {left for _, left in corners} >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("scale", "aspect", "size"),
    [(0.15, 1.0, (5, 5)), (0.15, 1.5, (7, 4)), (0.7, 0.75, (10, 14)), (0.7, 1.0, (12, 12)), (0.001, 1.0, (1, 1))],
)
def test_block_size(scale: float, aspect: float, size: tuple[int, int]) -> None:
    assert MultiBlock(GRID).block_size(scale, aspect) == size


def test_truncate_is_exact_cut_to_the_shortest_of_each_kind() -> None:
    exact = _sets(MultiBlock(GRID)(6, _generator(3)))
    truncated = _sets(MultiBlock(GRID, packing="truncate")(6, _generator(3)))
    for kind in range(2):
        rows = slice(kind * 6, kind * 6 + 6)
        for part in range(2):
            shortest = min(len(pair[part]) for pair in exact[rows])
            assert [pair[part] for pair in truncated[rows]] == [pair[part][:shortest] for pair in exact[rows]]


def test_budget_keeps_blocks_and_subsamples_context_only() -> None:
    exact = _sets(MultiBlock(GRID)(6, _generator(3)))
    budget = _sets(MultiBlock(GRID, packing="budget", hidden_ratio=0.9)(6, _generator(3)))
    for (context, target), (kept, kept_target) in zip(exact, budget, strict=True):
        assert kept_target == target
        assert set(kept) <= set(context)
        assert len(kept) == min(157, len(context))  # round(1568 * 0.1)
    assert any(len(context) < 157 for context, _ in exact)
    assert any(len(context) > 157 for context, _ in exact)


def test_budget_draws_uniformly_over_the_context() -> None:
    """Every context token is kept equally often: chi-squared over the time steps, where truncation has its bias."""
    sampler = MultiBlock(GRID, kinds=((8, 0.15),), packing="budget", hidden_ratio=0.9)
    counts = torch.zeros(8)
    for seed in range(20):
        masks = sampler(24, _generator(seed))
        counts += torch.bincount(masks.context.indices // 196, minlength=8)
    expected = counts.sum() / 8
    # 8 cells, 7 degrees of freedom: a fair draw exceeds 24.3 once in a thousand; without replacement even less often.
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_causal_context_lies_in_the_first_steps_and_the_rest_is_target() -> None:
    causal = _sets(CausalMultiBlock(GRID, context_steps=3)(5, _generator(1)))
    plain = _sets(MultiBlock(GRID)(5, _generator(1)))
    for (context, target), (whole, _) in zip(causal, plain, strict=True):
        assert context == [i for i in whole if i < 3 * 196]
        assert sorted(context + target) == list(range(1568))


def test_same_generator_same_masks_and_other_seed_other_masks() -> None:
    sampler = MultiBlock(GRID)
    assert _sets(sampler(3, _generator(5))) == _sets(sampler(3, _generator(5)))
    assert _sets(sampler(3, _generator(5))) != _sets(sampler(3, _generator(6)))


def test_iteration_fixes_the_block_size_and_not_the_positions() -> None:
    sampler = MultiBlock((1, 14, 14), kinds=((1, 0.3),))
    areas = [[len(target) for _, target in _sets(sampler(4, _generator(s), iteration=7))] for s in range(8)]
    assert len({area for batch in areas for area in batch}) == 1
    targets = [_sets(sampler(4, _generator(s), iteration=7)) for s in range(2)]
    assert targets[0] != targets[1]


def test_the_default_generator_is_not_touched() -> None:
    before = torch.random.get_rng_state()
    MultiBlock(GRID, packing="budget")(4, _generator())
    assert torch.equal(before, torch.random.get_rng_state())


def test_clips_without_context_are_drawn_again() -> None:
    """Two blocks of half the plane hide all of it half of the time."""
    sampler = MultiBlock((2, 2, 2), kinds=((2, 0.5),), aspect=(3.0, 3.0))
    assert sampler.block_size(0.5, 3.0) == (2, 1)
    for context, target in _sets(sampler(200, _generator())):
        assert context
        assert target


def test_blocks_that_cover_everything_are_an_error_after_bounded_redraws() -> None:
    sampler = MultiBlock((1, 2, 2), kinds=((64, 0.25),))
    with pytest.raises(ValueError, match=r"kinds: 64 blocks of 1 x 1 .* leave no context on a grid of 2 x 2"):
        sampler(1, _generator())


def test_block_as_large_as_the_plane_is_an_error_when_built() -> None:
    with pytest.raises(ValueError, match=r"kinds: a block of \(1, 1.0\) hides all of a 14 x 14 grid at every aspect"):
        MultiBlock(GRID, kinds=((1, 1.0),), aspect=(1.0, 1.0))
    with pytest.raises(ValueError, match="hides all of a 1 x 1 grid"):
        MultiBlock((8, 1, 1))


def test_block_that_almost_always_fills_the_plane_is_an_error_when_drawn() -> None:
    sampler = MultiBlock((1, 2, 2), kinds=((1, 0.75),), aspect=(0.75, 1.3333334))
    assert sampler.block_size(0.75, 1.3333334) == (2, 1)
    with pytest.raises(ValueError, match=r"spatial scale 0.75 hides all of a 2 x 2 grid for \d+ aspect ratios"):
        sampler(1, _generator())


def test_aspect_ratios_that_fill_the_plane_are_drawn_again() -> None:
    sampler = MultiBlock((1, 4, 4), kinds=((1, 0.9),), aspect=(0.5, 2.0))
    assert sampler.block_size(0.9, 1.0) == (4, 4)
    for seed in range(20):
        assert min(sampler(2, _generator(seed)).context.lengths) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (8, 14)}, "grid must be"),
        ({"grid": (0, 14, 14)}, "grid must be"),
        ({"grid": (8, 14.0, 14)}, "grid must be"),
        ({"grid": (1 << 10, 1 << 10, 1 << 10)}, "grid must have fewer than"),
        ({"kinds": ()}, "kinds must be one or more pairs"),
        ({"kinds": ((8,),)}, "kinds must be one or more pairs"),
        ({"kinds": (8, 0.15)}, "kinds must be one or more pairs"),  # a pair that is not in a list
        ({"kinds": ((8, "0.15"),)}, "kinds must be one or more pairs"),
        ({"grid": 8}, "grid must be"),
        ({"aspect": 1.0}, "aspect must be"),
        ({"hidden_ratio": "0.9"}, "hidden_ratio must be between"),
        ({"kinds": ((0, 0.15),)}, "number of blocks"),
        ({"kinds": ((8.5, 0.15),)}, "number of blocks"),
        ({"kinds": ((8, 0.0),)}, "spatial scale"),
        ({"kinds": ((8, 1.5),)}, "spatial scale"),
        ({"aspect": (1.5, 0.75)}, "aspect must be"),
        ({"aspect": (0.0, 1.0)}, "aspect must be"),
        ({"aspect": (0.5, float("nan"))}, "aspect must be"),
        ({"packing": "padded"}, "packing must be one of exact, budget, truncate, got 'padded'"),
        ({"hidden_ratio": 1.0}, "hidden_ratio must be between"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiBlock(**arguments)


def test_bad_context_steps_are_named() -> None:
    with pytest.raises(ValueError, match=r"context_steps must be within 1..8"):
        CausalMultiBlock(GRID, context_steps=9)
    with pytest.raises(TypeError, match="context_steps must be an int"):
        CausalMultiBlock(GRID, context_steps=2.5)


def test_bad_draws_are_named() -> None:
    sampler = MultiBlock(GRID)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sampler(0, _generator())
    with pytest.raises(TypeError, match="batch_size must be an int"):
        sampler(2.0, _generator())
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        sampler(2, 0)
