"""mlp: two linear layers and the exact GELU between them; the activation never takes a trip to memory of its own.

    hidden = x W1^T + b1,    a = gelu(hidden) = hidden Phi(hidden),    y = a W2^T + b2

    da = dy W2,    dhidden = da gelu'(hidden),    dx = dhidden W1
    dW1 = dhidden^T x,    db1 = sum_i dhidden_i,    dW2 = dy^T a,    db2 = sum_i dy_i

N tokens, D features in, H hidden, E out. 2 N H (D + E) FLOP forward, twice as many backward. For 16-bit floats, E = D and
H = 4 D, bytes of tokens that are moved, where linear, GELU and linear apart move 36 N D forward and 74 N D backward, and
keep 18 N D:

    forward    28 N D: x, hidden, a, a, y; without hidden, which is for gradients only, 20 N D
    kept       10 N D: x and hidden; a is made again
    backward   58 N D: dy, hidden, dhidden, a (da in the same kernel); dy, a (dW2); dhidden, dx; dhidden, x (dW1); dy (db2)

One kernel for both products would move 4 N D, but it has to hold its rows of y in registers and to read all weights for
them from the L2 cache. For D = 384 on an H200, estimated from its code: 64 rows allow 64 FLOP a byte of weights, 350 TFLOP/s
at 5.5 TB/s. 128 rows fill the 255 registers of 8 warps, which spill, and the shared memory of an SM; nothing else runs there
while 32 hidden features wait for their activation (640 clocks) between products (1920): at most 570 TFLOP/s. Two kernels
overlap activations with products and move their 28 N D bytes meanwhile; so there is no such kernel.

hidden, a, da and dhidden are rounded to the dtype of x, every sum is float32 (float64 for float64). On a CPU the native
library makes a, dhidden and db1 in one pass over rows that the products around it left in the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cpu_mlp as cpu
from . import _reference_mlp as reference
from ._checks import check_device, check_tensor, describe, dtype_under_autocast
from ._cpu_tokens import why_not as cpu_why_not
from ._dispatch import Row, choose, define, register
from ._triton import row as triton_row

SHAPES = {"x": "[N, D]", "weight1": "[H, D]", "bias1": "[H]", "weight2": "[E, H]", "bias2": "[E]"}


def _triton_unfit(x: Tensor) -> str | None:
    return "it computes in float32, not in float64" if x.dtype == torch.float64 else None


register(triton_row("mlp", "_triton_mlp", "mlp", "mlp_backward", unfit=_triton_unfit))
register(Row("mlp", "cpu", cpu.mlp, cpu.mlp_backward, cpu_why_not, cpu.unfit))
register(Row("mlp", "reference", reference.mlp, reference.mlp_backward))


def _forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    return choose("mlp", x.device, x).forward(x, weight1, bias1, weight2, bias2, keep)


def _fake(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    hidden = (x.shape[0], weight1.shape[0]) if keep else (0,)
    return x.new_empty((x.shape[0], weight2.shape[0])), x.new_empty(hidden)


def _backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return choose("mlp", x.device, x).backward(grad, x, hidden, weight1, weight2, needs)


def _backward_fake(
    grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    grads = (grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))
    of_x, of_weight1, of_bias1, of_weight2, of_bias2 = grads
    return of_x, of_weight1, of_bias1, of_weight2, of_bias2


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight1, _, weight2, _, keep = inputs
    ctx.keep = keep
    ctx.save_for_backward(x, output[1], weight1, weight2)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a zero for each hidden feature would be written for nothing


def _autograd(ctx, grad, grad_hidden):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 6
    if not ctx.keep:
        raise RuntimeError("mlp was told not to keep what its backward pass needs: call the operator with keep=True")
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.vjepa.mlp_backward(grad, *ctx.saved_tensors, needs)
    return *(found if need else None for found, need in zip(grads, needs, strict=True)), None


define(
    "mlp",
    "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, bool keep) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "mlp_backward",
    "(Tensor grad, Tensor x, Tensor hidden, Tensor weight1, Tensor weight2, bool[5] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("vjepa::mlp", _autograd, setup_context=_setup)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """gelu(x weight1^T + bias1) weight2^T + bias2 with the exact GELU.

    Args:
        x: [N, D], D at least 1, float32, bfloat16, float16 or float64; rows of any stride.
        weight1: [H, D], H at least 1, and weight2: [E, H], E at least 1, as torch.nn.Linear keeps them.
        bias1: [H], and bias2: [E], or None for 0.

    Under autocast all are cast to its dtype first, but for float64, as the arguments of a linear layer are; they must then
    have one dtype.

    Returns:
        [N, E] in that dtype. Gradients for all five, each in its own dtype, added in a fixed order.

    Raises:
        TypeError: wrong types, or several dtypes.
        ValueError: shapes or devices that do not fit, no features.
    """
    given = {"x": x, "weight1": weight1, "weight2": weight2}
    given |= {name: bias for name, bias in (("bias1", bias1), ("bias2", bias2)) if bias is not None}
    for name, tensor in given.items():
        check_tensor(name, tensor, SHAPES[name], 1 + SHAPES[name].count(","))
        check_device(name, tensor, "x", x)
    cast = {name: tensor.to(dtype_under_autocast(tensor)) for name, tensor in given.items()}
    for name, tensor in cast.items():
        if tensor.dtype != cast["x"].dtype:
            kinds = [str(like.dtype).removeprefix("torch.") for like in (cast["x"], tensor)]
            raise TypeError(f"{name} must have the dtype of x ({kinds[0]}), got {kinds[1]}")
    for name, size, other, expected in (
        ("weight1", weight1.shape[1], "feature of x", x.shape[1]),
        ("weight2", weight2.shape[1], "row of weight1", weight1.shape[0]),
    ):
        if size != expected:
            raise ValueError(f"{name} must have one column for each {other} ({expected}), got {describe(given[name])}")
    for name, bias, rows, weight in (("bias1", bias1, weight1, "weight1"), ("bias2", bias2, weight2, "weight2")):
        if bias is not None and bias.shape[0] != rows.shape[0]:
            raise ValueError(
                f"{name} must have one entry for each row of {weight} ({rows.shape[0]}), got {describe(bias)}"
            )
    for name, matrix in (("weight1", weight1), ("weight2", weight2)):
        if 0 in matrix.shape:
            raise ValueError(f"{name} must have no empty dimension, got {describe(matrix)}")
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in cast.values())
    out: Tensor = torch.ops.vjepa.mlp(*map(cast.get, SHAPES), keep)[0]
    return out
