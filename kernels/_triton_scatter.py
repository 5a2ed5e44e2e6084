"""scatter_tokens in Triton: each row of the result is written once, by 16-byte accesses.

    scatter         out[b, l] = values[last(b, l)], or fill where nothing names the token
    its adjoint     grad_values[i] = grad[clip(i), indices[i]] if i is the last that names its token, else 0
                    grad_fill = sum of grad[b, l] over the tokens that nothing names

B clips, L tokens of a clip, D features, S sets, N packed tokens, last(b, l) = the largest i that names token l of clip b;
R rows, K ids and W columns of a tile. Moves (N + B L) D elements forward, 2 N D backward and (B L - N) D more for a fill
vector, and computes nothing. A program owns 16 tokens of a clip, finds the rows that name them among the ids of the clip
(8 bytes each, out of the L2 cache) and walks over all columns in tiles of 8 KB, for which see _triton_gather.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, ceil_div, device_of
from ._triton_sets import ROWS, SETS, SETS_POINTERS, TILE_BYTES, TYPES, last_named, next_set, packed, tile_width

IDS = 128  # ids compared at a time: with 256 the registers of the adjoint do not suffice for nine programs of an SM
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_sets", "length", "blocks"], do_not_specialize_on_alignment=[*SETS_POINTERS])
def _scatter_kernel(
    values_ptr,
    fill_ptr,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    out_ptr,
    num_sets,
    length,
    width,
    blocks,
    stride_n,
    stride_d,
    stride_o,
    FILL: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    clip = tl.program_id(0) // blocks
    id_R = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    last_R = last_named(clip, id_R, indices_ptr, cu_ptr, clip_ptr, num_sets, R, K, S)
    from_R = last_R.to(tl.int64) * stride_n
    to_R = (clip.to(tl.int64) * length + id_R) * stride_o
    for first in range(0, width, W):
        column_W = first + tl.arange(0, W)
        in_width_W = column_W < width
        row_RW = tl.load(
            values_ptr + from_R[:, None] + column_W.to(tl.int64)[None, :] * stride_d,
            mask=(last_R >= 0)[:, None] & in_width_W[None, :],
            other=0.0,
        )
        if FILL:
            fill_W = tl.load(fill_ptr + column_W, mask=in_width_W, other=0.0)
            row_RW = tl.where((last_R >= 0)[:, None], row_RW, fill_W[None, :])
        tl.store(
            out_ptr + to_R[:, None] + column_W[None, :], row_RW, mask=(id_R < length)[:, None] & in_width_W[None, :]
        )


@triton.jit
def _zero_overwritten(
    clip,
    id_R,
    last_R,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    out_ptr,
    num_sets,
    width,
    stride_o,
    K: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    """Zeros in the rows that name a token id_R of `clip` and are not the last."""
    s = next_set(clip, 0, clip_ptr, num_sets, S)
    while s < num_sets:
        begin = tl.load(cu_ptr + s)
        end = tl.load(cu_ptr + s + 1)
        for first in range(begin, end, K):
            i_K = first + tl.arange(0, K)
            id_K = tl.load(indices_ptr + i_K, mask=i_K < end, other=-1).to(tl.int32)
            lost_RK = (id_R[:, None] == id_K[None, :]) & (i_K[None, :] < last_R[:, None])
            lost_K = tl.max(tl.where(lost_RK, i_K[None, :], -1), axis=0)
            i = tl.max(lost_K, axis=0)
            while i >= 0:  # seldom: one row after the other
                for column in range(0, width, W):
                    column_W = column + tl.arange(0, W)
                    zeros_W = tl.zeros([W], out_ptr.dtype.element_ty)
                    tl.store(out_ptr + i.to(tl.int64) * stride_o + column_W, zeros_W, mask=column_W < width)
                i = tl.max(tl.where(lost_K < i, lost_K, -1), axis=0)
        s = next_set(clip, s + 1, clip_ptr, num_sets, S)


@triton.jit(do_not_specialize=["num_sets", "length", "blocks"], do_not_specialize_on_alignment=[*SETS_POINTERS])
def _scatter_backward_kernel(
    grad_ptr,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    out_ptr,
    unnamed_ptr,
    num_sets,
    length,
    width,
    blocks,
    stride_b,
    stride_l,
    stride_d,
    stride_o,
    FILL: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    clip = tl.program_id(0) // blocks
    id_R = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    last_R = last_named(clip, id_R, indices_ptr, cu_ptr, clip_ptr, num_sets, R, K, S)
    _zero_overwritten(clip, id_R, last_R, indices_ptr, cu_ptr, clip_ptr, out_ptr, num_sets, width, stride_o, K, S, W)
    named_R = last_R >= 0
    read_R = (id_R < length) if FILL else named_R
    from_R = clip.to(tl.int64) * stride_b + id_R.to(tl.int64) * stride_l
    to_R = last_R.to(tl.int64) * stride_o
    for first in range(0, width, W):
        column_W = first + tl.arange(0, W)
        in_width_W = column_W < width
        row_RW = tl.load(
            grad_ptr + from_R[:, None] + column_W.to(tl.int64)[None, :] * stride_d,
            mask=read_R[:, None] & in_width_W[None, :],
            other=0.0,
        )
        tl.store(out_ptr + to_R[:, None] + column_W[None, :], row_RW, mask=named_R[:, None] & in_width_W[None, :])
        if FILL:
            sum_W = tl.sum(tl.where(named_R[:, None], 0.0, row_RW.to(unnamed_ptr.dtype.element_ty)), axis=0)
            to_W = tl.program_id(0).to(tl.int64) * width + column_W
            tl.store(unnamed_ptr + to_W, sum_W, mask=in_width_W)


def scatter_tokens(
    values: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    batch: int,
    length: int,
    fill: Tensor | None,
    fill_value: float,
) -> Tensor:
    """out[clip of i, indices[i]] = values[i], the last of duplicates wins; fill elsewhere; [B, L, D]."""
    width = values.shape[1]
    out = torch.empty((batch, length, width), dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    if fill is None and fill_value != 0:  # rounded by PyTorch: Triton takes numbers as float32
        fill = values.new_full((width,), fill_value)
    background = values if fill is None else fill.to(values.dtype).contiguous()
    indices, cu_seqlens, clip = packed(indices, cu_seqlens, clip)
    blocks = ceil_div(length, ROWS)
    with device_of(values):
        _scatter_kernel[(batch * blocks,)](
            values,
            background,
            indices,
            cu_seqlens,
            clip,
            out,
            clip.shape[0],
            length,
            width,
            blocks,
            *values.stride(),
            width,
            **_meta(width, values.dtype, fill is not None),
            **LAUNCH,
        )
    return out


def scatter_tokens_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, fill_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Gradients of values [N, D] (zero for overwritten rows) and of the fill vector [D] (empty without fill_dtype).

    The fill's is a sum over 16 tokens by each program, then over programs by PyTorch, both in a fixed order.
    """
    batch, length, width = grad.shape
    blocks = ceil_div(length, ROWS)
    out = torch.empty((indices.shape[0], width), dtype=grad.dtype, device=grad.device)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    programs = 0 if fill_dtype is None and out.numel() == 0 else batch * blocks
    unnamed = torch.empty((0 if fill_dtype is None else programs, width), dtype=wide, device=grad.device)
    indices, cu_seqlens, clip = packed(indices, cu_seqlens, clip)
    if programs * width > 0:
        with device_of(grad):
            _scatter_backward_kernel[(programs,)](
                grad,
                indices,
                cu_seqlens,
                clip,
                out,
                unnamed,
                clip.shape[0],
                length,
                width,
                blocks,
                *grad.stride(),
                width,
                **_meta(width, grad.dtype, fill_dtype is not None),
                **LAUNCH,
            )
    return out, grad.new_empty(0) if fill_dtype is None else unnamed.sum(0).to(fill_dtype)


def _meta(width: int, dtype: torch.dtype, fill: bool) -> dict[str, Any]:
    columns = tile_width(width, TILE_BYTES // (ROWS * dtype.itemsize))
    return {"FILL": fill, "R": ROWS, "K": IDS, "S": SETS, "W": columns, "num_warps": NUM_WARPS}


def variants() -> list[Variant]:
    """What the launchers launch at the widths of ViT-L (1024) and of its predictor (384)."""
    return [
        variant
        for width, dtype in ((1024, torch.bfloat16), (384, torch.float32))
        for fill in (False, True)
        for variant in _variants(width, dtype, fill)
    ]


def _variants(width: int, dtype: torch.dtype, fill: bool) -> list[Variant]:
    rows = f"*{TYPES[dtype]}"
    meta = _meta(width, dtype, fill)
    num_warps = meta.pop("num_warps")
    found = []
    for name, kernel, pointers, strides in (
        ("scatter_tokens", _scatter_kernel, {"values_ptr": rows, "fill_ptr": rows}, ("stride_n",)),
        (
            "scatter_tokens_backward",
            _scatter_backward_kernel,
            {"grad_ptr": rows, "unnamed_ptr": "*fp32"},
            ("stride_b", "stride_l"),
        ),
    ):
        sizes = ("num_sets", "length", "width", "blocks", *strides, "stride_d", "stride_o")
        found.append(
            Variant(
                name=f"{name}{' with a vector' if fill else ''} {TYPES[dtype]} {width}",
                kernel=kernel,
                types={**pointers, "out_ptr": rows, **SETS_POINTERS, **dict.fromkeys(sizes, "i32")},
                constants=meta,
                divisible=(*pointers, "out_ptr", "width", *strides, "stride_o"),
                num_warps=num_warps,
                ones=("stride_d",),
            )
        )
    return found
