"""Models, clips and masks made from closed formulas, so that every number in golden/*.json can be rebuilt anywhere."""

import math
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vjepa.config import VJEPAConfig
from vjepa.kernels import TokenIndices
from vjepa.masks import Masks
from vjepa.model import VJEPA

GOLDEN_STEP = 37  # the golden files hold every 37th number of a flattened tensor


def formula(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """sin(0.731 i^1.1 + phase(name)), i from 0: fills any shape, the same on every machine."""
    phase = (zlib.crc32(name.encode()) % 10007) / 997.0
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.731 * i**1.1 + phase).reshape(shape).to(dtype)


def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights at a realistic scale: norms near 1, matrices of size 1.5 / sqrt(fan in), the rest 0.1."""
    values = formula(name, shape)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * values
    if len(shape) > 1 and "mask_tokens" not in name:
        return values * 1.5 / math.sqrt(math.prod(shape[1:]))
    return 0.1 * values


def permuted(length: int, seed: int) -> list[int]:
    """A permutation of 0..length-1: j -> (a j + seed) mod length with a near 0.38 * length and prime to it."""
    a = next(a for a in range(int(0.38 * length) + 1, 2 * length) if math.gcd(a, length) == 1)
    return [(a * j + 7 * seed) % length for j in range(length)]


def make_masks(length: int, batch: int, sizes: list[Any]) -> Masks:
    """One context and one target set per kind and clip; `sizes`: per kind (context, target), or one such per clip."""
    context, target = [], []
    for kind, size in enumerate(sizes):
        for clip in range(batch):
            c, t = size[clip] if isinstance(size[0], (tuple, list)) else size
            order = permuted(length, 1 + clip + batch * kind)
            context.append(torch.tensor(sorted(order[:c])))
            target.append(torch.tensor(sorted(order[c : c + t])))
    clips = list(range(batch)) * len(sizes)
    return Masks(
        TokenIndices.from_sets(context, clip=clips),
        TokenIndices.from_sets(target, clip=clips),
        torch.arange(len(sizes)).repeat_interleave(batch),
    )


def summary(x: Tensor) -> dict[str, Any]:
    """What a golden file keeps of a tensor."""
    x = x.detach().double()
    return {"shape": list(x.shape), "abs_sum": float(x.abs().sum()), "values": x.flatten()[::GOLDEN_STEP][:24].tolist()}


def small_config(**changes: Any) -> VJEPAConfig:
    """A model of a few thousand weights over 4 x 3 x 4 tokens; fields can be replaced."""
    sizes: dict[str, Any] = {
        "image_size": (24, 32),
        "num_frames": 8,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "predictor_embed_dim": 16,
        "predictor_depth": 2,
    }
    return VJEPAConfig(**{**sizes, **changes})


def filled_model(config: VJEPAConfig, dtype: torch.dtype = torch.float32) -> VJEPA:
    """A model whose weights all come from the formulas; encoder and target encoder differ."""
    model = VJEPA(config).to(dtype)
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_(parameter(name, tuple(values.shape)))
    return model


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    return SimpleNamespace(
        formula=formula,
        filled_model=filled_model,
        make_masks=make_masks,
        small_config=small_config,
        summary=summary,
    )
