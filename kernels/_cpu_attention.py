"""The cpu backend of varlen_attention: the native library's kernels for AVX-512 and AMX, float32 and bfloat16.

Scores, softmax and sums are in float32. Of bfloat16 tensors the operands of the products are bfloat16, as in PyTorch's
kernels: so are the probabilities, and in the backward pass the gradients of the scores, when they are multiplied; where a
processor has no such product, the tensors become float32 while they are packed, and nothing more is rounded. Results do
not depend on the number of threads.

On a processor with AMX its tiles multiply, several times as fast. A float32 is then the sum of three bfloat16, and a product
that of their six largest products: what is left out is below 2^-24 of it, numbers below 2^-102 lose their last bits, and an
infinite number, or one that bfloat16 rounds to infinity, makes NaN.
"""

from __future__ import annotations

import ctypes
import functools
from math import isfinite

import torch
from torch import Tensor

from . import _native
from ._checks import describe
from ._cpu_tokens import rows_of
from ._cpu_tokens import why_not as _why_no_library

# VJEPA_AVX512 and those after it of csrc/capi_attention.h
AVX512, AVX512_BF16, AMX_BF16, AMX_IN_SOFTWARE = 1, 2, 4, 8
CODES = {torch.float32: 0, torch.bfloat16: 1}


class About(ctypes.Structure):
    """`vjepa_attention` of csrc/capi_attention.h."""

    _fields_ = [
        ("lengths", ctypes.c_void_p),
        ("kv_lengths", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("kv_tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("instructions", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


class Heads(ctypes.Structure):
    """`vjepa_heads` of csrc/capi_attention.h."""

    _fields_ = [("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64)]


@functools.cache
def _library() -> ctypes.CDLL:
    library = _native.library()
    i32, p = ctypes.c_int32, ctypes.c_void_p
    about, heads = ctypes.POINTER(About), ctypes.POINTER(Heads)
    prototypes = {
        "vjepa_attention_instructions": [],
        "vjepa_attention_cpu": [about, heads, p, p, i32],
        "vjepa_attention_backward_cpu": [about, heads, p, p, p, p, i32],
    }
    for name, arguments in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = i32, arguments
    return library


@functools.cache
def instructions() -> int:
    """AVX512, AVX512_BF16 and AMX_BF16, of those that the processor has and the system allows."""
    return _library().vjepa_attention_instructions()


@functools.cache
def tiles() -> bool:
    """Whether the library multiplies bfloat16 by AMX here."""
    return _native.available()[0] and bool(instructions() & AMX_BF16)


@functools.cache
def has_amx() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices by AMX, several times as fast as by AVX-512."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


def why_not(device: torch.device) -> str | None:
    """Why the library cannot serve attention on `device`, or None."""
    reason = _why_no_library(device)
    if reason is None and not instructions() & AVX512:
        return "its kernels need AVX-512 (F, BW, DQ and VL)"
    return reason


def unfit(q: Tensor, scale: float, *lengths: Tensor) -> str | None:
    """Why the library cannot take these arguments, or None."""
    if q.dtype not in CODES:
        return f"its kernels compute in float32 and bfloat16, got {describe(q)}"
    if q.dtype == torch.bfloat16 and has_amx() and not instructions() & AMX_BF16:
        return "PyTorch's kernel multiplies bfloat16 by AMX, which the native library cannot use here"
    return None if scale > 0 and isfinite(scale) else f"its kernels need a positive, finite scale, got {scale}"


def _check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless an argument of the operator is laid out as its kernel takes for granted."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be {describe(like)}, got {describe(tensor)}")


def _heads(*tensors: Tensor) -> ctypes.Array[Heads]:
    return (Heads * len(tensors))(*(Heads(x.data_ptr(), x.stride(0), x.stride(1)) for x in tensors))


def _about(q: Tensor, k: Tensor, lengths: Tensor, kv_lengths: Tensor, scale: float) -> About:
    lengths, kv_lengths = lengths.contiguous(), kv_lengths.contiguous()
    sizes = lengths.shape[0], q.shape[0], k.shape[0], *q.shape[1:]
    about = About(lengths.data_ptr(), kv_lengths.data_ptr(), *sizes, CODES[q.dtype], instructions(), scale)
    about.tensors = lengths, kv_lengths  # addresses are only as good as the tensors behind them
    return about


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
    _check_like("v", v, k)
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]))
    _native.check(
        _library().vjepa_attention_cpu(
            _about(q, k, lengths, kv_lengths, scale),
            _heads(q, k, v),
            out.data_ptr(),
            lse.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out, lse


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
    """See reference.varlen_attention_backward; `lse` is used as it is."""
    for name, tensor, like in (("v", v, k), ("grad", grad, q), ("out", out, q)):
        _check_like(name, tensor, like)
    if lse.shape != (q.shape[1], q.shape[0]) or lse.dtype != torch.float32:
        raise ValueError(f"lse must be {(q.shape[1], q.shape[0])} float32, got {describe(lse)}")
    given = tuple(rows_of(x) for x in (q, k, v, out, grad))
    lse = lse.contiguous()
    grads = (
        torch.empty(q.shape, dtype=q.dtype),
        torch.empty(k.shape, dtype=k.dtype),
        torch.empty(v.shape, dtype=v.dtype),
    )
    _native.check(
        _library().vjepa_attention_backward_cpu(
            _about(q, k, lengths, kv_lengths, scale),
            _heads(*given),
            lse.data_ptr(),
            *(x.data_ptr() for x in grads),
            torch.get_num_threads(),
        )
    )
    return grads
