"""Products of float32 matrices by the native library, on processors with tiles of bfloat16 (AMX): as exact as PyTorch's.

Each float32 is split into three bfloat16, and six products of those are summed in float32; csrc/capi_product.h says more.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from . import _native
from ._cpu_tokens import check_rows
from ._dispatch import requested

TILES, TILES_IN_SOFTWARE = 1, 2  # VJEPA_TILES and VJEPA_TILES_IN_SOFTWARE of csrc/capi_product.h
# Multiplications below which PyTorch's product is the faster one, and rows, columns and summands below which tiles have
# too much to pack or stay half empty.
FEWEST = 1 << 25
NARROWEST = 256


class Operand(ctypes.Structure):
    """`vjepa_operand` of csrc/capi_product.h."""

    _fields_ = [("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64)]


class Product(ctypes.Structure):
    """`vjepa_product` of csrc/capi_product.h."""

    _fields_ = [
        ("a", Operand),
        ("b", Operand),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("accumulate", ctypes.c_int64),
        ("instructions", ctypes.c_int64),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = _native.library()
    library.vjepa_product_instructions.restype, library.vjepa_product_instructions.argtypes = ctypes.c_int32, []
    library.vjepa_product_cpu.restype = ctypes.c_int32
    library.vjepa_product_cpu.argtypes = [ctypes.POINTER(Product), ctypes.c_int32]
    return library


@functools.cache
def instructions() -> int:
    """TILES and TILES_IN_SOFTWARE, whichever there are here."""
    return int(_library().vjepa_product_instructions()) if _native.available()[0] else 0


def serve(a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a b + bias, [N, M] of [N, K], [K, M] and [M], is faster this way, and nobody asked for PyTorch's alone.

    What does not fit together is PyTorch's: it says so, where the library would read on beyond the end.
    """
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in (a, b, bias) if x is not None):
        return False
    rows, depth, columns = *a.shape, b.shape[1]
    if b.shape[0] != depth or (bias is not None and bias.shape != (columns,)):
        return False
    large = min(rows, depth, columns) >= NARROWEST and rows * depth * columns >= FEWEST
    return large and bool(instructions() & TILES) and requested() != "reference"


def _operand(matrix: Tensor) -> tuple[Tensor, Operand]:
    """What has rows or columns side by side; the tensor must outlive the call."""
    if matrix.stride(0) != 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix, Operand(matrix.data_ptr(), *matrix.stride())


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    accumulate: bool = False,
    instructions: int = TILES,
) -> Tensor:
    """a b + bias, [N, M] of float32 matrices [N, K] and [K, M] and of [M]; written to `out`, rows of [M], or added to it."""
    (a, first), (b, second) = _operand(a), _operand(b)
    bias = None if bias is None else bias.contiguous()
    out = a.new_empty((a.shape[0], b.shape[1])) if out is None else out
    check_rows("out", out, a.shape[0], b.shape[1])
    given = Product(
        first,
        second,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        *out.shape,
        a.shape[1],
        accumulate,
        instructions,
    )
    _native.check(_library().vjepa_product_cpu(given, torch.get_num_threads()))
    return out
