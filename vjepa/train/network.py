"""What a step calls: the network on its device, alone or as one of several processes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vjepa.masks import Masks
from vjepa.model import VJEPA
from vjepa.train.distributed import current_world
from vjepa.train.recipe import TrainConfig
from vjepa.train.target_graph import TargetGraph


class Outputs(nn.Module):
    """`VJEPA.outputs` as a forward returning tensors, which is what DistributedDataParallel wraps."""

    def __init__(self, model: VJEPA) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs = self.model.outputs(video, masks)
        return outputs.loss, outputs.prediction.detach(), outputs.target_features.detach()


def forward_of(network: VJEPA, config: TrainConfig, device: torch.device) -> nn.Module:
    """`network` as a step calls it: loss, prediction and target features of clips and masks.

    Raises:
        ValueError: A graph of the target encoder is wanted where there can be none.
    """
    alone = current_world().size == 1
    if config.target_graph:
        if device.type != "cuda" or not alone or config.precision != "bf16":
            raise ValueError("train.target_graph needs a CUDA device, precision bf16 and a single process.")
        # the twin's: the user's model stays what it is
        network.target_encoder = TargetGraph(network.target_encoder)  # type: ignore[assignment]
    outputs = Outputs(network)
    if alone:
        return outputs
    return DistributedDataParallel(outputs, device_ids=[device] if device.type == "cuda" else None)


def resolve_device(name: str) -> torch.device:
    """The torch device `name` means; "auto" is CUDA where there is one.

    Raises:
        ValueError: No such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device must be 'auto' or a torch device, got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device is {name!r}, but PyTorch {torch.__version__} finds no CUDA device here.")
    return device
