"""Ragged sets inside Triton kernels: the set of a packed row, and the sum of the rows that name a token.

    set_of    s(i) = the set with cu_seqlens[s] <= i < cu_seqlens[s + 1]
    sum       out[b, l] = sum of values[i] over the packed i that name token l of clip b, in the order of i

S sets, N packed tokens, B clips, L tokens of a clip, D features; R rows, I ids and W widths of a tile. The sum needs no atomics, no
sort and no workspace: each program owns R tokens and reads all ids of its clip, which lie in the L2 cache (8 bytes an id;
at 1568 tokens, 32 to a program, 25 bytes of ids for each of the 4 D bytes of a float32 row it adds).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import Variant, device_of, next_power_of_2

ROWS = 16  # tokens of a program
IDS = 128  # ids compared at a time
SETS = 32  # owners of sets looked at at a time
WIDEST = 512  # features of a program: 16 x 512 float32 sums are 64 registers of each of 128 threads

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.uint8: "u8"}


def search_steps(num_sets: int) -> int:
    """Bisections that `set_of` needs."""
    return max(0, num_sets - 1).bit_length()


@triton.jit
def set_of(cu_ptr, row, num_sets, steps):
    """The set that holds each packed row (int tile); any valid set for rows outside."""
    low = row * 0
    high = low + num_sets
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(cu_ptr + middle) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _add_named(acc, begin, end, ids_R, values_ptr, indices_ptr, stride_n, column_W, in_width_W, I: tl.constexpr):
    """acc [R, W] + the rows begin..end-1 of values that name ids_R, in their order."""
    NONE: tl.constexpr = 2**31 - 1
    for first in range(begin, end, I):
        i_I = first + tl.arange(0, I)
        id_I = tl.load(indices_ptr + i_I, mask=i_I < end, other=-1)
        hit_RI = ids_R[:, None] == id_I[None, :]
        next_R = tl.min(tl.where(hit_RI, i_I[None, :], NONE), axis=1)
        while tl.min(next_R, axis=0) < NONE:
            found_R = next_R < NONE
            offset_R = tl.where(found_R, next_R, 0).to(tl.int64) * stride_n
            row_RW = tl.load(
                values_ptr + offset_R[:, None] + column_W[None, :],
                mask=found_R[:, None] & in_width_W[None, :],
                other=0.0,
            )
            acc += row_RW.to(acc.dtype)
            later_RI = hit_RI & (i_I[None, :] > next_R[:, None])
            next_R = tl.min(tl.where(later_RI, i_I[None, :], NONE), axis=1)
    return acc


@triton.jit(do_not_specialize=["num_tokens", "num_sets", "blocks"])
def _sum_named_kernel(
    values_ptr,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    out_ptr,
    num_tokens,
    num_sets,
    length,
    width,
    blocks,
    stride_n,
    BY_CLIP: tl.constexpr,
    DOUBLE: tl.constexpr,
    R: tl.constexpr,
    I: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    program = tl.program_id(0)
    batch = program // blocks
    ids_R = (program % blocks) * R + tl.arange(0, R)
    column_W = tl.program_id(1) * W + tl.arange(0, W)
    in_width_W = column_W < width
    acc = tl.zeros([R, W], tl.float64 if DOUBLE else tl.float32)
    if BY_CLIP:
        for first in range(0, num_sets, S):
            s_S = first + tl.arange(0, S)
            owner_S = tl.load(clip_ptr + s_S, mask=s_S < num_sets, other=-1)
            s = tl.min(tl.where(owner_S == batch, s_S, num_sets), axis=0)
            while s < num_sets:
                begin = tl.load(cu_ptr + s)
                end = tl.load(cu_ptr + s + 1)
                acc = _add_named(acc, begin, end, ids_R, values_ptr, indices_ptr, stride_n, column_W, in_width_W, I)
                s = tl.min(tl.where((owner_S == batch) & (s_S > s), s_S, num_sets), axis=0)
    else:
        acc = _add_named(acc, 0, num_tokens, ids_R, values_ptr, indices_ptr, stride_n, column_W, in_width_W, I)
    offset_R = (batch.to(tl.int64) * length + ids_R) * width
    tl.store(out_ptr + offset_R[:, None] + column_W[None, :], acc, mask=(ids_R < length)[:, None] & in_width_W[None, :])


def sum_named(
    values: Tensor, indices: Tensor, sets: tuple[Tensor, Tensor] | None, batch: int, length: int, dtype: torch.dtype
) -> Tensor:
    """out[b, l] = sum of values[i] that name token l of clip b, [batch, length, D] of `dtype`, added in float32 in order.

    values [N, D] (rows of any stride, float64 adds in float64); indices [N]; sets = (cu_seqlens, clip), or None to sum
    over all clips (batch 1).
    """
    if values.stride(1) != 1:
        values = values.contiguous()
    num_tokens, width = values.shape
    out = torch.empty((batch, length, width), dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    cu_seqlens, clip = (indices, indices) if sets is None else sets
    blocks = triton.cdiv(length, ROWS)
    meta = _sum_named_meta(width, values.dtype, sets is not None)
    with device_of(values):
        _sum_named_kernel[batch * blocks, triton.cdiv(width, meta["W"])](
            values,
            indices,
            cu_seqlens,
            clip,
            out,
            num_tokens,
            0 if sets is None else clip.shape[0],
            length,
            width,
            blocks,
            values.stride(0),
            **meta,
        )
    return out


def _sum_named_meta(width: int, dtype: torch.dtype, by_clip: bool) -> dict[str, int | bool]:
    return {
        "BY_CLIP": by_clip,
        "DOUBLE": dtype == torch.float64,
        "R": ROWS,
        "I": IDS,
        "S": SETS,
        "W": min(WIDEST, next_power_of_2(width)),
    }


def variants() -> list[Variant]:
    """What the launchers launch at the widths of ViT-L (1024) and of its predictor (384)."""
    return [
        Variant(
            name=f"sum_named {'by clip' if by_clip else 'over clips'} {TYPES[dtype]} {width}",
            kernel=_sum_named_kernel,
            types={
                "values_ptr": f"*{TYPES[dtype]}",
                "indices_ptr": "*i64",
                "cu_ptr": "*i32" if by_clip else "*i64",
                "clip_ptr": "*i64",
                "out_ptr": f"*{TYPES[dtype]}",
                **dict.fromkeys(("num_tokens", "num_sets", "length", "width", "blocks", "stride_n"), "i32"),
            },
            constants=_sum_named_meta(width, dtype, by_clip),
            divisible=("values_ptr", "indices_ptr", "cu_ptr", "clip_ptr", "out_ptr", "width", "length", "stride_n"),
        )
        for by_clip in (True, False)
        for width, dtype in ((1024, torch.bfloat16), (384, torch.float32))
    ]
