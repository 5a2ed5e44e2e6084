"""The gradients of tubelet_embed in Triton; the patches are read from the video again.

    grad_weight[n, k] = sum_m grad[m, n] patch(m)[k]        grad_bias[n] = sum_m grad[m, n]
    grad_pos[l, n] = sum of grad[m, n] over the m of token l

Letters as in the forward pass. 2 M K D FLOP over M K pixels and M D gradients. A program makes 128 features by 256 pixels
of the sum over a split of the tokens, in float32; the partial sums [splits, D, K] are then added in order: no atomics.
Programs of the same tokens run side by side, so that these come from memory once. The tokens' places in the video, 8
bytes each, are looked up beforehand; each step reads those of the next, so that pixels never wait for them.
The other sums are plain, and so is the gradient of the video, which is rarely wanted: the reference serves it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._triton import LAUNCH, Variant, ceil_div, device_of, next_power_of_2
from ._triton_patches import constants, geometry, normalisation, pixel_of, places, unit_of
from ._triton_product import LEAST, add_product, precision
from ._triton_sets import TYPES, packed, sum_named

# Tokens, features and pixels of a tile, warps, stages. Four stages of 32 tokens of 128 gradients and 256 pixels are 96 KB
# at 16 bits, what every architecture has; 8 warps then hold 128 sums a thread. Narrow tiles are for patches that do not
# fill a wide one with pixels of one channel. Of more than 32 features, Triton 3.6 makes TF32 products on sm_100, whatever
# precision it is told.
WIDE, NARROW, TF32, IEEE = (32, 128, 256, 8, 4), (32, 128, 128, 8, 4), (32, 128, 128, 8, 3), (16, 32, 128, 4, 3)
PROGRAMS = 264  # of the sum, at most: two waves on the 132 SMs of an H200
LEAST_SPLIT = 512  # tokens; of fewer, the partial sums (8 bytes a weight) would take longer to move than to compute


@triton.jit(do_not_specialize=["num_tokens", "split"])
def _grad_weight_kernel(
    grad_ptr,
    video_ptr,
    scale_ptr,
    shift_ptr,
    places_ptr,
    out_ptr,
    num_tokens,
    split,
    features,
    grad_stride,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    K: tl.constexpr = C * T * H * W
    tiles_k = tl.cdiv(K, BK)
    first_k = (tl.program_id(0) % tiles_k) * BK
    k_K = first_k + tl.arange(0, BK)
    n_N = (tl.program_id(0) // tiles_k) * BN + tl.arange(0, BN)
    pixel_K = pixel_of(k_K, (stride_c, stride_t, stride_h, stride_w), T, H, W)
    if scale_ptr is not None:
        scale, shift = normalisation(scale_ptr, shift_ptr, first_k, C, T * H * W, BK)
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, num_tokens)
    row_M = begin + tl.arange(0, BM)
    place_M = tl.load(places_ptr + row_M, mask=row_M < end, other=0)
    acc_NK = tl.zeros([BN, BK], tl.float32)
    for _ in range(begin, end, BM):
        patch_MK = video_ptr + (place_M * UNIT)[:, None] + pixel_K[None, :]
        mask_MK = (row_M < end)[:, None]
        if K % BK:
            mask_MK = mask_MK & (k_K < K)[None, :]
        a_MK = tl.load(patch_MK, mask=mask_MK, other=0)
        mask_MN = (row_M < end)[:, None] & (n_N < features)[None, :]
        grad_MN = grad_ptr + row_M.to(tl.int64)[:, None] * grad_stride + n_N[None, :]
        g_MN = tl.load(grad_MN, mask=mask_MN, other=0)
        row_M += BM
        place_M = tl.load(places_ptr + row_M, mask=row_M < end, other=0)
        if scale_ptr is not None:
            a_MK = (a_MK.to(tl.float32) * scale + shift).to(g_MN.dtype)
        acc_NK = add_product(acc_NK, g_MN.T, a_MK, PRECISION)
    out_N = (tl.program_id(1).to(tl.int64) * features + n_N) * K
    tl.store(out_ptr + out_N[:, None] + k_K[None, :], acc_NK, mask=(n_N < features)[:, None] & (k_K < K)[None, :])


def tubelet_embed_backward(
    grad: Tensor,
    video: Tensor,
    weight: Tensor,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of video, weight, bias, pos_embed (empty where not in `needs`)."""
    need_video, need_weight, need_bias, need_pos = needs
    sets = () if indices is None or cu_seqlens is None or clip is None else packed(indices, cu_seqlens, clip)
    grad_ND, wide = grad.reshape(-1, weight.shape[0]), reference.accumulator(grad.dtype)
    grad_video, grad_weight, grad_bias, grad_pos = (grad.new_empty(0) for _ in needs)
    if need_video:
        grad_video = reference.tubelet_embed_backward(
            grad, video, weight, indices, cu_seqlens, clip, mean, std, dtypes, [True, False, False, False]
        )[0]
    if need_weight:
        grad_weight = _grad_weight(grad_ND.to(weight.dtype), video, weight, sets, constants(video, weight, mean, std))
    if need_bias:
        grad_bias = grad_ND.sum(0, dtype=wide).to(dtypes[0])
    if need_pos and dtypes[1] is not None:
        if not sets:
            grad_pos = grad.sum(0, dtype=wide).to(dtypes[1])
        else:
            grad_pos = sum_named(grad_ND, sets[0], None, 1, reference.num_tubelets(video, weight), dtypes[1])[0]
    return grad_video, grad_weight, grad_bias, grad_pos


def _grad_weight(
    grad: Tensor,
    video: Tensor,
    weight: Tensor,
    sets: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor] | tuple[None, None],
) -> Tensor:
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    num_tokens, features = grad.shape
    if num_tokens == 0:
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    meta = _meta(weight.dtype, features, geometry(weight), unit_of(video, weight), precision(weight.dtype))
    tiles = ceil_div(features, meta["BN"]) * ceil_div(weight[0].numel(), meta["BK"])
    splits = max(1, min(PROGRAMS // tiles, num_tokens // LEAST_SPLIT))
    split = ceil_div(num_tokens, splits * meta["BM"]) * meta["BM"]
    splits = ceil_div(num_tokens, split)
    partial = torch.empty((splits, *weight.shape), dtype=torch.float32, device=video.device)
    with device_of(video):
        _grad_weight_kernel[(tiles, splits)](
            grad,
            video,
            *norm,
            places(video, weight, sets, num_tokens, meta["UNIT"]),
            partial,
            num_tokens,
            split,
            features,
            grad.stride(0),
            *video.stride()[1:],
            **meta,
            **LAUNCH,
        )
    return (partial[0] if splits == 1 else partial.sum(0)).to(weight.dtype)


def _meta(dtype: torch.dtype, features: int, patch: dict[str, int], unit: int, precision: str) -> dict[str, Any]:
    channel = patch["T"] * patch["H"] * patch["W"]
    tile = WIDE if channel % WIDE[2] == 0 and WIDE[2] % patch["W"] == 0 else NARROW
    if dtype == torch.float32:
        tile = TF32 if precision == "tf32" else IEEE
    tokens, rows, columns, warps, stages = tile
    return {
        "PRECISION": precision,
        "UNIT": unit,
        **patch,
        "BM": tokens,
        "BN": min(rows, max(LEAST, next_power_of_2(features))),
        "BK": min(columns, max(LEAST, next_power_of_2(patch["C"] * channel))),
        "num_warps": warps,
        "num_stages": stages,
    }


def variants() -> list[Variant]:
    """What the launcher launches: ViT-L/16 from bytes and from bfloat16; patches of 14; float32."""
    return [
        _variant(torch.bfloat16, 1024, 16),
        _variant(torch.bfloat16, 1024, 16, pixels=torch.bfloat16),
        _variant(torch.bfloat16, 1280, 14),
        _variant(torch.float32, 384, 16),
        _variant(torch.float32, 384, 16, precision="tf32"),
    ]


def _variant(
    dtype: torch.dtype, features: int, size: int, pixels: torch.dtype = torch.uint8, precision: str = "ieee"
) -> Variant:
    meta = _meta(dtype, features, {"C": 3, "T": 2, "H": size, "W": size}, size & -size, precision)
    pointers = {
        "grad_ptr": f"*{TYPES[dtype]}",
        "video_ptr": f"*{TYPES[pixels]}",
        "scale_ptr": "*fp32",
        "shift_ptr": "*fp32",
        "places_ptr": "*i64",
        "out_ptr": "*fp32",
    }
    strides = [f"stride_{dimension}" for dimension in "cthw"]
    kind = "tf32" if precision == "tf32" else TYPES[dtype]
    return Variant(
        name=f"tubelet_embed grad weight {TYPES[pixels]} to {kind} {features} patch {size}",
        kernel=_grad_weight_kernel,
        types={**pointers, **dict.fromkeys(("num_tokens", "split", "features", "grad_stride", *strides), "i32")},
        num_warps=meta.pop("num_warps"),
        num_stages=meta.pop("num_stages"),
        constants={**meta, **({} if pixels == torch.uint8 else dict.fromkeys(("scale_ptr", "shift_ptr")))},
        divisible=(*pointers, "features", "grad_stride", *strides[:3]),
        ones=("stride_w",),
        matrix=kind != "fp32",
    )
