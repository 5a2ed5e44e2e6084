"""Matrix products inside Triton kernels: with float32 sums, of the precision that PyTorch has been told, interpreted too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._triton import interpreted

INTERPRETED: tl.constexpr = tl.constexpr("interpreted")  # instead of a precision
LEAST = 16  # rows, columns and depth that a product in Triton needs


@triton.jit
def add_product(acc_MN, a_MK, b_KN, PRECISION: tl.constexpr):
    """acc + a b, with float32 sums; the interpreter, which takes the bits of bfloat16 for integers, is given float32."""
    if PRECISION == INTERPRETED:
        return tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32), acc_MN)
    else:
        return tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION)


@triton.jit
def halves(x_MN):
    """The left and the right columns: each thread keeps what it has, and needs fewer registers for the rest of its work."""
    return x_MN.reshape(x_MN.shape[0], 2, x_MN.shape[1] // 2).permute(0, 2, 1).split()


def precision(dtype: torch.dtype) -> str:
    """How products of `dtype` are computed: those of float32 as PyTorch has been told to."""
    if interpreted():
        return INTERPRETED.value
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
