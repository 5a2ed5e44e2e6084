"""EMA of a ViT-S encoder, float32: ours against `_foreach_lerp_` and against the loop of the usual trainers.

Without copies: 12 bytes a parameter. With bfloat16 copies: 14; peers need a second pass for those.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vjepa.kernels import backend, ema_update_

MOMENTUM = 0.998
WIDTH, DEPTH = 384, 12  # ViT-S
SHAPES = [
    (WIDTH, 3, 2, 16, 16),
    *[s for _ in range(DEPTH) for s in ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))],
    *[s for _ in range(DEPTH) for s in ((3 * WIDTH,), (WIDTH,), (4 * WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,))],
]
PARAMETERS = sum(torch.Size(shape).numel() for shape in SHAPES)
WORK = f"ViT-S, {PARAMETERS / 1e6:.1f} M parameters, float32"


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in SHAPES]


def loop(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)


def foreach_lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def native_cuda(targets: list[Tensor], sources: list[Tensor]) -> None:
    with backend("cuda"):
        ema_update_(targets, sources, MOMENTUM)


def bench_ema(compare, device):
    updates = {
        "vjepa": lambda targets, sources: ema_update_(targets, sources, MOMENTUM),
        "foreach_lerp_": foreach_lerp,
        "loop": loop,
    }
    if device.type == "cuda":
        updates["vjepa cuda, table built each time"] = native_cuda
    targets, sources = make(device), make(device)
    calls = {}
    for name, update in updates.items():
        expected = [MOMENTUM * t.double() + (1 - MOMENTUM) * s.double() for t, s in zip(targets, sources, strict=True)]
        update(targets, sources)
        for target, value in zip(targets, expected, strict=True):
            torch.testing.assert_close(target.double(), value, rtol=2e-7, atol=2e-7)
        calls[name] = partial(update, targets, sources)
    compare("ema", WORK, calls, bytes_moved=12 * PARAMETERS)


def bench_ema_with_copies(compare, device):
    targets, sources, copies = make(device), make(device), make(device, torch.bfloat16)

    def ours() -> None:
        torch.ops.vjepa.ema_update_(targets, sources, copies, torch.tensor(MOMENTUM, dtype=torch.float64))

    def two_passes() -> None:
        foreach_lerp(targets, sources)
        torch._foreach_copy_(copies, targets)

    calls = {"vjepa": ours, "foreach_lerp_ + foreach_copy_": two_passes}
    for call in calls.values():
        call()
        assert all(torch.equal(copy, target.bfloat16()) for copy, target in zip(copies, targets, strict=True))
    compare("ema", f"{WORK}, with bfloat16 copies", calls, bytes_moved=14 * PARAMETERS)
