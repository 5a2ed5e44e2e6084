"""tubelet_embed in Triton: a matrix product one of whose operands, the patches, is read straight from the strided video.

    out[m, n] = sum_k patch(m)[k] weight[n, k] + bias[n] + pos_embed[id(m), n]

B clips, C channels, (t, h, w) tubelet, K = C t h w, L tokens of a clip, D features, S sets, M tokens wanted: N packed
ones or all B L. 2 M K D FLOP over M K pixels, K D weights and M D outputs. A program makes a tile of 128 tokens by 256
features, for which it reads 384 values of each operand's k for 65536 FLOP. Programs of the same tokens run side by side,
so that each pixel comes from memory once, and the weight (3 MB for ViT-L) stays in the L2 cache. Patches are never
stored: bytes are normalised in float32 on their way to the matrix unit and rounded once, to the dtype of the weight.
Sums are float32; bias and position join them there, and the result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, ceil_div, device_of, next_power_of_2
from ._triton_patches import SIZES, constants, geometry, grid_of, line_of, normalisation, patch_of, pixel_of
from ._triton_product import LEAST, add_product, halves, precision
from ._triton_sets import SETS_POINTERS, TYPES, packed, search_steps
from ._triton_tubelet_backward import tubelet_embed_backward

__all__ = ["tubelet_embed", "tubelet_embed_backward", "variants"]

# Tokens, features and pixels of a tile, warps, stages. A step of 32 pixels is two rows of a patch of 16. Four stages of 128
# + 256 rows of 32 values of 16 bits are 96 KB, what every architecture has; 8 warps then hold 128 sums a thread. Narrow
# tiles are for widths that fill wide ones badly, and for uneven patches, whose addresses take registers. Of more than 32
# tokens, Triton 3.6 makes TF32 products on sm_100, whatever precision it is told.
WIDE, NARROW, TF32, IEEE = (128, 256, 32, 8, 4), (128, 128, 32, 8, 4), (128, 128, 32, 8, 3), (32, 128, 32, 4, 3)
WASTE = 1.1  # of columns, up to which a wide tile is the faster one


@triton.jit
def _finish(acc_MN, first, row_M, id_M, num_tokens, features, bias_ptr, pos_ptr, pos_stride, out_ptr):
    """Adds bias and position to the columns of the product that begin at `first`, and stores them."""
    n_N = first + tl.arange(0, acc_MN.shape[1])
    mask_MN = (row_M < num_tokens)[:, None] & (n_N < features)[None, :]
    if bias_ptr is not None:
        acc_MN += tl.load(bias_ptr + n_N, mask=n_N < features, other=0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        pos_MN = tl.load(pos_ptr + id_M.to(tl.int64)[:, None] * pos_stride + n_N[None, :], mask=mask_MN, other=0)
        acc_MN += pos_MN.to(tl.float32)
    tl.store(
        out_ptr + row_M.to(tl.int64)[:, None] * features + n_N[None, :],
        acc_MN.to(out_ptr.dtype.element_ty),
        mask=mask_MN,
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*SETS_POINTERS])
def _tubelet_kernel(
    video_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    scale_ptr,
    shift_ptr,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    out_ptr,
    num_tokens,
    num_sets,
    steps,
    length,
    rows,
    columns,
    features,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    pos_stride,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    K: tl.constexpr = C * T * H * W
    EVEN: tl.constexpr = (H * W) % BK == 0 and BK % W == 0  # a step stays in one frame and begins with a row
    tiles_n = tl.cdiv(features, BN)
    row_M = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    first_n = (tl.program_id(0) % tiles_n) * BN
    sets = (indices_ptr, cu_ptr, clip_ptr, num_sets, steps)
    first_M, id_M = patch_of(
        row_M, num_tokens, sets, (length, rows, columns), (stride_b, stride_t, stride_h, stride_w), T, H, W
    )
    strides = (stride_c, stride_t, stride_h, stride_w)
    n_N = tl.minimum(first_n + tl.arange(0, BN), features - 1)
    k_K = tl.arange(0, BK)
    patch_MK = video_ptr + first_M[:, None] + pixel_of(k_K, strides, T, H, W)[None, :]
    weight_NK = weight_ptr + n_N.to(tl.int64)[:, None] * K + k_K[None, :]
    acc_MN = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        start = tl.full([], first, tl.int32)
        if EVEN:
            a_MK = tl.load(patch_MK + line_of(start // W, strides, T, H))
            b_NK = tl.load(weight_NK + start)
        else:
            in_patch_K = (start + k_K < K)[None, :]
            pixel_K = pixel_of(start + k_K, strides, T, H, W)
            a_MK = tl.load(video_ptr + first_M[:, None] + pixel_K[None, :], mask=in_patch_K, other=0)
            b_NK = tl.load(weight_NK + start, mask=in_patch_K, other=0)
        if scale_ptr is not None:
            scale, shift = normalisation(scale_ptr, shift_ptr, start, C, T * H * W, BK)
            a_MK = (a_MK.to(tl.float32) * scale + shift).to(b_NK.dtype)
        acc_MN = add_product(acc_MN, a_MK, b_NK.T, PRECISION)
    if BN < 64:
        _finish(acc_MN, first_n, row_M, id_M, num_tokens, features, bias_ptr, pos_ptr, pos_stride, out_ptr)
    else:  # by quarters: a whole tile of positions would not fit the registers besides the sums
        left_MN, right_MN = halves(acc_MN)
        acc_MN, next_MN = halves(left_MN)
        _finish(acc_MN, first_n, row_M, id_M, num_tokens, features, bias_ptr, pos_ptr, pos_stride, out_ptr)
        first_n += BN // 4
        _finish(next_MN, first_n, row_M, id_M, num_tokens, features, bias_ptr, pos_ptr, pos_stride, out_ptr)
        first_n += BN // 4
        acc_MN, next_MN = halves(right_MN)
        _finish(acc_MN, first_n, row_M, id_M, num_tokens, features, bias_ptr, pos_ptr, pos_stride, out_ptr)
        first_n += BN // 4
        _finish(next_MN, first_n, row_M, id_M, num_tokens, features, bias_ptr, pos_ptr, pos_stride, out_ptr)


def tubelet_embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    """out = patches @ weight^T + bias + pos_embed; [N, D], or [B, L, D] without indices."""
    features, grid = weight.shape[0], grid_of(video, weight)
    shape = (video.shape[0], grid[0]) if indices is None else (indices.shape[0],)
    dtype = weight.dtype if pos_embed is None else torch.promote_types(weight.dtype, pos_embed.dtype)
    out = torch.empty((*shape, features), dtype=dtype, device=video.device)
    if out.numel() == 0:
        return out
    sets = () if indices is None or cu_seqlens is None or clip is None else packed(indices, cu_seqlens, clip)
    num_sets = sets[2].shape[0] if sets else 0
    if pos_embed is not None and pos_embed.stride(1) != 1:
        pos_embed = pos_embed.contiguous()
    num_tokens = out.numel() // features
    meta = _meta(weight.dtype, features, geometry(weight), precision(weight.dtype))
    with device_of(video):
        _tubelet_kernel[(ceil_div(num_tokens, meta["BM"]) * ceil_div(features, meta["BN"]),)](
            video,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            pos_embed,
            *constants(video, weight, mean, std),
            *(sets or (None, None, None)),
            out,
            num_tokens,
            num_sets,
            search_steps(num_sets),
            *grid,
            features,
            *video.stride(),
            0 if pos_embed is None else pos_embed.stride(0),
            **meta,
            **LAUNCH,
        )
    return out


def _meta(dtype: torch.dtype, features: int, patch: dict[str, int], precision: str) -> dict[str, Any]:
    depth, frame = WIDE[2], patch["H"] * patch["W"]
    even = frame % depth == 0 and depth % patch["W"] == 0
    fits = ceil_div(features, WIDE[1]) * WIDE[1] <= WASTE * features
    tile = WIDE if even and fits else NARROW
    if dtype == torch.float32:
        tile = TF32 if precision == "tf32" else IEEE
    rows, columns, depth, warps, stages = tile
    return {
        "PRECISION": precision,
        **patch,
        "BM": rows,
        "BN": min(columns, max(LEAST, next_power_of_2(features))),
        "BK": min(depth, max(LEAST, next_power_of_2(patch["C"] * patch["T"] * frame))),
        "num_warps": warps,
        "num_stages": stages,
    }


def variants() -> list[Variant]:
    """What the launcher launches: ViT-L/16 all and kept tokens of bytes, and from bfloat16; patches of 14; float32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        _variant(bf16, 1024, 16, kept=False, positions=fp32),
        _variant(bf16, 1024, 16, kept=True, positions=fp32),
        _variant(bf16, 1024, 16, kept=False, positions=bf16, pixels=bf16),
        _variant(bf16, 1280, 14, kept=True, positions=fp32),
        _variant(fp32, 384, 16, kept=True, positions=fp32),
        _variant(fp32, 384, 16, kept=True, positions=fp32, precision="tf32"),
    ]


def _variant(
    dtype: torch.dtype,
    features: int,
    size: int,
    kept: bool,
    positions: torch.dtype,
    pixels: torch.dtype = torch.uint8,
    precision: str = "ieee",
) -> Variant:
    meta = _meta(dtype, features, {"C": 3, "T": 2, "H": size, "W": size}, precision)
    absent = ([] if kept else [*SETS_POINTERS]) + ([] if pixels == torch.uint8 else ["scale_ptr", "shift_ptr"])
    pointers = {
        "video_ptr": f"*{TYPES[pixels]}",
        "weight_ptr": f"*{TYPES[dtype]}",
        "bias_ptr": f"*{TYPES[dtype]}",
        "pos_ptr": f"*{TYPES[positions]}",
        "scale_ptr": "*fp32",
        "shift_ptr": "*fp32",
        "out_ptr": f"*{TYPES[positions]}",
    }
    strides = [f"stride_{dimension}" for dimension in "bcthw"]
    tokens, kind = "kept" if kept else "all", "tf32" if precision == "tf32" else TYPES[dtype]
    return Variant(
        name=f"tubelet_embed {tokens} {TYPES[pixels]} to {kind} {features} patch {size}",
        kernel=_tubelet_kernel,
        types={**pointers, **SETS_POINTERS, **dict.fromkeys((*SIZES, "features", *strides, "pos_stride"), "i32")},
        num_warps=meta.pop("num_warps"),
        num_stages=meta.pop("num_stages"),
        constants={**meta, **dict.fromkeys(absent)},
        divisible=(*pointers, "features", "pos_stride", *strides[:4]),
        ones=("stride_w",),
        matrix=kind != "fp32",
    )
