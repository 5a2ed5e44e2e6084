"""gather, scatter and loss by the native library on a CPU: each row is read once and written once.

The functions have the meaning of those of the same name in reference.py. They take float32 and bfloat16 (gather and scatter
also float16) and sum in float32, in an order that depends on neither threads nor instruction sets.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from . import _native, reference
from ._checks import describe

CODES = {torch.float32: 0, torch.bfloat16: 1}
MOVED = {**CODES, torch.float16: 2}  # by gather and scatter


class _Sets(ctypes.Structure):
    """`vjepa_sets` of csrc/capi_tokens.h."""

    _fields_ = [
        ("indices", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("clips", ctypes.c_void_p),
        ("total", ctypes.c_int64),
        ("sets", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
    ]


class _Rows(ctypes.Structure):
    """`vjepa_rows` of csrc/capi_tokens.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("clip_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = _native.library()
    i32, i64, f64, p = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    sets, rows = ctypes.POINTER(_Sets), ctypes.POINTER(_Rows)
    prototypes = {
        "vjepa_gather_cpu": [sets, rows, i64, p, i32],
        "vjepa_sum_named_cpu": [sets, p, i64, i32, i64, p, i32],
        "vjepa_scatter_cpu": [sets, p, i64, p, i32, i64, p, i32],
        "vjepa_scatter_backward_cpu": [sets, rows, i64, p, p, i32],
        "vjepa_l1_cpu": [sets, rows, p, i64, i32, i64, f64, p, p, i32],
        "vjepa_l1_backward_cpu": [sets, rows, p, i64, i32, i64, p, p, p, i32],
        "vjepa_predictor_tokens_cpu": [p, p, i64, i32, p, p, i64, i32, i64, p, p, p, i32],
        "vjepa_predictor_tokens_backward_cpu": [p, p, i64, i32, i64, p, i32, p, i32],
    }
    for name, arguments in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = i32, arguments
    return library


def call(name: str, *arguments: object) -> None:
    """Call a function of the library whose last argument is the number of threads."""
    _native.check(getattr(_library(), name)(*arguments, torch.get_num_threads()))


def _sets(indices: Tensor, cu_seqlens: Tensor, clip: Tensor, batch: int, length: int) -> _Sets:
    parts = indices.contiguous(), cu_seqlens.contiguous(), clip.contiguous()
    sets = _Sets(*(part.data_ptr() for part in parts), indices.shape[0], clip.shape[0], batch, length)
    sets.parts = parts  # addresses are only as good as the tensors behind them
    return sets


def _table(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1), MOVED[x.dtype])


def rows_of(x: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_rows(name: str, x: Tensor, rows: int, width: int) -> None:
    """Raise unless a tensor is [rows, width]: the library sees an address, and would read on beyond its end."""
    if x.shape != (rows, width):
        raise ValueError(f"{name} must be [{rows}, {width}], got {describe(x)}")


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's first element, null for None."""
    return None if x is None else x.data_ptr()


def why_not(device: torch.device) -> str | None:
    """Why the library cannot serve tensors on `device`, or None."""
    if device.type != "cpu":
        return "it serves tensors on the CPU"
    ok, reason = _native.available()
    return None if ok else reason


def unfit_to_move(x: Tensor, *arguments: object) -> str | None:
    """Why gather and scatter cannot take these tokens, or None."""
    return None if x.dtype in MOVED else f"it moves floats of at most 32 bits, got {describe(x)}"


def gather_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor) -> Tensor:
    """See reference.gather_tokens."""
    x = rows_of(x)
    out = x.new_empty((indices.shape[0], x.shape[2]))
    sets = _sets(indices, cu_seqlens, clip, *x.shape[:2])
    call("vjepa_gather_cpu", sets, _table(x), x.shape[2], out.data_ptr())
    return out


def gather_tokens_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, batch: int, length: int
) -> Tensor:
    """See reference.gather_tokens_backward."""
    grad = rows_of(grad)
    check_rows("grad", grad, indices.shape[0], grad.shape[1])
    out = grad.new_empty((batch, length, grad.shape[1]))
    sets = _sets(indices, cu_seqlens, clip, batch, length)
    call("vjepa_sum_named_cpu", sets, grad.data_ptr(), grad.stride(0), MOVED[grad.dtype], grad.shape[1], out.data_ptr())
    return out


def scatter_tokens(
    values: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    clip: Tensor,
    batch: int,
    length: int,
    fill: Tensor | None,
    fill_value: float,
) -> Tensor:
    """See reference.scatter_tokens."""
    values, features = rows_of(values), values.shape[1]
    check_rows("values", values, indices.shape[0], features)
    if fill is not None:
        check_rows("fill", fill[None], 1, features)
    background = values.new_full((features,), fill_value) if fill is None else fill.to(values.dtype).contiguous()
    out = values.new_empty((batch, length, features))
    sets = _sets(indices, cu_seqlens, clip, batch, length)
    where = (values.data_ptr(), values.stride(0), background.data_ptr(), MOVED[values.dtype], features)
    call("vjepa_scatter_cpu", sets, *where, out.data_ptr())
    return out


def scatter_tokens_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, fill_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """See reference.scatter_tokens_backward."""
    grad = rows_of(grad)
    batch, length, features = grad.shape
    grad_values = grad.new_empty((indices.shape[0], features))
    grad_fill = None if fill_dtype is None else torch.empty(features, dtype=torch.float32)
    sets = _sets(indices, cu_seqlens, clip, batch, length)
    to = (grad_values.data_ptr(), None if grad_fill is None else grad_fill.data_ptr())
    call("vjepa_scatter_backward_cpu", sets, _table(grad), features, *to)
    return grad_values, grad.new_empty(0) if grad_fill is None else grad_fill.to(fill_dtype)


def unfit_for_loss(prediction: Tensor, features: Tensor, *arguments: object) -> str | None:
    """Why the loss cannot take these tensors, or None."""
    for tensor in (prediction, features):
        if tensor.dtype not in CODES:
            return f"it takes float32 and bfloat16, got {describe(tensor)}"
    return None


def masked_l1_loss(
    prediction: Tensor, features: Tensor, sets: reference.Sets, eps: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See reference.masked_l1_loss."""
    prediction, features = rows_of(prediction), rows_of(features)
    total, width = prediction.shape
    check_rows("prediction", prediction, sets[0].shape[0], features.shape[2])
    distances, statistics = torch.empty(total), torch.empty((total, 2))
    where = (prediction.data_ptr(), prediction.stride(0), CODES[prediction.dtype], width, eps)
    table = _sets(*sets, *features.shape[:2]), _table(features)
    call("vjepa_l1_cpu", *table, *where, distances.data_ptr(), statistics.data_ptr())
    shares = reference.token_shares(sets[1], weights, total, torch.float32)
    return (distances * shares).sum(), statistics


def masked_l1_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    features: Tensor,
    sets: reference.Sets,
    statistics: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """See reference.masked_l1_loss_backward."""
    prediction, features = rows_of(prediction), rows_of(features)
    total, width = prediction.shape
    check_rows("prediction", prediction, sets[0].shape[0], features.shape[2])
    check_rows("statistics", statistics, total, 2)
    shares = (reference.token_shares(sets[1], weights, total, torch.float32) * grad).contiguous()
    out = prediction.new_empty((total, width))
    where = (prediction.data_ptr(), prediction.stride(0), CODES[prediction.dtype], width)
    table = _sets(*sets, *features.shape[:2]), _table(features)
    statistics = statistics.contiguous()
    call("vjepa_l1_backward_cpu", *table, *where, statistics.data_ptr(), shares.data_ptr(), out.data_ptr())
    return out
