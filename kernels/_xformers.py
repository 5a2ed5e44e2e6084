"""The xformers backend of varlen_attention: its memory-efficient attention with a block-diagonal mask.

It dispatches to flash attention for 16-bit floats and to kernels of its own for float32. The first keep the log-sum-exp
as [1, G, N], the others as [S, G, longest]; it chooses its backward kernels by that form, so that it is given the one
which belongs to the dtype. It refuses the backward pass where PyTorch is told to be deterministic.

S sequences, N queries, G heads, E head_dim; the library wants a leading dimension of 1 before N.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._dispatch import Row
from ._flash import aligned
from ._triton import capability

MODULE = "xformers.ops.fmha"
FORWARD, BACKWARD = "memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_backward"
PIECE = 8  # 16 bytes of 16-bit floats: head_dims that its kernels read in whole pieces
MASKS = 16  # masks kept: all layers of a network, forward and backward, ask with the same lengths


@functools.cache
def _library() -> Any:
    """Its module, or why that cannot be used."""
    if not find_spec("xformers"):
        return "xformers is not installed"
    try:
        module = import_module(MODULE)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # built for another PyTorch
        return f"xformers does not import: {type(error).__name__}: {error}"
    missing = [name for name in (FORWARD, BACKWARD, "BlockDiagonalMask") if not hasattr(module, name)]
    return f"this version of xformers has no {missing[0]}" if missing else module


@functools.lru_cache(maxsize=MASKS)
def _mask(lengths: tuple[int, ...], kv_lengths: tuple[int, ...], device: torch.device) -> Any:
    with torch.inference_mode(False):
        return _library().BlockDiagonalMask.from_seqlens(lengths, kv_lengths, device=device)


def _present(lengths: Tensor, kv_lengths: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(lengths.tolist()), tuple(kv_lengths.tolist())


def _packed(lse: Tensor, lengths: tuple[int, ...], total: int) -> Tensor:
    """[1, G, at least N] or [S, G, at least the longest] -> [G, N]."""
    if lse.shape[0] == 1:
        return lse[0, :, :total].contiguous()
    return torch.cat([own[:, :length] for own, length in zip(lse, lengths, strict=True)], 1)


def _padded(lse: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[G, N] -> [S, G, longest]."""
    return pad_sequence(lse.T.split(lengths), batch_first=True).transpose(1, 2).contiguous()


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """See reference.varlen_attention."""
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    own, others = _present(lengths, kv_lengths)
    mask = _mask(own, others, q.device)
    given = (aligned(x)[None] for x in (q, k, v))
    out, lse = getattr(_library(), FORWARD)(*given, mask, scale=scale)
    return out[0].contiguous(), _packed(lse, own, q.shape[0])


def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.varlen_attention_backward."""
    if q.numel() == 0:
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    own, others = _present(lengths, kv_lengths)
    mask = _mask(own, others, q.device)
    form = _padded(lse, own) if q.dtype == torch.float32 else lse[None].contiguous()
    grad, out, q, k, v = (aligned(x)[None] for x in (grad, out, q, k, v))
    grads = getattr(_library(), BACKWARD)(grad, out, form, q, k, v, mask, scale=scale)
    grad_q, grad_k, grad_v = (x[0].contiguous() for x in grads)
    return grad_q, grad_k, grad_v


def unfit(q: Tensor, scale: float, *lengths: object) -> str | None:
    """Why its kernels do not take such heads, or None."""
    if q.dtype == torch.float64:
        return "its kernels do not compute in float64"
    major, minor = capability(q.device)
    if (major, minor) > (9, 0) if q.dtype == torch.float32 else major < 8:
        kind = str(q.dtype).removeprefix("torch.")
        return f"its kernels of {kind} are not for compute capability {major}.{minor}"
    if q.shape[2] % PIECE:
        return f"its kernels need a head_dim that is a multiple of {PIECE}, got {q.shape[2]}"
    return None if scale > 0 else f"its kernels need a positive scale, got {scale}"


def why_not(device: torch.device) -> str | None:
    """Why it cannot serve tensors on `device`, or None."""
    if device.type != "cuda":
        return f"it serves CUDA devices, not {device.type}"
    found = _library()
    return found if isinstance(found, str) else None


ROW = Row("varlen_attention", "xformers", varlen_attention, varlen_attention_backward, why_not, unfit, automatic=False)
