"""add_layer_norm by the native library on a CPU: a row is read once in each direction.

The functions have the meaning of those of the same name in _reference_norm.py. The residual, weight and bias are float32,
the branch and the normalised rows float32 or bfloat16. Sums do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cpu_tokens import ABSENT, CODES, call, pointer, rows_of


def unfit(residual: Tensor, wide: tuple[torch.dtype, ...], low: tuple[torch.dtype, ...]) -> str | None:
    """Why the library cannot take tensors of these dtypes, or None; wide: weight, bias and gradients of the residual."""
    for dtype in (residual.dtype, *wide):
        if dtype != torch.float32:
            return f"its residual, weight and bias are float32, got {str(dtype).removeprefix('torch.')}"
    for dtype in low:
        if dtype not in CODES:
            return f"its branch and normalised rows are float32 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    return None


def add_layer_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See _reference_norm.add_layer_norm."""
    rows, features = residual.shape
    residual, branch = rows_of(residual), None if branch is None else rows_of(branch)
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    added = residual.new_empty(0 if branch is None else (rows, features))
    normed, statistics = residual.new_empty((rows, features), dtype=dtype), residual.new_empty((rows, 2))
    code = ABSENT if branch is None else CODES[branch.dtype]
    call(
        "vjepa_add_layer_norm_cpu",
        residual.data_ptr(),
        residual.stride(0),
        pointer(branch),
        0 if branch is None else branch.stride(0),
        code,
        pointer(weight),
        pointer(bias),
        eps,
        rows,
        features,
        added.data_ptr(),
        normed.data_ptr(),
        CODES[dtype],
        statistics.data_ptr(),
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
    """See _reference_norm.add_layer_norm_backward."""
    rows, features = added.shape
    added, grad_normed, statistics = rows_of(added), rows_of(grad_normed), statistics.contiguous()
    grad_sum = None if grad_sum is None else rows_of(grad_sum)
    weight = None if weight is None else weight.contiguous()
    shapes = (rows, features), (rows, features), (features,), (features,)
    dtypes = torch.float32, branch_dtype if needs[1] else torch.float32, torch.float32, torch.float32
    grads = [
        added.new_empty(shape if need else 0, dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    ]
    of_residual, of_branch, of_weight, of_bias = (
        grad.data_ptr() if need else None for grad, need in zip(grads, needs, strict=True)
    )
    call(
        "vjepa_add_layer_norm_backward_cpu",
        pointer(grad_sum),
        0 if grad_sum is None else grad_sum.stride(0),
        grad_normed.data_ptr(),
        grad_normed.stride(0),
        CODES[grad_normed.dtype],
        added.data_ptr(),
        added.stride(0),
        statistics.data_ptr(),
        pointer(weight),
        rows,
        features,
        of_residual,
        of_branch,
        CODES[branch_dtype] if needs[1] else ABSENT,
        of_weight,
        of_bias,
    )
    return grads[0], grads[1], grads[2], grads[3]
