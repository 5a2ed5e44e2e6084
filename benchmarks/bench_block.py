"""A whole transformer block of the predictor (384 wide, heads of 24) and of the encoder of ViT-L (1024 wide, heads of 64).

The peers are the same block as one writes it in PyTorch, with each attention that is installed, and compiled. In bfloat16
all run under autocast: weights and residual are float32, products and attention bfloat16. Our backends are forced on
attention, norms and MLP alike.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.model.blocks import LAYER_NORM_EPS, Block

from .bench_attention import HEADS, Attention, lengths_of, peers
from .harness import Work, compiled, dtype_name
from .workloads import LONG, NARROW, SHORT, WIDTH

CLIPS = {"cuda": 24, "cpu": 1}
BLOCKS = {
    "predictor": (NARROW, 24, (SHORT, LONG)),
    "context": (WIDTH, 64, (SHORT, LONG)),
}  # width, head_dim, kinds of masks
MLP_RATIO = 4


def plain(block: Block, heads: int, attend: Attention) -> Callable[[Tensor], Tensor]:
    """The block in PyTorch's own functions, on the same weights."""

    def forward(x: Tensor) -> Tensor:
        shape = (x.shape[1],)
        normed = F.layer_norm(x, shape, block.norm1.weight, block.norm1.bias, LAYER_NORM_EPS)
        q, k, v = block.attn.qkv(normed).view(x.shape[0], 3, heads, -1).unbind(1)
        x = x + block.attn.proj(attend(q, k, v).flatten(1))
        normed = F.layer_norm(x, shape, block.norm2.weight, block.norm2.bias, LAYER_NORM_EPS)
        return x + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))

    return forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("what", BLOCKS)
def bench_block(compare, device, what, direction, dtype):
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("float32 is measured on a CPU")
    if dtype == torch.float32 and what != "predictor":
        pytest.skip("float32 is measured in the predictor")
    width, head_dim, kinds = BLOCKS[what]
    heads, backward = HEADS[head_dim], direction != "forward"
    lengths = lengths_of(what, "truncate", kinds, CLIPS[device.type])
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    block = Block(width, heads, MLP_RATIO).to(device)
    x = torch.randn(total, width, device=device).requires_grad_(backward)
    grad = torch.randn(total, width, device=device)
    low = dtype != torch.float32

    def step(function: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> object:
        with (
            torch.set_grad_enabled(backward),
            torch.autocast(device.type, dtype, enabled=low and x.dtype != torch.float64),
        ):
            out = function(x)
        if not backward:
            return out
        grads = torch.autograd.grad(out, (x, *parameters), grad.to(out.dtype))
        return (
            out,
            *(found for found in grads if found.ndim == 2),
        )  # sums of rows are as exact as the order they are in

    def ours(x: Tensor) -> Tensor:
        """One block of many: x and branch are added by the norm of the next, which is no part of this."""
        x, branch = block(x, None, offsets, lengths)
        return x + branch

    double = Block(width, heads, MLP_RATIO).to(device, torch.float64)
    double.load_state_dict(block.state_dict())
    attentions = peers(lengths, offsets, dtype)
    exact = next(iter(peers(lengths, offsets, torch.float32).values()))
    truth = step(plain(double, heads, exact), x.detach().double().requires_grad_(backward), list(double.parameters()))
    rivals = {f"PyTorch, {name}": plain(block, heads, attend) for name, attend in attentions.items()}
    name = "torch varlen_attn" if "torch varlen_attn" in attentions else next(iter(attentions))
    rivals[f"torch.compile of PyTorch, {name}"] = compiled(plain(block, heads, attentions[name]))
    pairs = sum(length**2 for length in lengths)
    products = 2 * total * width**2 * (4 + 2 * MLP_RATIO)
    parameters = list(block.parameters())
    compare(
        Work(
            "block",
            f"{what}, {total / len(lengths):.0f} tokens a sequence, {width} wide, {direction}",
            dtype_name(dtype),
            {"x": [total, width], "lengths": list(lengths)},
            "truncate",
            flop=products * (3 if backward else 1) + (14 if backward else 4) * width * pairs,
        ),
        "varlen_attention",
        lambda: step(ours, x, parameters),
        {name: lambda rival=rival: step(rival, x, parameters) for name, rival in rivals.items()},
        tuple(tensor.detach() for tensor in (truth if backward else (truth,))),
    )
