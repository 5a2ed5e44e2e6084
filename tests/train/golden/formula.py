"""A training problem made of formulas: weights, video and masks that anybody can compute again."""

from __future__ import annotations

import math
import zlib

import torch

FRAMES, SIZE, PATCH, TUBELET, CLIPS = 4, 64, 16, 2, 3
TOKENS = (FRAMES // TUBELET) * (SIZE // PATCH) ** 2
EMBED_DIM, DEPTH, HEADS, PREDICTOR_DIM, PREDICTOR_DEPTH = 48, 2, 2, 24, 2
CONTEXT_SIZES = (14, 6)  # tokens of the context for each mask kind; the targets are the rest
STEPS_PER_EPOCH, EPOCHS, WARMUP_EPOCHS = 2, 5, 1
FIRST_CLIPPED_STEP = 4  # the released trainer clips from the epoch after the one that follows the warm-up
RECIPE = {
    "start_lr": 5e-4,
    "lr": 2e-3,
    "final_lr": 1e-5,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "momentum": (0.9, 1.0),
    "clip_grad": 0.12,
}


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights of the parameter `name`: around 1 for norms' scales, around 0 for all others."""
    count = math.prod(shape)
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + zlib.crc32(name.encode()) % 1000)
    noise = (wave * 43758.5453).remainder(1.0) - 0.5  # uniform to the eye: a plain wave would make matrices of rank 2
    is_scale = "norm" in name and name.endswith("weight")
    values = 1 + 0.2 * noise if is_scale else noise
    return values.to(torch.float32).reshape(shape)


def video(step: int) -> torch.Tensor:
    """Clips of step `step`: float32 [CLIPS, 3, FRAMES, SIZE, SIZE]."""
    b, c, t, h, w = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (CLIPS, 3, FRAMES, SIZE, SIZE)), indexing="ij"
    )
    phase = 0.31 * (b + 1) * h + 0.17 * (c + 1) * w + 0.9 * t * (b + 0.5) + 1.3 * step
    return (torch.sin(phase) + 0.5 * torch.cos(0.05 * h * w + step)).to(torch.float32)


def token_sets(step: int, kind: int) -> tuple[list[list[int]], list[list[int]]]:
    """Context and target token ids, ascending, of each clip for mask kind `kind` at step `step`."""
    contexts, targets = [], []
    for clip in range(CLIPS):
        order = sorted(
            range(TOKENS), key=lambda i, c=clip: math.sin(i * 12.9898 + c * 78.233 + step * 37.719 + kind * 4.581)
        )
        contexts.append(sorted(order[: CONTEXT_SIZES[kind]]))
        targets.append(sorted(order[CONTEXT_SIZES[kind] :]))
    return contexts, targets


def sums(name: str, values: torch.Tensor) -> dict[str, float]:
    """Sum and sum of magnitudes of a parameter.

    The keys' bias is left out: softmax ignores it, so its gradient is rounding noise, which AdamW makes full steps of.
    """
    values = values.detach().double().flatten()
    if name.endswith("qkv.bias"):
        query, _, value = values.chunk(3)
        values = torch.cat([query, value])
    return {"sum": float(values.sum()), "abs_sum": float(values.abs().sum())}
