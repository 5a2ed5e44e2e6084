"""How the time of a step grows with batch, tokens of a clip and model, ours beside straight PyTorch."""

from __future__ import annotations

import pytest
import torch

from .bench_step import NAMES
from .contenders import ASSEMBLED, contenders, verifier, work_of
from .steps import workload

CENTRE = {"cpu": ("vit_tiny", 1, 96), "cuda": ("vit_large", 8, 224)}  # model, clips, pixels
AXES = {
    "cpu": {"clips": (1, 2, 4), "pixels": (64, 96, 128, 192), "model": ("vit_tiny", "vit_small")},
    "cuda": {"clips": (4, 8, 16), "pixels": (112, 224, 384), "model": ("vit_small", "vit_base", "vit_large")},
}
ROUNDS = 2


def points(kind: str) -> list[tuple[str, str, int, int]]:
    """(axis, model, clips, pixels): from the centre along each axis."""
    model, clips, pixels = CENTRE[kind]
    axes = AXES[kind]
    along = [("clips", model, number, pixels) for number in axes["clips"]]
    along += [("pixels", model, clips, number) for number in axes["pixels"]]
    return along + [("model", name, clips, pixels) for name in axes["model"]]  # the centre thrice: each axis in one go


POINTS = {kind: points(kind) for kind in AXES}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(max(map(len, POINTS.values()))))
def bench_step_growth(race, device, number):
    if number >= len(POINTS[device.type]):
        pytest.skip("a GPU has more points")
    axis, model, clips, pixels = POINTS[device.type][number]
    work = workload(model, clips, torch.bfloat16, device, image_size=pixels)
    two = [contender for contender in contenders(work, None) if contender.name != ASSEMBLED]
    name = f"{NAMES[model]}, {clips} clips, {work.config.num_tokens} tokens each"
    where = {
        "clips": clips,
        "tokens": work.config.num_tokens,
        "model": sum(p.numel() for p in work.model().parameters()),
    }
    entry = work_of(work, name, ROUNDS, op="step_growth", axis="tokens" if axis == "pixels" else axis, at=where)
    race(entry, two, verifier(work))
