"""tubelet_embed: video to tokens, only those that are kept.

    out[i] = weight . patch(i) + bias + pos_embed[id(i)]

B clips, C channels, T x H x W frames and pixels, (t, h, w) tubelet, K = C t h w, L = (T/t)(H/h)(W/w) tokens in
(t, h, w) order, D features, N kept tokens. A GEMM of 2 N K D FLOP over N K pixels, K D weights and N D outputs: the
tubelets do not overlap, so the convolution is a matrix product, and unlike a convolution it can skip tubelets. The
product runs in the dtype of `weight` with float32 sums; uint8 pixels are normalised in float32 and rounded once to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cpu_tubelet, reference
from ._checks import FLOATS, check_device, check_ids, check_offsets, check_tensor, describe
from ._dispatch import Row, choose, define, register
from ._triton import row as triton_row
from .tokens import TokenIndices, check_token_indices, check_within


def _triton_unfit(video: Tensor, weight: Tensor) -> str | None:
    return "its kernels do not compute in float64" if weight.dtype == torch.float64 else None


register(triton_row("tubelet_embed", "_triton_tubelet", "tubelet_embed", "tubelet_embed_backward", unfit=_triton_unfit))
register(
    Row(
        "tubelet_embed",
        "cpu",
        _cpu_tubelet.tubelet_embed,
        _cpu_tubelet.tubelet_embed_backward,
        why_not=_cpu_tubelet.why_not,
        unfit=_cpu_tubelet.unfit,
    )
)
register(Row("tubelet_embed", "reference", reference.tubelet_embed, reference.tubelet_embed_backward))


def _grid(video: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return video.shape[2] // weight.shape[2], video.shape[3] // weight.shape[3], video.shape[4] // weight.shape[4]


def _tokens(video: Tensor, weight: Tensor) -> int:
    t, h, w = _grid(video, weight)
    return t * h * w


def _forward(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    if indices is not None and cu_seqlens is not None and clip is not None:
        check_offsets(cu_seqlens, clip.shape[0], indices.shape[0])
        check_ids("indices", indices, _tokens(video, weight), "tokens of a clip")
        check_ids("clip", clip, video.shape[0], "clips")
    row = choose("tubelet_embed", video.device, video, weight)
    return row.forward(video, weight, bias, pos_embed, indices, cu_seqlens, clip, mean, std)


def _fake(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    dtype = weight.dtype if pos_embed is None else torch.promote_types(weight.dtype, pos_embed.dtype)
    shape = (video.shape[0], _tokens(video, weight)) if indices is None else (indices.shape[0],)
    return weight.new_empty((*shape, weight.shape[0]), dtype=dtype)


def _backward(
    grad: Tensor,
    video: Tensor,
    weight: Tensor,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    bias_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = choose("tubelet_embed", video.device, video, weight)
    return row.backward(grad, video, weight, indices, cu_seqlens, clip, mean, std, (bias_dtype, pos_dtype), needs)


def _backward_fake(
    grad: Tensor,
    video: Tensor,
    weight: Tensor,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    bias_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = weight.shape[0]
    return (
        video.new_empty(video.shape) if needs[0] else grad.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else grad.new_empty(0),
        weight.new_empty(features, dtype=bias_dtype) if needs[2] else grad.new_empty(0),
        weight.new_empty(_tokens(video, weight), features, dtype=pos_dtype) if needs[3] else grad.new_empty(0),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    video, weight, bias, pos_embed, indices, cu_seqlens, clip, mean, std = inputs
    ctx.save_for_backward(video, weight, indices, cu_seqlens, clip)
    ctx.mean, ctx.std = mean, std
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.pos_dtype = None if pos_embed is None else pos_embed.dtype


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.vjepa.tubelet_embed_backward(
        grad, *ctx.saved_tensors, ctx.mean, ctx.std, ctx.bias_dtype, ctx.pos_dtype, needs
    )
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None


define(
    "tubelet_embed",
    "(Tensor video, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? indices, Tensor? cu_seqlens, Tensor? clip, "
    "float[]? mean, float[]? std) -> Tensor",
    _forward,
    _fake,
)
define(
    "tubelet_embed_backward",
    "(Tensor grad, Tensor video, Tensor weight, Tensor? indices, Tensor? cu_seqlens, Tensor? clip, float[]? mean, "
    "float[]? std, ScalarType? bias_dtype, ScalarType? pos_dtype, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("vjepa::tubelet_embed", _autograd, setup_context=_setup)


def _constants(name: str, values: Sequence[float] | float | None, channels: int) -> list[float] | None:
    if values is None:
        return None
    if isinstance(values, int | float):
        return [float(values)] * channels
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name} must be a number or a sequence of numbers, one for each channel, got {describe(values)}"
        )
    if len(values) != channels:
        raise ValueError(f"{name} must have one number for each of the {channels} channels, got {len(values)}")
    if not all(isinstance(value, int | float) for value in values):
        raise TypeError(f"{name} must hold numbers, got {values!r}")
    return [float(value) for value in values]


def tubelet_embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    indices: TokenIndices | None = None,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
) -> Tensor:
    """Embed tubelets: out = patches @ weight^T + bias + pos_embed, for all tokens or for the kept ones alone.

    Args:
        video: [B, C, T, H, W], any strides; uint8, or the dtype of `weight` (then taken as normalised already).
        weight: [D, C, t, h, w] as nn.Conv3d keeps it, kernel = stride; float32, bfloat16, float16 or float64.
        bias: [D], dtype of `weight`.
        pos_embed: [L, D], any floating dtype.
        indices: which tokens of which clips to compute; no other tubelet is read. A clip may serve several sets.
        mean, std: for uint8 video, one number per channel in units of 0..1: pixels become (video / 255 - mean) / std.
            Without them (0 and 1) pixels are scaled to 0..1.

    Returns:
        [B, L, D], tokens in (t, h, w) order, or [N, D] with `indices`; dtype of `weight` promoted with that of
        `pos_embed`. Gradients for weight, bias, pos_embed and a float video.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong shapes or devices, a video that tubelets do not divide, ids out of range, mean or std with a
            float video, a std that is not positive.
    """
    check_tensor("weight", weight, "[D, C, t, h, w]", 5)
    if 0 in weight.shape:
        raise ValueError(f"weight must have no size of 0, got {describe(weight)}")
    check_tensor("video", video, "[B, C, T, H, W]", 5, (torch.uint8, *FLOATS))
    check_device("weight", weight, "video", video)
    if video.dtype not in (torch.uint8, weight.dtype):
        raise TypeError(f"video must be uint8 or {weight.dtype} like weight, got {describe(video)}")
    channels, kernel = weight.shape[1], tuple(weight.shape[2:])
    if video.shape[1] != channels:
        raise ValueError(f"video must have the {channels} channels of weight, got {describe(video)}")
    if any(size % step or size == 0 for size, step in zip(video.shape[2:], kernel, strict=True)):
        raise ValueError(
            f"video must have frames, height and width divisible by the tubelet {kernel}, got {describe(video)}"
        )
    if bias is not None:
        check_tensor("bias", bias, "[D]", 1, (weight.dtype,))
        check_device("bias", bias, "video", video)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must have {weight.shape[0]} entries like weight, got {describe(bias)}")
    length = _tokens(video, weight)
    if pos_embed is not None:
        check_tensor("pos_embed", pos_embed, "[L, D]", 2)
        check_device("pos_embed", pos_embed, "video", video)
        if pos_embed.shape[0] != length or pos_embed.shape[1] != weight.shape[0]:
            raise ValueError(f"pos_embed must have the shape ({length}, {weight.shape[0]}), got {describe(pos_embed)}")
    mean_C, std_C = _constants("mean", mean, channels), _constants("std", std, channels)
    if video.dtype != torch.uint8 and (mean_C or std_C):
        raise ValueError(
            f"mean and std are for uint8 video (a float video is normalised already), got {describe(video)}"
        )
    if std_C is not None and not all(value > 0 for value in std_C):
        raise ValueError(f"std must be positive, got {std_C}")
    if indices is None:
        return torch.ops.vjepa.tubelet_embed(video, weight, bias, pos_embed, None, None, None, mean_C, std_C)
    check_token_indices("indices", indices, video.device)
    check_within("indices", indices, video.shape[0], length)
    return torch.ops.vjepa.tubelet_embed(
        video, weight, bias, pos_embed, indices.indices, indices.cu_seqlens, indices.clip, mean_C, std_C
    )
