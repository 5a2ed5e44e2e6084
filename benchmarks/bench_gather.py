"""gather_tokens and scatter_tokens against index_select, index_copy and the expanded gather of the usual masking code.

Masks are truncated, because the expanded gather needs rectangles; peers get the rows in [B * L, D] for nothing.
"""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import gather_tokens, scatter_tokens

from .harness import Work, compiled, dtype_name
from .workloads import LENGTH, SHORT, WIDTH, detached, masks, rectangles, rows_of

CLIPS = {"cuda": 24, "cpu": 4}
DTYPES = [torch.bfloat16, torch.float32]


def forward_backward(function, x, grad):
    """The output, and the gradient of x if there is a `grad` of the output."""
    out = function(x)
    return out if grad is None else (out, *torch.autograd.grad(out, (x,), grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def bench_gather(compare, device, direction, dtype):
    clips, backward = CLIPS[device.type], direction != "forward"
    sets = masks("truncate", clips).context.to(device)
    rows, shape = rows_of(sets), (clips, LENGTH, WIDTH)
    columns = [ids[..., None].expand(-1, -1, WIDTH) for ids in rectangles(sets, clips)]
    x = torch.randn(shape, device=device).to(dtype).requires_grad_(backward)
    grad = torch.randn(sets.total, WIDTH, device=device).to(dtype) if backward else None

    def select(x):
        return x.view(-1, WIDTH).index_select(0, rows)

    def expanded(x):
        return torch.cat([torch.gather(x, 1, column).view(-1, WIDTH) for column in columns])

    fast = compiled(select)
    truth = forward_backward(
        select, x.detach().double().requires_grad_(backward), None if grad is None else grad.double()
    )
    moved = 2 * sets.total * WIDTH + (sets.total + x[..., 0].numel()) * WIDTH * backward
    compare(
        Work(
            "gather",
            f"gather, {sets.total / clips:.0f} tokens a clip, {direction}",
            dtype_name(dtype),
            {"x": list(shape), "out": [sets.total, WIDTH]},
            "truncate",
            bytes_moved=moved * x.element_size(),
        ),
        "gather_tokens",
        lambda: forward_backward(lambda x: gather_tokens(x, sets), x, grad),
        {
            "index_select": lambda: forward_backward(select, x, grad),
            "expanded gather": lambda: forward_backward(expanded, x, grad),
            "torch.compile of index_select": lambda: forward_backward(fast, x, grad),
        },
        detached(*(truth if backward else (truth,))),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def bench_scatter(compare, device, direction, dtype):
    clips, backward = CLIPS[device.type], direction != "forward"
    sets = masks("truncate", clips, [SHORT]).context.to(device)
    rows, shape = rows_of(sets), (clips, LENGTH, WIDTH)
    (ids,) = rectangles(sets, clips)
    columns = ids[..., None].expand(-1, -1, WIDTH)
    values = torch.randn(sets.total, WIDTH, device=device).to(dtype).requires_grad_(backward)
    grad = torch.randn(shape, device=device).to(dtype) if backward else None

    def copy(values):
        return values.new_zeros(clips * LENGTH, WIDTH).index_copy(0, rows, values).view(shape)

    def expanded(values):
        return values.new_zeros(shape).scatter(1, columns, values.view(clips, -1, WIDTH))

    fast = compiled(copy)
    truth = forward_backward(
        copy, values.detach().double().requires_grad_(backward), None if grad is None else grad.double()
    )
    moved = (sets.total + clips * LENGTH) * WIDTH + 2 * sets.total * WIDTH * backward
    compare(
        Work(
            "gather",
            f"scatter, {sets.total / clips:.0f} tokens a clip, {direction}",
            dtype_name(dtype),
            {"values": [sets.total, WIDTH], "out": list(shape)},
            "truncate",
            bytes_moved=moved * values.element_size(),
        ),
        "scatter_tokens",
        lambda: forward_backward(lambda values: scatter_tokens(values, sets, LENGTH), values, grad),
        {
            "index_copy": lambda: forward_backward(copy, values, grad),
            "expanded scatter": lambda: forward_backward(expanded, values, grad),
            "torch.compile of index_copy": lambda: forward_backward(fast, values, grad),
        },
        detached(*(truth if backward else (truth,))),
    )
