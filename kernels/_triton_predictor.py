"""Triton kernels of predictor_tokens: its packed input in one pass, and its backward pass in another.

    set s:  context_i + pos_embed[context id_i], then mask_tokens[kind_s mod M] + pos_embed[target id_j]
    d context_i = g[row of i],   d mask_token_m = sum of g over the target rows of the sets of kind m,   g = d tokens
    d pos_l = sum of g over the rows of id l, in their order                                               (sum_named)

Nc context and Nt target tokens over S sets, N = Nc + Nt packed rows, L tokens of a clip, P features, M kinds of mask tokens;
R rows and W columns of a tile. Forward moves (2 Nc + Nt) P elements, backward as many; positions and mask tokens stay in the
L2 cache (1568 x 384 positions are 1.2 MB in bfloat16). N P additions each: memory-bound.

A program finds set, kind and ids of its R rows once and walks over their columns. A thread has two or four 16-byte loads of
each input under way before the first store, in 52 to 80 registers: at least 6 programs, 48 KB in flight on an SM, where
4.8 TB/s x 0.7 us / 132 SMs of an H200 ask for 25 KB. Backward, a program leaves the sum of its rows of each kind: [programs,
M, P] in float32, 1/16 of what it reads (M = 2), added by torch.sum in a fixed order, which depends on the shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, ceil_div, device_of
from ._triton_sets import TYPES, packed, search_steps, sum_named, tile_width

WARPS = 4
THREADS = 32 * WARPS
ACCESS = 16  # bytes of the widest access of a thread
TILE = THREADS * 64  # bytes: four such accesses of each thread
FORWARD_WIDEST = 256  # columns of a tile: one such access of each lane of a warp in bfloat16
BACKWARD_WIDEST = 64  # fewer columns are more rows, hence fewer sums to leave; a row of a tile is still 128 bytes
KINDS = 2  # kinds of mask tokens that a program of the backward pass sums: what models have

RUNTIME = ["num_tokens", "num_sets", "steps"]
# Read one by one: no variant by alignment.
SCALARS = ["context_indices_ptr", "context_cu_ptr", "target_indices_ptr", "target_cu_ptr", "kind_ptr"]


@triton.jit
def _place(context_cu_ptr, target_cu_ptr, row_R, there_R, num_sets, steps):
    """Set of each packed row; whether it is a context token; its number among the tokens of its half (int32 tiles)."""
    low_R = row_R * 0
    high_R = low_R + num_sets
    for _ in range(steps):
        middle_R = (low_R + high_R) // 2
        below_R = tl.load(context_cu_ptr + middle_R) + tl.load(target_cu_ptr + middle_R) <= row_R
        low_R = tl.where(below_R, middle_R, low_R)
        high_R = tl.where(below_R, high_R, middle_R)
    in_context_R = row_R - tl.load(target_cu_ptr + low_R, mask=there_R, other=0)
    context_end_R = tl.load(context_cu_ptr + low_R + 1, mask=there_R, other=0)
    is_context_R = in_context_R < context_end_R
    return low_R, is_context_R, tl.where(is_context_R, in_context_R, row_R - context_end_R)


@triton.jit
def _kind(kind_ptr, s_R, which_R, M: tl.constexpr):
    """kind mod M of the set of each row, never negative."""
    kind_R = tl.load(kind_ptr + s_R, mask=which_R, other=0).to(tl.int64) % M
    return tl.where(kind_R < 0, kind_R + M, kind_R)


@triton.jit
def _id(context_indices_ptr, target_indices_ptr, place_R, there_R, is_context_R):
    """Token id of each packed row."""
    id_R = tl.load(context_indices_ptr + place_R, mask=there_R & is_context_R, other=0)
    return id_R + tl.load(target_indices_ptr + place_R, mask=there_R & (is_context_R == 0), other=0)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=SCALARS)
def _forward_kernel(
    context_ptr,
    mask_tokens_ptr,
    pos_ptr,
    context_indices_ptr,
    context_cu_ptr,
    target_indices_ptr,
    target_cu_ptr,
    kind_ptr,
    out_ptr,
    indices_ptr,
    cu_ptr,
    num_tokens,
    num_sets,
    steps,
    stride_c,
    stride_m,
    stride_p,
    P: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    in_cu_R = row_R <= num_sets
    first_R = tl.load(context_cu_ptr + row_R, mask=in_cu_R) + tl.load(target_cu_ptr + row_R, mask=in_cu_R)
    tl.store(cu_ptr + row_R, first_R, mask=in_cu_R)

    there_R = row_R < num_tokens
    s_R, is_context_R, place_R = _place(context_cu_ptr, target_cu_ptr, row_R, there_R, num_sets, steps)
    id_R = _id(context_indices_ptr, target_indices_ptr, place_R, there_R, is_context_R)
    tl.store(indices_ptr + row_R, id_R, mask=there_R)
    is_target_R = there_R & (is_context_R == 0)
    context_R = context_ptr + place_R.to(tl.int64) * stride_c
    mask_token_R = mask_tokens_ptr + _kind(kind_ptr, s_R, is_target_R, M) * stride_m
    pos_R = pos_ptr + id_R * stride_p
    out_R = out_ptr + row_R.to(tl.int64) * P
    dtype = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    for first in range(0, P, W):
        column_W = first + tl.arange(0, W)
        if context_ptr.dtype != mask_tokens_ptr.dtype:
            column_W = tl.max_contiguous(column_W, V)  # of a thread at once, whatever the dtype: no change of layout
        there_RW = there_R[:, None] & (column_W < P)[None, :]
        if context_ptr.dtype == mask_tokens_ptr.dtype:
            from_context_RW = context_R[:, None] + column_W[None, :]  # pointers of whole tiles: of rows, Triton 3.9
            from_mask_RW = mask_token_R[:, None] + column_W[None, :]  # forgets that they are aligned to 16 bytes
            token_RW = tl.load(tl.where(is_context_R[:, None], from_context_RW, from_mask_RW), mask=there_RW).to(dtype)
        else:
            context_RW = tl.load(context_R[:, None] + column_W[None, :], mask=there_RW & is_context_R[:, None])
            mask_RW = tl.load(mask_token_R[:, None] + column_W[None, :], mask=there_RW & is_target_R[:, None])
            token_RW = tl.where(is_context_R[:, None], context_RW.to(dtype), mask_RW.to(dtype))
        pos_RW = tl.load(pos_R[:, None] + column_W[None, :], mask=there_RW)
        token_RW = (token_RW + pos_RW.to(dtype)).to(out_ptr.dtype.element_ty)
        tl.store(out_R[:, None] + column_W[None, :], token_RW, mask=there_RW)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=SCALARS)
def _backward_kernel(
    grad_ptr,
    context_indices_ptr,
    context_cu_ptr,
    target_indices_ptr,
    target_cu_ptr,
    kind_ptr,
    grad_context_ptr,
    partial_ptr,
    indices_ptr,
    num_tokens,
    num_sets,
    steps,
    stride_n,
    P: tl.constexpr,
    M: tl.constexpr,
    DOUBLE: tl.constexpr,
    READ: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Writes what is not None of: gradient of context, partial sums of the mask tokens' gradients, packed ids."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    there_R = row_R < num_tokens
    m = tl.program_id(1) * 2 if M > 2 else 0  # this kind and the next are summed here
    EVEN: tl.constexpr = (M + 1) // 2 * 2
    rest_R = row_R < tl.where(tl.program_id(1) == 0, num_tokens, 0)  # the first program does the rest too
    s_R, is_context_R, place_R = _place(context_cu_ptr, target_cu_ptr, row_R, there_R, num_sets, steps)
    if indices_ptr is not None:
        id_R = _id(context_indices_ptr, target_indices_ptr, place_R, there_R, is_context_R)
        tl.store(indices_ptr + row_R, id_R, mask=rest_R)
    if READ:
        # of each row, what it is to this program: context -1, target the kind of its set, neither -2
        kind_R = _kind(kind_ptr, s_R, there_R, M).to(tl.int32)
        what_R = tl.where(there_R, tl.where(is_context_R, tl.where(rest_R, -1, -2), kind_R), -2)[:, None]
        grad_R = grad_ptr + row_R.to(tl.int64)[:, None] * stride_n
        to_R = place_R.to(tl.int64)[:, None] * P
        for first in range(0, P, W):
            column_W = first + tl.arange(0, W)
            in_width_W = column_W < P
            grad_RW = tl.load(grad_R + column_W[None, :], mask=(what_R > -2) & in_width_W[None, :], other=0.0)
            if grad_context_ptr is not None:
                context_RW = grad_RW.to(grad_context_ptr.dtype.element_ty)
                tl.store(
                    grad_context_ptr + (to_R + column_W[None, :]), context_RW, mask=(what_R == -1) & in_width_W[None, :]
                )
            if partial_ptr is not None:
                to_W = (tl.program_id(0).to(tl.int64) * EVEN + m) * P + column_W
                sum_W = tl.sum(tl.where(what_R == m, grad_RW.to(ACC), 0.0), axis=0)
                tl.store(partial_ptr + to_W, sum_W, mask=in_width_W)
                sum_W = tl.sum(tl.where(what_R == m + 1, grad_RW.to(ACC), 0.0), axis=0)
                tl.store(partial_ptr + (to_W + P), sum_W, mask=in_width_W)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward_meta(width: int, dtype: torch.dtype) -> dict[str, int]:
    columns = tile_width(width, FORWARD_WIDEST)
    return {"R": TILE // (columns * dtype.itemsize), "W": columns, "V": min(columns, ACCESS // dtype.itemsize)}


def _backward_meta(width: int, dtype: torch.dtype) -> dict[str, int]:
    columns = tile_width(width, BACKWARD_WIDEST)
    return {"R": TILE // (columns * dtype.itemsize), "W": columns}


def predictor_tokens(
    context: Tensor,
    mask_tokens: Tensor,
    pos_embed: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per set context + pos[ids], then mask_tokens[kind mod M] + pos[ids], packed; with their ids and offsets."""
    context, mask_tokens, pos_embed = _rows(context), _rows(mask_tokens), _rows(pos_embed)
    num_tokens, num_sets = context_indices.shape[0] + target_indices.shape[0], kind.shape[0]
    num_kinds, width = mask_tokens.shape
    dtype = torch.promote_types(torch.promote_types(context.dtype, mask_tokens.dtype), pos_embed.dtype)
    out = torch.empty((num_tokens, width), dtype=dtype, device=context.device)
    indices = torch.empty(num_tokens, dtype=context_indices.dtype, device=context.device)
    cu_seqlens = torch.empty(num_sets + 1, dtype=context_cu.dtype, device=context.device)
    meta = _forward_meta(width, dtype)
    with device_of(context):
        _forward_kernel[(ceil_div(max(num_tokens, num_sets + 1), meta["R"]),)](
            context,
            mask_tokens,
            pos_embed,
            *packed(context_indices, context_cu, target_indices, target_cu, kind),
            out,
            indices,
            cu_seqlens,
            num_tokens,
            num_sets,
            search_steps(num_sets),
            context.stride(0),
            mask_tokens.stride(0),
            pos_embed.stride(0),
            P=width,
            M=num_kinds,
            **meta,
            num_warps=WARPS,
            **LAUNCH,
        )
    return out, indices, cu_seqlens


def predictor_tokens_backward(
    grad: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
    num_kinds: int,
    length: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of context, mask_tokens and pos_embed (empty where not in `needs`)."""
    grad = _rows(grad)
    num_tokens, width = grad.shape
    meta = _backward_meta(width, grad.dtype)
    programs, groups = ceil_div(num_tokens, meta["R"]), ceil_div(num_kinds, KINDS)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_context = partial = indices = None
    if needs[0]:
        narrow = grad.dtype if grad.dtype == torch.float64 else dtypes[0]  # PyTorch rounds float64
        grad_context = torch.empty((context_indices.shape[0], width), dtype=narrow, device=grad.device)
    if needs[1]:
        partial = torch.empty((programs, groups * KINDS, width), dtype=wide, device=grad.device)
    if needs[2]:
        indices = torch.empty(num_tokens, dtype=context_indices.dtype, device=grad.device)
    if grad.numel() and any(needs):
        with device_of(grad):
            _backward_kernel[programs, groups](
                grad,
                *packed(context_indices, context_cu, target_indices, target_cu, kind),
                grad_context,
                partial,
                indices,
                num_tokens,
                kind.shape[0],
                search_steps(kind.shape[0]),
                grad.stride(0),
                P=width,
                M=num_kinds,
                DOUBLE=wide == torch.float64,
                READ=needs[0] or needs[1],
                **meta,
                num_warps=WARPS,
                **LAUNCH,
            )
    none = grad.new_empty(0)
    return (
        none if grad_context is None else grad_context.to(dtypes[0]),
        none if partial is None else partial.sum(0)[:num_kinds].to(dtypes[1]),
        none if indices is None else sum_named(grad, indices, None, 1, length, wide)[0].to(dtypes[2]),
    )


def variants() -> list[Variant]:
    """What the launchers launch at the width of the predictors of all published models."""
    width, kinds = 384, 2
    halves = dict(zip(SCALARS, ("*i64", "*i32", "*i64", "*i32", "*i64"), strict=True))
    found = []
    for context_dtype, dtype in ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        context, parameters = TYPES[context_dtype], TYPES[dtype]
        constants: dict[str, object] = {"P": width, "M": kinds}
        name = f"{context} context, {parameters} mask tokens {width}"
        rows = {"context_ptr": f"*{context}", "mask_tokens_ptr": f"*{parameters}", "pos_ptr": f"*{parameters}"}
        strides = ("stride_c", "stride_m", "stride_p")
        outputs = {"out_ptr": f"*{parameters}", "indices_ptr": "*i64", "cu_ptr": "*i32"}
        found.append(
            Variant(
                name=f"predictor_tokens {name}",
                kernel=_forward_kernel,
                types={**rows, **halves, **outputs, **dict.fromkeys((*RUNTIME, *strides), "i32")},
                constants={**constants, **_forward_meta(width, dtype)},
                divisible=(*rows, *outputs, *strides),
                num_warps=WARPS,
            )
        )
        rows = {"grad_ptr": f"*{parameters}", "grad_context_ptr": f"*{context}", "partial_ptr": "*fp32"}
        types = {**rows, **halves, **dict.fromkeys((*RUNTIME, "stride_n"), "i32")}
        constants |= {"DOUBLE": False, "READ": True, **_backward_meta(width, dtype)}
        for learned in (False, True):
            found.append(
                Variant(
                    name=f"predictor_tokens backward {name}{', learned positions' if learned else ''}",
                    kernel=_backward_kernel,
                    types={**types, "indices_ptr": "*i64"} if learned else types,
                    constants=constants if learned else {**constants, "indices_ptr": None},
                    divisible=(*rows, "stride_n", *(("indices_ptr",) if learned else ())),
                    num_warps=WARPS,
                )
            )
    return found
