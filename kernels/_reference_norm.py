"""add_layer_norm in plain PyTorch: the specification, the fallback and the baseline, like reference.py.

N tokens, D features. The layer norm and its sums run in float32 (float64 for a float64 residual); each result is rounded
once, to its own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import accumulator


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def add_layer_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """residual + branch (empty without branch), its layer norm in `dtype`, and mean and rstd of each row, [N, 2]."""
    wide, added = accumulator(residual.dtype), residual.new_empty(0)
    if branch is not None:
        # PyTorch adds 16-bit floats in float32 and rounds once; of two dtypes it adds in the wider
        residual = added = torch.add(residual, branch).to(residual.dtype).contiguous()
    normed, mean, rstd = torch.native_layer_norm(
        residual.to(wide).contiguous(), residual.shape[1:], _wide(weight, wide), _wide(bias, wide), eps
    )
    return added, normed.to(dtype), torch.cat((mean, rstd), 1)


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
    need_residual, need_branch, need_weight, need_bias = needs
    wide = statistics.dtype
    mean, rstd = (column.contiguous() for column in statistics.split(1, 1))
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(wide).contiguous(),
        added.to(wide).contiguous(),
        added.shape[1:],
        mean,
        rstd,
        _wide(weight, wide),
        statistics.new_empty(added.shape[1:]),  # in place of the bias: only its dtype and shape count
        [need_residual or need_branch, need_weight, need_bias],
    )
    if grad is not None and grad_sum is not None:
        grad = grad.add_(grad_sum)
    return (
        grad.to(added.dtype) if need_residual else added.new_empty(0),
        grad.to(branch_dtype) if need_branch else added.new_empty(0),
        grad_weight.to(wide if weight is None else weight.dtype) if need_weight else added.new_empty(0),
        grad_bias.to(bias_dtype) if need_bias else added.new_empty(0),
    )
