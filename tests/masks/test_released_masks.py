"""Masks equal, token for token, what the released samplers drew for the same seeds (golden/released_masks.json)."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch

from vjepa.masks import CausalMultiBlock, Masks, MultiBlock, RandomTube

GOLDEN = json.loads((Path(__file__).parent / "golden" / "released_masks.json").read_text())


def _case_id(case: dict) -> str:
    grid = "x".join(map(str, case["grid"]))
    return f"{grid}-steps{case.get('context_steps', '')}-batch{case['batch_size']}-seed{case['seed']}"


def _entries(masks: Masks) -> list[list]:
    """[context tokens, target tokens, context digest, target digest] of each mask kind."""
    batch = masks.num_clips
    rows = []
    for kind in range(masks.num_kinds):
        row = []
        for tokens in (masks.context, masks.target):
            sets = tokens.indices.split(list(tokens.lengths))[kind * batch : (kind + 1) * batch]
            digest = hashlib.sha256()
            for ids in sets:
                digest.update(struct.pack(f"<{len(ids) + 1}q", len(ids), *ids.tolist()))
            row.append((len(sets[0]), digest.hexdigest()[:16]))
        rows.append([row[0][0], row[1][0], row[0][1], row[1][1]])
    return rows


def _block_sampler(case: dict, packing: str) -> MultiBlock:
    kinds = [tuple(kind) for kind in case["kinds"]]
    args = (tuple(case["grid"]), kinds, tuple(case["aspect"]), packing)
    if case["context_steps"] == case["grid"][0]:
        return MultiBlock(*args)
    return CausalMultiBlock(*args, context_steps=case["context_steps"])


@pytest.mark.parametrize("case", GOLDEN["multiblock"], ids=_case_id)
def test_truncate_equals_released_multiblock_call_after_call(case: dict) -> None:
    sampler = _block_sampler(case, "truncate")
    generator = torch.Generator().manual_seed(case["seed"])
    for iteration, expected in enumerate(case["calls"]):
        assert _entries(sampler(case["batch_size"], generator, iteration=iteration)) == expected


@pytest.mark.parametrize("case", GOLDEN["tube"], ids=_case_id)
@pytest.mark.parametrize("packing", ["exact", "truncate"])
def test_tube_equals_released_tube_call_after_call(case: dict, packing: str) -> None:
    sampler = RandomTube(tuple(case["grid"]), case["ratio"], packing, num_kinds=case["num_kinds"])
    generator = torch.Generator().manual_seed(case["seed"])
    for expected in case["calls"]:
        assert _entries(sampler(case["batch_size"], generator)) == expected


def test_default_generator_serves_like_the_released_sampler() -> None:
    case = GOLDEN["multiblock"][0]
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(case["seed"])
        masks = _block_sampler(case, "truncate")(case["batch_size"], torch.default_generator, iteration=0)
    finally:
        torch.random.set_rng_state(state)
    assert _entries(masks) == case["calls"][0]
