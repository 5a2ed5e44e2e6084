"""Host time of one call on tokens so few that nothing else counts, beside a plain PyTorch operation of the same kind.

On a GPU: until the call has queued its work. The peers do less (no ragged sets, no checks), so that ratios are below 1.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vjepa.kernels import (
    TokenIndices,
    add_layer_norm,
    gather_tokens,
    masked_l1_loss,
    mlp,
    predictor_tokens,
    scatter_tokens,
    tubelet_embed,
    varlen_attention,
)

from .clocks import HostClock, LaunchClock
from .harness import Work

CALLS = 30  # a sample; on a GPU few enough for its queue to take all
CLIPS, LENGTH, WIDTH = 2, 8, 16


def cases(device: torch.device, backward: bool) -> dict:
    """Of each operator: our call, its inputs that may have a gradient, the peer's name and call."""
    sets = TokenIndices.from_sets([torch.tensor([0, 3, 5]), torch.tensor([2, 7])]).to(device)
    rows = torch.tensor([0, 3, 5, 10, 15], device=device)
    video = torch.randn(CLIPS, 3, 2, 8, 8, device=device)
    weight = torch.randn(WIDTH, 3, 1, 4, 4, device=device, requires_grad=backward)
    x = torch.randn(CLIPS, LENGTH, WIDTH, device=device, requires_grad=backward)
    values = torch.randn(5, WIDTH, device=device, requires_grad=backward)
    tokens, pos = torch.randn(2, WIDTH, device=device), torch.randn(LENGTH, WIDTH, device=device)
    kind, patches = torch.tensor([0, 1], device=device), torch.randn(5, 48, device=device)
    features, flat = x.detach(), weight.detach().flatten(1).requires_grad_(backward)
    zeros = torch.zeros(CLIPS * LENGTH, WIDTH, device=device)
    heads = torch.randn(5, 2, WIDTH // 2, device=device, requires_grad=backward)
    square, ones = torch.randn(WIDTH, WIDTH, device=device), torch.ones(WIDTH, device=device)
    return {
        "tubelet_embed": (
            lambda: tubelet_embed(video, weight, indices=sets), weight, "linear", lambda: F.linear(patches, flat), flat
        ),
        "gather_tokens": (
            lambda: gather_tokens(x, sets), x, "index_select", lambda: x.view(-1, WIDTH).index_select(0, rows), x
        ),
        "scatter_tokens": (
            lambda: scatter_tokens(values, sets, LENGTH),
            values,
            "index_copy",
            lambda: zeros.index_copy(0, rows, values),
            values,
        ),
        "predictor_tokens": (
            lambda: predictor_tokens(values, tokens, pos, sets, sets, kind)[0],
            values,
            "cat",
            lambda: torch.cat((values, values)),
            values,
        ),
        "masked_l1_loss": (
            lambda: masked_l1_loss(values, features, sets),
            values,
            "l1_loss",
            lambda: F.l1_loss(values, patches[:, :WIDTH]),
            values,
        ),
        "varlen_attention": (
            lambda: varlen_attention(heads, heads, heads, sets.cu_seqlens, sets.lengths),
            heads,
            "scaled_dot_product_attention",
            lambda: F.scaled_dot_product_attention(*(heads.transpose(0, 1)[None],) * 3),
            heads,
        ),
        "add_layer_norm": (
            lambda: add_layer_norm(values, tokens[:1].expand(5, WIDTH), ones, ones)[1],
            values,
            "add + layer_norm",
            lambda: F.layer_norm(values + tokens[:1], (WIDTH,), ones, ones),
            values,
        ),
        "mlp": (
            lambda: mlp(values, square, ones, square, ones),
            values,
            "linear + gelu + linear",
            lambda: F.linear(F.gelu(F.linear(values, square, ones)), square, ones),
            values,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize(
    "op",
    [
        *("tubelet_embed", "gather_tokens", "scatter_tokens", "predictor_tokens", "masked_l1_loss", "varlen_attention"),
        *("add_layer_norm", "mlp"),
    ],
)
def bench_overhead(compare, device, op, direction):
    backward = direction != "forward"
    ours, our_leaf, name, peer, peer_leaf = cases(device, backward)[op]

    def step(call, leaf):
        out = call()
        return torch.autograd.grad(out, leaf, torch.ones_like(out)) if backward else out

    compare(
        Work("overhead", f"{op}, one call, {direction}", "float32", {"tokens": [5, WIDTH]}),
        op,
        lambda: step(ours, our_leaf),
        {name: lambda: step(peer, peer_leaf)},
        verify=lambda call, factor: call(),
        other_clock=LaunchClock(CALLS) if device.type == "cuda" else HostClock(CALLS),
    )
