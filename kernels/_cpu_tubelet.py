"""tubelet_embed on a CPU: pixels gathered once, run by run, straight into the layout of the matrix product.

    out[i] = weight . patch(i) + bias + pos_embed[id(i)]

B clips, C channels, (t, h, w) tubelet, K = C t h w, L tokens of a clip, D features, N tokens wanted, n of them at a
time. A patch is R = C t h runs of w adjacent pixels, so that gathering patches is one `index_select` of runs, whatever
the other strides. Tokens go through gather, normalisation and product chunk by chunk, so that neither the clips nor
their patches exist as floats all at once. The product is torch's own (oneDNN, MKL), 2 N K D FLOP at the peak of the
machine; the gather moves N K pixels twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from . import reference

CHUNK = 1 << 22  # pixels at a time, at most 28 MB in all: 2730 tokens of ViT-L, for a weight reordered once a product
ROWS = 64  # a multiple of the rows of every tile of the product


def why_not(device: torch.device) -> str | None:
    """Why this path cannot serve tensors on `device`, or None."""
    return None if device.type == "cpu" else "it serves tensors on the CPU"


def unfit(video: Tensor, weight: Tensor) -> str | None:
    """Why this path cannot take these tensors, or None."""
    if video.stride(4) != 1 and weight.shape[4] > 1:
        return f"it needs the pixels of a row side by side, got the stride {video.stride(4)}"
    return None


@lru_cache(maxsize=64)
def _lattice(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Offsets of the points of a lattice, in order."""
    with torch.inference_mode(False):
        offsets = torch.zeros(1, dtype=torch.int64)
        for size, stride in zip(sizes, strides, strict=True):
            offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
        return offsets


def _chunks(
    video: Tensor,
    weight: Tensor,
    sets: tuple[Tensor, Tensor, Tensor] | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens, and their patches [n, K] in the dtype of weight, chunk after chunk."""
    _, channels, t, h, w = weight.shape
    clip_stride, *runs = video.stride()[:4]
    steps = (runs[1] * t, runs[2] * h, video.stride(4) * w)  # from tubelet to tubelet, by frame, row, column
    unit = math.gcd(clip_stride, *runs, *steps) or 1  # runs begin at its multiples: rows of a table, maybe overlapping
    grid = (video.shape[2] // t, video.shape[3] // h, video.shape[4] // w)
    tokens_L = _lattice(grid, tuple(step // unit for step in steps))
    if sets is None:
        clips_B = torch.arange(video.shape[0]) * (clip_stride // unit)
        first_N = (clips_B[:, None] + tokens_L).flatten()
    else:
        indices, cu_seqlens, clip = sets
        clips_N = reference.per_token(clip * (clip_stride // unit), cu_seqlens, indices.shape[0])
        first_N = tokens_L.index_select(0, indices).add_(clips_N)
    if first_N.shape[0] == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(video.shape, video.stride(), strict=True)) - (w - 1)
    table = video.as_strided((last // unit + 1, w), (unit, 1))
    runs_R = _lattice((channels, t, h), tuple(stride // unit for stride in runs))
    patch = weight[0].numel()
    most = max(1, CHUNK // patch // ROWS) * ROWS
    chunks = -(-first_N.shape[0] // most)
    step = -(-first_N.shape[0] // chunks // ROWS) * ROWS
    for start in range(0, first_N.shape[0], step):
        chosen = slice(start, min(start + step, first_N.shape[0]))
        pixels = table.index_select(0, (first_N[chosen, None] + runs_R).flatten())
        yield chosen, reference.normalised(pixels.view(-1, channels, patch // channels), weight.dtype, mean, std)


def tubelet_embed(
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
    """out = patches @ weight^T + bias + pos_embed; [N, D], or [B, L, D] without indices."""
    features, length = weight.shape[0], reference.num_tubelets(video, weight)
    shape = (video.shape[0], length) if indices is None else (indices.shape[0],)
    dtype = weight.dtype if pos_embed is None else torch.promote_types(weight.dtype, pos_embed.dtype)
    out = weight.new_empty((*shape, features), dtype=dtype)
    if out.numel() == 0:
        return out
    weight_KD = weight.reshape(features, -1).T
    out_ND = out.view(-1, features)
    sets = None if indices is None or cu_seqlens is None or clip is None else (indices, cu_seqlens, clip)
    for chosen, patches in _chunks(video, weight, sets, mean, std):
        rows = out_ND[chosen] if dtype == weight.dtype else weight.new_empty((patches.shape[0], features))
        if bias is None:
            torch.mm(patches, weight_KD, out=rows)
        else:
            torch.addmm(bias, patches, weight_KD, out=rows)
        if pos_embed is not None and indices is not None:
            torch.add(rows, pos_embed.index_select(0, indices[chosen]), out=out_ND[chosen])
        elif dtype != weight.dtype:
            out_ND[chosen] = rows
    return out.add_(pos_embed) if pos_embed is not None and indices is None else out


def tubelet_embed_backward(
    grad: Tensor,
    video: Tensor,
    weight: Tensor,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of video, weight, bias, pos_embed (empty where not in `needs`); patches are gathered again.

    All but that of weight are the reference's.
    """
    others = [needs[0], False, needs[2], needs[3]]
    grads = reference.tubelet_embed_backward(grad, video, weight, indices, cu_seqlens, clip, mean, std, dtypes, others)
    if not needs[1]:
        return grads
    sets = None if indices is None or cu_seqlens is None or clip is None else (indices, cu_seqlens, clip)
    low_ND = grad.reshape(-1, weight.shape[0]).to(weight.dtype)
    grad_weight = weight.new_zeros((weight.shape[0], weight[0].numel()))
    if weight.dtype == reference.accumulator(weight.dtype):
        for chosen, patches in _chunks(video, weight, sets, mean, std):
            grad_weight.addmm_(low_ND[chosen].T, patches)
    elif low_ND.shape[0]:  # one product, since sums between chunks would be rounded to 16 bits
        patches = weight.new_empty((low_ND.shape[0], grad_weight.shape[1]))
        for chosen, part in _chunks(video, weight, sets, mean, std):
            patches[chosen] = part
        torch.mm(low_ND.T, patches, out=grad_weight)
    return grads[0], grad_weight.view(weight.shape), *grads[2:]
