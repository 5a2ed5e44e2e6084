"""mlp by the native library on a CPU: activation, its gradient and that of the bias in one pass.

Rows go through in chunks, so that what is between two products stays in the caches, and in memory that the system need not
hand out anew. hidden, where it is kept, is written while its activation is made. The backward pass has, chunk by chunk,

    da = dy W2,    dhidden = da gelu'(hidden),    a = gelu(hidden),    sums of 32 rows of dhidden,    dx = dhidden W1

For float32 the chunk's share of dW1 and dW2 is added at once, and nothing of [N, H] is ever written. 16-bit products round
what they return, so there all of dhidden and of a is written, and one product of all rows makes each of dW1 and dW2.

The functions have the meaning of those of the same name in _reference_mlp.py. N tokens, D features in, H hidden, E out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _native
from ._checks import describe
from ._cpu_products import linear, of_weight, times
from ._cpu_tokens import check_rows, rows_of

SUM_ROWS = 32  # VJEPA_SUM_ROWS of csrc/capi_block.h
# Of a chunk's hidden features: they stay in the last cache. Smaller ones slow the products down; sums over chunks must not
# depend on the number of threads.
CHUNK_BYTES = 8 << 20
FEWEST_ROWS = 256  # of a chunk


def unfit(x: Tensor) -> str | None:
    """Why the library cannot take these tokens, or None."""
    return None if x.dtype in _native.DTYPE_CODES else f"it takes floats of at most 32 bits, got {describe(x)}"


def _call(name: str, *arguments: object) -> None:
    _native.check(getattr(_native.library(), name)(*arguments, torch.get_num_threads()))


def column_sums(matrix: Tensor) -> Tensor:
    """sum_i matrix_i in float32, [D] of [N, D] of at most 32 bits, in an order that depends on N alone."""
    matrix = rows_of(matrix)
    sums = torch.empty(matrix.shape[1], dtype=torch.float32)
    code = _native.DTYPE_CODES[matrix.dtype]
    _call("vjepa_column_sums_cpu", matrix.data_ptr(), matrix.stride(0), *matrix.shape, code, sums.data_ptr())
    return sums


def gelu(hidden: Tensor, kept: Tensor | None = None) -> Tensor:
    """gelu(hidden) in its place; `kept`, if there is one, gets what hidden was. Both contiguous."""
    code, address = _native.DTYPE_CODES[hidden.dtype], hidden.data_ptr()
    _call("vjepa_gelu_cpu", address, hidden.numel(), code, address, None if kept is None else kept.data_ptr())
    return hidden


def gelu_backward(grad: Tensor, hidden: Tensor, dhidden: Tensor, active: Tensor | None, sums: Tensor | None) -> Tensor:
    """dhidden <- grad gelu'(hidden), active <- gelu(hidden), sums <- those of each SUM_ROWS rows of dhidden."""
    addresses = (x if x is None else x.data_ptr() for x in (active, sums))
    code, stride = _native.DTYPE_CODES[grad.dtype], hidden.stride(0)
    where = (grad.data_ptr(), hidden.data_ptr(), stride, *grad.shape, code, dhidden.data_ptr())
    _call("vjepa_gelu_backward_cpu", *where, *addresses)
    return dhidden


def _chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Chunks of about equal size, each but the last of whole groups of SUM_ROWS."""
    most = max(FEWEST_ROWS, CHUNK_BYTES // max(1, row_bytes))
    number = max(1, -(-rows // most))
    size = -(-rows // (number * SUM_ROWS)) * SUM_ROWS
    return (slice(first, min(first + size, rows)) for first in range(0, rows, max(1, size)))


class _Room:
    """[n, H] of one chunk after the other, in memory that the system need not hand out anew for each."""

    def __init__(self, like: Tensor, features: int) -> None:
        self.like, self.features, self.memory = like, features, like.new_empty(0)

    def rows(self, chunk: slice) -> Tensor:
        count = chunk.stop - chunk.start
        if self.memory.shape[0] < count:
            self.memory = self.like.new_empty((count, self.features))
        return self.memory[:count]


def _put(there: Tensor, found: Tensor) -> None:
    """Copies a product that is not there yet."""
    if found.data_ptr() != there.data_ptr():
        there.copy_(found)


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """See _reference_mlp.mlp."""
    tokens, features = x.shape[0], weight1.shape[0]
    out = x.new_empty((tokens, weight2.shape[0]))
    hidden = x.new_empty((tokens, features) if keep else 0)
    room = _Room(x, features)
    for chunk in _chunks(tokens, features * x.element_size()):
        active = gelu(linear(x[chunk], weight1, bias1, room.rows(chunk)), hidden[chunk] if keep else None)
        _put(out[chunk], linear(active, weight2, bias2, out[chunk]))
    return out, hidden


def mlp_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See _reference_mlp.mlp_backward."""
    need_x, need_weight1, need_bias1, need_weight2, need_bias2 = needs
    tokens, features = x.shape[0], weight1.shape[0]
    check_rows("hidden", hidden, tokens, features)
    check_rows("grad", grad, tokens, weight2.shape[0])
    hidden = rows_of(hidden)
    need_slopes, wide = any(needs[:3]), x.dtype == torch.float32
    of_x = x.new_empty(x.shape if need_x else 0)
    of_weight1 = x.new_zeros(weight1.shape) if need_weight1 and wide else x.new_empty(0)
    of_weight2 = x.new_zeros(weight2.shape) if need_weight2 and wide else x.new_empty(0)
    sums = torch.empty((-(-tokens // SUM_ROWS), features), dtype=torch.float32) if need_bias1 else None
    all_slopes = x.new_empty((tokens, features) if need_weight1 and not wide else 0)
    all_active = x.new_empty((tokens, features) if need_weight2 and not wide else 0)
    room_of_slopes, room_of_active = _Room(x, features), _Room(x, features)
    for chunk in _chunks(tokens, features * x.element_size()):
        kept = slopes = active = hidden[chunk]
        if need_weight2:
            active = room_of_active.rows(chunk) if wide else all_active[chunk]
        if need_slopes:
            given = times(grad[chunk], weight2, room_of_slopes.rows(chunk))
            slopes = all_slopes[chunk] if all_slopes.numel() else given
            own = None if sums is None else sums[chunk.start // SUM_ROWS :]
            gelu_backward(given, kept, slopes, active if need_weight2 else None, own)
        elif need_weight2:
            gelu(active.copy_(kept))
        if need_x:
            _put(of_x[chunk], times(slopes, weight1, of_x[chunk]))
        if wide and need_weight1:
            of_weight(slopes, x[chunk], added_to=of_weight1)
        if wide and need_weight2:
            of_weight(grad[chunk], active, added_to=of_weight2)
    return (
        of_x,
        of_weight1 if wide or not need_weight1 else all_slopes.T @ x,
        x.new_empty(0) if sums is None else column_sums(sums).to(x.dtype),
        of_weight2 if wide or not need_weight2 else grad.T @ all_active,
        column_sums(grad).to(x.dtype) if need_bias2 else x.new_empty(0),
    )
