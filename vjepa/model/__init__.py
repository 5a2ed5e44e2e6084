"""The model: encoder, predictor, target encoder."""

from vjepa.model.encoder import Encoder
from vjepa.model.predictor import Predictor
from vjepa.model.vjepa import VJEPA, StepOutput

__all__ = ["VJEPA", "Encoder", "Predictor", "StepOutput"]
