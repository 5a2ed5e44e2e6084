"""mlp against linear, the exact GELU and linear as separate steps, as they are and compiled.

At the widths of ViT-L's encoder and predictor, on the tokens that these see in training. Weights are in the dtype of the
tokens, as under autocast once it has cast them; forward alone keeps nothing for a backward pass.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vjepa.kernels import mlp

from .harness import Work, compiled, dtype_name
from .workloads import NARROW, WIDTH, detached, doubles, masks

CLIPS = {"cuda": 24, "cpu": 1}
RATIO = 4  # hidden features to features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("width", [WIDTH, NARROW])
def bench_mlp(compare, device, width, direction, dtype):
    clips, backward = CLIPS[device.type], direction != "forward"
    drawn = masks("truncate", clips)
    rows, hidden = drawn.context.total + (drawn.target.total if width == NARROW else 0), RATIO * width
    weight1, weight2 = (torch.randn(hidden, width, device=device) * width**-0.5 for _ in range(2))
    weight2 = weight2.T.contiguous() / RATIO**0.5
    bias1, bias2 = torch.randn(hidden, device=device), torch.randn(width, device=device)
    tensors = (torch.randn(rows, width, device=device), weight1, bias1, weight2, bias2)
    given = [x.to(dtype).requires_grad_(backward) for x in tensors]
    grad = torch.randn(rows, width, device=device).to(dtype)

    def separate(x, weight1, bias1, weight2, bias2):
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    def step(function, *given):
        out = function(*given)
        if not backward:
            return out
        # the gradient of bias2 is a plain sum, of all contenders; compiled for a CPU, it adds row after row and is no match
        return (out, *torch.autograd.grad(out, given, grad.to(out.dtype))[:-1])

    exact = step(separate, *doubles(*given))
    name = "linear + gelu + linear"
    peers = {name: separate, f"torch.compile of {name}": compiled(separate)}
    # of the tokens: x, hidden twice, y; backward: dy, hidden, dhidden, a; dy, a; dhidden, dx; dhidden, x; dy
    moved = (2 + 2 * RATIO) if not backward else (2 + 3 * RATIO) + (5 + 6 * RATIO)
    compare(
        Work(
            "mlp",
            f"{rows / clips:.0f} tokens a clip of {width}, {direction}",
            dtype_name(dtype),
            {"x": [rows, width], "weight1": [hidden, width]},
            "truncate",
            bytes_moved=rows * width * dtype.itemsize * moved,
            flop=(3 if backward else 1) * 4 * rows * width * hidden,
        ),
        "mlp",
        lambda: step(mlp, *given),
        {name: lambda peer=peer: step(peer, *given) for name, peer in peers.items()},
        detached(*(exact if backward else (exact,))),
    )
