"""Which tokens of a clip the encoder sees and which the predictor must fill in: samplers, packings, seeding."""

from vjepa.masks.config import MaskConfig
from vjepa.masks.container import Masks
from vjepa.masks.multiblock import CausalMultiBlock, MultiBlock
from vjepa.masks.seeding import mask_generator, mask_seed
from vjepa.masks.statistics import mask_statistics
from vjepa.masks.tube import RandomTube

__all__ = [
    "CausalMultiBlock",
    "MaskConfig",
    "Masks",
    "MultiBlock",
    "RandomTube",
    "mask_generator",
    "mask_seed",
    "mask_statistics",
]
