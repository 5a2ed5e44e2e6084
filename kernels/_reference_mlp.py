"""mlp in plain PyTorch: the specification, the fallback and the baseline, like reference.py.

N tokens, D features in, H hidden, E out. Every product and every activation is rounded to the dtype of the arguments, as by
F.linear and F.gelu; gradients of biases are summed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulator


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """gelu(x weight1^T + bias1) weight2^T + bias2, and the argument of gelu, [N, H], or nothing if it is not to be kept."""
    hidden = F.linear(x, weight1, bias1)
    return F.linear(F.gelu(hidden), weight2, bias2), hidden if keep else x.new_empty(0)


def mlp_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2 and bias2 (empty where not in `needs`)."""
    slopes = grad.new_empty(0)
    if any(needs[:3]):
        slopes = torch.ops.aten.gelu_backward(grad @ weight2, hidden)
    return gradients(grad, x, slopes, F.gelu(hidden) if needs[3] else None, weight1, None, needs)


def gradients(
    grad: Tensor,
    x: Tensor,
    slopes: Tensor,
    active: Tensor | None,
    weight1: Tensor,
    grad_bias1: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What follows from the gradient of hidden (`slopes`) and gelu(hidden) (`active`); grad_bias1, if it is there."""
    wide = accumulator(grad.dtype)
    if needs[2] and grad_bias1 is None:
        grad_bias1 = slopes.sum(0, dtype=wide)
    return (
        slopes @ weight1 if needs[0] else grad.new_empty(0),
        slopes.T @ x if needs[1] else grad.new_empty(0),
        grad.new_empty(0) if grad_bias1 is None else grad_bias1.to(grad.dtype),
        grad.new_empty(0) if active is None else grad.T @ active,
        grad.sum(0, dtype=wide).to(grad.dtype) if needs[4] else grad.new_empty(0),
    )
