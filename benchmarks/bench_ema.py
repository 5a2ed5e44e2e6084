"""EMA of a ViT, float32: ours against `_foreach_lerp_` and against the loop of the usual trainers.

Without copies: 12 bytes a parameter. With bfloat16 copies: 14; peers need a second pass for those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa.kernels import ema_update_

from .harness import Work

MOMENTUM = 0.998
ROUNDING = 2e-7  # relative and absolute: one rounding of the sum and one of the difference in it
SIZES = {"cuda": ("ViT-L", 1024, 24), "cpu": ("ViT-S", 384, 12)}  # width and depth


def shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    matrices = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    vectors = ((3 * width,), (width,), (4 * width,), (width,), (width,), (width,))
    return [(width, 3, 2, 16, 16), *matrices * depth, *vectors * depth]


def loop(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)


def foreach_lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def prepare(device: torch.device) -> tuple[str, list[Tensor], list[Tensor]]:
    """A name, targets and sources."""
    model, width, depth = SIZES[device.type]
    lists = [[torch.randn(shape, device=device) for shape in shapes(width, depth)] for _ in range(2)]
    return f"{model}, {sum(t.numel() for t in lists[0]) / 1e6:.0f} M parameters", *lists


def verifier(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor] | None = None):
    """The targets are updated in place, so each contender is compared with what they were before it."""

    def verify(call, factor):
        expected = [MOMENTUM * t.double() + (1 - MOMENTUM) * s.double() for t, s in zip(targets, sources, strict=True)]
        call()
        for target, value in zip(targets, expected, strict=True):
            assert ((target - value).abs_() <= value.abs().mul_(ROUNDING).add_(ROUNDING)).all()
        for copy, target in zip(copies or [], targets, strict=False):
            assert torch.equal(copy, target.bfloat16())

    return verify


def bench_ema(compare, device):
    name, targets, sources = prepare(device)
    parameters = sum(target.numel() for target in targets)
    compare(
        Work("ema", name, "float32", {"parameters": [parameters]}, bytes_moved=12 * parameters, flop=3 * parameters),
        "ema_update_",
        lambda: ema_update_(targets, sources, MOMENTUM),
        {"foreach_lerp_": lambda: foreach_lerp(targets, sources), "loop": lambda: loop(targets, sources)},
        verify=verifier(targets, sources),
    )


def bench_ema_with_copies(compare, device):
    name, targets, sources = prepare(device)
    parameters = sum(target.numel() for target in targets)
    copies = [target.bfloat16() for target in targets]
    momentum = torch.tensor(MOMENTUM, dtype=torch.float64)

    def two_passes() -> None:
        foreach_lerp(targets, sources)
        torch._foreach_copy_(copies, targets)

    shapes_of = {"parameters": [parameters]}
    compare(
        Work("ema", f"{name}, bf16 copies", "float32", shapes_of, bytes_moved=14 * parameters, flop=3 * parameters),
        "ema_update_",
        lambda: torch.ops.vjepa.ema_update_(targets, sources, copies, momentum),
        {"foreach_lerp_ + foreach_copy_": two_passes},
        verify=verifier(targets, sources, copies),
    )
