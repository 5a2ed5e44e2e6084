"""The sdpa backend of varlen_attention: torch's own attention kernels, as few calls as the lengths allow.

Sequences of equal length share one call. On a CPU unlike lengths share one too, padded and with a mask on the keys,
while the padding costs less than another call; on other devices each sequence then has its own call, because the row
numbers for padding would have to be copied there.

N queries, M keys, G heads, E head_dim; a call takes `count` sequences as [count, G, n, E] and [count, G, m, E].
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulator, spans

# One more call of the CPU kernel is worth padding of up to so many FLOP of a forward pass. Alone on 2 AVX-512 cores it costs
# about 2 MFLOP (45 us); it also waits for every thread, which costs far more while loader workers share the cores.
CALL_FLOP = 4_000_000


class Side(NamedTuple):
    """Where the queries, or the keys, of a call lie: `size` padded tokens for each of its sequences."""

    size: int
    start: int  # first packed row, where the sequences follow each other without padding (then the rest is None)
    gather: Tensor | None  # packed row of each slot; a padding slot repeats the first row of its sequence
    slots: Tensor | None  # slots that are no padding (None: all), and
    rows: Tensor | None  # their packed rows


class Call(NamedTuple):
    """So many sequences share a call of the kernel."""

    sequences: int
    q: Side
    k: Side


def _side(members: list[int], pairs: list[tuple[int, int]]) -> Side:
    starts = torch.tensor([pairs[s][0] for s in members])[:, None]
    sizes = torch.tensor([pairs[s][1] - pairs[s][0] for s in members])[:, None]
    size = int(sizes.max())
    padded = int(sizes.min()) < size
    first, last = members[0], members[-1]
    if not padded and pairs[last][1] - pairs[first][0] == size * len(members):
        return Side(size, pairs[first][0], None, None, None)
    slot = torch.arange(size)
    gather = torch.where(slot < sizes, starts + slot, starts).flatten()
    if not padded:
        return Side(size, 0, gather, None, None)
    slots = (slot < sizes).flatten().nonzero().flatten()
    return Side(size, 0, gather, slots, gather[slots])


@lru_cache(maxsize=16)  # all layers of a network, forward and backward, ask with the same lengths
def plan(lengths: tuple[int, ...], kv_lengths: tuple[int, ...], width: int, pad: bool) -> tuple[Call, ...]:
    """The calls for sequences of these lengths; width = G*E; without `pad` no call needs row numbers."""
    pairs_q, pairs_k = spans(lengths), spans(kv_lengths)
    live = [s for s, length in enumerate(lengths) if length]
    equal = len(set(lengths)) == 1 and len(set(kv_lengths)) == 1
    groups: list[list[int]] = []
    if equal:
        groups = [live] if live else []
    elif not pad:
        groups = [[s] for s in live]
    else:
        for s in sorted(live, key=lambda s: (lengths[s], kv_lengths[s]), reverse=True):
            top = groups[-1][0] if groups else s
            n, m = lengths[top], kv_lengths[top]
            padding = 4 * width * (n * m - lengths[s] * kv_lengths[s])
            if groups and kv_lengths[s] <= m and padding <= CALL_FLOP:
                groups[-1].append(s)
            else:
                groups.append([s])
    return tuple(Call(len(group), _side(sorted(group), pairs_q), _side(sorted(group), pairs_k)) for group in groups)


def on_cpu(tensor: Tensor) -> bool:
    """Whether torch's CPU kernel, which tells its log-sum-exp and has a backward of its own, serves this tensor."""
    return tensor.device.type == "cpu"


def _calls(q: Tensor, lengths: Tensor, kv_lengths: Tensor) -> tuple[Call, ...]:
    width = q.shape[1] * q.shape[2]
    return plan(tuple(lengths.tolist()), tuple(kv_lengths.tolist()), width, on_cpu(q))


def _take(x: Tensor, side: Side, count: int) -> Tensor:
    """[N, G, E] -> [count, G, size, E]."""
    rows = x[side.start : side.start + count * side.size] if side.gather is None else x.index_select(0, side.gather)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()  # torch's CPU kernels take it for granted, and read other memory otherwise
    return rows.unflatten(0, (count, side.size)).transpose(1, 2)


def _flat(values: Tensor) -> Tensor:
    """[count, G, size, ...] -> [count*size, G, ...], without a copy of what torch's kernels return."""
    return values.transpose(1, 2).flatten(0, 1).contiguous()


def _take_sums(sums: Tensor, side: Side, count: int) -> Tensor:
    """[G, N] -> [count, G, size]."""
    rows = (
        sums[:, side.start : side.start + count * side.size]
        if side.gather is None
        else sums.index_select(1, side.gather)
    )
    return rows.unflatten(1, (count, side.size)).transpose(0, 1)


def _flat_sums(sums: Tensor) -> Tensor:
    """[count, G, size] -> [G, count*size], without a copy for one sequence."""
    return sums.transpose(0, 1).flatten(1).contiguous()


def _is_whole(calls: tuple[Call, ...], queries: int, keys: int) -> bool:
    """Whether a single call takes all queries and keys as they lie."""
    if len(calls) != 1:
        return False
    ((sequences, q, k),) = calls
    return q.gather is None and k.gather is None and (sequences * q.size, sequences * k.size) == (queries, keys)


def _put(out: Tensor, side: Side, values: Tensor) -> None:
    """[count, G, size, ...] into the packed rows of `out` [N, G, ...]."""
    flat = _flat(values)
    if side.gather is None:
        out[side.start : side.start + flat.shape[0]] = flat
    elif side.slots is None or side.rows is None:
        out.index_copy_(0, side.gather, flat)
    else:
        out.index_copy_(0, side.rows, flat.index_select(0, side.slots))


def _put_sums(out: Tensor, side: Side, sums: Tensor) -> None:
    """[count, G, size] into the packed columns of `out` [G, N]."""
    flat = _flat_sums(sums)
    if side.gather is None:
        out[:, side.start : side.start + flat.shape[1]] = flat
    elif side.slots is None or side.rows is None:
        out.index_copy_(1, side.gather, flat)
    else:
        out.index_copy_(1, side.rows, flat.index_select(1, side.slots))


def _key_mask(call: Call, like: Tensor) -> Tensor | None:
    """[count, 1, 1, m], -inf on padding."""
    if call.k.slots is None:
        return None
    mask = like.new_full((call.sequences * call.k.size,), float("-inf"))
    mask[call.k.slots] = 0
    return mask.reshape(call.sequences, 1, 1, call.k.size)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Results [count, G, n, E] and log-sum-exp [count, G, n] of a call."""
    q_c = _take(q, call.q, call.sequences)
    k_c, v_c = _take(k, call.k, call.sequences), _take(v, call.k, call.sequences)
    mask = _key_mask(call, q)
    if on_cpu(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_c, k_c, v_c, 0.0, False, attn_mask=mask, scale=scale
        )
    out = F.scaled_dot_product_attention(q_c, k_c, v_c, attn_mask=mask, scale=scale)
    return out, out.new_full(out.shape[:3], float("nan"), dtype=accumulator(q.dtype))


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
    """See reference.varlen_attention; off the CPU the log-sum-exp is NaN: torch's public function does not tell it."""
    calls = _calls(q, lengths, kv_lengths)
    if _is_whole(calls, q.shape[0], k.shape[0]):
        out_c, lse_c = _attend(calls[0], q, k, v, scale)
        return _flat(out_c), _flat_sums(lse_c)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator(q.dtype))
    for call in calls:
        out_c, lse_c = _attend(call, q, k, v, scale)
        _put(out, call.q, out_c)
        _put_sums(lse, call.q, lse_c)
    return out, lse


def _attend_backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [count, G, n or m, E] of a call."""
    count = call.sequences
    q_c, grad_c = _take(q, call.q, count), _take(grad, call.q, count)
    k_c, v_c = _take(k, call.k, count), _take(v, call.k, count)
    if call.q.slots is not None:  # padding must not send gradients to the keys
        real = grad.new_zeros(count * call.q.size)
        real[call.q.slots] = 1
        grad_c = grad_c * real.reshape(count, 1, call.q.size, 1)
    mask = _key_mask(call, q)
    if on_cpu(q):
        out_c, lse_c = _take(out, call.q, count), _take_sums(lse, call.q, count)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_c, q_c, k_c, v_c, out_c, lse_c, 0.0, False, attn_mask=mask, scale=scale
        )
    q_c, k_c, v_c = (x.detach().requires_grad_() for x in (q_c, k_c, v_c))
    with torch.enable_grad():
        again = F.scaled_dot_product_attention(q_c, k_c, v_c, attn_mask=mask, scale=scale)
    grad_q, grad_k, grad_v = torch.autograd.grad(again, (q_c, k_c, v_c), grad_c)
    return grad_q, grad_k, grad_v


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
    """See reference.varlen_attention_backward; off the CPU the forward pass runs again under autograd."""
    calls = _calls(q, lengths, kv_lengths)
    if _is_whole(calls, q.shape[0], k.shape[0]):
        grad_q, grad_k, grad_v = _attend_backward(calls[0], grad, q, k, v, out, lse, scale)
        return _flat(grad_q), _flat(grad_k), _flat(grad_v)
    grads = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for call in calls:
        grads_c = _attend_backward(call, grad, q, k, v, out, lse, scale)
        for target, side, values in zip(grads, (call.q, call.k, call.k), grads_c, strict=True):
            _put(target, side, values)
    return grads
