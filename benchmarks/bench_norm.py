"""add_layer_norm against the addition, layer_norm and the cast as separate steps, as they are and compiled.

At the widths of ViT-L's encoder and predictor, on the tokens that these see in training. In bfloat16 the residual stays
float32, as under autocast: the branch and the normalised rows are bfloat16. Both outputs have a gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vjepa.kernels import add_layer_norm

from .harness import Work, compiled, dtype_name
from .workloads import NARROW, WIDTH, detached, doubles, masks

CLIPS = {"cuda": 24, "cpu": 2}
EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("width", [WIDTH, NARROW])
def bench_norm(compare, device, width, direction, dtype):
    clips, backward = CLIPS[device.type], direction != "forward"
    drawn = masks("truncate", clips)
    rows = drawn.context.total + (drawn.target.total if width == NARROW else 0)
    residual = torch.randn(rows, width, device=device) * 3 + 1
    branch = torch.randn(rows, width, device=device).to(dtype)
    affine = torch.randn(2, width, device=device) * 0.1 + 1
    given = [x.requires_grad_(backward) for x in (residual, branch, *affine.unbind())]
    grads = [torch.randn(rows, width, device=device), torch.randn(rows, width, device=device).to(dtype)]

    def separate(residual, branch, weight, bias):
        added = residual + branch
        normed = F.layer_norm(added, (width,), weight, bias, EPS)
        return added, normed if added.dtype == torch.float64 else normed.to(dtype)

    def ours(*given):
        return add_layer_norm(*given, eps=EPS, dtype=dtype)

    def step(function, *given):
        outputs = function(*given)
        if not backward:
            return outputs
        same = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
        return *outputs, *torch.autograd.grad(outputs, given, same)

    truth = step(separate, *doubles(*given))
    name = "add + layer_norm + cast" if dtype != torch.float32 else "add + layer_norm"
    peers = {name: separate, f"torch.compile of {name}": compiled(separate)}
    # forward: residual, branch, sum, normed; backward: sum, both gradients, and those of residual and, if it differs, branch
    own = dtype.itemsize
    moved = 2 * (4 + own) + ((4 + own + 4) + 4 + (own if dtype != torch.float32 else 0) if backward else 0)
    compare(
        Work(
            "norm",
            f"{rows / clips:.0f} tokens a clip of {width}, {direction}",
            dtype_name(dtype),
            {"residual": [rows, width]},
            "truncate",
            bytes_moved=rows * width * moved,
        ),
        "add_layer_norm",
        lambda: step(ours, *given),
        {name: lambda peer=peer: step(peer, *given) for name, peer in peers.items()},
        detached(*truth),
    )
