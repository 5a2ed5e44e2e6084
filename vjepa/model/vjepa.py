"""V-JEPA: encoder, predictor and the slow target encoder, and the loss that ties them.

loss = mean over sets s, tokens j in target set s, features d of
       | predictor(encoder(video, context_s), target_s)_jd - layer_norm(target_encoder(video))_jd |
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vjepa.config import VJEPAConfig
from vjepa.kernels import masked_l1_loss
from vjepa.masks import Masks
from vjepa.model.encoder import Encoder
from vjepa.model.init import initialise
from vjepa.model.predictor import Predictor


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass leaves: for the optimiser the loss, for the monitors the rest.

    loss             scalar float32
    prediction       [Nt, D], packed as the target sets
    target_features  [B, L, D] of the target encoder, after its final norm and before the loss's layer norm; no gradient
    """

    loss: Tensor
    prediction: Tensor
    target_features: Tensor


class VJEPA(nn.Module):
    """Encoder, predictor and target encoder of `config`; the target encoder starts as a copy and takes no gradient.

    forward(video, masks) -> scalar loss. Both mask kinds go through one encoder pass and one predictor pass, the target
    encoder sees each clip once.
        video  [B, C, T, H, W] uint8 or floating point, see `Encoder`
        masks  `vjepa.Masks`: S context sets, S target sets and int kinds [S], on the video's device
    Raises ValueError or TypeError naming the argument on wrong types, shapes, devices or ids, or another number of clips.
    """

    def __init__(self, config: VJEPAConfig):
        super().__init__()
        if not isinstance(config, VJEPAConfig):
            raise TypeError(f"config must be a VJEPAConfig, got {type(config).__name__}")
        self.config = config
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        initialise(self.encoder, config.init, config.init_std)
        initialise(self.predictor, config.init, config.init_std)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VJEPA":
        """A freshly initialised model of a preset (vit_tiny .. vit_giant) with some fields of VJEPAConfig replaced.
        ValueError names the nearest valid preset or field."""
        return cls(VJEPAConfig.from_preset(name, **overrides))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether the trained networks keep only the inputs of their blocks and compute the rest again in backward."""
        self.encoder.activation_checkpointing = enabled
        self.predictor.activation_checkpointing = enabled

    def forward(self, video: Tensor, masks: Masks) -> Tensor:
        return self.outputs(video, masks).loss

    def outputs(self, video: Tensor, masks: Masks) -> StepOutput:
        """The loss together with the predictions and the target features it came from."""
        clips = self.encoder.as_clips(video)
        if not isinstance(masks, Masks):
            raise TypeError(f"masks must be a vjepa.Masks, got {type(masks).__name__}")
        if masks.num_clips != clips.shape[0]:
            raise ValueError(f"masks must be for the {clips.shape[0]} clips of video, got masks for {masks.num_clips}")
        with torch.no_grad():
            target_features = self.target_encoder(clips)
        context = self.encoder(clips, masks.context)
        grid = self.encoder.grid_of(clips)
        prediction = self.predictor(context, masks.context, masks.target, masks.kind, grid)
        loss = masked_l1_loss(prediction, target_features, masks.target)
        return StepOutput(loss, prediction, target_features)
