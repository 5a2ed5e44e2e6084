"""predictor_tokens: the predictor's packed input, built in one pass.

    set s:  context_i + pos_embed[context id_i]  for its context tokens, in order, then
            mask_tokens[kind_s mod M] + pos_embed[target id_j]  for its target tokens, in order

Nc context and Nt target tokens packed over S sets, L tokens of a clip, P predictor features, M kinds of mask tokens.
Moves (2 Nc + Nt) P elements and as many of positions; N P additions: memory-bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cpu_predictor, reference
from ._checks import (
    FLOATS,
    INTS,
    check_device,
    check_ids,
    check_no_empty_set,
    check_sets,
    check_tensor,
    describe,
    lengths_tensor,
)
from ._cpu_tokens import why_not
from ._dispatch import Row, choose, define, register
from ._triton import row as triton_row
from .tokens import TokenIndices, check_token_indices, check_within

register(triton_row("predictor_tokens", "_triton_predictor", "predictor_tokens", "predictor_tokens_backward"))
register(
    Row(
        "predictor_tokens",
        "cpu",
        _cpu_predictor.predictor_tokens,
        _cpu_predictor.predictor_tokens_backward,
        why_not,
        _cpu_predictor.unfit,
    )
)
register(Row("predictor_tokens", "reference", reference.predictor_tokens, reference.predictor_tokens_backward))


def _forward(
    context: Tensor,
    mask_tokens: Tensor,
    pos_embed: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    context_lengths: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    target_lengths: Tensor,
    kind: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    check_sets("context_idx.", context_cu, context_lengths, context_indices.shape[0])
    check_sets("target_idx.", target_cu, target_lengths, target_indices.shape[0])
    check_no_empty_set("context_idx", context_lengths)
    check_no_empty_set("target_idx", target_lengths)
    check_ids("context_idx.indices", context_indices, pos_embed.shape[0], "rows of pos_embed")
    check_ids("target_idx.indices", target_indices, pos_embed.shape[0], "rows of pos_embed")
    if kind.device.type == "cpu" and int(kind.min()) < 0:
        raise ValueError(f"kind must not be negative, got {int(kind.min())}")
    dtypes = context.dtype, mask_tokens.dtype, pos_embed.dtype
    row = choose("predictor_tokens", context.device, dtypes)
    return row.forward(context, mask_tokens, pos_embed, context_indices, context_cu, target_indices, target_cu, kind)


def _fake(
    context: Tensor,
    mask_tokens: Tensor,
    pos_embed: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    context_lengths: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    target_lengths: Tensor,
    kind: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    total = context_indices.shape[0] + target_indices.shape[0]
    dtype = torch.promote_types(torch.promote_types(context.dtype, mask_tokens.dtype), pos_embed.dtype)
    return (
        context.new_empty((total, context.shape[1]), dtype=dtype),
        context_indices.new_empty(total),
        context_cu.new_empty(context_cu.shape[0]),
    )


def _backward(
    grad: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
    num_kinds: int,
    length: int,
    context_dtype: torch.dtype,
    mask_dtype: torch.dtype,
    pos_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = (context_dtype, mask_dtype, pos_dtype)
    row = choose("predictor_tokens", grad.device, dtypes)
    return row.backward(
        grad, context_indices, context_cu, target_indices, target_cu, kind, num_kinds, length, dtypes, needs
    )


def _backward_fake(
    grad: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
    num_kinds: int,
    length: int,
    context_dtype: torch.dtype,
    mask_dtype: torch.dtype,
    pos_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad.shape[1]
    return (
        grad.new_empty((context_indices.shape[0], width), dtype=context_dtype) if needs[0] else grad.new_empty(0),
        grad.new_empty((num_kinds, width), dtype=mask_dtype) if needs[1] else grad.new_empty(0),
        grad.new_empty((length, width), dtype=pos_dtype) if needs[2] else grad.new_empty(0),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    context, mask_tokens, pos_embed, context_indices, context_cu, _, target_indices, target_cu, _, kind = inputs
    ctx.save_for_backward(context_indices, context_cu, target_indices, target_cu, kind)
    ctx.num_kinds, ctx.length = mask_tokens.shape[0], pos_embed.shape[0]
    ctx.dtypes = context.dtype, mask_tokens.dtype, pos_embed.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the sets there is none


def _autograd(ctx, grad, grad_indices, grad_cu):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.vjepa.predictor_tokens_backward(
        grad, *ctx.saved_tensors, ctx.num_kinds, ctx.length, *ctx.dtypes, needs
    )
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7


define(
    "predictor_tokens",
    "(Tensor context, Tensor mask_tokens, Tensor pos_embed, Tensor context_indices, Tensor context_cu, "
    "Tensor context_lengths, Tensor target_indices, Tensor target_cu, Tensor target_lengths, Tensor kind) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "predictor_tokens_backward",
    "(Tensor grad, Tensor context_indices, Tensor context_cu, Tensor target_indices, Tensor target_cu, Tensor kind, "
    "SymInt num_kinds, SymInt length, ScalarType context_dtype, ScalarType mask_dtype, ScalarType pos_dtype, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("vjepa::predictor_tokens", _autograd, setup_context=_setup)


def predictor_tokens(
    context: Tensor,
    mask_tokens: Tensor,
    pos_embed: Tensor,
    context_idx: TokenIndices,
    target_idx: TokenIndices,
    kind: Tensor,
) -> tuple[Tensor, TokenIndices]:
    """Per set: context tokens + their positions, then the mask token of the set's kind + target positions.

    Args:
        context: [Nc, P], encoded context tokens in the order of `context_idx`, floating.
        mask_tokens: [M, P], one learned vector for each kind of mask.
        pos_embed: [L, P], positions of a clip's tokens.
        context_idx, target_idx: S sets each, set s of both for the same clip; no set may be empty.
        kind: int [S], the mask kind of each set; kind i uses mask token i mod M.

    Returns:
        tokens [Nc+Nt, P], dtype promoted from the three inputs; and the TokenIndices of the packed tokens, whose sets
        hold context ids, then target ids (its lengths are a tensor if either input's are). Gradients for context,
        mask_tokens and pos_embed, added in float32 in a fixed order.

    Raises:
        TypeError: wrong types.
        ValueError: wrong shapes or devices, an empty set, ids outside 0..L-1, a negative kind, sets of different clips.
    """
    check_tensor("context", context, "[Nc, P]", 2)
    for name, value, shape in (("mask_tokens", mask_tokens, "[M, P]"), ("pos_embed", pos_embed, "[L, P]")):
        check_tensor(name, value, shape, 2, FLOATS)
        check_device(name, value, "context", context)
        if value.shape[1] != context.shape[1]:
            raise ValueError(f"{name} must have {context.shape[1]} features like context, got {describe(value)}")
    if mask_tokens.shape[0] == 0:
        raise ValueError(f"mask_tokens must have at least one row, got {describe(mask_tokens)}")
    for name, sets in (("context_idx", context_idx), ("target_idx", target_idx)):
        check_token_indices(name, sets, context.device)
        check_within(name, sets, sets.num_sets if sets.num_clips is None else sets.num_clips, pos_embed.shape[0])
    if context.shape[0] != context_idx.total:
        raise ValueError(
            f"context must have one row for each of the {context_idx.total} context_idx, got {describe(context)}"
        )
    if context_idx.num_sets != target_idx.num_sets:
        raise ValueError(
            f"target_idx must have {context_idx.num_sets} sets like context_idx, got {target_idx.num_sets}"
        )
    check_tensor("kind", kind, "[S]", 1, INTS)
    check_device("kind", kind, "context", context)
    if kind.shape[0] != context_idx.num_sets:
        raise ValueError(f"kind must have one entry for each of the {context_idx.num_sets} sets, got {describe(kind)}")
    readable = context.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not torch.equal(context_idx.clip, target_idx.clip):
        raise ValueError("target_idx.clip must equal context_idx.clip, got sets of different clips")
    tokens, indices, cu_seqlens = torch.ops.vjepa.predictor_tokens(
        context,
        mask_tokens,
        pos_embed,
        context_idx.indices,
        context_idx.cu_seqlens,
        lengths_tensor(context_idx.lengths),
        target_idx.indices,
        target_idx.cu_seqlens,
        lengths_tensor(target_idx.lengths),
        kind,
    )
    lengths: Tensor | tuple[int, ...]
    if isinstance(context_idx.lengths, Tensor) or isinstance(target_idx.lengths, Tensor):
        lengths = lengths_tensor(context_idx.lengths) + lengths_tensor(target_idx.lengths)
    else:
        lengths = tuple(c + t for c, t in zip(context_idx.lengths, target_idx.lengths, strict=True))
    largest = None  # what the host knows of the ids of both it knows of the result's
    if not (torch.compiler.is_compiling() or context_idx.max_index is None or target_idx.max_index is None):
        largest = max(context_idx.max_index, target_idx.max_index)
    return tokens, TokenIndices(indices, cu_seqlens, context_idx.clip, lengths, context_idx.num_clips, largest)
