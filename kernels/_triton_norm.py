"""add_layer_norm in Triton: one kernel adds and normalises, one makes all gradients of a row.

    s_i = r_i + b_i,    h_i = (s_i - mean(s_i)) rstd_i,    y_i = h_i w + c,    rstd_i = 1 / sqrt(var(s_i) + eps)
    g_i = dy_i w,       dr_i = db_i = ds_i + rstd_i (g_i - mean(g_i) - h_i mean(g_i h_i))
    dw  = sum_i dy_i h_i,    dc = sum_i dy_i

N tokens, D features; R rows and W columns of a tile, W the power of two that holds D. For float32 r, ds and dr, bfloat16
b, y, dy and db, 12 bytes an element are moved forward and 16 backward: memory-bound. A row is read once, by the warps of
a program side by side, and stays in registers: the mean is subtracted before squaring. A thread has R rows of the same
columns, so that sums over rows need no other thread, and those over columns meet in shared memory once for R rows.

Backward, a program takes every P-th tile of R rows and keeps its sums of dw and dc in registers; the P partial sums are
then added by torch.sum. P follows from N and the dtypes alone: no atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, ceil_div, device_of, next_power_of_2
from ._triton_sets import TYPES
from .reference import accumulator

BYTES = 16  # of the widest access of a thread
LANES = 32
HELD, HELD_BACKWARD = 32, 16  # elements of a tile in a thread, of two tensors and of three: 64 to 110 registers
WARPS, MOST_WARPS = 8, 16  # of a program: up to 2048 columns of 16 bits; of a row that so few do not hold
RESIDENT = 132 * 16  # warps of the programs, backward: what the 132 SMs of an H200 hold of 128 registers a thread


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    residual_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    statistics_ptr,
    num_tokens,
    stride_r,
    stride_b,
    EPS: tl.constexpr,
    D: tl.constexpr,
    DOUBLE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    d_W = tl.arange(0, W)
    mask_RW = (i_R < num_tokens)[:, None] & (d_W < D)[None, :]
    there_R = i_R < num_tokens
    i_R = i_R.to(tl.int64)
    place_RW = (i_R * D)[:, None] + d_W[None, :]
    s_RW = tl.load(residual_ptr + ((i_R * stride_r)[:, None] + d_W[None, :]), mask=mask_RW, other=0.0)
    if branch_ptr is not None:
        b_RW = tl.load(branch_ptr + ((i_R * stride_b)[:, None] + d_W[None, :]), mask=mask_RW, other=0.0)
        s_RW = (s_RW.to(ACC) + b_RW.to(ACC)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place_RW, s_RW, mask=mask_RW)
    x_RW = s_RW.to(ACC)
    mean_R = tl.sum(x_RW, axis=1) / D
    x_RW = tl.where((d_W < D)[None, :], x_RW - mean_R[:, None], 0.0)
    missed_R = tl.sum(x_RW, axis=1) / D  # what rounding took from a large mean
    x_RW = tl.where((d_W < D)[None, :], x_RW - missed_R[:, None], 0.0)
    rstd_R = tl.rsqrt(tl.sum(x_RW * x_RW, axis=1) / D + EPS)
    x_RW = x_RW * rstd_R[:, None]
    if weight_ptr is not None:
        x_RW = x_RW * tl.load(weight_ptr + d_W, mask=d_W < D, other=0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        x_RW = x_RW + tl.load(bias_ptr + d_W, mask=d_W < D, other=0.0).to(ACC)[None, :]
    tl.store(normed_ptr + place_RW, x_RW.to(normed_ptr.dtype.element_ty), mask=mask_RW)
    tl.store(statistics_ptr + 2 * i_R, mean_R + missed_R, mask=there_R)
    tl.store(statistics_ptr + 2 * i_R + 1, rstd_R, mask=there_R)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad_sum_ptr,
    grad_normed_ptr,
    added_ptr,
    statistics_ptr,
    weight_ptr,
    residual_ptr,
    branch_ptr,
    weights_ptr,
    biases_ptr,
    num_tokens,
    stride_s,
    stride_n,
    stride_a,
    D: tl.constexpr,
    DOUBLE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """residual_ptr, branch_ptr: their gradients; weights_ptr, biases_ptr: [P, D], the sums of each program."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    d_W = tl.arange(0, W)
    dw_W = tl.zeros([W], ACC)
    dc_W = tl.zeros([W], ACC)
    if weight_ptr is not None:
        w_W = tl.load(weight_ptr + d_W, mask=d_W < D, other=0.0).to(ACC)
    for first in range(tl.program_id(0) * R, num_tokens, tl.num_programs(0) * R):
        i_R = first + tl.arange(0, R)
        there_R = i_R < num_tokens
        mask_RW = there_R[:, None] & (d_W < D)[None, :]
        i_R = i_R.to(tl.int64)
        x_RW = tl.load(added_ptr + ((i_R * stride_a)[:, None] + d_W[None, :]), mask=mask_RW, other=0.0).to(ACC)
        g_RW = tl.load(grad_normed_ptr + ((i_R * stride_n)[:, None] + d_W[None, :]), mask=mask_RW, other=0.0).to(ACC)
        mean_R = tl.load(statistics_ptr + 2 * i_R, mask=there_R, other=0.0)
        rstd_R = tl.load(statistics_ptr + 2 * i_R + 1, mask=there_R, other=0.0)
        x_RW = tl.where((d_W < D)[None, :], (x_RW - mean_R[:, None]) * rstd_R[:, None], 0.0)
        missed_R = tl.sum(x_RW, axis=1) / D
        x_RW = tl.where((d_W < D)[None, :], x_RW - missed_R[:, None], 0.0)
        if weights_ptr is not None:
            dw_W += tl.sum(g_RW * x_RW, axis=0)
        if biases_ptr is not None:
            dc_W += tl.sum(g_RW, axis=0)
        if (residual_ptr is not None) | (branch_ptr is not None):
            if weight_ptr is not None:
                g_RW = g_RW * w_W[None, :]
            along_R = tl.sum(g_RW * x_RW, axis=1) / D
            mean_R = tl.sum(g_RW, axis=1) / D
            g_RW = (g_RW - mean_R[:, None] - x_RW * along_R[:, None]) * rstd_R[:, None]
            if grad_sum_ptr is not None:
                from_RW = grad_sum_ptr + ((i_R * stride_s)[:, None] + d_W[None, :])
                g_RW += tl.load(from_RW, mask=mask_RW, other=0.0).to(ACC)
            place_RW = (i_R * D)[:, None] + d_W[None, :]
            if residual_ptr is not None:
                tl.store(residual_ptr + place_RW, g_RW.to(residual_ptr.dtype.element_ty), mask=mask_RW)
            if branch_ptr is not None:
                tl.store(branch_ptr + place_RW, g_RW.to(branch_ptr.dtype.element_ty), mask=mask_RW)
    place_W = tl.program_id(0).to(tl.int64) * D + d_W
    if weights_ptr is not None:
        tl.store(weights_ptr + place_W, dw_W, mask=d_W < D)
    if biases_ptr is not None:
        tl.store(biases_ptr + place_W, dc_W, mask=d_W < D)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _meta(width: int, held: int, *dtypes: torch.dtype) -> dict[str, int]:
    access = LANES * BYTES // min(dtype.itemsize for dtype in dtypes)  # columns of a warp
    columns = max(access, next_power_of_2(width))
    warps = min(columns // access, max(WARPS, min(MOST_WARPS, columns // (LANES * held))))
    return {"R": max(1, LANES * held * warps // columns), "W": columns, "num_warps": warps}


def add_layer_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """residual + branch (empty without branch), its layer norm in `dtype`, and mean and rstd of each row, [N, 2]."""
    (num_tokens, width), device, wide = residual.shape, residual.device, accumulator(residual.dtype)
    shape = (0,) if branch is None else (num_tokens, width)
    added = torch.empty(shape, dtype=residual.dtype, device=device)
    normed = torch.empty((num_tokens, width), dtype=dtype, device=device)
    statistics = torch.empty((num_tokens, 2), dtype=wide, device=device)
    if num_tokens > 0:
        residual, branch = _rows(residual), None if branch is None else _rows(branch)
        meta = _meta(width, HELD, residual.dtype, dtype, *(() if branch is None else (branch.dtype,)))
        with device_of(residual):
            _forward_kernel[(ceil_div(num_tokens, meta["R"]),)](
                residual,
                branch,
                _vector(weight),
                _vector(bias),
                None if branch is None else added,
                normed,
                statistics,
                num_tokens,
                residual.stride(0),
                0 if branch is None else branch.stride(0),
                EPS=eps,
                D=width,
                DOUBLE=wide == torch.float64,
                **meta,
                **LAUNCH,
            )
    return added, normed, statistics


def add_layer_norm_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    added: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, branch, weight and bias (empty where not in `needs`); `added` is what was normalised."""
    (num_tokens, width), wide = added.shape, statistics.dtype
    dtypes = [grad_normed.dtype, added.dtype]
    dtypes += [] if grad_sum is None else [grad_sum.dtype]
    dtypes += [branch_dtype] if needs[1] else []
    meta = _meta(width, HELD_BACKWARD, *dtypes)
    programs = min(ceil_div(num_tokens, meta["R"]), RESIDENT // meta["num_warps"])

    def fresh(number: int, rows: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty((rows, width), dtype=dtype, device=added.device) if needs[number] else None

    to_residual, to_branch = fresh(0, num_tokens, added.dtype), fresh(1, num_tokens, branch_dtype)
    weights, biases = fresh(2, programs, wide), fresh(3, programs, wide)
    if num_tokens > 0:
        grad_normed, added = _rows(grad_normed), _rows(added)
        grad_sum = None if grad_sum is None else _rows(grad_sum)
        with device_of(added):
            _backward_kernel[(programs,)](
                grad_sum,
                grad_normed,
                added,
                statistics.contiguous(),
                _vector(weight),
                to_residual,
                to_branch,
                weights,
                biases,
                num_tokens,
                0 if grad_sum is None else grad_sum.stride(0),
                grad_normed.stride(0),
                added.stride(0),
                D=width,
                DOUBLE=wide == torch.float64,
                **meta,
                **LAUNCH,
            )
    affine = ((weights, wide if weight is None else weight.dtype), (biases, bias_dtype))
    found = (to_residual, to_branch, *(None if x is None else x.sum(0).to(dtype) for x, dtype in affine))
    to_residual, to_branch, to_weight, to_bias = (added.new_empty(0) if x is None else x for x in found)
    return to_residual, to_branch, to_weight, to_bias


def variants() -> list[Variant]:
    """What the launchers launch at the widths of the predictor, ViT-L and ViT-H, for a float32 residual; and float32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = []
    for width in (384, 1024, 1280):
        found += [_forward_variant(width, bf16, bf16), _backward_variant(width, bf16, bf16, True)]
    for width in (384, 1024):  # the first norm of a network adds nothing, and of the last the sum is not used
        found += [_forward_variant(width, None, bf16), _backward_variant(width, None, bf16, False)]
        found += [_backward_variant(width, bf16, bf16, False)]
    return [*found, _forward_variant(1024, fp32, fp32), _backward_variant(1024, fp32, fp32, True)]


def _forward_variant(width: int, branch: torch.dtype | None, dtype: torch.dtype) -> Variant:
    meta = _meta(width, HELD, torch.float32, dtype, *(() if branch is None else (branch,)))
    pointers = dict.fromkeys(("residual_ptr", "weight_ptr", "bias_ptr", "statistics_ptr"), "*fp32")
    pointers |= {"normed_ptr": f"*{TYPES[dtype]}"}
    constants: dict[str, object] = {"EPS": 1e-6, "D": width, "DOUBLE": False}
    if branch is None:
        constants |= dict.fromkeys(("branch_ptr", "sum_ptr"))
    else:
        pointers |= {"branch_ptr": f"*{TYPES[branch]}", "sum_ptr": "*fp32"}
    strides = ("stride_r", "stride_b")
    return Variant(
        name=f"add_layer_norm fp32 + {_name(branch)} to {TYPES[dtype]} {width}",
        kernel=_forward_kernel,
        types={**pointers, **dict.fromkeys(("num_tokens", *strides), "i32")},
        num_warps=meta.pop("num_warps"),
        constants={**constants, **meta},
        divisible=(*pointers, *strides),
    )


def _backward_variant(width: int, branch: torch.dtype | None, dtype: torch.dtype, of_sum: bool) -> Variant:
    own = branch is not None and branch != torch.float32  # branch has a gradient of its own
    meta = _meta(width, HELD_BACKWARD, torch.float32, dtype, *((branch,) if branch is not None and own else ()))
    rows = ("added_ptr", "statistics_ptr", "weight_ptr", "residual_ptr", "weights_ptr", "biases_ptr")
    pointers = {**dict.fromkeys(rows, "*fp32"), "grad_normed_ptr": f"*{TYPES[dtype]}"}
    absent = []
    for name, there, kind in (("branch_ptr", own, _name(branch)), ("grad_sum_ptr", of_sum, "fp32")):
        if there:
            pointers[name] = f"*{kind}"
        else:
            absent.append(name)
    strides = ("stride_s", "stride_n", "stride_a")
    return Variant(
        name=f"add_layer_norm backward fp32 + {_name(branch)} to {TYPES[dtype]}{'' if of_sum else ' alone'} {width}",
        kernel=_backward_kernel,
        types={**pointers, **dict.fromkeys(("num_tokens", *strides), "i32")},
        num_warps=meta.pop("num_warps"),
        constants={"D": width, "DOUBLE": False, **dict.fromkeys(absent), **meta},
        divisible=(*pointers, *strides),
    )


def _name(branch: torch.dtype | None) -> str:
    return "nothing" if branch is None else TYPES[branch]
