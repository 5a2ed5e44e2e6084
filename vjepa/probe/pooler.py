"""Attentive pooling: learned queries read a clip's tokens by cross-attention (Bardes et al. 2024, section on evaluation).

    a = softmax_L( (q W_q + b_q) (LN(x) W_k + b_k)^T / sqrt(d) )      per head
    y = q + a (LN(x) W_v + b_v)          z = y + MLP(LN(y))

B clips, L tokens, D features, H heads of width d, Q queries. The queries are the same for every clip, so the products
are taken in the other order: W_k^T q is one D-vector for each head and query, b_k shifts a row of scores evenly and drops
out of the softmax, and W_v is applied after the average. Reading B x L tokens costs 4*B*L*D*Q*H FLOP instead of
4*B*L*D^2 + 4*B*L*D*Q, which for one query is D/H times fewer, and stores no keys or values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-5  # the probe's norms; the encoder's use 1e-6
INIT_STD = 0.02


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise TypeError unless `value` is an int, ValueError unless it is at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _CrossAttention(nn.Module):
    """Batch-shared queries [Q, D] over tokens [B, L, D] -> [B, Q, D], without an output projection.

    `proj` is part of published probe files and is never applied; it is kept so that they load strictly.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim).requires_grad_(False)

    def forward(self, query_QD: Tensor, x_BLD: Tensor) -> Tensor:
        num_queries, dim = query_QD.shape
        heads, head_dim = self.num_heads, dim // self.num_heads
        key_HdD, value_HdD = self.kv.weight.view(2, heads, head_dim, dim).unbind(0)
        q_QHd = self.q(query_QD).view(num_queries, heads, head_dim)
        reader_RD = torch.einsum("qhd,hdD->qhD", q_QHd, key_HdD.to(q_QHd.dtype)).flatten(0, 1)  # R = Q*H readers
        weights_BLR = (x_BLD @ reader_RD.T.to(x_BLD.dtype) / math.sqrt(head_dim)).softmax(dim=1)
        pooled_BQHD = (weights_BLR.transpose(1, 2) @ x_BLD).view(-1, num_queries, heads, dim)
        out_BQHd = torch.einsum("bqhD,hdD->bqhd", pooled_BQHD, value_HdD.to(x_BLD.dtype))
        return out_BQHd.flatten(2) + self.kv.bias[dim:]


class _CrossAttentionBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.xattn = _CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = _MLP(dim, int(dim * mlp_ratio))

    def forward(self, query_QD: Tensor, x_BLD: Tensor) -> Tensor:
        y_BQD = query_QD + self.xattn(query_QD, self.norm1(x_BLD))
        return y_BQD + self.mlp(self.norm2(y_BQD))


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BQD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BQD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = _SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = _MLP(dim, int(dim * mlp_ratio))

    def forward(self, x_BQD: Tensor) -> Tensor:
        x_BQD = x_BQD + self.attn(self.norm1(x_BQD))
        return x_BQD + self.mlp(self.norm2(x_BQD))


class AttentivePooler(nn.Module):
    """Learned queries that summarise a clip's tokens: [B, L, D] -> [B, num_queries, D].

    Args:
        num_queries: learned query tokens.
        embed_dim: features D of a token.
        num_heads: attention heads; must divide embed_dim.
        mlp_ratio: hidden width of the MLPs over embed_dim.
        depth: 1 reads once; each further layer is a self-attention block over the queries.
        complete_block: False leaves out the cross-attention's norms, residual and MLP.

    forward(x) takes tokens x [B, L, D] in the dtype of the weights (any floating dtype under autocast), L at least 1.

    Raises ValueError or TypeError naming the argument where `embed_dim` is no multiple of `num_heads`, a count is below 1,
    `mlp_ratio` leaves no hidden feature, or x is not as above.
    """

    def __init__(
        self,
        num_queries: int = 1,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        complete_block: bool = True,
    ) -> None:
        super().__init__()
        check_count("num_queries", num_queries)
        check_count("embed_dim", embed_dim)
        check_count("num_heads", num_heads)
        check_count("depth", depth)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads={num_heads}, got {embed_dim}")
        if not isinstance(mlp_ratio, int | float) or not 1 <= embed_dim * mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be a positive number, at least 1 / embed_dim, got {mlp_ratio!r}")
        self.embed_dim = embed_dim
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, embed_dim))
        self.cross_attention_block: nn.Module = (
            _CrossAttentionBlock(embed_dim, num_heads, mlp_ratio)
            if complete_block
            else _CrossAttention(embed_dim, num_heads)
        )
        # absent (not empty) at depth 1, as in published files
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth - 1)) or None
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.query_tokens, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
                nn.init.zeros_(module.bias)
        with torch.no_grad():  # residual branches shrink with depth, as in the encoder
            for layer, block in enumerate([self.cross_attention_block, *(self.blocks or [])], start=1):
                for name in ("mlp.fc2.weight", "attn.proj.weight"):
                    if name in (parameters := dict(block.named_parameters())):
                        parameters[name] /= math.sqrt(2 * layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, num_queries, D]."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor [B, L, {self.embed_dim}], got {given}")
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x must have shape [B, L, {self.embed_dim}] with L at least 1, got {list(x.shape)}")
        out = self.cross_attention_block(self.query_tokens[0], x)
        for block in self.blocks or ():
            out = block(out)
        return out


class AttentiveClassifier(nn.Module):
    """One learned query and a linear layer: [B, L, D] -> logits [B, num_classes]. Arguments as AttentivePooler."""

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        num_classes: int = 1000,
        complete_block: bool = True,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, 2)
        self.pooler = AttentivePooler(1, embed_dim, num_heads, mlp_ratio, depth, complete_block)
        self.linear = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> logits [B, num_classes]."""
        return self.linear(self.pooler(x).squeeze(1))
