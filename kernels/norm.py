"""add_layer_norm: the addition of a residual branch and the layer norm of the sum in one pass.

    sum_i  = residual_i + branch_i
    normed = h_i * weight + bias,    h_i = (sum_i - mean_i) rstd_i,    rstd_i = 1 / sqrt(var(sum_i) + eps)

    g_i              = dnormed_i * weight
    dresidual_i      = dsum_i + rstd_i (g_i - mean(g_i) - h_i mean(g_i h_i)),    dbranch_i the same
    dweight, dbias   = sum_i dnormed_i h_i, sum_i dnormed_i

N tokens, D features. Moves 4 N D elements forward, 12 bytes of each feature for a float32 residual and a bfloat16 branch
where add, layer norm and cast apart move 24; and 4 N D elements backward, or 5 N D where branch has a dtype of its own:
memory-bound. The sum is rounded to the dtype of residual before it is normalised. It is kept for the backward pass with
mean and rstd of each row, the normalised values are not. Everything between is float32 (float64 for a float64 residual).
The native library serves what is of at most 32 bits on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cpu_norm as cpu
from . import _reference_norm as reference
from ._checks import FLOATS, check_device, check_tensor, describe, dtype_under_autocast
from ._cpu_tokens import why_not as cpu_why_not
from ._dispatch import Row, choose, define, register
from ._triton import row as triton_row
from .reference import accumulator

WIDEST = 16384  # features of a row that 16 warps hold


def _triton_unfit(residual: Tensor, *arguments: object) -> str | None:
    width = residual.shape[1]
    return None if width <= WIDEST else f"a program holds a row of at most {WIDEST} features, got {width}"


register(triton_row("add_layer_norm", "_triton_norm", "add_layer_norm", "add_layer_norm_backward", unfit=_triton_unfit))
register(Row("add_layer_norm", "cpu", cpu.add_layer_norm, cpu.add_layer_norm_backward, cpu_why_not, cpu.unfit))
register(Row("add_layer_norm", "reference", reference.add_layer_norm, reference.add_layer_norm_backward))


def _forward(
    residual: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (residual, branch, weight, bias, eps, dtype)
    return choose("add_layer_norm", residual.device, *arguments).forward(*arguments)


def _fake(
    residual: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        residual.new_empty(0 if branch is None else residual.shape),
        residual.new_empty(residual.shape, dtype=dtype),
        residual.new_empty((residual.shape[0], 2), dtype=accumulator(residual.dtype)),
    )


def _backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    added: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = choose("add_layer_norm", added.device, added)
    return row.backward(grad_sum, grad_normed, added, statistics, weight, branch_dtype, bias_dtype, needs)


def _backward_fake(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    added: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, weight_dtype = added.shape[1], statistics.dtype if weight is None else weight.dtype
    return (
        added.new_empty(added.shape if needs[0] else 0),
        added.new_empty(added.shape, dtype=branch_dtype) if needs[1] else added.new_empty(0),
        added.new_empty(width, dtype=weight_dtype) if needs[2] else added.new_empty(0),
        added.new_empty(width, dtype=bias_dtype) if needs[3] else added.new_empty(0),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    residual, branch, weight, bias, _, _ = inputs
    added, _, statistics = output
    ctx.save_for_backward(residual if branch is None else added, statistics, weight)
    ctx.branch_dtype = residual.dtype if branch is None else branch.dtype
    ctx.bias_dtype = statistics.dtype if bias is None else bias.dtype
    ctx.mark_non_differentiable(*((added, statistics) if branch is None else (statistics,)))
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_sum, grad_normed, grad_statistics):  # type: ignore[no-untyped-def]
    need_residual, need_branch, *affine = ctx.needs_input_grad[:4]
    if grad_normed is None:  # only the sum is used, or nothing
        grad_branch = grad_sum.to(ctx.branch_dtype) if need_branch and grad_sum is not None else None
        return grad_sum if need_residual else None, grad_branch, None, None, None, None
    added, statistics, weight = ctx.saved_tensors
    alike = ctx.branch_dtype == added.dtype  # one tensor is the gradient of both
    needs = [need_residual or (need_branch and alike), need_branch and not alike, *affine]
    grads = torch.ops.vjepa.add_layer_norm_backward(
        grad_sum, grad_normed, added, statistics, weight, ctx.branch_dtype, ctx.bias_dtype, needs
    )
    grad_residual, grad_branch, *grad_affine = (g if need else None for g, need in zip(grads, needs, strict=True))
    if need_branch and alike:
        grad_branch = grad_residual
    return grad_residual if need_residual else None, grad_branch, *grad_affine, None, None


define(
    "add_layer_norm",
    "(Tensor residual, Tensor? branch, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "add_layer_norm_backward",
    "(Tensor? grad_sum, Tensor grad_normed, Tensor added, Tensor statistics, Tensor? weight, ScalarType branch_dtype, "
    "ScalarType bias_dtype, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("vjepa::add_layer_norm", _autograd, setup_context=_setup)


def add_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """sum = residual + branch, and the layer norm of sum over its features, in one pass.

    Args:
        residual: [N, D], D at least 1, float32, bfloat16, float16 or float64; rows of any stride.
        branch: [N, D], any of these dtypes; None adds nothing, and the sum is then `residual` itself, not a copy.
        weight, bias: [D] each, any of these dtypes, or None for the factor 1 and the summand 0.
        eps: of the layer norm, at least 0.
        dtype: of the normalised rows; by default the dtype of autocast where that is on (it leaves float64 alone), else
            the dtype of residual.

    Returns:
        sum [N, D] in the dtype of residual and normed [N, D] in `dtype`, each rounded once. Gradients for residual,
        branch, weight and bias, each in its own dtype, those of weight and bias added in a fixed order.

    Raises:
        TypeError: wrong types.
        ValueError: shapes or devices that do not fit, no features, a negative eps.
    """
    check_tensor("residual", residual, "[N, D]", 2)
    if residual.shape[1] == 0:
        raise ValueError(f"residual must have at least one feature, got {describe(residual)}")
    if branch is not None:
        check_tensor("branch", branch, "[N, D]", 2)
        check_device("branch", branch, "residual", residual)
        if branch.shape != residual.shape:
            raise ValueError(f"branch must have the shape of residual {tuple(residual.shape)}, got {describe(branch)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(name, vector, "[D]", 1)
            check_device(name, vector, "residual", residual)
            if vector.shape[0] != residual.shape[1]:
                raise ValueError(
                    f"{name} must have one entry for each of the {residual.shape[1]} features, got {describe(vector)}"
                )
    if not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {describe(eps)}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if dtype is not None and dtype not in FLOATS:
        names = ", ".join(str(known).removeprefix("torch.") for known in FLOATS)
        given = dtype if isinstance(dtype, torch.dtype) else describe(dtype)
        raise TypeError(f"dtype must be one of {names} or None, got {given}")
    added, normed, _ = torch.ops.vjepa.add_layer_norm(
        residual, branch, weight, bias, float(eps), dtype_under_autocast(residual) if dtype is None else dtype
    )
    return residual if branch is None else added, normed
