"""varlen_attention inside the sequences of a step, against every attention that is installed.

Lengths come from the mask sampler: context tokens for the encoders, context and target tokens for the predictor, which
attends in heads of 24 for ViT-L and ViT-H. Peers get q, k and v as views of a packed qkv, as ours does, and what they
need of offsets and masks for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.kernels import backend, varlen_attention

from .harness import Work, dtype_name
from .workloads import LENGTH, LONG, SHORT, masks

# Head_dim and heads: of the predictor (24 for ViT-L and ViT-H), and of the encoders of ViT-S to ViT-L (64) and ViT-H (80).
HEADS = {24: 16, 32: 12, 64: 16, 80: 16}
CLIPS = {"cuda": 24, "cpu": 1}
SHORTER = 4  # times as many of them on a CPU where sequences are short: one alone says little of many in a call
CASES = [  # what attends, packing, kinds of masks, head_dims
    ("predictor", "truncate", (SHORT, LONG), (24, 32)),
    ("predictor", "exact", (SHORT, LONG), (24, 32)),
    ("context", "truncate", (LONG,), (64,)),
    ("context", "exact", (SHORT, LONG), (64, 80)),
    ("whole clips", None, (), (64, 80)),
]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def lengths_of(what: str, packing: str | None, kinds: Sequence[tuple[int, float]], clips: int) -> tuple[int, ...]:
    if packing is None:
        return (LENGTH,) * clips
    drawn = masks(packing, clips, kinds)
    if what == "context":
        return tuple(drawn.context.lengths)
    return tuple(c + t for c, t in zip(drawn.context.lengths, drawn.target.lengths, strict=True))


def one_by_one(lengths: Sequence[int]) -> Attention:
    """A call for each sequence."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (x.transpose(0, 1).split(lengths, 1) for x in (q, k, v))
        out = [F.scaled_dot_product_attention(a[None], b[None], c[None])[0] for a, b, c in zip(*parts, strict=True)]
        return torch.cat(out, 1).transpose(0, 1)

    return attend


def padded(lengths: Sequence[int], device: torch.device) -> Attention:
    """One call for all, with padding and a mask on the keys where lengths differ; a reshape where they do not."""
    count, longest = len(lengths), max(lengths)
    if min(lengths) == longest:

        def rectangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (count, longest)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

        return rectangle
    real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    slots = real.flatten().nonzero().flatten()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, slots, x).unflatten(0, (count, longest))
            for x in (q, k, v)
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)

    return attend


def peers(lengths: Sequence[int], offsets: Tensor, dtype: torch.dtype) -> dict[str, Attention]:
    """Every attention that is installed and takes such tensors."""
    device, longest = offsets.device, max(lengths)
    found = {"SDPA, a call for each": one_by_one(lengths), "SDPA, one padded call": padded(lengths, device)}
    if device.type != "cuda" or dtype == torch.float32:
        return found
    found["SDPA, nested tensor"] = nested(offsets, longest)
    if find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        found["torch varlen_attn"] = lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest)
    if find_spec("flash_attn_2_cuda"):
        from flash_attn import flash_attn_varlen_func

        found["flash_attn 2"] = lambda q, k, v: flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest)
    if find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func as flash_attn_3

        found["flash_attn 3"] = lambda q, k, v: flash_attn_3(q, k, v, offsets, offsets, longest, longest)
    if find_spec("xformers"):
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        bias = BlockDiagonalMask.from_seqlens(list(lengths))
        found["xformers"] = lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], bias)[0]
    return found


def nested(offsets: Tensor, longest: int) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
            for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    return attend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize(("what", "packing", "kinds", "head_dims"), CASES, ids=lambda value: str(value))
def bench_attention(compare, device, what, packing, kinds, head_dims, head_dim, direction, dtype):
    if head_dim not in head_dims:
        pytest.skip(f"{what} have heads of {head_dims}")
    if dtype == torch.float32 and (device.type == "cuda" or what == "whole clips"):
        pytest.skip("float32 is measured on a CPU, for the trained networks")
    if device.type == "cpu" and (what, packing) == ("predictor", "exact"):
        pytest.skip("of the single clip that a CPU gets, nothing is truncated")
    heads, backward = HEADS[head_dim], direction != "forward"
    clips = CLIPS[device.type] * (SHORTER if device.type == "cpu" and what == "context" else 1)
    lengths = lengths_of(what, packing, kinds, clips)
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    qkv = torch.randn(total, 3, heads, head_dim, device=device).to(dtype).requires_grad_(backward)
    grad = torch.randn(total, heads, head_dim, device=device).to(dtype) if backward else None

    def step(attend: Attention, qkv: Tensor, grad: Tensor | None) -> object:
        out = attend(*qkv.unbind(1))
        return out if grad is None else (out, *torch.autograd.grad(out, (qkv,), grad))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, offsets, lengths)

    with backend("reference"):
        double = qkv.detach().double().requires_grad_(backward)
        truth = step(ours, double, None if grad is None else grad.double())
    pairs = sum(length**2 for length in lengths)
    compare(
        Work(
            "attention",
            f"{what}, {total / len(lengths):.0f} tokens a sequence, head_dim {head_dim}, {direction}",
            dtype_name(dtype),
            {"qkv": list(qkv.shape), "lengths": list(lengths)},
            packing,
            bytes_moved=(4 + 8 * backward) * total * heads * head_dim * qkv.element_size(),
            flop=(4 + 10 * backward) * heads * head_dim * pairs,
            exps=(1 + backward) * heads * pairs,
        ),
        "varlen_attention",
        lambda: step(ours, qkv, grad),
        {name: lambda peer=peer: step(peer, qkv, grad) for name, peer in peers(lengths, offsets, dtype).items()},
        tuple(tensor.detach() for tensor in (truth if backward else (truth,))),
    )
