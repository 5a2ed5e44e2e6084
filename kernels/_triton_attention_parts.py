"""What the Triton kernels of attention share: work items, rows of heads, and 2^x on two units of the chip.

    2^x = 2^i 2^f,   i = round(x),   2^f = 1 + f (C1 + f (C2 + f C3)) (1 + e),   |f| <= 1/2,   |e| <= 1.02e-4

N queries and M keys packed over S sequences, G heads, E head_dim. An item is a block of rows of a sequence with all the
rows of the other side that it meets; items of the most work come first, so that none is begun late that takes long. They
depend on host lengths alone, and are kept on the device: all layers of a network, forward and backward, share them.

A head_dim is computed in one or two parts, each a power of two (24 as 32, 80 as 64 + 16), since tiles are such; columns
beyond it are zero and not read. On Hopper the exp unit makes 16 results a clock and SM; for heads of 24 and 32 that is
the limit, and one exponential in SHARE (0: none) is computed by multiply-adds instead, nine instructions for one.
"""

from __future__ import annotations

from collections import OrderedDict
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import capability, next_power_of_2
from ._triton_product import LEAST
from ._triton_sets import TYPES

LEAST_BESIDE_128 = 64  # a narrower one makes the compiler spill some thousand bytes a thread in the backward pass
STRIDES = [f"{tensor}_{of}" for tensor in ("q", "k", "v", "grad") for of in ("row", "head")]  # not specialised on
KEPT = 64  # tables of items: forward and backward of a few steps with some kinds of sequences

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# 1.5 * 2^23: numbers of float32 that large are integers, so that adding it rounds; 127 makes the low bits an exponent.
ROUNDS: tl.constexpr = tl.constexpr(12582912.0 + 127.0)
C1: tl.constexpr = tl.constexpr(0.69328293)  # of least relative error on [-1/2, 1/2] among those that are exact at 0
C2: tl.constexpr = tl.constexpr(0.242211)
C3: tl.constexpr = tl.constexpr(0.05500893)


@triton.jit
def exp2_by_fma(x):
    """2^x for x <= 0 without the exp unit; 0 below -126.5, NaN of NaN."""
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)  # its exponent becomes that of 0
    rounded = x + ROUNDS
    f = x - (rounded - ROUNDS)
    whole = (rounded.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return (((f * C3 + C2) * f + C1) * f + 1.0) * whole


@triton.jit
def _exp2_of_some(x, LEFT: tl.constexpr):
    """2^x, x [..., 2 (LEFT times)]; the last of each dimension by multiply-adds."""
    if LEFT == 0:
        return exp2_by_fma(x)
    else:
        first, last = tl.split(x)
        return tl.join(tl.exp2(first), _exp2_of_some(last, LEFT - 1))


@triton.jit
def exp2(x_MN, SHARE: tl.constexpr):
    """2^x for x <= 0; one of SHARE (0, 2, 4 or 8) by multiply-adds.

    The bits of a column's number that are split off, 0, 3 and 4, tell apart values of one thread in the layouts of
    matrix instructions: nothing moves between threads.
    """
    M: tl.constexpr = x_MN.shape[0]
    N: tl.constexpr = x_MN.shape[1]
    if SHARE == 0:
        return tl.exp2(x_MN)
    elif SHARE == 2:
        return _exp2_of_some(x_MN.reshape(M, N // 2, 2), 1).reshape(M, N)
    elif SHARE == 4:
        x = x_MN.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4)
        return _exp2_of_some(x, 2).permute(0, 1, 3, 2, 4).reshape(M, N)
    else:
        tl.static_assert(SHARE == 8)
        x = x_MN.reshape(M, N // 32, 2, 2, 4, 2).permute(0, 1, 4, 2, 3, 5)
        return _exp2_of_some(x, 3).permute(0, 1, 3, 4, 2, 5).reshape(M, N)


@triton.jit
def exponent(s_MN, scale, less_MN, FLOAT32: tl.constexpr):
    """log2 of e^(scale s - less): one multiply-add, or without the rounding of a large product where float32 is wanted."""
    if FLOAT32:
        return (s_MN * scale - less_MN) * LOG2_E
    else:
        return s_MN * (scale * LOG2_E) - less_MN * LOG2_E


@triton.jit
def item_of(items_ptr, item):
    """First and end row of a block, and of what it meets."""
    items_ptr += item.to(tl.int64) * 4
    return tl.load(items_ptr), tl.load(items_ptr + 1), tl.load(items_ptr + 2), tl.load(items_ptr + 3)


@triton.jit
def rows_at(ptr, first, head, stride_row, stride_head, row_R, UNIT: tl.constexpr):
    """Pointers [R, 1] to rows first + row_R of a head; strides in units of UNIT elements, which tells their alignment."""
    ptr += (first.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head) * UNIT
    return ptr + (row_R.to(tl.int64) * stride_row * UNIT)[:, None]


@triton.jit
def sums_at(ptr, first, head, tokens):
    """Pointer to the entry of row `first` of a head in sums [G, N]: those of a block lie side by side."""
    return ptr + (head.to(tl.int64) * tokens + first)


@triton.jit
def load_part(rows_R1, PART: tl.constexpr, FROM: tl.constexpr, E: tl.constexpr):
    """Columns FROM .. FROM + PART - 1 of rows, zero beyond E."""
    column_E = (FROM + tl.arange(0, PART))[None, :]
    if FROM + PART > E:
        return tl.load(rows_R1 + column_E, mask=column_E < E, other=0)
    else:
        return tl.load(rows_R1 + column_E)


@triton.jit
def again(rows_R1, held_RE, PART: tl.constexpr, FROM: tl.constexpr, E: tl.constexpr, RELOAD: tl.constexpr):
    """`held_RE`, or the same columns read again, where a program has no registers to hold them."""
    if RELOAD:
        column_E = (FROM + tl.arange(0, PART))[None, :]
        return tl.load(rows_R1 + column_E, mask=column_E < E, other=0, volatile=True)
    else:
        return held_RE


@triton.jit
def store_part(rows_R1, value_RE, in_block_R, FROM: tl.constexpr, E: tl.constexpr):
    """Stores columns FROM .. of rows, as far as E."""
    column_E = (FROM + tl.arange(0, value_RE.shape[1]))[None, :]
    mask_RE = in_block_R[:, None] & (column_E < E)
    tl.store(rows_R1 + column_E, value_RE.to(rows_R1.dtype.element_ty), mask=mask_RE)


def parts_of(head_dim: int) -> tuple[int, int]:
    """Widths of the parts that a head_dim is computed in, depths of products; the second is 0 if it would save nothing."""
    whole = max(LEAST, next_power_of_2(head_dim))
    first = max(LEAST, whole // 2)
    second = max(LEAST if first < 128 else LEAST_BESIDE_128, next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


class Tile(NamedTuple):
    """How the programs of a kernel are made."""

    owned: int  # rows of a program
    walked: int  # rows of a step
    warps: int
    stages: int
    reload: bool = False  # read what is owned again in each step, for want of registers
    share: int = 0  # one exponential in so many (2, 4 or 8; 0: none) without the exp unit


# Of products that read shared memory, those that read registers, and all of those of float32.
ARCHS = {"shared": (90, 100), "registers": (80, 120), "float32": (80, 90, 100, 120)}
Tiles = dict[str, dict[int, Tile]]  # by family of architectures, then by the width of a head up to which they serve


def family(device: torch.device, dtype: torch.dtype) -> str:
    """Which tiles serve."""
    if device.type != "cuda":
        return "shared"  # for Triton's interpreter any tile is as good
    if dtype == torch.float32:
        return "float32"
    return "shared" if capability(device)[0] in (9, 10) else "registers"


# Family, dtype and head_dim of what is compiled ahead of time: the heads that must be fast, the widest, and float32.
CASES = [
    *((name, torch.bfloat16, head_dim) for name in ("shared", "registers") for head_dim in (24, 32, 64, 80, 192, 256)),
    ("registers", torch.bfloat16, 88),
    ("float32", torch.float32, 64),
]


def describe(dtype: torch.dtype, head_dim: int, made_by: dict[str, Any]) -> str:
    """For the table."""
    share = f", 1 in {made_by['SHARE']} by multiply-adds" if made_by["SHARE"] else ""
    return f"{TYPES[dtype]} head_dim {head_dim}{share}"


def meta(tiles: Tiles, family: str, head_dim: int, unit: int, precision: str) -> dict[str, Any]:
    """What a kernel is specialised on, but for its rows."""
    parts = parts_of(head_dim)
    widths = tiles[family]
    tile = widths[min(most for most in widths if sum(parts) <= most)]
    return {
        "PRECISION": "tf32x3" if family == "float32" and precision == "ieee" else precision,
        "UNIT": unit,
        "E": head_dim,
        "E0": parts[0],
        "E1": parts[1],
        "SHARE": 0 if family == "float32" else tile.share,  # whose rounding is finer than the polynomial's error
        "RELOAD": tile.reload,
        "OWNED": tile.owned,
        "WALKED": tile.walked,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def unit_of(*tensors: Tensor) -> int:
    """The largest power of two up to 8 that divides all strides of rows and heads."""
    return gcd(8, *(stride for tensor in tensors for stride in tensor.stride()[:2]))


def strides_of(tensor: Tensor, unit: int) -> tuple[int, int]:
    """Strides of rows and heads in units."""
    row, head, _ = tensor.stride()
    return row // unit, head // unit


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied if neighbouring features of a head are not neighbours in memory."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


# ---------------------------------------------------------------------------------------------------------------- items

_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_captured: set[Tensor] = set()  # CUDA graphs hold their addresses


def list_items(lengths: Tensor, other_lengths: Tensor, rows: int) -> Tensor:
    """int32 [I, 4]: first and end row of each block of `rows` rows, first and end row of what it meets; most work first.

    The end is that of the sequence, for blocks that are not the last too.
    """
    lengths_S, others_S = lengths.long(), other_lengths.long()
    order_S = torch.argsort(others_S, descending=True, stable=True)
    blocks_S = ((lengths_S + rows - 1) // rows)[order_S]
    sequence_I = torch.repeat_interleave(order_S, blocks_S)
    block_I = torch.arange(sequence_I.shape[0], device=sequence_I.device)
    block_I -= torch.repeat_interleave(blocks_S.cumsum(0) - blocks_S, blocks_S)
    end_I, other_end_I = lengths_S.cumsum(0)[sequence_I], others_S.cumsum(0)[sequence_I]
    first_I = end_I - lengths_S[sequence_I] + block_I * rows
    return torch.stack((first_I, end_I, other_end_I - others_S[sequence_I], other_end_I), 1).int()


def items_for(lengths: Tensor, other_lengths: Tensor, rows: int, device: torch.device) -> Tensor:
    """`list_items` on the device, kept for the stream at hand.

    Inside a CUDA graph nothing is copied: each replay would read host memory that is long gone. A graph takes the table that
    was made before, on whatever stream, since its own is another than that of the runs which warm up.
    """
    cuda = device.type == "cuda"
    key: tuple[object, ...] = (tuple(lengths.tolist()), tuple(other_lengths.tolist()), rows, device)
    if cuda and torch.cuda.is_current_stream_capturing():
        kept = next((table for (*of, _), table in list(_tables.items()) if tuple(of) == key), None)
        if kept is None:
            raise RuntimeError("varlen_attention must run once with the same lengths before a CUDA graph captures it")
        _captured.add(kept)
        return kept
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    place = (*key, stream)
    table = _tables.get(place)
    if table is None:
        with torch.inference_mode(False):
            table = _tables[place] = list_items(lengths, other_lengths, rows).to(device, non_blocking=True)
        while len(_tables) > KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(place)  # whole clips are asked for in every step, among masks that never come again
    return table
