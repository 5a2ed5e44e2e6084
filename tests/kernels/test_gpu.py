"""On a GPU: the same results as on the CPU, and no wait for the device anywhere in a step."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import (
    EMA,
    AdamWEMA,
    gather_tokens,
    masked_l1_loss,
    predictor_tokens,
    scatter_tokens,
    tubelet_embed,
    varlen_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]
L, D = 16, 32


class Step(torch.nn.Module):
    """Every differentiable operator once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D, 3, 2, 4, 4) / 10)
        self.bias = torch.nn.Parameter(torch.randn(D))
        self.mask_tokens = torch.nn.Parameter(torch.randn(2, D))
        self.register_buffer("pos", torch.randn(L, D))

    def attend(self, x, sets):
        q = x.unflatten(1, (2, D // 2))
        return x + varlen_attention(q, q * 0.5, q + 1, sets.cu_seqlens, sets.lengths).flatten(1)

    def forward(self, video, context, target, kind, features):
        norm = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}
        x = self.attend(tubelet_embed(video, self.weight, self.bias, self.pos, context, **norm), context)
        tokens, packed = predictor_tokens(x, self.mask_tokens, self.pos, context, target, kind)
        tokens = scatter_tokens(self.attend(tokens, packed), packed, L, fill=self.bias)
        return masked_l1_loss(gather_tokens(tokens, target), features, target)


def inputs(make_sets):
    context = make_sets((5, 9, 3, 3), L, (0, 1, 0, 1))
    target = make_sets((2, 4, 8, 1), L, (0, 1, 0, 1), seed=1, duplicates=True)
    video = torch.randint(0, 256, (2, 3, 2, 16, 16), dtype=torch.uint8)
    return video, context, target, torch.tensor([0, 0, 1, 1]), torch.randn(2, L, D)


def test_equals_the_cpu(make_sets):
    arguments, step = inputs(make_sets), Step()
    expected = step(*arguments)
    gradients = torch.autograd.grad(expected, list(step.parameters()))
    step.to("cuda")
    for _ in range(2):
        loss = step(*(argument.to("cuda") for argument in arguments))
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
        for ours, plain in zip(torch.autograd.grad(loss, list(step.parameters())), gradients, strict=True):
            torch.testing.assert_close(ours.cpu(), plain, rtol=1e-3, atol=1e-4)


def test_no_wait_for_the_device(make_sets):
    step, shadow = Step().cuda(), Step().cuda()
    arguments = [argument.to("cuda") for argument in inputs(make_sets)]
    optimizer = AdamWEMA(step.parameters(), list(shadow.parameters()), copies=torch.bfloat16)
    ema = EMA(shadow, step)

    def once():
        step(*arguments).backward()
        optimizer.step()
        ema.update(0.99)

    once()  # constants go to the device the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
