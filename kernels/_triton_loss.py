"""masked_l1_loss in Triton: statistics, layer norm, gather and L1 in one pass, and the backward pass in another.

    h_i   = (f_i - mean(f_i)) rstd_i,    f_i = features[clip(i), indices[i]],    rstd_i = 1 / sqrt(var(f_i) + eps)
    loss  = sum_i share_i (1/D sum_d |p_id - h_id|),    share_i = w_i / (S sum of w in the set of i), w = 1 without weights
    dp_id = share_i / D * sign(p_id - h_id) * dloss

N predicted tokens in S sets, B clips of L tokens, D features; R rows and W + W2 or W columns of a tile. Forward reads 2 N D
elements and writes 3 N floats, backward reads 2 N D and writes N D: 10 bytes an element in bfloat16, memory-bound. Only
mean and rstd are kept. Each row leaves one number; torch.sum adds them in a fixed order, so that no tile changes the loss.

Forward, a program is one warp, which holds one row at a time, so that sums are shuffles inside it, without barriers. The row
is read once and stays in registers: the mean is subtracted before squaring. It is a tile of W columns, a power of two, and
one of W2, so that 1280 features are 1024 + 256 and not 2048. At D = 1024 in bfloat16 a thread has 128 bytes in flight and
72 registers: 28 programs, 112 KB in flight on an SM, where 4.8 TB/s x 0.7 us / 132 SMs of an H200 ask for 25 KB.
Backward nothing is summed: a program of R rows finds their set, clip, id and share once and walks over the columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import LAUNCH, Variant, ceil_div, device_of, next_power_of_2
from ._triton_sets import TYPES, packed, search_steps, set_of, tile_width
from .reference import Sets, accumulator

BYTES = 16  # of the widest access of a thread
LANES, WARPS = 32, 4
ROWS = 4  # forward, of a program: fewer programs to start
HELD = 64  # forward, elements of a row in a thread, of prediction and of features each: 96 to 112 registers
STREAMED = 64  # backward, bytes of prediction in a thread and step: with the features 128 in flight, as forward
WIDEST = 256  # backward, columns of a step: one 16-byte access of each lane in bfloat16
WEIGHTS = 1024  # of a set, added at a time

RUNTIME = ["num_tokens", "num_sets", "steps"]
SCALARS = ["indices_ptr", "cu_ptr", "clip_ptr", "weights_ptr", "sums_ptr"]  # read one by one: no variant by alignment


@triton.jit(do_not_specialize_on_alignment=SCALARS)
def _sum_weights_kernel(weights_ptr, cu_ptr, sums_ptr, stride_w, DOUBLE: tl.constexpr, K: tl.constexpr):
    """sums[s] = sum of the weights of set s, K at a time."""
    s = tl.program_id(0)
    acc_K = tl.zeros([K], tl.float64 if DOUBLE else tl.float32)
    end = tl.load(cu_ptr + s + 1)
    for first in range(tl.load(cu_ptr + s), end, K):
        i_K = first + tl.arange(0, K)
        acc_K += tl.load(weights_ptr + i_K.to(tl.int64) * stride_w, mask=i_K < end, other=0.0).to(acc_K.dtype)
    tl.store(sums_ptr + s, tl.sum(acc_K, axis=0))


@triton.jit
def _share(cu_ptr, weights_ptr, sums_ptr, i, s, num_sets, stride_w, ACC: tl.constexpr):
    """Share of token i of set s in the loss, of one or of a tile of tokens."""
    if weights_ptr is None:
        share = 1.0 / (num_sets * (tl.load(cu_ptr + s + 1) - tl.load(cu_ptr + s)).to(ACC))
    else:
        share = tl.load(weights_ptr + i.to(tl.int64) * stride_w).to(ACC) / (num_sets * tl.load(sums_ptr + s))
    return share


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=SCALARS)
def _forward_kernel(
    prediction_ptr,
    features_ptr,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    weights_ptr,
    sums_ptr,
    losses_ptr,
    statistics_ptr,
    num_tokens,
    num_sets,
    steps,
    stride_p,
    stride_fb,
    stride_fl,
    stride_w,
    EPS: tl.constexpr,
    D: tl.constexpr,
    DOUBLE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    W2: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    d_W = tl.arange(0, W)
    if W2 > 0:
        d_W2 = W + tl.arange(0, W2)
    begin = tl.program_id(0) * R
    s = set_of(cu_ptr, begin, num_sets, steps)
    for number in range(0, tl.minimum(R, num_tokens - begin)):
        i = begin + number
        p_row = prediction_ptr + i.to(tl.int64) * stride_p
        p_W = tl.load(p_row + d_W, mask=d_W < D, other=0.0)  # under way while the features are looked for
        if W2 > 0:
            p_W2 = tl.load(p_row + d_W2, mask=d_W2 < D, other=0.0)
        while tl.load(cu_ptr + s + 1) <= i:
            s += 1
        f_row = features_ptr + (tl.load(clip_ptr + s) * stride_fb + tl.load(indices_ptr + i) * stride_fl)
        f_W = tl.load(f_row + d_W, mask=d_W < D, other=0.0).to(ACC)
        mean = tl.sum(f_W, axis=0)
        if W2 > 0:
            f_W2 = tl.load(f_row + d_W2, mask=d_W2 < D, other=0.0).to(ACC)
            mean += tl.sum(f_W2, axis=0)
        mean = mean / D

        f_W = tl.where(d_W < D, f_W - mean, 0.0)
        var = tl.sum(f_W * f_W, axis=0)
        if W2 > 0:
            f_W2 = tl.where(d_W2 < D, f_W2 - mean, 0.0)
            var += tl.sum(f_W2 * f_W2, axis=0)
        rstd = tl.rsqrt(var / D + EPS)

        loss = tl.sum(tl.abs(p_W.to(ACC) - f_W * rstd), axis=0)
        if W2 > 0:
            loss += tl.sum(tl.abs(p_W2.to(ACC) - f_W2 * rstd), axis=0)
        share = _share(cu_ptr, weights_ptr, sums_ptr, i, s, num_sets, stride_w, ACC)
        tl.store(losses_ptr + i, loss / D * share)
        tl.store(statistics_ptr + 2 * i.to(tl.int64), mean)
        tl.store(statistics_ptr + 2 * i.to(tl.int64) + 1, rstd)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=[*SCALARS, "grad_ptr"])
def _backward_kernel(
    prediction_ptr,
    features_ptr,
    indices_ptr,
    cu_ptr,
    clip_ptr,
    weights_ptr,
    sums_ptr,
    statistics_ptr,
    grad_ptr,
    out_ptr,
    num_tokens,
    num_sets,
    steps,
    stride_p,
    stride_fb,
    stride_fl,
    stride_w,
    D: tl.constexpr,
    DOUBLE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    there_R = i_R < num_tokens
    i_R = tl.minimum(i_R, num_tokens - 1)
    s_R = set_of(cu_ptr, i_R, num_sets, steps)
    share_R = _share(cu_ptr, weights_ptr, sums_ptr, i_R, s_R, num_sets, stride_w, ACC)
    f_R = tl.load(clip_ptr + s_R) * stride_fb + tl.load(indices_ptr + i_R) * stride_fl
    i_R = i_R.to(tl.int64)
    mean_R = tl.load(statistics_ptr + 2 * i_R)
    rstd_R = tl.load(statistics_ptr + 2 * i_R + 1)
    step_R = share_R * (tl.load(grad_ptr).to(ACC) / D)
    for first in range(0, D, W):
        d_W = first + tl.arange(0, W)
        mask_RW = there_R[:, None] & (d_W < D)[None, :]
        p_RW = tl.load(prediction_ptr + ((i_R * stride_p)[:, None] + d_W[None, :]), mask=mask_RW)
        f_RW = tl.load(features_ptr + (f_R[:, None] + d_W[None, :]), mask=mask_RW)
        error_RW = p_RW.to(ACC) - (f_RW.to(ACC) - mean_R[:, None]) * rstd_R[:, None]
        sign_RW = (error_RW > 0).to(ACC) - (error_RW < 0).to(ACC)
        grad_RW = (sign_RW * step_R[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + ((i_R * D)[:, None] + d_W[None, :]), grad_RW, mask=mask_RW)


def _arguments(
    prediction: Tensor, features: Tensor, sets: Sets, weights: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What both kernels take, pointers first, then numbers; the sums of the weights of each set are made here."""
    indices, cu_seqlens, clip = packed(*sets)
    prediction, features = _rows(prediction), _rows(features)
    num_sets, stride_w, sums = clip.shape[0], 1, None
    if weights is not None:
        stride_w, wide = weights.stride(0), accumulator(prediction.dtype)
        sums = torch.empty(num_sets, dtype=wide, device=weights.device)
        double = wide == torch.float64
        _sum_weights_kernel[(num_sets,)](weights, cu_seqlens, sums, stride_w, DOUBLE=double, K=WEIGHTS, **LAUNCH)
    strides = (prediction.stride(0), features.stride(0), features.stride(1), stride_w)
    numbers = (indices.shape[0], num_sets, search_steps(num_sets), *strides)
    return (prediction, features, indices, cu_seqlens, clip, weights, sums), numbers


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward_meta(width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> dict[str, int]:
    columns = LANES * BYTES // min(dtype.itemsize for dtype in dtypes)
    chunks = max(1, ceil_div(width, columns))
    first = 1 << (chunks.bit_length() - 1)
    rest = next_power_of_2(chunks - first) if chunks > first else 0
    warps = max(1, next_power_of_2(first + rest) * columns // (LANES * HELD))
    return {"R": ROWS, "W": first * columns, "W2": rest * columns, "num_warps": warps}


def _backward_meta(width: int, dtype: torch.dtype) -> dict[str, int]:
    columns = tile_width(width, WIDEST)
    return {"R": WARPS * LANES * STREAMED // (columns * dtype.itemsize), "W": columns, "num_warps": WARPS}


def masked_l1_loss(
    prediction: Tensor, features: Tensor, sets: Sets, eps: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss and, for the backward pass, mean and rstd of each named row, [N, 2]."""
    (num_tokens, width), wide = prediction.shape, accumulator(prediction.dtype)
    losses = torch.empty(num_tokens, dtype=wide, device=prediction.device)
    statistics = torch.empty((num_tokens, 2), dtype=wide, device=prediction.device)
    if num_tokens > 0:
        meta = _forward_meta(width, (prediction.dtype, features.dtype))
        with device_of(prediction):
            pointers, numbers = _arguments(prediction, features, sets, weights)
            _forward_kernel[(ceil_div(num_tokens, meta["R"]),)](
                *pointers,
                losses,
                statistics,
                *numbers,
                EPS=eps,
                D=width,
                DOUBLE=wide == torch.float64,
                **meta,
                **LAUNCH,
            )
    return losses.sum(), statistics


def masked_l1_loss_backward(
    grad: Tensor, prediction: Tensor, features: Tensor, sets: Sets, statistics: Tensor, weights: Tensor | None
) -> Tensor:
    """d loss / d prediction = share of the token * sign(prediction - target) / D, [N, D]."""
    num_tokens, width = prediction.shape
    out = torch.empty((num_tokens, width), dtype=prediction.dtype, device=prediction.device)
    if out.numel() > 0:
        meta = _backward_meta(width, prediction.dtype)
        with device_of(prediction):
            pointers, numbers = _arguments(prediction, features, sets, weights)
            _backward_kernel[(ceil_div(num_tokens, meta["R"]),)](
                *pointers,
                statistics.contiguous(),
                grad,
                out,
                *numbers,
                D=width,
                DOUBLE=prediction.dtype == torch.float64,
                **meta,
                **LAUNCH,
            )
    return out


def variants() -> list[Variant]:
    """What the launchers launch at the widths of ViT-L, ViT-H and ViT-giant; with weights at the first."""
    bf16, fp32 = torch.bfloat16, torch.float32
    sums = Variant(
        name="masked_l1_loss, sums of weights",
        kernel=_sum_weights_kernel,
        types={"weights_ptr": "*fp32", "cu_ptr": "*i32", "sums_ptr": "*fp32"},
        constants={"DOUBLE": False, "K": WEIGHTS},
        wide=False,
        ones=("stride_w",),
    )
    found = [sums, *_variants(1024, (bf16, bf16), True)]
    for width in (1024, 1280, 1408):
        for dtypes in ((bf16, bf16), (bf16, fp32), (fp32, fp32)):
            found += _variants(width, dtypes, False)
    return found


def _variants(width: int, dtypes: tuple[torch.dtype, torch.dtype], weighted: bool) -> list[Variant]:
    prediction, features = (TYPES[dtype] for dtype in dtypes)
    strides = ("stride_p", "stride_fb", "stride_fl")
    rows = {"prediction_ptr": f"*{prediction}", "features_ptr": f"*{features}", "statistics_ptr": "*fp32"}
    shared = {**rows, "indices_ptr": "*i64", "cu_ptr": "*i32", "clip_ptr": "*i64"}
    shared |= dict.fromkeys((*RUNTIME, *strides, "stride_w"), "i32")
    constants: dict[str, object] = {"D": width, "DOUBLE": False}
    if weighted:
        shared |= dict.fromkeys(("weights_ptr", "sums_ptr"), "*fp32")
    else:
        constants |= dict.fromkeys(("weights_ptr", "sums_ptr"))
    name = f"{prediction}, features {features}{', weights' if weighted else ''} {width}"
    forward, backward = _forward_meta(width, dtypes), _backward_meta(width, dtypes[0])
    warps = forward.pop("num_warps"), backward.pop("num_warps")
    return [
        Variant(
            name=f"masked_l1_loss {name}",
            kernel=_forward_kernel,
            types={**shared, "losses_ptr": "*fp32"},
            constants={**constants, "EPS": 1e-5, **forward},
            divisible=(*rows, "losses_ptr", *strides),
            num_warps=warps[0],
            ones=("stride_w",),
        ),
        Variant(
            name=f"masked_l1_loss backward {name}",
            kernel=_backward_kernel,
            types={**shared, "grad_ptr": "*fp32", "out_ptr": f"*{prediction}"},
            constants={**constants, **backward},
            divisible=(*rows, "out_ptr", *strides),
            num_warps=warps[1],
            ones=("stride_w",),
        ),
    ]
