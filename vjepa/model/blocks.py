"""The pre-norm transformer block over packed sequences.

    x <- x + proj(attention(qkv(norm1(x))))
    x <- x + fc2(gelu(fc1(norm2(x))))                x [N, D]: the tokens of all sequences, one after the other

Under autocast the matrix products run in the low precision, while x stays in the weights' precision; norms are computed
in it too, and rounded once, to that of the product which takes them.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vjepa.kernels import add_layer_norm, varlen_attention

LAYER_NORM_EPS = 1e-6  # of every norm in encoder and predictor; the released weights were trained with it


class Attention(nn.Module):
    """Multi-head self-attention inside each packed sequence: [N, D] -> [N, D]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        return self.proj(varlen_attention(q, k, v, cu_seqlens, lengths).flatten(1))


class MLP(nn.Module):
    """Two linear maps with an exact GELU between them: [N, D] -> [N, D]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it: [N, D] -> [N, D]."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        _, normed = _add_norm(x, None, self.norm1)
        x, normed = _add_norm(x, self.attn(normed, cu_seqlens, lengths), self.norm2)
        return x + self.mlp(normed)


def _add_norm(x: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The sum, and its norm in the precision of the matrix products that take it."""
    return add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int] | Tensor,
    checkpointing: bool,
) -> Tensor:
    """`blocks` one after the other; with `checkpointing` only their inputs are kept for the backward pass."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            # no block draws random numbers, so there is no generator state to keep
            x = checkpoint(block, x, cu_seqlens, lengths, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, cu_seqlens, lengths)
    return x
