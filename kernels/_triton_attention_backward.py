"""The gradients of varlen_attention in Triton, each summed by one program in a fixed order: no atomics.

    p_ij = e^(scale q_i . k_j - lse_i)       d_i = sum_e grad_ie out_ie       ds_ij = p_ij (grad_i . v_j - d_i)
    grad_q_i = scale sum_j ds_ij k_j        grad_k_j = scale sum_i ds_ij q_i        grad_v_j = sum_i p_ij grad_i

Letters as in `_triton_attention_parts.py`. Two kernels: a program of one owns queries of a head, walks over their keys, and
leaves d [G, N] for the other, in which a program owns keys and walks over their queries. Each computes scores and
exponentials anew: 14 E FLOP and two exponentials for each pair of query and key, where a single pass that adds up grad_q by
atomics has 10 E and one, and an order that changes from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, device_of
from ._triton_attention_parts import (
    ARCHS,
    CASES,
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

# By the width of a head, all parts together, up to which they serve: for grad_q, and for grad_k and grad_v. What is staged
# fits the least shared memory of a family, 227 and 99 KB.
QUERIES: Tiles = {
    "shared": {
        32: Tile(64, 128, 4, 3),
        64: Tile(128, 128, 8, 2),
        128: Tile(128, 64, 8, 2),
        256: Tile(32, 32, 8, 1, reload=True),
    },
    "registers": {
        32: Tile(64, 128, 4, 3),
        64: Tile(128, 64, 8, 2),
        128: Tile(128, 32, 8, 2, reload=True),
        256: Tile(32, 32, 8, 1, reload=True),
    },
    "float32": {32: Tile(32, 16, 4, 1, reload=True), 64: Tile(16, 16, 4, 2, reload=True)},
}
KEYS: Tiles = {
    "shared": {
        64: Tile(128, 64, 8, 3),
        80: Tile(128, 64, 8, 2),
        128: Tile(64, 64, 8, 2),
        192: Tile(32, 32, 8, 2, reload=True),
        256: Tile(32, 32, 8, 1, reload=True),
    },
    "registers": {
        32: Tile(128, 64, 8, 3),
        64: Tile(128, 32, 8, 2),
        80: Tile(128, 32, 8, 2, reload=True),
        96: Tile(64, 16, 8, 2, reload=True),
        128: Tile(64, 64, 8, 2, reload=True),
        192: Tile(32, 32, 8, 2, reload=True),
        256: Tile(32, 32, 8, 1, reload=True),
    },
    "float32": {32: Tile(64, 32, 8, 2, reload=True), 64: Tile(32, 32, 8, 1, reload=True)},
}


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return add_product(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a, b, PRECISION)


@triton.jit
def _query_step(
    q_rows, g_rows, q0, q1, g0, g1, k_rows, v_rows, acc0, acc1, lse_M, d_M, scale, left,
    PRECISION, E, E0, E1, SHARE, RELOAD, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to grad_q what the keys of a step give; `left` keys are left where MASKED."""
    k0 = load_part(k_rows, E0, 0, E)
    q0 = again(q_rows, q0, E0, 0, E, RELOAD)
    g0 = again(g_rows, g0, E0, 0, E, RELOAD)
    s_MN = _product(q0, k0.T, PRECISION)
    ds_MN = _product(g0, load_part(v_rows, E0, 0, E).T, PRECISION)
    if E1 > 0:
        k1 = load_part(k_rows, E1, E0, E)
        q1 = again(q_rows, q1, E1, E0, E, RELOAD)
        g1 = again(g_rows, g1, E1, E0, E, RELOAD)
        s_MN = add_product(s_MN, q1, k1.T, PRECISION)
        ds_MN = add_product(ds_MN, g1, load_part(v_rows, E1, E0, E).T, PRECISION)
    s_MN = exponent(s_MN, scale, lse_M[:, None], q0.dtype == tl.float32)
    if MASKED:
        s_MN = tl.where((tl.arange(0, k_rows.shape[0]) < left)[None, :], s_MN, float("-inf"))
    ds_MN = (exp2(s_MN, SHARE) * (ds_MN - d_M[:, None])).to(k0.dtype)
    acc0 = add_product(acc0, ds_MN, k0, PRECISION)
    if E1 > 0:
        acc1 = add_product(acc1, ds_MN, k1, PRECISION)
    return acc0, acc1


@triton.jit(do_not_specialize=["heads", "tokens", *STRIDES])
def _grad_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    d_ptr,
    grad_q_ptr,
    items_ptr,
    heads,
    tokens,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_row,
    grad_head,
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
    in_block_M = row_M < q_end - q_first
    near_M = tl.minimum(row_M, q_end - q_first - 1)
    q_rows = rows_at(q_ptr, q_first, head, q_row, q_head, near_M, UNIT)
    g_rows = rows_at(grad_ptr, q_first, head, grad_row, grad_head, near_M, UNIT)
    out_rows = rows_at(out_ptr, q_first, head, heads, 1, near_M, E)
    q0 = load_part(q_rows, E0, 0, E)
    g0 = load_part(g_rows, E0, 0, E)
    d_M = tl.sum(g0.to(tl.float32) * load_part(out_rows, E0, 0, E).to(tl.float32), axis=1)
    acc0 = tl.zeros([OWNED, E0], tl.float32)
    if E1 > 0:
        q1 = load_part(q_rows, E1, E0, E)
        g1 = load_part(g_rows, E1, E0, E)
        d_M += tl.sum(g1.to(tl.float32) * load_part(out_rows, E1, E0, E).to(tl.float32), axis=1)
        acc1 = tl.zeros([OWNED, E1], tl.float32)
    else:
        q1 = q0
        g1 = g0
        acc1 = tl.zeros([OWNED, 1], tl.float32)
    tl.store(sums_at(d_ptr, q_first, head, tokens) + row_M, d_M, mask=in_block_M)
    lse_M = tl.load(sums_at(lse_ptr, q_first, head, tokens) + near_M)
    keys = k_end - k_first
    whole = keys // WALKED * WALKED
    k_rows = rows_at(k_ptr, k_first, head, k_row, k_head, row_N, UNIT)
    v_rows = rows_at(v_ptr, k_first, head, v_row, v_head, row_N, UNIT)
    for _ in range(0, whole, WALKED):
        acc0, acc1 = _query_step(
            q_rows, g_rows, q0, q1, g0, g1, k_rows, v_rows, acc0, acc1, lse_M, d_M, scale, WALKED,
            PRECISION, E, E0, E1, SHARE, RELOAD, False,
        )  # fmt: skip
        k_rows += k_row.to(tl.int64) * (WALKED * UNIT)
        v_rows += v_row.to(tl.int64) * (WALKED * UNIT)
    if whole < keys:
        row_N = tl.minimum(row_N, keys - whole - 1)
        k_rows = rows_at(k_ptr, k_first + whole, head, k_row, k_head, row_N, UNIT)
        v_rows = rows_at(v_ptr, k_first + whole, head, v_row, v_head, row_N, UNIT)
        left = keys - whole
        acc0, acc1 = _query_step(
            q_rows, g_rows, q0, q1, g0, g1, k_rows, v_rows, acc0, acc1, lse_M, d_M, scale, left,
            PRECISION, E, E0, E1, SHARE, RELOAD, True,
        )  # fmt: skip
    grad_q_rows = rows_at(grad_q_ptr, q_first, head, heads, 1, row_M, E)
    store_part(grad_q_rows, acc0 * scale, in_block_M, 0, E)
    if E1 > 0:
        store_part(grad_q_rows, acc1 * scale, in_block_M, E0, E)


@triton.jit
def _key_step(
    k_rows, v_rows, k0, k1, v0, v1, q_rows, g_rows, lse_rows, d_rows, gk0, gk1, gv0, gv1, scale, left,
    PRECISION, E, E0, E1, SHARE, RELOAD, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to grad_k and grad_v what the queries of a step give; `left` queries are left where MASKED."""
    q0 = load_part(q_rows, E0, 0, E)
    g0 = load_part(g_rows, E0, 0, E)
    k0 = again(k_rows, k0, E0, 0, E, RELOAD)
    v0 = again(v_rows, v0, E0, 0, E, RELOAD)
    p_NM = _product(k0, q0.T, PRECISION)
    ds_NM = _product(v0, g0.T, PRECISION)
    if E1 > 0:
        q1 = load_part(q_rows, E1, E0, E)
        g1 = load_part(g_rows, E1, E0, E)
        k1 = again(k_rows, k1, E1, E0, E, RELOAD)
        v1 = again(v_rows, v1, E1, E0, E, RELOAD)
        p_NM = add_product(p_NM, k1, q1.T, PRECISION)
        ds_NM = add_product(ds_NM, v1, g1.T, PRECISION)
    lse_M = tl.load(lse_rows)
    if MASKED:
        lse_M = tl.where(tl.arange(0, q_rows.shape[0]) < left, lse_M, float("inf"))
    p_NM = exp2(exponent(p_NM, scale, lse_M[None, :], q0.dtype == tl.float32), SHARE)
    ds_NM = (p_NM * (ds_NM - tl.load(d_rows)[None, :])).to(q0.dtype)
    p_NM = p_NM.to(q0.dtype)
    gv0 = add_product(gv0, p_NM, g0, PRECISION)
    gk0 = add_product(gk0, ds_NM, q0, PRECISION)
    if E1 > 0:
        gv1 = add_product(gv1, p_NM, g1, PRECISION)
        gk1 = add_product(gk1, ds_NM, q1, PRECISION)
    return gk0, gk1, gv0, gv1


@triton.jit(do_not_specialize=["heads", "tokens", *STRIDES])
def _grad_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    d_ptr,
    grad_k_ptr,
    grad_v_ptr,
    items_ptr,
    heads,
    tokens,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_row,
    grad_head,
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
    k_first, k_end, q_first, q_end = item_of(items_ptr, tl.program_id(0) // heads)
    row_M = tl.arange(0, WALKED)
    row_N = tl.arange(0, OWNED)
    near_N = tl.minimum(row_N, k_end - k_first - 1)
    k_rows = rows_at(k_ptr, k_first, head, k_row, k_head, near_N, UNIT)
    v_rows = rows_at(v_ptr, k_first, head, v_row, v_head, near_N, UNIT)
    k0 = load_part(k_rows, E0, 0, E)
    v0 = load_part(v_rows, E0, 0, E)
    gk0 = tl.zeros([OWNED, E0], tl.float32)
    gv0 = tl.zeros([OWNED, E0], tl.float32)
    if E1 > 0:
        k1 = load_part(k_rows, E1, E0, E)
        v1 = load_part(v_rows, E1, E0, E)
        gk1 = tl.zeros([OWNED, E1], tl.float32)
        gv1 = tl.zeros([OWNED, E1], tl.float32)
    else:
        k1 = k0
        v1 = v0
        gk1 = tl.zeros([OWNED, 1], tl.float32)
        gv1 = tl.zeros([OWNED, 1], tl.float32)
    queries = q_end - q_first
    whole = queries // WALKED * WALKED
    q_rows = rows_at(q_ptr, q_first, head, q_row, q_head, row_M, UNIT)
    g_rows = rows_at(grad_ptr, q_first, head, grad_row, grad_head, row_M, UNIT)
    lse_rows = sums_at(lse_ptr, q_first, head, tokens) + row_M
    d_rows = sums_at(d_ptr, q_first, head, tokens) + row_M
    for _ in range(0, whole, WALKED):
        gk0, gk1, gv0, gv1 = _key_step(
            k_rows, v_rows, k0, k1, v0, v1, q_rows, g_rows, lse_rows, d_rows, gk0, gk1, gv0, gv1, scale, WALKED,
            PRECISION, E, E0, E1, SHARE, RELOAD, False,
        )  # fmt: skip
        q_rows += q_row.to(tl.int64) * (WALKED * UNIT)
        g_rows += grad_row.to(tl.int64) * (WALKED * UNIT)
        lse_rows += WALKED
        d_rows += WALKED
    if whole < queries:
        left = queries - whole
        row_M = tl.minimum(row_M, left - 1)
        q_rows = rows_at(q_ptr, q_first + whole, head, q_row, q_head, row_M, UNIT)
        g_rows = rows_at(grad_ptr, q_first + whole, head, grad_row, grad_head, row_M, UNIT)
        lse_rows = sums_at(lse_ptr, q_first + whole, head, tokens) + row_M
        d_rows = sums_at(d_ptr, q_first + whole, head, tokens) + row_M
        gk0, gk1, gv0, gv1 = _key_step(
            k_rows, v_rows, k0, k1, v0, v1, q_rows, g_rows, lse_rows, d_rows, gk0, gk1, gv0, gv1, scale, left,
            PRECISION, E, E0, E1, SHARE, RELOAD, True,
        )  # fmt: skip
    in_block_N = row_N < k_end - k_first
    grad_k_rows = rows_at(grad_k_ptr, k_first, head, heads, 1, row_N, E)
    grad_v_rows = rows_at(grad_v_ptr, k_first, head, heads, 1, row_N, E)
    store_part(grad_k_rows, gk0 * scale, in_block_N, 0, E)
    store_part(grad_v_rows, gv0, in_block_N, 0, E)
    if E1 > 0:
        store_part(grad_k_rows, gk1 * scale, in_block_N, E0, E)
        store_part(grad_v_rows, gv1, in_block_N, E0, E)


def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from that of `out` [N, G, E] and the log-sum-exp [G, N] of the forward pass."""
    tokens, heads, head_dim = q.shape
    grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v)]
    q, k, v, grad = (with_unit_stride(tensor) for tensor in (q, k, v, grad))
    unit = unit_of(q, k, v, grad)
    strides = [stride for tensor in (q, k, v, grad) for stride in strides_of(tensor, unit)]
    kind, rounding = family(q.device, q.dtype), precision(q.dtype)
    d = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    out, lse = out.contiguous(), lse.contiguous()
    with device_of(q):
        if q.numel():
            made_by = meta(QUERIES, kind, head_dim, unit, rounding)
            items = items_for(lengths, kv_lengths, made_by["OWNED"], q.device)
            _grad_q_kernel[(items.shape[0] * heads,)](
                q, k, v, grad, out, lse, d, grads[0], items, heads, tokens, *strides, scale, **made_by, **LAUNCH
            )
        if k.numel():
            made_by = meta(KEYS, kind, head_dim, unit, rounding)
            items = items_for(kv_lengths, lengths, made_by["OWNED"], q.device)
            _grad_kv_kernel[(items.shape[0] * heads,)](
                q, k, v, grad, lse, d, grads[1], grads[2], items, heads, tokens, *strides, scale, **made_by, **LAUNCH
            )
    return grads[0], grads[1], grads[2]


def variants() -> list[Variant]:
    """What the launcher launches on views of a packed qkv."""
    return [_variant(tiles, *case) for tiles in (QUERIES, KEYS) for case in CASES]


def _variant(tiles: Tiles, family: str, dtype: torch.dtype, head_dim: int) -> Variant:
    made_by = meta(tiles, family, head_dim, 8, "ieee")
    of_queries = tiles is QUERIES
    names = ("out", "grad_q") if of_queries else ("grad_k", "grad_v")
    pointers = {f"{name}_ptr": f"*{TYPES[dtype]}" for name in ("q", "k", "v", "grad", *names)}
    sums = {"lse_ptr": "*fp32", "d_ptr": "*fp32", "items_ptr": "*i32"}
    return Variant(
        name=f"varlen_attention grad {'q' if of_queries else 'k and v'} {describe(dtype, head_dim, made_by)}",
        kernel=_grad_q_kernel if of_queries else _grad_kv_kernel,
        types={**pointers, **sums, **dict.fromkeys(("heads", "tokens", *STRIDES), "i32"), "scale": "fp32"},
        num_warps=made_by.pop("num_warps"),
        num_stages=made_by.pop("num_stages"),
        constants=made_by,
        divisible=(*pointers, *sums),
        matrix=True,
        archs=ARCHS[family],
    )
