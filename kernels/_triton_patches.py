"""Patches of a strided video inside Triton kernels: where they begin, where their pixels lie, what bytes stand for.

    pixel k of the patch of token i lies at   place(i) + offset(k),   k = ((c t + dt) h + dy) w + dx

B clips, C channels, (t, h, w) tubelet, K = C t h w pixels of a patch, L tokens of a clip in (t, h, w) order, S sets, M
tokens wanted: N packed ones or all B L. Any strides. Where a kernel wants places step after step, they are looked up
beforehand: 8 bytes a token.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._triton import LAUNCH, Variant, ceil_div
from ._triton_sets import SETS_POINTERS, search_steps, set_of

SIZES = ["num_tokens", "num_sets", "steps", "length", "rows", "columns"]  # the kernels are not specialised on them
PLACES = 256  # tokens of a program that looks up places


@triton.jit
def patch_of(row_M, num_tokens, sets, grid, strides, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Where the patch of each wanted token begins, and the token's id; of the last token for rows beyond it.

    sets: pointers to indices, cu_seqlens, clip (None: all tokens of all clips), their number and the steps of `set_of`;
    grid: tokens of a clip, rows and columns of a frame; strides: of clips, frames, rows and pixels of the video.
    """
    row_M = tl.minimum(row_M, num_tokens - 1)
    if sets[0] is not None:
        clip_M = tl.load(sets[2] + set_of(sets[1], row_M, sets[3], sets[4]))
        id_M = tl.load(sets[0] + row_M).to(tl.int32)
    else:
        clip_M = row_M // grid[0]
        id_M = row_M % grid[0]
    line_M = id_M // grid[2]
    first_M = clip_M.to(tl.int64) * strides[0] + (line_M // grid[1]).to(tl.int64) * strides[1] * T
    first_M += (line_M % grid[1]).to(tl.int64) * strides[2] * H + (id_M % grid[2]).to(tl.int64) * strides[3] * W
    return first_M, id_M


@triton.jit
def line_of(line, strides, T: tl.constexpr, H: tl.constexpr):
    """Where line (c t + dt) h + dy of a patch begins, from the patch; strides of channels, frames, rows and pixels."""
    frame = line // H
    offset = (frame // T).to(tl.int64) * strides[0] + (frame % T).to(tl.int64) * strides[1]
    return offset + (line % H).to(tl.int64) * strides[2]


@triton.jit
def pixel_of(k, strides, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Where pixel k of a patch lies, from the patch."""
    return line_of(k // W, strides, T, H) + (k % W).to(tl.int64) * strides[3]


@triton.jit
def normalisation(scale_ptr, shift_ptr, first, C: tl.constexpr, CHANNEL: tl.constexpr, BK: tl.constexpr):
    """Scale and shift of pixels first..first + BK - 1 of a patch; numbers where these are of one channel."""
    if CHANNEL % BK == 0:
        return tl.load(scale_ptr + first // CHANNEL), tl.load(shift_ptr + first // CHANNEL)
    else:
        channel_K = tl.minimum((first + tl.arange(0, BK)) // CHANNEL, C - 1)
        return tl.load(scale_ptr + channel_K)[None, :], tl.load(shift_ptr + channel_K)[None, :]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*SETS_POINTERS])
def _places_kernel(
    indices_ptr,
    cu_ptr,
    clip_ptr,
    places_ptr,
    num_tokens,
    num_sets,
    steps,
    length,
    rows,
    columns,
    stride_b,
    stride_t,
    stride_h,
    stride_w,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
):
    row_M = tl.program_id(0) * BM + tl.arange(0, BM)
    sets = (indices_ptr, cu_ptr, clip_ptr, num_sets, steps)
    strides = (stride_b, stride_t, stride_h, stride_w)
    first_M, _ = patch_of(row_M, num_tokens, sets, (length, rows, columns), strides, T, H, W)
    tl.store(places_ptr + row_M, first_M // UNIT, mask=row_M < num_tokens)


def constants(
    video: Tensor, weight: Tensor, mean: list[float] | None, std: list[float] | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Float32 scale and shift of each channel of a uint8 video, on its device; kept there, so that nothing waits."""
    if video.dtype != torch.uint8:
        return None, None
    return reference.scale_and_shift(weight.shape[1], mean, std, video.device, torch.float32)


def geometry(weight: Tensor) -> dict[str, int]:
    """C, T, H and W of the kernels."""
    return dict(zip("CTHW", weight.shape[1:], strict=True))


def grid_of(video: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Tokens of a clip, rows and columns of tokens in a frame."""
    rows, columns = video.shape[3] // weight.shape[3], video.shape[4] // weight.shape[4]
    return reference.num_tubelets(video, weight), rows, columns


def unit_of(video: Tensor, weight: Tensor) -> int:
    """The largest power of two up to 16 that divides all places: what is known about the alignment of patches."""
    clip, _, *strides = video.stride()
    return math.gcd(16, clip, *(stride * size for stride, size in zip(strides, weight.shape[2:], strict=True)))


def places(video: Tensor, weight: Tensor, sets: tuple[Tensor, ...], num_tokens: int, unit: int) -> Tensor:
    """Place of each wanted token, in units of `unit` pixels, int64 [M]; for use on the current device."""
    patch = geometry(weight)
    stride_b, _, *strides = video.stride()
    num_sets = sets[2].shape[0] if sets else 0
    out = torch.empty(num_tokens, dtype=torch.int64, device=video.device)
    _places_kernel[(ceil_div(num_tokens, PLACES),)](
        *(sets or (None, None, None)),
        out,
        num_tokens,
        num_sets,
        search_steps(num_sets),
        *grid_of(video, weight),
        stride_b,
        *strides,
        **_meta(patch, unit),
        **LAUNCH,
    )
    return out


def _meta(patch: dict[str, int], unit: int) -> dict[str, int]:
    return {name: patch[name] for name in ("T", "H", "W")} | {"UNIT": unit, "BM": PLACES}


def variants() -> list[Variant]:
    """What the launcher launches for uint8 clips of 224 x 224 in patches of 16: kept tokens, and all."""
    return [
        Variant(
            name=f"places of {'kept' if kept else 'all'} tokens",
            kernel=_places_kernel,
            types={
                **SETS_POINTERS,
                "places_ptr": "*i64",
                **dict.fromkeys((*SIZES, "stride_b", "stride_t", "stride_h", "stride_w"), "i32"),
            },
            constants={
                **_meta({"C": 3, "T": 2, "H": 16, "W": 16}, 16),
                **({} if kept else dict.fromkeys(SETS_POINTERS)),
            },
            divisible=("places_ptr", "stride_b", "stride_t", "stride_h"),
            ones=("stride_w",),
            wide=False,
        )
        for kept in (True, False)
    ]
