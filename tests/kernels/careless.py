"""Kernels with the faults that the harness is there to see: each must be refused."""

from __future__ import annotations

import triton
import triton.language as tl

from vjepa.kernels._triton import Variant


@triton.jit
def specialised_kernel(out_ptr, num_tokens, R: tl.constexpr):
    """Compiled anew where the number of tokens is 1 or a multiple of 16."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    tl.store(out_ptr + row_R, row_R, mask=row_R < num_tokens)


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    """256 values for each of 32 threads, needed until the last of their sums is known."""
    place_RC = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    x_RC = tl.load(x_ptr + place_RC)
    tl.store(out_ptr + place_RC, x_RC - tl.sum(x_RC, axis=0)[None, :])


@triton.jit
def _narrow_kernel(x_ptr, out_ptr, stride, R: tl.constexpr):
    """Copies elements that do not lie side by side, without a product."""
    row_R = tl.arange(0, R)
    tl.store(out_ptr + row_R, tl.load(x_ptr + row_R * stride))


@triton.jit
def _greedy_kernel(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    """The product of two tiles of 128 KiB each, for which sm_120 has too little shared memory."""
    row_R = tl.arange(0, R)[:, None]
    x_RC = tl.load(x_ptr + row_R * C + tl.arange(0, C)[None, :])
    y_RC = tl.load(x_ptr + (R + row_R) * C + tl.arange(0, C)[None, :])
    tl.store(out_ptr + row_R * R + tl.arange(0, R)[None, :], tl.dot(x_RC, y_RC.T).to(tl.bfloat16))


def variants() -> list[Variant]:
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    aligned = ("x_ptr", "out_ptr")
    return [
        Variant(
            "spilling", _spilling_kernel, dict.fromkeys(aligned, "*fp32"), {"R": 128, "C": 64}, aligned, num_warps=1
        ),
        Variant("narrow", _narrow_kernel, {**pointers, "stride": "i32"}, {"R": 128}, aligned, matrix=True),
        Variant("greedy", _greedy_kernel, pointers, {"R": 128, "C": 512}, aligned, num_warps=8, matrix=True),
        Variant("broken", _narrow_kernel, {**pointers, "stride": "*i32"}, {"R": 128}, aligned),
    ]
