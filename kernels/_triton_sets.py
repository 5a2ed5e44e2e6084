"""Ragged sets inside Triton kernels: the set of a packed row, the last row that names a token, the sum of all that do.

    set_of        s(i) = the set with cu_seqlens[s] <= i < cu_seqlens[s + 1]
    last_named    last[b, l] = the largest packed i that names token l of clip b, -1 if none does
    sum_named     out[b, l] = sum of values[i] over the packed i that name token l of clip b, in the order of i

S sets, N packed tokens, B clips, L tokens of a clip, D features; R rows, K ids and W widths of a tile. No atomics, no
sort and no workspace: each program owns R tokens and reads all ids of its clip, which lie in the L2 cache (8 bytes an
id: 800 bytes for each of 16 rows at a whole clip of 1568 tokens, beside the 2 KB of a bfloat16 row of 1024).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, ceil_div, device_of, next_power_of_2

ROWS = 16  # tokens of a program
TILE_BYTES = 8192  # of rows moved by a program of four warps: four 16-byte loads of each thread before the first store
IDS = 256  # ids compared at a time: most sets of masks are one or two such steps, each of which waits for the L2 cache
SETS = 32  # owners of sets looked at at a time
WIDEST = 512  # features of a program: 16 x 512 float32 sums are 64 registers of each of 128 threads
WIDEST_OVER_CLIPS = 128  # few programs, L / 16, share all clips there: narrow ones are more

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.uint8: "u8"}

# Read one entry a thread, and anywhere in memory: the kernels are not specialised on their alignment.
SETS_POINTERS = {"indices_ptr": "*i64", "cu_ptr": "*i32", "clip_ptr": "*i64"}


def search_steps(num_sets: int) -> int:
    """Bisections that `set_of` needs."""
    return max(0, num_sets - 1).bit_length()


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Index tensors as the kernels read them: entry after entry."""
    return tuple(tensor.contiguous() for tensor in tensors)


@functools.cache
def tile_width(width: int, widest: int) -> int:
    """Columns of a tile, a power of two up to `widest`: the widest of those that leave the fewest lanes idle."""
    widest = min(widest, next_power_of_2(width))
    sizes = [size for size in (32, 64, 128, 256, 512, 1024) if size < widest]
    return min((widest, *reversed(sizes)), key=lambda size: ceil_div(width, size) * size)


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
def next_set(clip, start, clip_ptr, num_sets, S: tl.constexpr):
    """The first set from `start` on that belongs to `clip`, num_sets if none does."""
    first = start
    found = num_sets
    while (first < num_sets) & (found == num_sets):
        s_S = first + tl.arange(0, S)
        owner_S = tl.load(clip_ptr + s_S, mask=s_S < num_sets, other=-1)
        found = tl.min(tl.where(owner_S == clip, s_S, num_sets), axis=0)
        first += S
    return found


@triton.jit
def last_named(clip, id_R, indices_ptr, cu_ptr, clip_ptr, num_sets, R: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """The last packed row that names each token id_R of `clip`, -1 where none does."""
    last_RK = tl.full([R, K], -1, tl.int32)
    s = next_set(clip, 0, clip_ptr, num_sets, S)
    while s < num_sets:
        begin = tl.load(cu_ptr + s)
        end = tl.load(cu_ptr + s + 1)
        for first in range(begin, end, K):
            i_K = first + tl.arange(0, K)
            id_K = tl.load(indices_ptr + i_K, mask=i_K < end, other=-1).to(tl.int32)
            last_RK = tl.where(id_R[:, None] == id_K[None, :], i_K[None, :], last_RK)  # i only grows
        s = next_set(clip, s + 1, clip_ptr, num_sets, S)
    return tl.max(last_RK, axis=1)


@triton.jit
def _add_named(acc, begin, end, ids_R, values_ptr, indices_ptr, stride_n, column_W, in_width_W, K: tl.constexpr):
    """acc [R, W] + the rows begin..end-1 of values that name ids_R, in their order."""
    NONE: tl.constexpr = 2**31 - 1
    for first in range(begin, end, K):
        i_K = first + tl.arange(0, K)
        id_K = tl.load(indices_ptr + i_K, mask=i_K < end, other=-1).to(tl.int32)
        hit_RK = ids_R[:, None] == id_K[None, :]
        next_R = tl.min(tl.where(hit_RK, i_K[None, :], NONE), axis=1)
        while tl.min(next_R, axis=0) < NONE:
            found_R = next_R < NONE
            offset_R = tl.where(found_R, next_R, 0).to(tl.int64) * stride_n
            row_RW = tl.load(
                values_ptr + offset_R[:, None] + column_W[None, :],
                mask=found_R[:, None] & in_width_W[None, :],
                other=0.0,
            )
            acc += row_RW.to(acc.dtype)
            later_RK = hit_RK & (i_K[None, :] > next_R[:, None])
            next_R = tl.min(tl.where(later_RK, i_K[None, :], NONE), axis=1)
    return acc


@triton.jit(
    do_not_specialize=["num_tokens", "num_sets", "length", "blocks"], do_not_specialize_on_alignment=[*SETS_POINTERS]
)
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
    K: tl.constexpr,
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
        s = next_set(batch, 0, clip_ptr, num_sets, S)
        while s < num_sets:
            begin = tl.load(cu_ptr + s)
            end = tl.load(cu_ptr + s + 1)
            acc = _add_named(acc, begin, end, ids_R, values_ptr, indices_ptr, stride_n, column_W, in_width_W, K)
            s = next_set(batch, s + 1, clip_ptr, num_sets, S)
    else:
        acc = _add_named(acc, 0, num_tokens, ids_R, values_ptr, indices_ptr, stride_n, column_W, in_width_W, K)
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
    indices, cu_seqlens, clip = packed(indices, *((indices, indices) if sets is None else sets))
    blocks = ceil_div(length, ROWS)
    meta = _sum_named_meta(width, values.dtype, sets is not None)
    with device_of(values):
        _sum_named_kernel[batch * blocks, ceil_div(width, meta["W"])](
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
            **LAUNCH,
        )
    return out


def _sum_named_meta(width: int, dtype: torch.dtype, by_clip: bool) -> dict[str, int | bool]:
    return {
        "BY_CLIP": by_clip,
        "DOUBLE": dtype == torch.float64,
        "R": ROWS,
        "K": IDS,
        "S": SETS,
        "W": tile_width(width, WIDEST if by_clip else WIDEST_OVER_CLIPS),
    }


def variants() -> list[Variant]:
    """What the launchers launch at the widths of ViT-L (1024) and of its predictor (384)."""
    return [
        Variant(
            name=f"sum_named {'by clip' if by_clip else 'over clips'} {TYPES[dtype]} {width}",
            kernel=_sum_named_kernel,
            types={
                "values_ptr": f"*{TYPES[dtype]}",
                **SETS_POINTERS,
                "cu_ptr": "*i32" if by_clip else "*i64",  # not read over clips: the ids stand in
                "out_ptr": f"*{TYPES[dtype]}",
                **dict.fromkeys(("num_tokens", "num_sets", "length", "width", "blocks", "stride_n"), "i32"),
            },
            constants=_sum_named_meta(width, dtype, by_clip),
            divisible=("values_ptr", "out_ptr", "width", "stride_n"),
        )
        for by_clip in (True, False)
        for width, dtype in ((1024, torch.bfloat16), (384, torch.float32))
    ]
