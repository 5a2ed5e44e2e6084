"""masked_l1_loss: layer norm of the target features, gather and L1 in one pass.

    target_i = (f_i - mean(f_i)) / sqrt(var(f_i) + eps),   f_i = features[clip(i), indices[i]]
    loss     = 1/S sum_s  sum_{i in s} w_i (1/D sum_d |prediction_id - target_id|) / sum_{i in s} w_i

N predicted tokens in S sets, B clips of L tokens, D features; w = 1 without weights. Reads 2 N D elements and keeps mean
and 1 / sqrt(var + eps) of each target; the backward pass reads the 2 N D again and writes N D: memory-bound. Only the named
rows of `features` are read. Everything between reading and the result is float32 (float64 for a float64 prediction).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu_tokens, reference
from ._checks import (
    FLOATS,
    check_device,
    check_ids,
    check_no_empty_set,
    check_sets,
    check_tensor,
    describe,
    lengths_tensor,
)
from ._dispatch import Row, choose, define, register
from ._triton import row as triton_row
from .tokens import TokenIndices, check_token_indices, check_within

WIDEST = 65536  # features of a row that 32 warps hold


def _triton_unfit(prediction: Tensor, *arguments: object) -> str | None:
    width = prediction.shape[1]
    return None if width <= WIDEST else f"a program holds a row of at most {WIDEST} features, got {width}"


register(triton_row("masked_l1_loss", "_triton_loss", "masked_l1_loss", "masked_l1_loss_backward", unfit=_triton_unfit))
register(
    Row(
        "masked_l1_loss",
        "cpu",
        _cpu_tokens.masked_l1_loss,
        _cpu_tokens.masked_l1_loss_backward,
        _cpu_tokens.why_not,
        _cpu_tokens.unfit_for_loss,
    )
)
register(Row("masked_l1_loss", "reference", reference.masked_l1_loss, reference.masked_l1_loss_backward))


def _check_weights(weights: Tensor, cu_seqlens: Tensor) -> None:
    smallest = float(weights.min())
    if not smallest >= 0:
        raise ValueError(f"weights must not be negative or NaN, got {smallest}")
    before = F.pad((weights > 0).cumsum(0), (1, 0))  # positive weights before each token
    positive = before.index_select(0, cu_seqlens).diff()
    if not positive.all():
        raise ValueError(f"weights must have a positive sum in each set, got 0 in set {positive.tolist().index(0)}")


def _forward(
    prediction: Tensor,
    features: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    lengths: Tensor,
    eps: float,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_sets("targets.", cu_seqlens, lengths, indices.shape[0])
    check_no_empty_set("targets", lengths)
    check_ids("targets.indices", indices, features.shape[1], "tokens of a clip")
    check_ids("targets.clip", clip, features.shape[0], "clips")
    if weights is not None and weights.device.type == "cpu":
        _check_weights(weights, cu_seqlens)
    arguments = (prediction, features, (indices, cu_seqlens, clip), eps, weights)
    return choose("masked_l1_loss", prediction.device, *arguments).forward(*arguments)


def _fake(
    prediction: Tensor,
    features: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    lengths: Tensor,
    eps: float,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = reference.accumulator(prediction.dtype)
    return prediction.new_empty((), dtype=wide), prediction.new_empty((prediction.shape[0], 2), dtype=wide)


def _backward(
    grad: Tensor,
    prediction: Tensor,
    features: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    statistics: Tensor,
    weights: Tensor | None,
) -> Tensor:
    row = choose("masked_l1_loss", grad.device, prediction, features)
    return row.backward(grad, prediction, features, (indices, cu_seqlens, clip), statistics, weights)


def _backward_fake(
    grad: Tensor,
    prediction: Tensor,
    features: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    statistics: Tensor,
    weights: Tensor | None,
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    prediction, features, indices, cu_seqlens, clip, _, _, weights = inputs
    ctx.save_for_backward(prediction, features, indices, cu_seqlens, clip, output[1], weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the statistics there is none


def _autograd(ctx, grad, grad_statistics):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 8
    return torch.ops.vjepa.masked_l1_loss_backward(grad, *ctx.saved_tensors), *(None,) * 7


define(
    "masked_l1_loss",
    "(Tensor prediction, Tensor features, Tensor indices, Tensor cu_seqlens, Tensor clip, Tensor lengths, float eps, "
    "Tensor? weights) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "masked_l1_loss_backward",
    "(Tensor grad, Tensor prediction, Tensor features, Tensor indices, Tensor cu_seqlens, Tensor clip, "
    "Tensor statistics, Tensor? weights) -> Tensor",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("vjepa::masked_l1_loss", _autograd, setup_context=_setup)


def masked_l1_loss(
    prediction: Tensor,
    features: Tensor,
    targets: TokenIndices,
    *,
    eps: float = 1e-5,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean over sets of the mean over a set's tokens of the mean over D of |prediction - layer_norm(features)|.

    Args:
        prediction: [N, D], predicted features of the target tokens, in the order of `targets`; floating.
        features: [B, L, D], raw output of the y-encoder, any floating dtype; layer norm without affine is applied here.
        targets: S sets of target tokens, none of them empty.
        eps: of the layer norm, at least 0.
        weights: [N], w_i >= 0, floating: the mean of a set is sum(w_i |.|_i) / sum(w_i). Constant: it gets no gradient.

    Returns:
        A float32 scalar (float64 for a float64 prediction), differentiable in `prediction` only, with sign(0) = 0.

    Raises:
        TypeError: wrong types.
        ValueError: wrong shapes or devices, an empty set, ids out of range, a negative eps; for weights on the CPU
            negative ones or a set whose weights sum to 0 (on a device they are not read, and such a set makes the loss
            NaN).
    """
    check_tensor("prediction", prediction, "[N, D]", 2)
    check_tensor("features", features, "[B, L, D]", 3, FLOATS)
    check_device("features", features, "prediction", prediction)
    if features.shape[2] != prediction.shape[1]:
        raise ValueError(f"features must have {prediction.shape[1]} features like prediction, got {describe(features)}")
    check_token_indices("targets", targets, prediction.device)
    check_within("targets", targets, features.shape[0], features.shape[1])
    if prediction.shape[0] != targets.total:
        raise ValueError(
            f"prediction must have one row for each of the {targets.total} targets, got {describe(prediction)}"
        )
    if not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {describe(eps)}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if weights is not None:
        check_tensor("weights", weights, "[N]", 1, FLOATS)
        check_device("weights", weights, "prediction", prediction)
        if weights.shape[0] != targets.total:
            raise ValueError(
                f"weights must have one entry for each of the {targets.total} targets, got {describe(weights)}"
            )
        weights = weights.detach()
    return torch.ops.vjepa.masked_l1_loss(
        prediction,
        features.detach(),
        targets.indices,
        targets.cu_seqlens,
        targets.clip,
        lengths_tensor(targets.lengths),
        float(eps),
        weights,
    )[0]
