"""varlen_attention in Triton: flash attention forward over packed sequences of any lengths.

    out_i = sum_j p_ij v_j,   p_ij = e^(scale q_i . k_j - m_i) / l_i,   lse_i = m_i + log l_i

Letters as in `_triton_attention_parts.py`. A program owns queries of a head and walks over the keys of their sequence, with
a running maximum m and sum l in float32: 4 E FLOP and one exponential for each pair of query and key. Keys and values, 4 E
bytes a key in 16 bits, come from the L2 cache. Only the last step of a sequence masks keys. Heads of an item run side by
side, because they lie side by side in memory.

Sums are scaled down in every step, needed or not: that is E multiplications a query for 64 or 128 exponentials, of which the
exp unit makes one while the others make eight; to skip it, warps would have to agree on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, device_of
from ._triton_attention_backward import varlen_attention_backward
from ._triton_attention_parts import (
    ARCHS,
    CASES,
    LOG2_E,
    STRIDES,
    Tile,
    Tiles,
    again,
    describe,
    exp2,
    exponent,
    family,
    item_of,
    items_for,
    load_part,
    meta,
    rows_at,
    store_part,
    strides_of,
    sums_at,
    unit_of,
    with_unit_stride,
)
from ._triton_product import add_product, precision
from ._triton_sets import TYPES

__all__ = ["variants", "varlen_attention", "varlen_attention_backward"]

# By the width of a head, all parts together, up to which they serve. A thread holds owned * walked / 32 / warps scores: 64
# where nothing else needs the registers. What is staged fits the least shared memory of a family, 227 and 99 KB.
TILES: Tiles = {
    "shared": {32: Tile(64, 128, 4, 3), 128: Tile(128, 128, 8, 2), 256: Tile(64, 64, 8, 2)},
    "registers": {
        32: Tile(64, 128, 4, 3),
        64: Tile(128, 64, 8, 3),
        128: Tile(128, 64, 8, 2),
        192: Tile(64, 32, 8, 1, reload=True),
        256: Tile(64, 32, 8, 2, reload=True),
    },
    "float32": {32: Tile(64, 32, 4, 2, reload=True), 64: Tile(64, 32, 8, 2, reload=True)},
}


@triton.jit
def _step(
    q_rows, q0, q1, k_rows, v_rows, acc0, acc1, m_M, l_M, scale, left,
    PRECISION, E, E0, E1, SHARE, RELOAD, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys and values of a step; `left` keys are left where MASKED."""
    q0 = again(q_rows, q0, E0, 0, E, RELOAD)
    acc_MN = tl.zeros([q0.shape[0], k_rows.shape[0]], tl.float32)
    s_MN = add_product(acc_MN, q0, load_part(k_rows, E0, 0, E).T, PRECISION)
    if E1 > 0:
        s_MN = add_product(s_MN, q1, load_part(k_rows, E1, E0, E).T, PRECISION)
    if MASKED:
        s_MN = tl.where((tl.arange(0, k_rows.shape[0]) < left)[None, :], s_MN, float("-inf"))
    new_M = tl.maximum(m_M, tl.max(s_MN, axis=1) * scale)
    p_MN = exp2(exponent(s_MN, scale, new_M[:, None], q0.dtype == tl.float32), SHARE)
    rescale_M = tl.exp2((m_M - new_M) * LOG2_E)
    l_M = l_M * rescale_M + tl.sum(p_MN, axis=1)
    v0 = load_part(v_rows, E0, 0, E)
    p_MN = p_MN.to(v0.dtype)
    acc0 = add_product(acc0 * rescale_M[:, None], p_MN, v0, PRECISION)
    if E1 > 0:
        acc1 = add_product(acc1 * rescale_M[:, None], p_MN, load_part(v_rows, E1, E0, E), PRECISION)
    return acc0, acc1, new_M, l_M


@triton.jit(do_not_specialize=["heads", "tokens", *STRIDES[:6]])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    items_ptr,
    heads,
    tokens,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    SHARE: tl.constexpr,
    RELOAD: tl.constexpr,
    OWNED: tl.constexpr,
    WALKED: tl.constexpr,
):
    head = tl.program_id(0) % heads
    q_first, q_end, k_first, k_end = item_of(items_ptr, tl.program_id(0) // heads)
    row_M = tl.arange(0, OWNED)
    row_N = tl.arange(0, WALKED)
    q_rows = rows_at(q_ptr, q_first, head, q_row, q_head, tl.minimum(row_M, q_end - q_first - 1), UNIT)
    q0 = load_part(q_rows, E0, 0, E)
    acc0 = tl.zeros([OWNED, E0], tl.float32)
    if E1 > 0:
        q1 = load_part(q_rows, E1, E0, E)
        acc1 = tl.zeros([OWNED, E1], tl.float32)
    else:
        q1 = q0
        acc1 = tl.zeros([OWNED, 1], tl.float32)
    m_M = tl.full([OWNED], float("-inf"), tl.float32)
    l_M = tl.zeros([OWNED], tl.float32)
    keys = k_end - k_first
    whole = keys // WALKED * WALKED
    k_rows = rows_at(k_ptr, k_first, head, k_row, k_head, row_N, UNIT)
    v_rows = rows_at(v_ptr, k_first, head, v_row, v_head, row_N, UNIT)
    for _ in range(0, whole, WALKED):
        acc0, acc1, m_M, l_M = _step(
            q_rows, q0, q1, k_rows, v_rows, acc0, acc1, m_M, l_M, scale, WALKED,
            PRECISION, E, E0, E1, SHARE, RELOAD, False,
        )  # fmt: skip
        k_rows += k_row.to(tl.int64) * (WALKED * UNIT)
        v_rows += v_row.to(tl.int64) * (WALKED * UNIT)
    if whole < keys:
        row_N = tl.minimum(row_N, keys - whole - 1)
        k_rows = rows_at(k_ptr, k_first + whole, head, k_row, k_head, row_N, UNIT)
        v_rows = rows_at(v_ptr, k_first + whole, head, v_row, v_head, row_N, UNIT)
        acc0, acc1, m_M, l_M = _step(
            q_rows, q0, q1, k_rows, v_rows, acc0, acc1, m_M, l_M, scale, keys - whole,
            PRECISION, E, E0, E1, SHARE, RELOAD, True,
        )  # fmt: skip
    in_block_M = row_M < q_end - q_first
    tl.store(sums_at(lse_ptr, q_first, head, tokens) + row_M, m_M + tl.log(l_M), mask=in_block_M)
    out_rows = rows_at(out_ptr, q_first, head, heads, 1, row_M, E)
    store_part(out_rows, acc0 / l_M[:, None], in_block_M, 0, E)
    if E1 > 0:
        store_part(out_rows, acc1 / l_M[:, None], in_block_M, E0, E)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale q k^T) v inside each sequence, [N, G, E], and its log-sum-exp [G, N]."""
    tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = (with_unit_stride(tensor) for tensor in (q, k, v))
    made_by = meta(TILES, family(q.device, q.dtype), head_dim, unit_of(q, k, v), precision(q.dtype))
    with device_of(q):
        items = items_for(lengths, kv_lengths, made_by["OWNED"], q.device)
        _attention_kernel[(items.shape[0] * heads,)](
            q,
            k,
            v,
            out,
            lse,
            items,
            heads,
            tokens,
            *(stride for tensor in (q, k, v) for stride in strides_of(tensor, made_by["UNIT"])),
            scale,
            **made_by,
            **LAUNCH,
        )
    return out, lse


def variants() -> list[Variant]:
    """What the launcher launches on views of a packed qkv, and narrow heads with other shares of exponentials."""
    tile = TILES["shared"][32]
    others = [
        _variant("shared", torch.bfloat16, 24, tile._replace(share=share)) for share in (0, 4, 8) if share != tile.share
    ]
    return [*(_variant(*case) for case in CASES), *others]


def _variant(family: str, dtype: torch.dtype, head_dim: int, tile: Tile | None = None) -> Variant:
    made_by = meta(TILES if tile is None else {family: {256: tile}}, family, head_dim, 8, "ieee")
    pointers = {f"{name}_ptr": f"*{TYPES[dtype]}" for name in ("q", "k", "v", "out")}
    return Variant(
        name=f"varlen_attention {describe(dtype, head_dim, made_by)}",
        kernel=_attention_kernel,
        types={
            **pointers,
            "lse_ptr": "*fp32",
            "items_ptr": "*i32",
            **dict.fromkeys(("heads", "tokens", *STRIDES[:6]), "i32"),
            "scale": "fp32",
        },
        num_warps=made_by.pop("num_warps"),
        num_stages=made_by.pop("num_stages"),
        constants=made_by,
        divisible=(*pointers, "lse_ptr", "items_ptr"),
        matrix=True,
        archs=ARCHS[family],
    )
