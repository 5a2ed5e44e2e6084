"""Gradient norms of encoder and predictor of a ViT, apart: ours against PyTorch's ways. 4 bytes a float32 parameter.

Ours sum in float64, the peers in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from vjepa.kernels import gradient_norms

from .bench_ema import SIZES, shapes
from .harness import OURS, Work

PREDICTOR = {"cuda": (384, 12), "cpu": (192, 6)}  # width and depth, beside those of the encoder
ROUNDING = 2e-7  # relative: ours is rounded once
PEERS_ROUNDING = 1e-4  # of sums in float32 of a million numbers and more


def of_each(norm: Callable[[list[Tensor]], Tensor], groups: list[list[Tensor]]) -> Callable[[], Tensor]:
    return lambda: torch.stack([norm(group) for group in groups])


def foreach_norm(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def loop(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))


def verifier(groups: list[list[Tensor]]):
    exact = torch.stack([sum(gradient.double().square().sum() for gradient in group) for group in groups]).sqrt()

    def verify(call, factor):
        # the harness grants peers a larger factor than ours
        allowed = ROUNDING if factor <= OURS else PEERS_ROUNDING
        assert ((call() - exact).abs() <= allowed * exact).all()

    return verify


def bench_gradient_norm(compare, device):
    encoder, *size = SIZES[device.type]
    groups = [[torch.randn(shape, device=device) for shape in shapes(*its)] for its in (size, PREDICTOR[device.type])]
    counts = [sum(gradient.numel() for gradient in group) for group in groups]
    total = sum(counts)
    compare(
        Work(
            "gradient_norm",
            f"{encoder} and predictor, {total / 1e6:.0f} M parameters",
            "float32",
            {"parameters": counts},
            bytes_moved=4 * total,
            flop=2 * total,
        ),
        "gradient_norms",
        lambda: gradient_norms(groups),
        {
            "foreach_norm + norm": of_each(foreach_norm, groups),
            "get_total_norm": of_each(get_total_norm, groups),
            "loop": of_each(loop, groups),
        },
        verify=verifier(groups),
    )
