"""gather_tokens in Triton: each row of the result is written once, by 16-byte accesses.

    gather          out[i] = x[clip(i), indices[i]]
    its adjoint     grad_x[b, l] = sum of grad[i] over the i that name token l of clip b      (sum_named)

B clips, L tokens of a clip, D features, S sets, N packed tokens; R rows and W columns of a tile. Moves 2 N D elements and
8 N bytes of ids, and computes nothing, so it is as fast as it keeps memory busy: an H200 needs 4.8 TB/s x 0.7 us = 25 KB
in flight on each of its 132 SMs. A tile of 8 KB is four 16-byte loads of each of 128 threads before the first store; four
programs of an SM would do, and at 32 registers sixteen fit. Set, clip and id of a row are looked up once for the whole
row where that is at most 2 KB; a longer row, or one whose length is no power of two, is cut where the fewest lanes idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, ceil_div, device_of
from ._triton_sets import SETS_POINTERS, TILE_BYTES, TYPES, packed, search_steps, set_of, sum_named, tile_width

ROW_BYTES = 2048  # of a tile's rows: 128 threads x 16 bytes, so that each thread has several rows to load
MOST_ROWS = 32  # of a tile, where they are short: one warp looks them up
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_tokens", "num_sets", "steps"], do_not_specialize_on_alignment=[*SETS_POINTERS])
def _gather_kernel(
    x_ptr,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    out_ptr,
    num_tokens,
    num_sets,
    steps,
    width,
    chunks,
    stride_b,
    stride_l,
    stride_d,
    stride_o,
    R: tl.constexpr,
    W: tl.constexpr,
):
    program = tl.program_id(0)
    row_R = (program // chunks) * R + tl.arange(0, R)
    column_W = (program % chunks) * W + tl.arange(0, W)
    here_R = row_R < num_tokens
    clip_R = tl.load(clip_ptr + set_of(cu_ptr, row_R, num_sets, steps))
    id_R = tl.load(indices_ptr + row_R, mask=here_R, other=0)
    offset_R = clip_R.to(tl.int64) * stride_b + id_R.to(tl.int64) * stride_l
    mask_RW = here_R[:, None] & (column_W < width)[None, :]
    x_RW = tl.load(x_ptr + offset_R[:, None] + column_W.to(tl.int64)[None, :] * stride_d, mask=mask_RW)
    tl.store(out_ptr + row_R.to(tl.int64)[:, None] * stride_o + column_W[None, :], x_RW, mask=mask_RW)


def gather_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor) -> Tensor:
    """out[i] = x[clip of i, indices[i]]; [N, D]. Any strides of x [B, L, D]."""
    width = x.shape[2]
    num_tokens, num_sets = indices.shape[0], clip.shape[0]
    out = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    indices, cu_seqlens, clip = packed(indices, cu_seqlens, clip)
    meta = _gather_meta(width, x.dtype)
    chunks = ceil_div(width, meta["W"])
    with device_of(x):
        _gather_kernel[(ceil_div(num_tokens, meta["R"]) * chunks,)](
            x,
            indices,
            cu_seqlens,
            clip,
            out,
            num_tokens,
            num_sets,
            search_steps(num_sets),
            width,
            chunks,
            *x.stride(),
            width,
            **meta,
            **LAUNCH,
        )
    return out


def gather_tokens_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, batch: int, length: int
) -> Tensor:
    """[B, L, D]: the sum of the gradients of each token's copies."""
    return sum_named(grad, indices, (cu_seqlens, clip), batch, length, grad.dtype)


def _gather_meta(width: int, dtype: torch.dtype) -> dict[str, int]:
    columns = tile_width(width, ROW_BYTES // dtype.itemsize)
    return {"R": min(MOST_ROWS, TILE_BYTES // (columns * dtype.itemsize)), "W": columns, "num_warps": NUM_WARPS}


def variants() -> list[Variant]:
    """What the launcher launches at the widths of ViT-L (1024) and of its predictor (384); the adjoint is sum_named's."""
    found = []
    for width, dtype in ((1024, torch.bfloat16), (384, torch.bfloat16), (1024, torch.float32), (384, torch.float32)):
        meta = _gather_meta(width, dtype)
        pointers = {"x_ptr": f"*{TYPES[dtype]}", "out_ptr": f"*{TYPES[dtype]}"}
        sizes = ("num_tokens", "num_sets", "steps", "width", "chunks", "stride_b", "stride_l", "stride_d", "stride_o")
        found.append(
            Variant(
                name=f"gather_tokens {TYPES[dtype]} {width}",
                kernel=_gather_kernel,
                types={**pointers, **SETS_POINTERS, **dict.fromkeys(sizes, "i32")},
                num_warps=meta.pop("num_warps"),
                constants=meta,
                divisible=(*pointers, "width", "stride_b", "stride_l", "stride_o"),
                ones=("stride_d", "chunks") if width <= meta["W"] else ("stride_d",),
            )
        )
    return found
