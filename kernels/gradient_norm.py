"""gradient_norms: the L2 norms of several lists of gradients, such as encoder's and predictor's, which are clipped apart.

    norms[g] = sqrt(sum of x^2 over all elements of all tensors of groups[g])

4 bytes and 2 FLOP for a float32 gradient (it is read): memory-bound. Squares are exact in float64 and are summed in
float64; the result is rounded once, to float32. The native library sums in one order, whatever the number of threads
and the instruction set, on a CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import _native_gradient_norm as native
from . import _reference_optimizer as reference
from ._checks import FLOATS, describe
from ._dispatch import Row, choose, define, register
from ._native import device_of
from .ema import native_cpu_why_not, native_cuda_why_not

EXPECTED = "must have strided gradients in float32, bfloat16, float16 or float64, or None"


def _reference(gradients: list[Tensor], sizes: list[int]) -> Tensor:
    for g, gradient in zip(native.groups_of(sizes), gradients, strict=True):
        if gradient.dtype not in FLOATS or gradient.layout != torch.strided:
            raise TypeError(f"groups[{g}] {EXPECTED}, got {describe(gradient)}, {gradient.layout}")
    return reference.gradient_norms(gradients, sizes)


def _native_unfit(gradients: list[Tensor], sizes: list[int]) -> str | None:
    if native.walkable(gradients):
        return None
    wrong = next(tensor for tensor in gradients if not native.walkable([tensor]))
    return f"it needs floating tensors of at most 32 bits without gaps in memory, got {describe(wrong)}"


register(Row("gradient_norms", "cpu", native.norms_cpu, why_not=native_cpu_why_not, unfit=_native_unfit))
# not automatic before it has been measured against the reference on a GPU
register(
    Row("gradient_norms", "cuda", native.norms_cuda, why_not=native_cuda_why_not, unfit=_native_unfit, automatic=False)
)
register(Row("gradient_norms", "reference", _reference))


def _device(gradients: list[Tensor]) -> torch.device:
    """The one device of gradients that there are."""
    devices = set(map(device_of, gradients))
    if len(devices) > 1:
        raise ValueError(f"groups must have gradients on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def _norms(gradients: list[Tensor], sizes: list[int]) -> Tensor:
    if min(sizes, default=0) < 0 or sum(sizes) != len(gradients):
        raise ValueError(f"sizes must not be negative and sum to the {len(gradients)} gradients given, got {sizes}")
    if not gradients:
        return torch.zeros(len(sizes), dtype=torch.float32, device="cpu")
    return choose("gradient_norms", _device(gradients), gradients, sizes).forward(gradients, sizes)


def _fake(gradients: list[Tensor], sizes: list[int]) -> Tensor:
    return torch.empty(len(sizes), dtype=torch.float32, device=_device(gradients) if gradients else "cpu")


define("gradient_norms", "(Tensor[] gradients, int[] sizes) -> Tensor", _norms, _fake)


def _check_types(g: int, group: list[Tensor]) -> None:
    """Raise unless all are gradients, as far as their types tell."""
    for gradient in group:
        if not isinstance(gradient, Tensor):
            raise TypeError(f"groups[{g}] {EXPECTED}, got {describe(gradient)}")
        if isinstance(gradient, nn.Parameter):
            raise TypeError(f"groups[{g}] must have gradients, got a parameter {describe(gradient)}")


def _mesh(gradient: Tensor) -> object | None:
    """The mesh of a DTensor, None of any other tensor; `isinstance` would import all of torch.distributed.tensor."""
    return getattr(gradient, "device_mesh", None)


def _whole(gradients: list[Any]) -> Tensor:
    """[1], the norm of DTensors on one mesh, whose processes communicate."""
    norm: Any = _reference(gradients, [len(gradients)])  # DTensors compute this with DTensors
    return norm.full_tensor()


def _with_shards(groups: list[list[Tensor]]) -> Tensor:
    """The norms of groups among which there are DTensors."""
    gradients = list(chain.from_iterable(groups))
    norms = torch.zeros(len(groups), dtype=torch.float32, device=_device(gradients))
    for mesh in dict.fromkeys(map(_mesh, gradients)):
        parts = [[gradient for gradient in group if _mesh(gradient) == mesh] for group in groups]
        if mesh is None:
            of_mesh = gradient_norms(parts)
        else:
            none = norms.new_zeros(1)
            of_mesh = torch.cat([_whole(part) if part else none for part in parts])
        norms = torch.hypot(norms, of_mesh)
    return norms


def gradient_norms(groups: Iterable[Iterable[Tensor | None]]) -> Tensor:
    """[G] float32, the L2 norm of each of the G groups, on the device of the gradients; nothing waits for that device.

    Args:
        groups: lists (or other iterables) of gradients of any shapes, all on one device, float32, bfloat16, float16 or
            float64; None, the gradient of a parameter without one, counts as nothing. A norm is 0 if its group is empty,
            infinite or NaN if there is an infinity or a NaN in its group, and infinite if it exceeds float32.

    Of a DTensor the whole counts, however it is placed: the processes of its mesh, which must all call this function,
    exchange a number for each group. Autograd does not see this function. With no gradients at all the result is on the
    CPU.

    Raises:
        TypeError: something that is no list, no gradient (a parameter, say), integers, a sparse layout.
        ValueError: gradients on several devices.
    """
    if isinstance(groups, Tensor) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be a list of lists of gradients, got {describe(groups)}")
    present = []
    for g, group in enumerate(groups):
        if isinstance(group, Tensor) or not isinstance(group, Iterable):
            raise TypeError(f"groups[{g}] must be a list of gradients, got {describe(group)}")
        present.append([gradient for gradient in group if gradient is not None])
    gradients = list(chain.from_iterable(present))
    with torch.no_grad():
        # whole lists first: a step has hundreds of tensors; a trace knows little of map
        if torch.compiler.is_compiling() or not set(map(type, gradients)) <= {Tensor}:
            for g, group in enumerate(present):
                _check_types(g, group)
            if any(_mesh(gradient) is not None for gradient in gradients):
                return _with_shards(present)
        return torch.ops.vjepa.gradient_norms(gradients, [len(group) for group in present])
