"""masked_l1_loss against layer_norm, gather and L1 as separate steps, in either order, and both compiled.

Peers compute the layer norm in float32, as autocast does, and get each token's share of the loss for nothing.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vjepa.kernels import masked_l1_loss

from .harness import Work, compiled, dtype_name
from .workloads import LENGTH, WIDTH, detached, doubles, masks, per_token, rows_of

CLIPS = {"cuda": 24, "cpu": 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def bench_loss(compare, device, direction, dtype):
    clips, backward = CLIPS[device.type], direction != "forward"
    targets = masks("truncate", clips).target.to(device)
    rows, shape = rows_of(targets), (clips, LENGTH, WIDTH)
    lengths = torch.tensor(targets.lengths, device=device)
    share = per_token(1 / (targets.num_sets * lengths.double()), targets)
    features = (torch.randn(shape, device=device) * 3 + 1).to(dtype)
    # no difference is near 0, where its sign, the gradient, would depend on rounding
    away = torch.empty(targets.total, WIDTH, device=device).uniform_(0.5, 1.5)
    away = away * torch.randint(0, 2, away.shape, device=device).mul_(2).sub_(1)
    normal = F.layer_norm(features.float(), (WIDTH,)).view(-1, WIDTH).index_select(0, rows)
    prediction = (normal + away).to(dtype).requires_grad_(backward)
    del away, normal

    def wide(x):
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def distance(prediction, target):
        return ((wide(prediction) - target).abs().mean(1) * share.to(target.dtype)).sum()

    def norm_first(prediction, features):
        normal = F.layer_norm(wide(features), (WIDTH,))
        return distance(prediction, normal.view(-1, WIDTH).index_select(0, rows))

    def gather_first(prediction, features):
        return distance(prediction, F.layer_norm(wide(features.view(-1, WIDTH).index_select(0, rows)), (WIDTH,)))

    def step(loss, prediction, features):
        out = loss(prediction, features)
        return (out, *torch.autograd.grad(out, (prediction,))) if backward else out

    truth = step(norm_first, *doubles(prediction, features))
    peers = {"layer_norm + gather + L1": norm_first, "gather + layer_norm + L1": gather_first}
    peers |= {f"torch.compile of {name}": compiled(loss) for name, loss in peers.items()}
    # read the predictions and the rows of the targets; backward: write the gradient
    moved = (3 if backward else 2) * targets.total * WIDTH * prediction.element_size()
    compare(
        Work(
            "loss",
            f"{targets.total / clips:.0f} targets a clip, {direction}",
            dtype_name(dtype),
            {"prediction": list(prediction.shape), "features": list(shape)},
            "truncate",
            bytes_moved=moved,
        ),
        "masked_l1_loss",
        lambda: step(lambda *given: masked_l1_loss(*given, targets), prediction, features),
        {name: lambda loss=loss: step(loss, prediction, features) for name, loss in peers.items()},
        detached(*(truth if backward else (truth,))),
    )
