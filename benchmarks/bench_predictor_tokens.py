"""predictor_tokens against plain PyTorch: rectangles joined clip by clip where masks are truncated, else one index_select.

Peers get the ids of each rectangle, or the order of the packed rows, for nothing.
"""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import predictor_tokens

from .harness import Work, compiled, dtype_name
from .workloads import LENGTH, NARROW, detached, doubles, masks, per_token, rectangles

CLIPS = {"cuda": 24, "cpu": 4}


def rectangular(clips, batch):
    """The usual code: for each mask kind cat((context + pos, mask token + pos), 1)."""
    context_ids, target_ids = rectangles(batch.context, clips), rectangles(batch.target, clips)
    sizes = [ids.numel() for ids in context_ids]

    def build(context, mask_tokens, pos_embed):
        parts = []
        for kind, part in enumerate(context.split(sizes)):
            seen = part.view(clips, -1, NARROW) + pos_embed[context_ids[kind]]
            hidden = mask_tokens[kind] + pos_embed[target_ids[kind]]
            parts.append(torch.cat((seen, hidden), 1).view(-1, NARROW))
        return torch.cat(parts)

    return build


def ragged(batch):
    """Both halves in one piece each, then rows in the order of the sets."""
    context, target = batch.context, batch.target
    first_kind = per_token(batch.kind, target)[:, None] == 0
    sets = torch.arange(context.num_sets, device=first_kind.device)
    order = torch.cat((per_token(sets, context), per_token(sets, target))).argsort(stable=True)

    def build(context_rows, mask_tokens, pos_embed):
        seen = context_rows + pos_embed.index_select(0, context.indices)
        hidden = torch.where(first_kind, mask_tokens[0], mask_tokens[1]) + pos_embed.index_select(0, target.indices)
        return torch.cat((seen, hidden)).index_select(0, order)

    return build


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("packing", ["truncate", "exact"])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def bench_predictor_tokens(compare, device, direction, packing, dtype):
    clips, backward = CLIPS[device.type], direction != "forward"
    batch = masks(packing, clips).to(device)
    total = batch.context.total + batch.target.total
    context = torch.randn(batch.context.total, NARROW, device=device).to(dtype).requires_grad_(backward)
    mask_tokens = torch.randn(2, NARROW, device=device).to(dtype).requires_grad_(backward)
    pos_embed = torch.randn(LENGTH, NARROW, device=device).to(dtype)
    grad = torch.randn(total, NARROW, device=device).to(dtype) if backward else None

    def step(build, context, mask_tokens, pos_embed, grad):
        out = build(context, mask_tokens, pos_embed)
        return (out, *torch.autograd.grad(out, (context, mask_tokens), grad)) if backward else out

    def ours(*inputs):
        return predictor_tokens(*inputs, batch.context, batch.target, batch.kind)[0]

    inputs = (context, mask_tokens, pos_embed)
    plain = rectangular(clips, batch) if packing == "truncate" else ragged(batch)
    fast = compiled(plain)
    truth = step(plain, *doubles(*inputs), None if grad is None else grad.double())
    # read the context, write all; backward: read all, write the context (positions stay in the cache)
    moved = (batch.context.total + total) * NARROW * (2 if backward else 1) * context.element_size()
    name = "cat of rectangles" if packing == "truncate" else "cat + index_select"
    compare(
        Work(
            "predictor_tokens",
            f"{total / clips / 2:.0f} tokens a set, {direction}",
            dtype_name(dtype),
            {"context": list(context.shape), "out": [total, NARROW]},
            packing,
            bytes_moved=moved,
        ),
        "predictor_tokens",
        lambda: step(ours, *inputs, grad),
        {
            name: lambda: step(plain, *inputs, grad),
            f"torch.compile of {name}": lambda: step(fast, *inputs, grad),
        },
        detached(*(truth if backward else (truth,))),
    )
