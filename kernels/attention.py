"""varlen_attention: softmax attention inside each of many packed sequences.

    out_i = sum_j p_ij v_j,   p_ij = exp(scale q_i . k_j - lse_i),   i and j in the same sequence

N queries and M keys packed over S sequences of n_s queries and m_s keys, G heads, E head_dim. 4 G E sum(n_s m_s) FLOP
forward, 10 G E sum(n_s m_s) backward, over 4 N G E elements: compute-bound from some hundred tokens on. Softmax and
sums run in float32 (float64 for float64 tensors); the backward pass computes the probabilities again. On a CPU with AVX-512
the native library (_cpu_attention.py) serves float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cpu_attention, _flash, _sdpa, _xformers, reference
from ._attention_order import order
from ._checks import FLOATS, check_device, check_lengths, check_sets, check_tensor, describe, lengths_tensor
from ._dispatch import Row, choose, define, prefer, register, requested
from ._triton import row as triton_row

TRITON_FLOAT32 = 64  # widest head in float32 whose operands fit the registers of a thread block
MAX_HEAD_DIM = 256  # what fits the registers and shared memory of one thread block, in every kernel of the field


def _triton_unfit(q: Tensor, scale: float, *lengths: Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "its kernels do not compute in float64"
    if q.dtype == torch.float32 and q.device.type == "cuda" and q.shape[2] > TRITON_FLOAT32:
        return f"its kernels compute heads of up to {TRITON_FLOAT32} in float32, got {q.shape[2]}"
    return None if scale > 0 else f"its kernels need a positive scale, got {scale}"


register(
    triton_row(
        "varlen_attention", "_triton_attention", "varlen_attention", "varlen_attention_backward", unfit=_triton_unfit
    )
)
register(
    Row(
        "varlen_attention",
        "cpu",
        _cpu_attention.varlen_attention,
        _cpu_attention.varlen_attention_backward,
        why_not=_cpu_attention.why_not,
        unfit=_cpu_attention.unfit,
        automatic=False,
    )
)
for _row in (*_flash.rows(), _xformers.ROW):
    register(_row)
register(Row("varlen_attention", "sdpa", _sdpa.varlen_attention, _sdpa.varlen_attention_backward))
register(Row("varlen_attention", "reference", reference.varlen_attention, reference.varlen_attention_backward))
prefer("varlen_attention", order)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    check_sets("", cu_seqlens, lengths, q.shape[0])
    check_sets("kv_", kv_cu_seqlens, kv_lengths, k.shape[0])
    if lengths.shape != kv_lengths.shape:
        raise ValueError(f"kv_lengths must have {lengths.shape[0]} entries like lengths, got {kv_lengths.shape[0]}")
    for number, (n, m) in enumerate(zip(lengths.tolist(), kv_lengths.tolist(), strict=True)):
        if n > 0 and m == 0:
            raise ValueError(f"kv_lengths must be positive where there are queries, got 0 in sequence {number}")
    row = choose("varlen_attention", q.device, q, scale, lengths, kv_lengths)
    return row.forward(q, k, v, cu_seqlens, lengths, scale, kv_cu_seqlens, kv_lengths)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=reference.accumulator(q.dtype))


def _backward(
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
    asked: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """asked: the backend that was asked for in the forward pass, whatever is asked for now."""
    arguments = (grad, q, k, v, out, lse, cu_seqlens, lengths, scale, kv_cu_seqlens, kv_lengths)
    if asked == "sdpa" and not _sdpa.on_cpu(q):  # it left no log-sum-exp, which every other backend would read
        return _sdpa.varlen_attention_backward(*arguments)
    return choose("varlen_attention", q.device, q, scale, lengths, kv_lengths).backward(*arguments)


def _backward_fake(
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
    asked: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, lengths, ctx.scale, kv_cu_seqlens, kv_lengths = inputs
    out, lse = output
    ctx.asked = requested()
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, lengths, kv_cu_seqlens, kv_lengths)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 8
    q, k, v, out, lse, cu_seqlens, lengths, kv_cu_seqlens, kv_lengths = ctx.saved_tensors
    grads = torch.ops.vjepa.varlen_attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, lengths, ctx.scale, kv_cu_seqlens, kv_lengths, ctx.asked
    )
    return *grads, None, None, None, None, None


define(
    "varlen_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor lengths, float scale, Tensor kv_cu_seqlens, "
    "Tensor kv_lengths) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "varlen_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, Tensor lengths, "
    "float scale, Tensor kv_cu_seqlens, Tensor kv_lengths, str asked='auto') -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("vjepa::varlen_attention", _autograd, setup_context=_setup)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    kv_cu_seqlens: Tensor | None = None,
    kv_lengths: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """out = softmax(scale q k^T) v inside each sequence, not causal.

    Args:
        q: [N, heads, head_dim], float32, bfloat16, float16 or float64; strided views of a packed qkv are all right.
        k, v: [M, heads, head_dim], dtype of `q`; M = N without `kv_lengths`.
        cu_seqlens: int32 [S+1], offsets of the sequences in `q` (and in `k`, `v`).
        lengths: S ints on the host (tuple, or int CPU tensor), tokens of each sequence; 0 is all right.
        scale: head_dim ** -0.5 by default.
        kv_cu_seqlens, kv_lengths: offsets and lengths of the sequences in `k` and `v` where they differ from `q`.

    Returns:
        [N, heads, head_dim], contiguous, dtype of `q`. Gradients for q, k and v.

    Raises:
        TypeError: wrong types, dtypes of q, k, v that differ. ValueError: wrong shapes or devices, head_dim above 256,
        lengths that do not sum to the tokens or disagree with the offsets, queries without a key.
    """
    check_tensor("q", q, "[N, heads, head_dim]", 3)
    if (kv_cu_seqlens is None) != (kv_lengths is None):
        raise ValueError("kv_cu_seqlens and kv_lengths must be given together, got one of them")
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, "[M, heads, head_dim]", 3, FLOATS)
        check_device(name, value, "q", q)
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {describe(value)}")
        if value.shape[1:] != q.shape[1:]:
            raise ValueError(
                f"{name} must have the heads and head_dim of q, {tuple(q.shape[1:])}, got {describe(value)}"
            )
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have the {k.shape[0]} tokens of k, got {describe(v)}")
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head_dim of 1 to {MAX_HEAD_DIM}, got {describe(q)}")
    check_tensor("cu_seqlens", cu_seqlens, "[S+1]", 1, (torch.int32,))
    check_device("cu_seqlens", cu_seqlens, "q", q)
    check_lengths("lengths", lengths)
    if kv_lengths is None or kv_cu_seqlens is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"k must have the {q.shape[0]} tokens of q without kv_lengths, got {describe(k)}")
        host = kv_host = lengths_tensor(lengths)
        kv_cu_seqlens = cu_seqlens
    else:
        check_tensor("kv_cu_seqlens", kv_cu_seqlens, "[S+1]", 1, (torch.int32,))
        check_device("kv_cu_seqlens", kv_cu_seqlens, "q", q)
        check_lengths("kv_lengths", kv_lengths)
        host, kv_host = lengths_tensor(lengths), lengths_tensor(kv_lengths)
    if scale is None:
        scale = q.shape[2] ** -0.5
    elif not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {describe(scale)}")
    return torch.ops.vjepa.varlen_attention(q, k, v, cu_seqlens, host, float(scale), kv_cu_seqlens, kv_host)[0]
