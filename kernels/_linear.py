"""linear: torch.nn.functional.linear, forward and backward by the fastest of several libraries on a CPU.

    y = x W^T + b,    dx = dy W,    dW = dy^T x,    db = sum_i dy_i

Internal: for the linear layers of the model. Processor time of F.linear over that of linear, forward and backward with all
gradients, one thread of a Zen 4: float32 1.08 (6000 x 384 x 1152), 1.16 (6000 x 384 x 384) and 1.11 (664 x 1024 x 3072);
bfloat16 1.05, 1.07 and 1.01. Elsewhere than on a CPU, and for other dtypes, it is F.linear. N rows, K and M features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu_mlp as cpu
from . import _cpu_products as products
from . import _native
from ._checks import dtype_under_autocast
from ._dispatch import define, requested

SERVED = (torch.float32, torch.bfloat16)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if requested() == "reference" else products.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    # With create_graph=True products are recorded, so that they must be PyTorch's: of others it would take 0 as gradient.
    ours = requested() != "reference" and not torch.is_grad_enabled()
    of_x, of_weight, of_bias = (grad.new_empty(0) for _ in needs)
    if needs[0]:
        of_x = products.times(grad, weight) if ours else grad @ weight
    if needs[1]:
        of_weight = products.of_weight(grad, x) if ours else grad.T @ x
    if needs[2]:
        native = ours and _native.available()[0]
        of_bias = cpu.column_sums(grad).to(grad.dtype) if native else grad.sum(0)
    return of_x, of_weight, of_bias


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    of_x, of_weight, of_bias = (grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return of_x, of_weight, of_bias


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    needs = list(ctx.needs_input_grad)
    grads = torch.ops.vjepa.linear_backward(grad, *ctx.saved_tensors, needs)
    return tuple(found if need else None for found, need in zip(grads, needs, strict=True))


define("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, _fake)
define(
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("vjepa::linear", _autograd, setup_context=_setup)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, with the arguments, results and errors of torch.nn.functional.linear, under autocast too."""
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    cast = [tensor.to(dtype_under_autocast(tensor)) for tensor in given]
    if (
        any(tensor.device.type != "cpu" or tensor.dtype != cast[0].dtype for tensor in cast)
        or cast[0].dtype not in SERVED
        or x.ndim < 2
        or weight.ndim != 2
        or x.shape[-1] != weight.shape[1]
        or (bias is not None and bias.shape != weight.shape[:1])
        or 0 in weight.shape
    ):
        return F.linear(x, weight, bias)
    rows = cast[0].reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.vjepa.linear(rows, cast[1], None if bias is None else cast[2])
    return out.reshape(*x.shape[:-1], weight.shape[0])
