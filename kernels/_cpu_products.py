"""Matrix products on a CPU, by whichever of three libraries is the fastest one: PyTorch's two, and the native one.

Where the processor has tiles of bfloat16 (AMX), large products of float32 are the native library's; see _cpu_tiles.

Elsewhere, for float32, PyTorch calls MKL, whose fastest code is for Intel's own processors; oneDNN is the faster one on
those of AMD. For bfloat16 both ways end in oneDNN, but `linear` first writes the bias to all rows of the result and then has
the product added to it. On a Zen 4 with AVX-512, of 6000 x 384 x 1536 and other shapes of ViT-S and ViT-L, oneDNN asked
directly needs this share of the time of linear and mm, in processor time of one thread:

    x W^T + b    float32 0.87 to 0.94, bfloat16 0.90 to 0.97
    g W          float32 0.86 to 0.95, bfloat16 1.00
    g^T x        float32 1.00 to 1.15, bfloat16 1.00 to 1.15: left to mm

N rows, K columns of x, M rows of W.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu_tiles as tiles

CPUINFO = Path("/proc/cpuinfo")
# Summands of a float32 product by oneDNN: of 1536 its largest error was 2.4 times MKL's.
LONGEST_SUM = 512


@functools.cache
def made_by_amd() -> bool:
    """Whether the processor says that AMD made it."""
    if CPUINFO.exists():
        with CPUINFO.open(errors="replace") as lines:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in lines)
    return "AuthenticAMD" in platform.processor()


@functools.cache
def _onednn() -> tuple[torch.dtype, ...]:
    """The dtypes whose products with a bias are faster if oneDNN is asked directly."""
    operators = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise")):
        return ()
    narrow = hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return (torch.float32,) * made_by_amd() + (torch.bfloat16,) * narrow


def _ask(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    if x.dtype == torch.float32 and x.shape[1] > LONGEST_SUM:
        return False
    return x.dtype in dtypes and bool(torch.backends.mkldnn.enabled) and x.numel() > 0


def _dense(weight: Tensor) -> Tensor:
    """Rows or columns side by side: what oneDNN takes as it is."""
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias: [N, M] of [N, K], [M, K] and [M].

    It is `out`, if that is given, its rows dense, and the product can be written there; else it is new.
    """
    if tiles.serve(x, weight.T, bias):
        return tiles.product(x, weight.T, bias, out)
    if not _ask(x, _onednn()):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, _dense(weight), bias, "none", [], "")


def times(grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """grad weight: [N, K] of [N, M] and [M, K]; `out` as for linear."""
    if tiles.serve(grad, weight):
        return tiles.product(grad, weight, None, out)
    if grad.dtype != torch.float32 or not _ask(grad, _onednn()):
        return grad @ weight
    return torch.ops.mkldnn._linear_pointwise(grad, _dense(weight.T), None, "none", [], "")


def of_weight(grad: Tensor, x: Tensor, added_to: Tensor | None = None) -> Tensor:
    """grad^T x: [M, K] of [N, M] and [N, K]; or that added to `added_to`, in its place."""
    if tiles.serve(grad.T, x):
        return tiles.product(grad.T, x, None, added_to, accumulate=added_to is not None)
    return grad.T @ x if added_to is None else added_to.addmm_(grad.T, x)
