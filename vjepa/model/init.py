"""Initialisation of the weights.

"scaled"     matrices and the tubelet filters: normal, std `init_std` (0.02), truncated at 2 std; biases 0, norms 1 and
             0, mask tokens 0; attention output and second MLP matrix of block i (from 1) divided by sqrt(2 i), so that
             the residual stream does not grow with depth: the published intent
"reference"  what the released code ends up with: the same std practically untruncated (bounds of +-2, 100 std of 0.02),
             and no rescaling, because its second initialisation undoes it
"""

import math

from torch import nn

from vjepa.model.blocks import Block
from vjepa.model.encoder import Encoder, TubeletProjection
from vjepa.model.predictor import Predictor


def initialise(module: Encoder | Predictor, init: str, std: float = 0.02) -> None:
    """Draws every weight of `module` in place from the default generator.

    `init` is "scaled" or "reference"; `std` the standard deviation of matrices and filters.
    """
    bound = 2 * std if init == "scaled" else 2.0
    for part in module.modules():
        if isinstance(part, (nn.Linear, TubeletProjection)):
            nn.init.trunc_normal_(part.weight, std=std, a=-bound, b=bound)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    if isinstance(module, Predictor):
        nn.init.zeros_(module.mask_tokens)
    if init == "scaled":
        blocks = module.blocks if isinstance(module, Encoder) else module.predictor_blocks
        for number, block in enumerate(blocks, start=1):
            _rescale(block, math.sqrt(2 * number))


def _rescale(block: nn.Module, divisor: float) -> None:
    if isinstance(block, Block):
        block.attn.proj.weight.data.div_(divisor)
        block.mlp.fc2.weight.data.div_(divisor)
