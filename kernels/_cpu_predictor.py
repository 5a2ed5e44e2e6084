"""predictor_tokens by the native library on a CPU: each packed row is made in one go, without halves that are joined later.

The functions have the meaning of those of the same name in reference.py. Mask tokens and positions are float32 or like the
context. The gradient of positions, which no V-JEPA needs, is made by the reference.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import reference
from ._cpu_tokens import MOVED, call, check_rows, pointer, rows_of

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of context, mask tokens and positions


class _Halves(ctypes.Structure):
    """`vjepa_halves` of csrc/capi_tokens.h."""

    _fields_ = [
        ("context_indices", ctypes.c_void_p),
        ("context_offsets", ctypes.c_void_p),
        ("target_indices", ctypes.c_void_p),
        ("target_offsets", ctypes.c_void_p),
        ("kind", ctypes.c_void_p),
        ("sets", ctypes.c_int64),
        ("kinds", ctypes.c_int64),
        ("length", ctypes.c_int64),
    ]


def _halves(
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
    kinds: int,
    length: int,
) -> _Halves:
    given = (context_indices, context_cu, target_indices, target_cu, kind.long())
    parts = [part.contiguous() for part in given]
    halves = _Halves(*(part.data_ptr() for part in parts), kind.shape[0], kinds, length)
    halves.parts = parts  # addresses are only as good as the tensors behind them
    return halves


def unfit(dtypes: Dtypes) -> str | None:
    """Why the library cannot take tensors of these dtypes, or None."""
    context, *others = dtypes
    if context in MOVED and others in ([torch.float32] * 2, [context] * 2):
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"its context has at most 32 bits, its mask tokens and positions are float32 or like it, got {names}"


def predictor_tokens(
    context: Tensor,
    mask_tokens: Tensor,
    pos_embed: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.predictor_tokens."""
    context, mask_tokens, pos_embed = rows_of(context), mask_tokens.contiguous(), rows_of(pos_embed)
    total, width = context_indices.shape[0] + target_indices.shape[0], context.shape[1]
    tokens, indices = mask_tokens.new_empty((total, width)), torch.empty(total, dtype=torch.int64)
    for name, x, rows in (
        ("context", context, context_indices.shape[0]),
        ("mask_tokens", mask_tokens, mask_tokens.shape[0]),
        ("pos_embed", pos_embed, pos_embed.shape[0]),
    ):
        check_rows(name, x, rows, width)
    cu_seqlens = torch.empty(kind.shape[0] + 1, dtype=torch.int32)
    sizes = (mask_tokens.shape[0], pos_embed.shape[0])
    call(
        "vjepa_predictor_tokens_cpu",
        ctypes.byref(_halves(context_indices, context_cu, target_indices, target_cu, kind, *sizes)),
        context.data_ptr(),
        context.stride(0),
        MOVED[context.dtype],
        mask_tokens.data_ptr(),
        pos_embed.data_ptr(),
        pos_embed.stride(0),
        MOVED[mask_tokens.dtype],
        width,
        tokens.data_ptr(),
        indices.data_ptr(),
        cu_seqlens.data_ptr(),
    )
    return tokens, indices, cu_seqlens


def predictor_tokens_backward(
    grad: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
    num_kinds: int,
    length: int,
    dtypes: Dtypes,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.predictor_tokens_backward."""
    grad, width = rows_of(grad), grad.shape[1]
    check_rows("grad", grad, context_indices.shape[0] + target_indices.shape[0], width)
    of_context = torch.empty((context_indices.shape[0], width), dtype=dtypes[0]) if needs[0] else None
    of_mask_tokens = torch.empty((num_kinds, width)) if needs[1] else None
    call(
        "vjepa_predictor_tokens_backward_cpu",
        ctypes.byref(_halves(context_indices, context_cu, target_indices, target_cu, kind, num_kinds, length)),
        grad.data_ptr(),
        grad.stride(0),
        MOVED[grad.dtype],
        width,
        pointer(of_context),
        MOVED[dtypes[0]],
        pointer(of_mask_tokens),
    )
    of_positions = grad.new_empty(0)
    if needs[2]:
        sets = (context_indices, context_cu, target_indices, target_cu, kind, num_kinds, length)
        *_, of_positions = reference.predictor_tokens_backward(grad, *sets, dtypes, [False, False, True])
    return (
        grad.new_empty(0) if of_context is None else of_context,
        grad.new_empty(0) if of_mask_tokens is None else of_mask_tokens.to(dtypes[1]),
        of_positions,
    )
