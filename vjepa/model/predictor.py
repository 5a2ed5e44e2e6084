"""The predictor: from the features of the visible tokens to the features of the hidden ones."""

import torch
from torch import Tensor, nn

from vjepa.config import VJEPAConfig
from vjepa.kernels import TokenIndices, predictor_tokens
from vjepa.model.blocks import LAYER_NORM_EPS, Block, Wanted, add_norm, run_blocks
from vjepa.model.position_table import PositionTable
from vjepa.model.precision import Linear, product_dtype

MLP_RATIO = 4.0  # whatever the encoder's, as in the released predictors


class Predictor(nn.Module):
    """A narrow transformer over [context tokens | mask tokens] of each set; all sets in one packed pass.

    forward(context, context_idx, target_idx, kind, grid=None)
        context      [Nc, D] encoder features of the context tokens, packed as `context_idx` names them
        context_idx  S sets of visible tokens         target_idx  S sets of hidden tokens to predict
        kind         int [S] mask kind of each set; kind i uses mask token i mod num_mask_tokens
        grid         (t, h, w) of the clips when it is not the config's: positions are interpolated
        returns      [Nt, D] predicted features, packed as `target_idx` names them
    Raises ValueError or TypeError naming the argument on a wrong shape or dtype.
    """

    def __init__(self, config: VJEPAConfig):
        super().__init__()
        self.config = config
        width = config.predictor_embed_dim
        self.predictor_embed = Linear(config.embed_dim, width)
        self.mask_tokens = nn.Parameter(torch.zeros(config.num_mask_tokens, width))
        self.positions = PositionTable(width, config.grid, config.uniform_power)
        self.predictor_blocks = nn.ModuleList(
            Block(width, config.predictor_heads, MLP_RATIO) for _ in range(config.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.predictor_proj = Linear(width, config.embed_dim)
        self.activation_checkpointing = False

    def forward(
        self,
        context: Tensor,
        context_idx: TokenIndices,
        target_idx: TokenIndices,
        kind: Tensor,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        if not isinstance(context, Tensor) or not context.is_floating_point():
            given = context.dtype if isinstance(context, Tensor) else type(context).__name__
            raise TypeError(f"context must be a floating-point tensor, got {given}")
        if context.ndim != 2 or context.shape[1] != self.config.embed_dim:
            raise ValueError(f"context must have shape (Nc, {self.config.embed_dim}), got {tuple(context.shape)}")
        embedded = self.predictor_embed(context)
        pos_embed = self.positions(grid or self.config.grid)
        tokens, sets = predictor_tokens(embedded, self.mask_tokens, pos_embed, context_idx, target_idx, kind)
        checkpointing = self.activation_checkpointing
        wanted = Wanted(target_rows(context_idx, target_idx), target_idx.cu_seqlens, target_idx.lengths)
        x, branch = run_blocks(self.predictor_blocks, tokens, sets.cu_seqlens, sets.lengths, checkpointing, wanted)
        dtype = product_dtype(self.predictor_proj.weight)
        return self.predictor_proj(add_norm(x, branch, self.predictor_norm, dtype)[1])


def target_rows(context_idx: TokenIndices, target_idx: TokenIndices) -> Tensor:
    """Rows int64 [Nt] of the mask tokens in a sequence packed as [context | target] set by set.

    Before target token j of all (in set s) stand j other target tokens and the context tokens of sets 0..s.
    """
    total = target_idx.total
    context_before = context_idx.cu_seqlens[1:].repeat_interleave(target_idx.cu_seqlens.diff(), output_size=total)
    return torch.arange(total, device=context_before.device) + context_before
