"""mlp in Triton: the matrix products before and behind GELU, forward and backward, make the activation where their sums are.

    hidden = x W1^T + b1,                  a = gelu(hidden)                                 forward
    dhidden = (dy W2) gelu'(hidden),       a = gelu(hidden),    db1 = sum_i dhidden_i       backward

N tokens, D features in, H hidden, E out; M tokens and C hidden features of a tile, K depth of a step. 2 N D H FLOP forward
and 2 N E H backward; each tile of 128 x 128 reads 256 rows of its step from the L2 cache for 64 FLOP a byte. Programs of the
same tokens run side by side, so that x comes from memory once, while the weight stays in the L2 cache. Sums are float32;
hidden is rounded before the activation, so that what is kept gives the same activation again. All other products have
nothing to do but multiply: cuBLAS makes them.

Backward, each program adds the columns of its tile; the sums of all row tiles are then added by torch.sum: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._reference_mlp import gradients
from ._triton import LAUNCH, Variant, ceil_div, device_of, next_power_of_2
from ._triton_gelu import gelu, gelu_and_slope
from ._triton_product import LEAST, add_product, halves, precision
from ._triton_sets import TYPES

# Tokens, hidden features and depth of a tile, warps, stages. Three stages of 2 x 128 rows of 64 values of 16 bits are 96 KB,
# what every architecture has; of such programs an SM of an H200 runs two, one of which multiplies while the other makes
# activations. Of more than 32 tokens, Triton 3.6 makes TF32 products on sm_100, whatever precision it is told.
HALF, TF32, IEEE = (128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (32, 128, 32, 4, 3)


@triton.jit
def _below(index, size, EVEN: tl.constexpr):
    """index < size, known beforehand where tiles are EVEN."""
    if EVEN:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < size


@triton.jit
def _product(
    a_M1,
    b_1C,
    there_M,
    there_C,
    b_stride,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """Rows of a times columns of b, whose entries are `b_stride` apart: float32 [M, C]; zero where there is no row."""
    k_K = tl.arange(0, K)
    acc_MC = tl.zeros([M, C], tl.float32)
    for first in range(0, DEPTH, K):
        start = tl.full([], first, tl.int32)
        in_K = _below(start + k_K, DEPTH, DEPTH % K == 0)
        a_MK = tl.load(a_M1 + start + k_K[None, :], mask=there_M[:, None] & in_K[None, :], other=0)
        b_KC = b_1C + (start + k_K).to(tl.int64)[:, None] * b_stride
        b_KC = tl.load(b_KC, mask=in_K[:, None] & there_C[None, :], other=0)
        acc_MC = add_product(acc_MC, a_MK, b_KC, PRECISION)
    return acc_MC


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    active_ptr,
    num_tokens,
    stride_x,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    TILES: tl.constexpr = (H + C - 1) // C
    i_M = (tl.program_id(0) // TILES) * M + tl.arange(0, M)
    j_C = (tl.program_id(0) % TILES) * C + tl.arange(0, C)
    there_M, there_C = i_M < num_tokens, _below(j_C, H, H % C == 0)
    i_M = i_M.to(tl.int64)
    x_M1 = x_ptr + (i_M * stride_x)[:, None]
    weight_1C = weight_ptr + (j_C.to(tl.int64) * D)[None, :]
    h_MC = _product(x_M1, weight_1C, there_M, there_C, 1, D, PRECISION, M, C, K)
    if bias_ptr is not None:
        h_MC += tl.load(bias_ptr + j_C, mask=there_C, other=0).to(tl.float32)[None, :]
    h_MC = h_MC.to(active_ptr.dtype.element_ty)
    place_MC = (i_M * H)[:, None] + j_C[None, :]
    mask_MC = there_M[:, None] & there_C[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + place_MC, h_MC, mask=mask_MC)
    a_MC = gelu(h_MC.to(tl.float32), active_ptr.dtype.element_ty == tl.float32)
    tl.store(active_ptr + place_MC, a_MC.to(active_ptr.dtype.element_ty), mask=mask_MC)


@triton.jit
def _finish(g_MC, j_C, rows, H: tl.constexpr, EVEN: tl.constexpr):
    """Stores the gradient of hidden for columns j_C of the product, its sums and the activation."""
    hidden_ptr, slopes_ptr, active_ptr, sums_ptr, i_M, there_M, stride_h = rows
    there_C = _below(j_C, H, EVEN)
    mask_MC = there_M[:, None] & there_C[None, :]
    h_MC = tl.load(hidden_ptr + ((i_M * stride_h)[:, None] + j_C[None, :]), mask=mask_MC, other=0).to(tl.float32)
    a_MC, slope_MC = gelu_and_slope(h_MC, slopes_ptr.dtype.element_ty == tl.float32)
    g_MC = g_MC.to(tl.float32) * slope_MC
    place_MC = (i_M * H)[:, None] + j_C[None, :]
    tl.store(slopes_ptr + place_MC, g_MC.to(slopes_ptr.dtype.element_ty), mask=mask_MC)
    if active_ptr is not None:
        tl.store(active_ptr + place_MC, a_MC.to(active_ptr.dtype.element_ty), mask=mask_MC)
    if sums_ptr is not None:
        tl.store(sums_ptr + j_C, tl.sum(g_MC, axis=0), mask=there_C)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad_ptr,
    weight_ptr,
    hidden_ptr,
    slopes_ptr,
    active_ptr,
    sums_ptr,
    num_tokens,
    stride_g,
    stride_h,
    E: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """slopes_ptr: the gradient of hidden; sums_ptr: [tiles of tokens, H], its sums over the tokens of each."""
    TILES: tl.constexpr = (H + C - 1) // C
    i_M = (tl.program_id(0) // TILES) * M + tl.arange(0, M)
    j_C = (tl.program_id(0) % TILES) * C + tl.arange(0, C)
    there_M, there_C = i_M < num_tokens, _below(j_C, H, H % C == 0)
    i_M = i_M.to(tl.int64)
    g_MC = _product(
        grad_ptr + (i_M * stride_g)[:, None], weight_ptr + j_C[None, :], there_M, there_C, H, E, PRECISION, M, C, K
    )
    g_MC = g_MC.to(slopes_ptr.dtype.element_ty)
    if sums_ptr is not None:
        sums_ptr += (tl.program_id(0) // TILES).to(tl.int64) * H
    rows = (hidden_ptr, slopes_ptr, active_ptr, sums_ptr, i_M, there_M, stride_h)
    if C < 64:
        _finish(g_MC, j_C, rows, H, H % C == 0)
    else:  # by quarters: a whole tile of hidden takes registers that a second program on the SM needs
        first_C = (tl.program_id(0) % TILES) * C + tl.arange(0, C // 4)
        left_MC, right_MC = halves(g_MC)
        g_MC, next_MC = halves(left_MC)
        _finish(g_MC, first_C, rows, H, H % C == 0)
        _finish(next_MC, first_C + C // 4, rows, H, H % C == 0)
        g_MC, next_MC = halves(right_MC)
        _finish(g_MC, first_C + C // 2, rows, H, H % C == 0)
        _finish(next_MC, first_C + C // 4 * 3, rows, H, H % C == 0)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _meta(dtype: torch.dtype, depth: int, hidden: int, precision: str) -> dict[str, Any]:
    tile = HALF
    if dtype == torch.float32:
        tile = TF32 if precision == "tf32" else IEEE
    rows, columns, step, warps, stages = tile
    return {
        "PRECISION": precision,
        "M": rows,
        "C": min(columns, max(LEAST, next_power_of_2(hidden))),
        "K": min(step, max(LEAST, next_power_of_2(depth))),
        "num_warps": warps,
        "num_stages": stages,
    }


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """gelu(x weight1^T + bias1) weight2^T + bias2, and the argument of gelu, [N, H], or nothing if it is not to be kept."""
    (num_tokens, width), features = x.shape, weight1.shape[0]
    active = torch.empty((num_tokens, features), dtype=x.dtype, device=x.device)
    hidden = torch.empty_like(active) if keep else x.new_empty(0)
    if num_tokens > 0:
        x = _rows(x)
        meta = _meta(x.dtype, width, features, precision(x.dtype))
        with device_of(x):
            _forward_kernel[(ceil_div(num_tokens, meta["M"]) * ceil_div(features, meta["C"]),)](
                x,
                weight1.contiguous(),
                None if bias1 is None else bias1.contiguous(),
                hidden if keep else None,
                active,
                num_tokens,
                x.stride(0),
                D=width,
                H=features,
                **meta,
                **LAUNCH,
            )
    return F.linear(active, weight2, bias2), hidden


def mlp_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2 and bias2 (empty where not in `needs`)."""
    if not any(needs[:3]):
        return gradients(grad, x, grad, F.gelu(hidden) if needs[3] else None, weight1, None, needs)
    (num_tokens, features), width = hidden.shape, grad.shape[1]
    meta = _meta(grad.dtype, width, features, precision(grad.dtype))
    tiles = ceil_div(num_tokens, meta["M"])
    slopes = torch.empty((num_tokens, features), dtype=grad.dtype, device=grad.device)
    active = torch.empty_like(slopes) if needs[3] else None
    sums = torch.empty((tiles, features), dtype=torch.float32, device=grad.device) if needs[2] else None
    if num_tokens > 0:
        of_out, hidden = _rows(grad), _rows(hidden)
        with device_of(grad):
            _backward_kernel[(tiles * ceil_div(features, meta["C"]),)](
                of_out,
                weight2.contiguous(),
                hidden,
                slopes,
                active,
                sums,
                num_tokens,
                of_out.stride(0),
                hidden.stride(0),
                E=width,
                H=features,
                **meta,
                **LAUNCH,
            )
    return gradients(grad, x, slopes, active, weight1, None if sums is None else sums.sum(0), needs)


def variants() -> list[Variant]:
    """What the launchers launch at the widths of the predictor and of ViT-L, with gradients and without; and float32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = []
    for width in (384, 1024):
        found += [_forward_variant(width, bf16, keep=True), _forward_variant(width, bf16, keep=False)]
        found += [_backward_variant(width, bf16)]
    for kind in ("ieee", "tf32"):
        found += [_forward_variant(384, fp32, keep=True, precision=kind), _backward_variant(384, fp32, precision=kind)]
    return found


def _forward_variant(width: int, dtype: torch.dtype, keep: bool, precision: str = "ieee") -> Variant:
    names = ("x_ptr", "weight_ptr", "bias_ptr", "active_ptr", *(("hidden_ptr",) if keep else ()))
    pointers = dict.fromkeys(names, f"*{TYPES[dtype]}")
    name = f"mlp {'keeping hidden ' if keep else ''}{_kind(dtype, precision)} {width}"
    sizes = {"D": width, **({} if keep else {"hidden_ptr": None})}
    return _variant(name, _forward_kernel, dtype, pointers, ("stride_x",), sizes, precision)


def _backward_variant(width: int, dtype: torch.dtype, precision: str = "ieee") -> Variant:
    names = ("grad_ptr", "weight_ptr", "hidden_ptr", "slopes_ptr", "active_ptr")
    pointers = {**dict.fromkeys(names, f"*{TYPES[dtype]}"), "sums_ptr": "*fp32"}
    name = f"mlp backward {_kind(dtype, precision)} {width}"
    return _variant(name, _backward_kernel, dtype, pointers, ("stride_g", "stride_h"), {"E": width}, precision)


def _variant(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    pointers: dict[str, str],
    strides: tuple[str, ...],
    sizes: dict[str, int | None],
    precision: str,
) -> Variant:
    width = next(iter(sizes.values())) or 0
    meta = _meta(dtype, width, 4 * width, precision)
    return Variant(
        name=name,
        kernel=kernel,
        types={**pointers, **dict.fromkeys(("num_tokens", *strides), "i32")},
        num_warps=meta.pop("num_warps"),
        num_stages=meta.pop("num_stages"),
        constants={**sizes, "H": 4 * width, **meta},
        divisible=(*pointers, *strides),
        matrix=_kind(dtype, precision) != "fp32",
    )


def _kind(dtype: torch.dtype, precision: str) -> str:
    return "tf32" if precision == "tf32" else TYPES[dtype]
