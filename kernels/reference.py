"""The operators in plain PyTorch: the specification, the fallback and the baseline. Imports torch alone.

B clips, C channels, T x H x W video, (t, h, w) tubelet, L tokens of a clip, D features, S sets, N packed tokens,
K = C*t*h*w values of a tubelet, G = number of heads, E = head_dim, M = kinds of mask tokens.
Sums run in float32 (float64 for float64 tensors) and in a fixed order; results are rounded once, to their own dtype.
Nothing here reads a device tensor on the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# -------------------------------------------------------------------------------------------------- rows of ragged sets

Sets = tuple[Tensor, Tensor, Tensor]  # indices [N], cu_seqlens [S+1], clip [S]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of `dtype` run."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_token(values_S: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """[S] -> [N]: each token gets the value of its set."""
    return torch.repeat_interleave(values_S, cu_seqlens.diff(), output_size=total)


def flat_rows(indices: Tensor, cu_seqlens: Tensor, clip: Tensor, length: int) -> Tensor:
    """Row of each packed token in a [B*L, ...] table, int64 [N]."""
    return per_token(clip, cu_seqlens, indices.shape[0]) * length + indices


def sum_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """out[r] = sum of values[i] with rows[i] = r, in the accumulator's dtype, always in the same order."""
    out = values.new_zeros((num_rows, *values.shape[1:]), dtype=accumulator(values.dtype))
    values = values.to(out.dtype)
    if values.device.type == "cpu":
        return out.index_add_(0, rows, values)  # adds row after row
    return out.index_put_((rows,), values, accumulate=True)  # sorts first; index_add_ would use atomics


# -------------------------------------------------------------------------------------------------------- tubelet embed


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, C, 1] constants, copied to the device once: each copy would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).reshape(1, -1, 1).to(device)


def _tubelets(video: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """A view [B, T/t, H/h, W/w, C, t, h, w]; splitting a dimension needs no copy whatever the strides."""
    t, h, w = kernel
    split = video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7)


def num_tubelets(video: Tensor, weight: Tensor) -> int:
    """L, the tubelets of a clip."""
    t, h, w = (size // step for size, step in zip(video.shape[2:], weight.shape[2:], strict=True))
    return t * h * w


def scale_and_shift(
    channels: int, mean: list[float] | None, std: list[float] | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[1, C, 1] factors and summands that turn bytes into (byte / 255 - mean) / std."""
    mean = mean or [0.0] * channels
    std = std or [1.0] * channels
    scale = _per_channel(tuple(1 / (255 * s) for s in std), device, dtype)
    return scale, _per_channel(tuple(-m / s for m, s in zip(mean, std, strict=True)), device, dtype)


def normalised(pixels: Tensor, dtype: torch.dtype, mean: list[float] | None, std: list[float] | None) -> Tensor:
    """[N, C, K/C] pixels -> [N, K] in `dtype`; bytes become (byte / 255 - mean) / std, computed wide, rounded once."""
    if pixels.dtype == torch.uint8:
        wide = accumulator(dtype)
        scale, shift = scale_and_shift(pixels.shape[1], mean, std, pixels.device, wide)
        pixels = pixels.to(wide).mul_(scale).add_(shift)
    return pixels.to(dtype).flatten(1)


def _patches(
    video: Tensor, weight: Tensor, sets: Sets | None, mean: list[float] | None, std: list[float] | None
) -> Tensor:
    """[N, K] (or [B*L, K]) pixels in the dtype of weight; only the kept tubelets are read."""
    channels = video.shape[1]
    tubelets = _tubelets(video, (weight.shape[2], weight.shape[3], weight.shape[4]))
    if sets is not None:
        indices, cu_seqlens, clip = sets
        _, _, rows, columns = tubelets.shape[:4]
        where = (
            per_token(clip, cu_seqlens, indices.shape[0]),
            indices // (rows * columns),
            indices // columns % rows,
            indices % columns,
        )
        tubelets = tubelets[where]
    return normalised(tubelets.reshape(-1, channels, weight[0, 0].numel()), weight.dtype, mean, std)


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
    sets = None if indices is None else (indices, cu_seqlens, clip)
    patches = _patches(video, weight, sets, mean, std)  # type: ignore[arg-type]
    out = F.linear(patches, weight.flatten(1), bias)
    if indices is None:
        out = out.unflatten(0, (video.shape[0], num_tubelets(video, weight)))
    if pos_embed is None:
        return out
    pos = pos_embed if indices is None else pos_embed.index_select(0, indices)
    return out + pos if out.dtype != pos.dtype else out.add_(pos)


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
    """Gradients of video, weight, bias, pos_embed (empty where not in `needs`); patches are gathered again."""
    need_video, need_weight, need_bias, need_pos = needs
    kernel = (weight.shape[2], weight.shape[3], weight.shape[4])
    grad_ND = grad.reshape(-1, weight.shape[0])
    low_ND = grad_ND.to(weight.dtype)
    wide = accumulator(grad.dtype)
    sets = None if indices is None else (indices, cu_seqlens, clip)

    grad_video, grad_weight, grad_pos = (grad.new_empty(0) for _ in range(3))
    if need_video:
        tubelets = torch.empty_like(video, memory_format=torch.contiguous_format)
        view = _tubelets(tubelets, kernel)
        patches = low_ND @ weight.flatten(1)
        if sets is not None:
            rows = flat_rows(sets[0], sets[1], sets[2], view[0, ..., 0, 0, 0, 0].numel())  # type: ignore[arg-type]
            patches = sum_rows(patches, rows, view[..., 0, 0, 0, 0].numel())
        view.copy_(patches.reshape(view.shape))
        grad_video = tubelets

    if need_weight:
        patches = _patches(video, weight, sets, mean, std)  # type: ignore[arg-type]
        grad_weight = (low_ND.T @ patches).reshape(weight.shape)

    bias_dtype, pos_dtype = dtypes
    grad_bias = grad_ND.sum(0, dtype=wide).to(bias_dtype) if need_bias else grad.new_empty(0)
    if need_pos:
        if indices is None:
            grad_pos = grad.sum(0, dtype=wide)
        else:
            grad_pos = sum_rows(grad_ND, indices, num_tubelets(video, weight))
        grad_pos = grad_pos.to(pos_dtype)
    return grad_video, grad_weight, grad_bias, grad_pos


# ------------------------------------------------------------------------------------------------------ gather, scatter


def gather_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor) -> Tensor:
    """out[i] = x[clip of i, indices[i]]; [N, D]."""
    return x.flatten(0, 1).index_select(0, flat_rows(indices, cu_seqlens, clip, x.shape[1]))


def gather_tokens_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, batch: int, length: int
) -> Tensor:
    """[B, L, D]: the sum of the gradients of each token's copies."""
    rows = flat_rows(indices, cu_seqlens, clip, length)
    return sum_rows(grad, rows, batch * length).to(grad.dtype).reshape(batch, length, grad.shape[1])


def _last_naming(rows: Tensor, num_rows: int) -> Tensor:
    """For each row the largest i with rows[i] = row, or -1; the maximum of integers does not depend on any order."""
    order = torch.arange(rows.shape[0], device=rows.device)
    return torch.full((num_rows,), -1, device=rows.device).scatter_reduce_(0, rows, order, "amax")


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
    """out[clip of i, indices[i]] = values[i], the last of duplicates wins; fill elsewhere; [B, L, D]."""
    features = values.shape[1]
    background = values.new_full((features,), fill_value) if fill is None else fill.to(values.dtype)
    if values.shape[0] == 0:
        return background.expand(batch, length, features).contiguous()
    last = _last_naming(flat_rows(indices, cu_seqlens, clip, length), batch * length)
    out = torch.where(last[:, None] >= 0, values.index_select(0, last.clamp(min=0)), background)
    return out.reshape(batch, length, features)


def scatter_tokens_backward(
    grad: Tensor, indices: Tensor, cu_seqlens: Tensor, clip: Tensor, fill_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Gradients of values [N, D] (zero for overwritten rows) and of the fill vector [D] (empty without fill_dtype)."""
    batch, length, _ = grad.shape
    rows = flat_rows(indices, cu_seqlens, clip, length)
    last = _last_naming(rows, batch * length)
    grad_rows = grad.flatten(0, 1)
    order = torch.arange(rows.shape[0], device=rows.device)
    kept = (last.index_select(0, rows) == order)[:, None]
    grad_values = torch.where(kept, grad_rows.index_select(0, rows), 0)
    if fill_dtype is None:
        return grad_values, grad.new_empty(0)
    unnamed = torch.where(last[:, None] < 0, grad_rows, 0)
    return grad_values, unnamed.sum(0, dtype=accumulator(grad.dtype)).to(fill_dtype)


# ------------------------------------------------------------------------------------------------------------ attention


def spans(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Start and stop of each sequence in the packed tokens."""
    pairs, start = [], 0
    for length in lengths:
        pairs.append((start, start + length))
        start += length
    return pairs


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
    """out = softmax(scale q k^T) v inside each sequence, [N, G, E], and its log-sum-exp [G, N]."""
    wide = accumulator(q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=wide)
    for (q0, q1), (k0, k1) in zip(spans(lengths.tolist()), spans(kv_lengths.tolist()), strict=True):
        scores = torch.einsum("qge,kge->gqk", q[q0:q1].to(wide), k[k0:k1].to(wide)) * scale
        lse[:, q0:q1] = torch.logsumexp(scores, -1)
        out[q0:q1] = torch.einsum("gqk,kge->qge", torch.softmax(scores, -1), v[k0:k1].to(wide)).to(out.dtype)
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
    """With P = softmax(scale q k^T), dS = P (dO v^T - rowsum(dO * O)): dq = scale dS k, dk = scale dS^T q, dv = P^T dO.

    P is computed again from the scores, so that gradients are right whatever backend made `lse`."""
    wide = accumulator(q.dtype)
    grads = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for (q0, q1), (k0, k1) in zip(spans(lengths.tolist()), spans(kv_lengths.tolist()), strict=True):
        q_s, k_s, v_s = q[q0:q1].to(wide), k[k0:k1].to(wide), v[k0:k1].to(wide)
        grad_s = grad[q0:q1].to(wide)
        probs = torch.softmax(torch.einsum("qge,kge->gqk", q_s, k_s) * scale, -1)
        delta = (grad_s * out[q0:q1].to(wide)).sum(-1).T[..., None]
        grad_scores = probs * (torch.einsum("qge,kge->gqk", grad_s, v_s) - delta) * scale
        grads[0][q0:q1] = torch.einsum("gqk,kge->qge", grad_scores, k_s).to(q.dtype)
        grads[1][k0:k1] = torch.einsum("gqk,qge->kge", grad_scores, q_s).to(k.dtype)
        grads[2][k0:k1] = torch.einsum("gqk,qge->kge", probs, grad_s).to(v.dtype)
    return grads


# ---------------------------------------------------------------------------------------------------- predictor's input


def _slots(own_cu: Tensor, other_cu: Tensor, total: int) -> Tensor:
    """Where the packed tokens of one half land, if other_cu [S] tokens of the other half come before those of a set."""
    return torch.arange(total, device=own_cu.device) + per_token(other_cu.long(), own_cu, total)


def predictor_tokens(
    context: Tensor,
    mask_tokens: Tensor,
    pos_embed: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per set context + pos[ids], then mask_tokens[kind mod M] + pos[ids], packed; with their ids and offsets."""
    num_context, num_target = context_indices.shape[0], target_indices.shape[0]
    slots = torch.cat((_slots(context_cu, target_cu[:-1], num_context), _slots(target_cu, context_cu[1:], num_target)))
    order = torch.empty_like(slots)
    order[slots] = torch.arange(slots.shape[0], device=slots.device)
    dtype = torch.promote_types(torch.promote_types(context.dtype, mask_tokens.dtype), pos_embed.dtype)
    kinds_N = per_token(kind.long() % mask_tokens.shape[0], target_cu, num_target)
    halves = torch.cat(
        (
            context.to(dtype) + pos_embed.index_select(0, context_indices),
            mask_tokens.to(dtype).index_select(0, kinds_N) + pos_embed.index_select(0, target_indices),
        )
    )
    indices = torch.cat((context_indices, target_indices)).index_select(0, order)
    return halves.index_select(0, order), indices, context_cu + target_cu


def predictor_tokens_backward(
    grad: Tensor,
    context_indices: Tensor,
    context_cu: Tensor,
    target_indices: Tensor,
    target_cu: Tensor,
    kind: Tensor,
    num_kinds: int,
    length: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of context, mask_tokens and pos_embed (empty where not in `needs`)."""
    num_context, num_target = context_indices.shape[0], target_indices.shape[0]
    wide = accumulator(grad.dtype)
    grad_c = grad.index_select(0, _slots(context_cu, target_cu[:-1], num_context))
    grad_t = grad.index_select(0, _slots(target_cu, context_cu[1:], num_target))
    grad_mask, grad_pos = grad.new_empty(0), grad.new_empty(0)
    if needs[1]:
        kinds_N = per_token(kind.long() % num_kinds, target_cu, num_target)
        chosen = kinds_N == torch.arange(num_kinds, device=kind.device)[:, None]  # [M, Nt]: the sums become one product
        grad_mask = (chosen.to(wide) @ grad_t.to(wide)).to(dtypes[1])
    if needs[2]:
        ids = torch.cat((context_indices, target_indices))
        grad_pos = sum_rows(torch.cat((grad_c, grad_t)), ids, length).to(dtypes[2])
    return grad_c.to(dtypes[0]) if needs[0] else grad.new_empty(0), grad_mask, grad_pos


# ----------------------------------------------------------------------------------------------------------------- loss


def token_shares(cu_seqlens: Tensor, weights: Tensor | None, total: int, dtype: torch.dtype) -> Tensor:
    """[N] share of each token in the loss: w_i / (S * sum of w over its set), with w = 1 without weights."""
    sets = cu_seqlens.shape[0] - 1
    if weights is None:
        return per_token(1 / (sets * cu_seqlens.diff().to(dtype)), cu_seqlens, total)
    set_ids = per_token(torch.arange(sets, device=cu_seqlens.device), cu_seqlens, total)
    return weights.to(dtype) / (sets * sum_rows(weights.to(dtype), set_ids, sets)).index_select(0, set_ids)


def masked_l1_loss(
    prediction: Tensor, features: Tensor, sets: Sets, eps: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss and, for the backward pass, mean and 1 / sqrt(var + eps) of each named row of features, [N, 2]."""
    wide = accumulator(prediction.dtype)
    rows = gather_tokens(features, *sets).to(wide)
    target, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)
    shares = token_shares(sets[1], weights, rows.shape[0], wide)
    return (target.sub_(prediction).abs_().mean(1) * shares).sum(), torch.cat((mean, rstd), 1)


def masked_l1_loss_backward(
    grad: Tensor, prediction: Tensor, features: Tensor, sets: Sets, statistics: Tensor, weights: Tensor | None
) -> Tensor:
    """d loss / d prediction = share of the token * sign(prediction - target) / D, [N, D]."""
    mean, rstd = statistics.split(1, 1)
    target = gather_tokens(features, *sets).to(statistics.dtype).sub_(mean).mul_(rstd)
    shares = token_shares(sets[1], weights, target.shape[0], target.dtype) * (grad / target.shape[1])
    return torch.sub(prediction, target).sign_().mul_(shares[:, None]).to(prediction.dtype)
