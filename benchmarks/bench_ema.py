"""EMA of a ViT, float32: ours against the loop of the released recipe, the usual libraries' ways and foreach operations.

Without copies: 12 bytes a parameter. With bfloat16 copies: 14; peers need a second pass for those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vjepa.kernels import EMA, ema_update_

from .harness import Call, Work
from .machine import available_memory

MOMENTUM = 0.998
ROUNDING = 2e-7  # relative and absolute: one rounding of the sum and one of the difference in it
VIT_S, VIT_L = ("ViT-S", 384, 12), ("ViT-L", 1024, 24)  # name, width and depth
SIZES = {"cuda": VIT_L, "cpu": VIT_S}
RELEASED = "released loop"
NEEDED = 6e9  # bytes of two ViT-L in float32, and of what the released loop makes of one tensor
SAMPLED = 251  # of a ViT-L each so many-th element is checked


def shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    matrices = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    vectors = ((3 * width,), (width,), (4 * width,), (width,), (width,), (width,))
    return [(width, 3, 2, 16, 16), *matrices * depth, *vectors * depth]


# ---------------------------------------------------------------------------------------------------------------- peers


def released_loop(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Three passes for each tensor, one of which writes a temporary."""
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_((1 - MOMENTUM) * source)


def alpha_loop(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Two passes for each tensor."""
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)


def lerp_loop(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """One pass for each tensor, as timm's ModelEmaV3 without foreach."""
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source, 1 - MOMENTUM)


def new_value_loop(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Products and their sum are new tensors, the sum is then copied: the arithmetic of timm's ModelEmaV2."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(MOMENTUM * target + (1 - MOMENTUM) * source)


def foreach_lerp(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def foreach_mul_add(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    torch._foreach_mul_(targets, MOMENTUM)
    torch._foreach_add_(targets, sources, alpha=1 - MOMENTUM)


def averaged_model(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Call:
    """torch's AveragedModel of a module made of `sources`, past its first update, which would only copy."""
    averaged, model = AveragedModel(nn.Module(), multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM)), nn.ParameterList(sources)
    averaged.module = nn.ParameterList(targets)
    averaged.n_averaged.fill_(1)
    return lambda: averaged.update_parameters(model)


UPDATES = {
    "foreach_lerp_": foreach_lerp,
    "foreach_mul_ + foreach_add_": foreach_mul_add,
    RELEASED: released_loop,
    "loop of mul_ and add_(alpha)": alpha_loop,
    "loop of lerp_ (timm V3)": lerp_loop,
    "loop of new values (timm V2)": new_value_loop,
}


# ---------------------------------------------------------------------------------------------------------------- works


def prepare(device: torch.device, size: tuple[str, int, int] | None = None) -> tuple[str, list[Tensor], list[Tensor]]:
    """A name, targets and sources."""
    model, width, depth = size or SIZES[device.type]
    lists = [[torch.randn(shape, device=device) for shape in shapes(width, depth)] for _ in range(2)]
    return f"{model}, {sum(t.numel() for t in lists[0]) / 1e6:.0f} M parameters", *lists


def verifier(
    targets: list[Tensor], sources: list[Tensor], copies: Sequence[Tensor] = (), every: int = 1
) -> Callable[[Call, float], None]:
    """The targets are updated in place, so each contender is compared with what they were before it.

    Of each tensor every `every`-th element.
    """
    looked_at, its_sources = (
        [tensor.detach().view(-1)[::every] for tensor in tensors] for tensors in (targets, sources)
    )

    def verify(call: Call, factor: float) -> None:
        pairs = zip(looked_at, its_sources, strict=True)
        expected = [MOMENTUM * target.double() + (1 - MOMENTUM) * source.double() for target, source in pairs]
        call()
        for target, value in zip(looked_at, expected, strict=True):
            assert ((target - value).abs_() <= value.abs().mul_(ROUNDING).add_(ROUNDING)).all()
        for copy, target in zip(copies, targets, strict=bool(copies)):
            assert torch.equal(copy, target.bfloat16())

    return verify


def work(name: str, targets: list[Tensor], bytes_each: int) -> Work:
    numel = sum(target.numel() for target in targets)
    needs = {"bytes_moved": bytes_each * numel, "flop": 3 * numel}
    return Work("ema", name, "float32", {"parameters": [numel]}, **needs, in_place=True, also=RELEASED)


def peers(targets: list[Tensor], sources: list[Tensor]) -> dict[str, Call]:
    calls = {name: partial(update, targets, sources) for name, update in UPDATES.items()}
    return {**calls, "AveragedModel": averaged_model(targets, sources)}


def bench_ema(compare, device):
    name, targets, sources = prepare(device)
    ours, verify = (lambda: ema_update_(targets, sources, MOMENTUM)), verifier(targets, sources)
    compare(work(name, targets, 12), "ema_update_", ours, peers(targets, sources), verify=verify)


def bench_ema_class(compare, device):
    name, targets, sources = prepare(device)
    ema = EMA(nn.ParameterList(targets), nn.ParameterList(sources))
    ours, verify = (lambda: ema.update(MOMENTUM)), verifier(targets, sources)
    compare(work(f"{name}, EMA class", targets, 12), "ema_update_", ours, peers(targets, sources), verify=verify)


def bench_ema_class_with_copies(compare, device):
    name, targets, sources = prepare(device)
    ema = EMA(nn.ParameterList(targets), nn.ParameterList(sources), copies=torch.bfloat16)
    copies = list(ema.copies.values())

    def two_passes() -> None:
        foreach_lerp(targets, sources)
        torch._foreach_copy_(copies, targets)

    def loop() -> None:
        released_loop(targets, sources)
        for copy, target in zip(copies, targets, strict=True):
            copy.copy_(target)

    compare(
        work(f"{name}, EMA class, bf16 copies", targets, 14),
        "ema_update_",
        lambda: ema.update(MOMENTUM),
        {"foreach_lerp_ + foreach_copy_": two_passes, RELEASED: loop},
        verify=verifier(targets, sources, copies),
    )


def bench_ema_large(compare, device):
    """On a CPU too the size of a ViT-L, whose tensors no second-level cache holds between the passes of a loop."""
    if SIZES[device.type] == VIT_L:
        pytest.skip("the other works have this size on such a device")
    if (available := available_memory()) < NEEDED:
        pytest.skip(f"{NEEDED / 1e9:.0f} GB of memory are needed, {available / 1e9:.1f} GB are available")
    name, targets, sources = prepare(device, VIT_L)
    ema = EMA(nn.ParameterList(targets), nn.ParameterList(sources))
    compare(
        work(f"{name}, EMA class", targets, 12),
        "ema_update_",
        lambda: ema.update(MOMENTUM),
        {label: partial(UPDATES[label], targets, sources) for label in ("foreach_lerp_", RELEASED)},
        verify=verifier(targets, sources, every=SAMPLED),
    )
