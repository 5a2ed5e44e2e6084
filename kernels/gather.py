"""gather_tokens and scatter_tokens: rows of ragged sets out of a batch of clips, and back.

    gather    out[i] = x[clip(i), indices[i]]                       [B, L, D] -> [N, D]
    scatter   out[clip(i), indices[i]] = values[i], else fill       [N, D] -> [B, L, D]

B clips, L tokens of a clip, D features, S sets, N packed tokens; clip(i) is the clip of the set that holds i.
Moves 2 N D (gather) or (N + B L) D (scatter) elements and computes nothing, so memory bandwidth bounds both.
The adjoint of gather adds the copies of a token in float32, in the order of the packed tokens, and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cpu_tokens, reference
from ._checks import FLOATS, INTS, check_device, check_ids, check_offsets, check_tensor, describe
from ._dispatch import Row, choose, define, register
from ._triton import row as triton_row
from .tokens import TokenIndices, check_token_indices, check_within

register(triton_row("gather_tokens", "_triton_gather", "gather_tokens", "gather_tokens_backward"))
register(triton_row("scatter_tokens", "_triton_scatter", "scatter_tokens", "scatter_tokens_backward"))
register(
    Row(
        "gather_tokens",
        "cpu",
        _cpu_tokens.gather_tokens,
        _cpu_tokens.gather_tokens_backward,
        _cpu_tokens.why_not,
        _cpu_tokens.unfit_to_move,
    )
)
register(
    Row(
        "scatter_tokens",
        "cpu",
        _cpu_tokens.scatter_tokens,
        _cpu_tokens.scatter_tokens_backward,
        _cpu_tokens.why_not,
        _cpu_tokens.unfit_to_move,
    )
)
register(Row("gather_tokens", "reference", reference.gather_tokens, reference.gather_tokens_backward))
register(Row("scatter_tokens", "reference", reference.scatter_tokens, reference.scatter_tokens_backward))


# --------------------------------------------------------------------------------------------------------------- gather


def _gather(x: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor) -> Tensor:
    check_offsets(cu_seqlens, clip.shape[0], indices.shape[0])
    check_ids("indices", indices, x.shape[1], "tokens of a clip")
    check_ids("clip", clip, x.shape[0], "clips")
    return choose("gather_tokens", x.device, x).forward(x, indices, cu_seqlens, clip)


def _gather_fake(x: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor) -> Tensor:
    return x.new_empty(indices.shape[0], x.shape[2])


def _gather_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, batch: int, length: int
) -> Tensor:
    row = choose("gather_tokens", grad.device, grad)
    return row.backward(grad, indices, cu_seqlens, clip, batch, length)


def _gather_backward_fake(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, batch: int, length: int
) -> Tensor:
    return grad.new_empty(batch, length, grad.shape[1])


def _gather_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *sets = inputs
    ctx.save_for_backward(*sets)
    ctx.batch, ctx.length = x.shape[:2]


def _gather_autograd(ctx, grad):  # type: ignore[no-untyped-def]
    indices, cu_seqlens, clip = ctx.saved_tensors
    grad_x = torch.ops.vjepa.gather_tokens_backward(grad, indices, cu_seqlens, clip, ctx.batch, ctx.length)
    return grad_x, None, None, None


define("gather_tokens", "(Tensor x, Tensor indices, Tensor cu_seqlens, Tensor clip) -> Tensor", _gather, _gather_fake)
define(
    "gather_tokens_backward",
    "(Tensor grad, Tensor indices, Tensor cu_seqlens, Tensor clip, SymInt batch, SymInt length) -> Tensor",
    _gather_backward,
    _gather_backward_fake,
)
torch.library.register_autograd("vjepa::gather_tokens", _gather_autograd, setup_context=_gather_setup)


# -------------------------------------------------------------------------------------------------------------- scatter


def _scatter(
    values: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    batch: int,
    length: int,
    fill: Tensor | None,
    fill_value: float,
) -> Tensor:
    check_offsets(cu_seqlens, clip.shape[0], indices.shape[0])
    check_ids("indices", indices, length, "tokens of a clip")
    check_ids("clip", clip, batch, "clips")
    row = choose("scatter_tokens", values.device, values)
    return row.forward(values, indices, cu_seqlens, clip, batch, length, fill, fill_value)


def _scatter_fake(
    values: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    batch: int,
    length: int,
    fill: Tensor | None,
    fill_value: float,
) -> Tensor:
    return values.new_empty(batch, length, values.shape[1])


def _scatter_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, fill_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    row = choose("scatter_tokens", grad.device, grad)
    return row.backward(grad, indices, cu_seqlens, clip, fill_dtype)


def _scatter_backward_fake(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, fill_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    features = grad.shape[2]
    grad_fill = grad.new_empty(0) if fill_dtype is None else grad.new_empty(features, dtype=fill_dtype)
    return grad.new_empty(indices.shape[0], features), grad_fill


def _scatter_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, indices, cu_seqlens, clip, _, _, fill, _ = inputs
    ctx.save_for_backward(indices, cu_seqlens, clip)
    ctx.fill_dtype = None if fill is None else fill.dtype


def _scatter_autograd(ctx, grad):  # type: ignore[no-untyped-def]
    fill_dtype = ctx.fill_dtype if ctx.needs_input_grad[6] else None
    grad_values, grad_fill = torch.ops.vjepa.scatter_tokens_backward(grad, *ctx.saved_tensors, fill_dtype)
    return grad_values, None, None, None, None, None, None if fill_dtype is None else grad_fill, None


define(
    "scatter_tokens",
    "(Tensor values, Tensor indices, Tensor cu_seqlens, Tensor clip, SymInt batch, SymInt length, Tensor? fill, "
    "float fill_value) -> Tensor",
    _scatter,
    _scatter_fake,
)
define(
    "scatter_tokens_backward",
    "(Tensor grad, Tensor indices, Tensor cu_seqlens, Tensor clip, ScalarType? fill_dtype) -> (Tensor, Tensor)",
    _scatter_backward,
    _scatter_backward_fake,
)
torch.library.register_autograd("vjepa::scatter_tokens", _scatter_autograd, setup_context=_scatter_setup)


# ----------------------------------------------------------------------------------------------------- public functions


def gather_tokens(x: Tensor, indices: TokenIndices) -> Tensor:
    """out[i] = x[clip(i), indices[i]]: the named tokens, packed.

    Args:
        x: [B, L, D], float32, bfloat16, float16 or float64, any strides.
        indices: S sets of tokens of these clips; duplicates and empty sets are all right.

    Returns:
        [N, D], dtype of `x`. The gradient of a token is the sum over its copies, added in float32 in a fixed order.

    Raises:
        TypeError: wrong types.
        ValueError: wrong shapes or devices, ids outside 0..L-1, clips outside 0..B-1.
    """
    check_tensor("x", x, "[B, L, D]", 3)
    check_token_indices("indices", indices, x.device)
    check_within("indices", indices, x.shape[0], x.shape[1])
    return torch.ops.vjepa.gather_tokens(x, indices.indices, indices.cu_seqlens, indices.clip)


def scatter_tokens(values: Tensor, indices: TokenIndices, length: int, fill: float | Tensor = 0) -> Tensor:
    """out[clip(i), indices[i]] = values[i]; positions not named get `fill`.

    Args:
        values: [N, D], float32, bfloat16, float16 or float64.
        indices: where each row goes; of several rows for one position the last wins. B is `indices.num_clips`.
        length: L, tokens of a clip.
        fill: a number, or a vector [D] (converted to the dtype of `values`; it gets a gradient).

    Returns:
        [B, L, D], dtype of `values`. The gradient reaches the rows that won, and the vector `fill`.

    Raises:
        TypeError: wrong types.
        ValueError: wrong shapes or devices, a length below 1, ids outside 0..L-1, or a number of clips that is not
            known on the host (`indices` built from tensors on a device, without `num_clips`).
    """
    check_tensor("values", values, "[N, D]", 2)
    check_token_indices("indices", indices, values.device)
    if values.shape[0] != indices.total:
        raise ValueError(f"values must have one row for each of the {indices.total} indices, got {describe(values)}")
    if indices.num_clips is None:
        raise ValueError("indices must know its number of clips: build it on the CPU or give num_clips, got None")
    if not isinstance(length, int):
        raise TypeError(f"length must be an int, got {describe(length)}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    check_within("indices", indices, indices.num_clips, length)
    vector = fill if isinstance(fill, Tensor) else None
    if vector is not None:
        check_tensor("fill", vector, "[D]", 1, FLOATS)
        check_device("fill", vector, "values", values)
        if vector.shape[0] != values.shape[1]:
            raise ValueError(f"fill must have {values.shape[1]} entries like values, got {describe(vector)}")
    elif not isinstance(fill, int | float):
        raise TypeError(f"fill must be a number or a tensor [D], got {describe(fill)}")
    return torch.ops.vjepa.scatter_tokens(
        values,
        indices.indices,
        indices.cu_seqlens,
        indices.clip,
        indices.num_clips,
        length,
        vector,
        0.0 if isinstance(fill, Tensor) else float(fill),
    )


def apply_masks(x: Tensor, masks: Tensor | Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """Rectangular masks: for each mask, out[b, j] = x[b, mask[b, j]].

    Args:
        x: [B, L, D], floating.
        masks: int tensors [B, K], token ids to keep of each clip (one tensor is a list of one).
        concat: concatenate the results along the batch.

    Returns:
        [len(masks)*B, K, D], or a list of [B, K, D] if not `concat` (then K may differ between masks).

    Raises:
        TypeError, ValueError: wrong types, shapes or devices, ids outside 0..L-1.
    """
    check_tensor("x", x, "[B, L, D]", 3)
    if not isinstance(masks, Tensor | list | tuple):
        raise TypeError(f"masks must be a tensor [B, K] or a list of them, got {describe(masks)}")
    masks = [masks] if isinstance(masks, Tensor) else list(masks)
    if not masks:
        raise ValueError("masks must have at least one tensor, got none")
    batch = x.shape[0]
    for number, mask in enumerate(masks):
        check_tensor(f"masks[{number}]", mask, "[B, K]", 2, INTS)
        check_device(f"masks[{number}]", mask, "x", x)
        if mask.shape[0] != batch:
            raise ValueError(f"masks[{number}] must have one row for each of the {batch} clips, got {describe(mask)}")
        if concat and mask.shape[1] != masks[0].shape[1]:
            raise ValueError(
                f"masks[{number}] must have {masks[0].shape[1]} columns to concatenate, got {describe(mask)}"
            )
    if concat:  # one mask of several rows for each clip: the tokens are written where they stay
        return _apply_mask(x, masks[0] if len(masks) == 1 else torch.cat(masks), len(masks))
    return [_apply_mask(x, mask, 1) for mask in masks]


def _apply_mask(x: Tensor, mask: Tensor, repeats: int) -> Tensor:
    """out[r*B + b, j] = x[b, mask[r*B + b, j]], [repeats*B, K, D]."""
    batch, width = x.shape[0], mask.shape[1]
    clip = torch.arange(batch, device=x.device)
    clip = clip if repeats == 1 else clip.repeat(repeats)
    offsets = torch.arange(repeats * batch + 1, device=x.device, dtype=torch.int32) * width
    packed = torch.ops.vjepa.gather_tokens(x, mask.reshape(-1).to(torch.int64), offsets, clip)
    return packed.reshape(repeats * batch, width, x.shape[2])
