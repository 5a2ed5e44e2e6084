"""add_layer_norm by the native library on a CPU: each row is read once and written once, without copies in float32.

The functions have the meaning of those of the same name in _reference_norm.py; sums over tokens
are in an order that depends on neither threads nor instruction sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._checks import describe
from ._cpu_tokens import check_rows, pointer, rows_of

CODES = _native.DTYPE_CODES


def unfit(residual: Tensor, branch: Tensor | None = None, *arguments: object) -> str | None:
    """Why the library cannot take these tensors, or None."""
    for tensor in (residual, branch):
        if tensor is not None and tensor.dtype not in CODES:
            return f"it takes floats of at most 32 bits, got {describe(tensor)}"
    if torch.float64 in arguments:
        return "it normalises in float32, not to float64"
    return None


def _call(name: str, *arguments: object) -> None:
    _native.check(getattr(_native.library(), name)(*arguments, torch.get_num_threads()))


def _floats(name: str, vector: Tensor | None, width: int) -> Tensor | None:
    """A vector of `width` elements as contiguous float32."""
    if vector is None:
        return None
    check_rows(name, vector[None], 1, width)
    return vector.to(torch.float32).contiguous()


def _matrix(name: str, matrix: Tensor | None, rows: int, width: int) -> tuple[_native.Matrix, Tensor | None]:
    """The library's view of a [rows, width] matrix, and what must stay alive with it."""
    if matrix is None:
        return _native.Matrix(None, 0, 0), None
    check_rows(name, matrix, rows, width)
    matrix = rows_of(matrix if matrix.dtype in CODES else matrix.to(torch.float32))
    return _native.Matrix(matrix.data_ptr(), matrix.stride(0), CODES[matrix.dtype]), matrix


def add_layer_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See _reference_norm.add_layer_norm."""
    rows, width = residual.shape
    added = residual.new_empty(0 if branch is None else residual.shape)
    normed, statistics = residual.new_empty(residual.shape, dtype=dtype), torch.empty((rows, 2), dtype=torch.float32)
    first, _here = _matrix("residual", residual, rows, width)
    second, other = _matrix("branch", branch, rows, width)
    weight, bias = _floats("weight", weight, width), _floats("bias", bias, width)
    to = (None if other is None else added.data_ptr(), normed.data_ptr(), CODES[dtype], statistics.data_ptr())
    _call("vjepa_layer_norm_cpu", first, second, pointer(weight), pointer(bias), rows, width, eps, *to)
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
    rows, width = added.shape
    weight_dtype = torch.float32 if weight is None else weight.dtype
    dtypes = (added.dtype, branch_dtype, weight_dtype, bias_dtype)
    made = (added.dtype, branch_dtype if branch_dtype in CODES else torch.float32, torch.float32, torch.float32)
    shapes = (added.shape, added.shape, (width,), (width,))
    grads = [
        added.new_empty(shape, dtype=dtype) if need else None
        for shape, dtype, need in zip(shapes, made, needs, strict=True)
    ]
    grad_sum = None if grad_sum is None else grad_sum.to(added.dtype)
    given = {"grad_sum": grad_sum, "grad_normed": grad_normed, "added": added}
    pairs = [_matrix(name, matrix, rows, width) for name, matrix in given.items()]
    check_rows("statistics", statistics, rows, 2)
    statistics, weight = statistics.to(torch.float32).contiguous(), _floats("weight", weight, width)
    of_residual, of_branch, *affine = map(pointer, grads)
    _call(
        "vjepa_layer_norm_backward_cpu",
        *(matrix for matrix, _ in pairs),
        statistics.data_ptr(),
        pointer(weight),
        rows,
        width,
        of_residual,
        of_branch,
        CODES[made[1]],
        *affine,
    )
    of = [added.new_empty(0) if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    return of[0], of[1], of[2], of[3]
