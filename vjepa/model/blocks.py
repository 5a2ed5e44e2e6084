"""The pre-norm transformer block over packed sequences.

    x <- x + proj(attention(qkv(norm1(x))))
    x <- x + fc2(gelu(fc1(norm2(x))))                x [N, D]: the tokens of all sequences, one after the other

Matrix products run in the precision of `vjepa.model.precision`, while x stays in that of the tokens; norms are computed in
it too, and rounded once, to that of the product which takes them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vjepa.kernels import add_layer_norm, mlp, varlen_attention
from vjepa.kernels._linear import linear
from vjepa.model.precision import Linear, product_dtype

LAYER_NORM_EPS = 1e-6  # of every norm in encoder and predictor; the released weights were trained with it


class Wanted(NamedTuple):
    """The tokens whose result is wanted: int64 [M] rows of the packed tokens, and how they lie in sequences of their own."""

    rows: Tensor
    cu_seqlens: Tensor
    lengths: Sequence[int] | Tensor


class Attention(nn.Module):
    """Multi-head self-attention inside each packed sequence: [N, D] -> [N, D], or [M, D] of the wanted tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | Tensor, wanted: Wanted | None = None
    ) -> Tensor:
        if wanted is None:
            q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
            return self.proj(varlen_attention(q, k, v, cu_seqlens, lengths).flatten(1))
        width, weight, bias = x.shape[1], self.qkv.weight, self.qkv.bias
        q = linear(x.index_select(0, wanted.rows), weight[:width], bias[:width]).unflatten(1, (self.num_heads, -1))
        k, v = linear(x, weight[width:], bias[width:]).view(x.shape[0], 2, self.num_heads, -1).unbind(1)
        found = varlen_attention(
            q, k, v, wanted.cu_seqlens, wanted.lengths, kv_cu_seqlens=cu_seqlens, kv_lengths=lengths
        )
        return self.proj(found.flatten(1))


class MLP(nn.Module):
    """Two linear maps with an exact GELU between them: [N, D] -> [N, D]. The GELU is not kept for the backward pass."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised sum and added to it: x, branch [N, D] -> x, branch [N, D].

    The tokens before the block are x + branch (`branch` None: x), and so after it: the last addition is left to the norm
    that follows, which does both in one pass over memory. With `wanted` tokens, [M, D] of these alone: all are keys and
    values, nothing else is computed of the others.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        cu_seqlens: Tensor,
        lengths: Sequence[int] | Tensor,
        wanted: Wanted | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, normed = add_norm(x, branch, self.norm1, product_dtype(self.attn.qkv.weight))
        branch = self.attn(normed, cu_seqlens, lengths, wanted)
        if wanted is not None:
            x = x.index_select(0, wanted.rows)
        x, normed = add_norm(x, branch, self.norm2, product_dtype(self.mlp.fc1.weight))
        return x, self.mlp(normed)


def add_norm(x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum, and its norm in `dtype`, that of the matrix product which takes it."""
    return add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps, dtype=dtype)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int] | Tensor,
    checkpointing: bool,
    wanted: Wanted | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`blocks` one after the other, to x and branch; the last one gives the `wanted` tokens alone.

    With `checkpointing` only sums are kept for the backward pass.
    """
    branch = None
    for number, block in enumerate(blocks, 1):
        its = wanted if number == len(blocks) else None
        if checkpointing and torch.is_grad_enabled():
            # no block draws random numbers, so there is no generator state to keep
            x = checkpoint(_summed, block, x, cu_seqlens, lengths, its, use_reentrant=False, preserve_rng_state=False)
        else:
            x, branch = block(x, branch, cu_seqlens, lengths, its)
    return x, branch


def _summed(
    block: nn.Module, x: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | Tensor, wanted: Wanted | None
) -> Tensor:
    x, branch = block(x, None, cu_seqlens, lengths, wanted)
    return x + branch
