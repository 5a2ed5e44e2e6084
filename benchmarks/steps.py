"""What the contenders of bench_step share: one model, its masks and clips, the schedule, and how a contender looks.

All start from the same weights. Masks are packed by truncation, so that those who know rectangles alone can run them.
Clips are uint8 for us, whose first kernel normalises; peers get normalised floats for nothing, as the released
recipe's workers make them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vjepa import VJEPA, VJEPAConfig
from vjepa.masks import Masks, MultiBlock
from vjepa.schedules import StepValues
from vjepa.train import TrainConfig

from .workloads import rectangles

TARGET, CONTEXT, PREDICTOR, LOSS, UPDATE = "target", "context", "predictor", "loss", "update"
PARTS = {
    TARGET: "target encoder, forward",
    CONTEXT: "context encoder, forward + backward",
    PREDICTOR: "predictor, forward + backward",
    LOSS: "layer norm of targets, gather, L1, forward + backward",
    UPDATE: "norms, clipping, AdamW, moving average",
}
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
MASK_TOKEN_STD = 0.5  # zeros, as training begins with, would leave out of the loss what is done with them

FAST = 0.5  # momentum of the average; the recipe's 0.998 takes as long


class Step(Protocol):
    """One way to train: its state, a full step, and the parts of one."""

    def step(self) -> Any:
        """A full training step; the loss before it, or a mapping with "loss"."""

    def parts(self) -> dict[str, Callable[[], Any]]:
        """A call for each of PARTS; what it returns is to be the same for everybody."""

    def state(self) -> Iterable[Tensor]:
        """What stays in memory between steps: weights, averages, moments, copies."""


@dataclass(frozen=True, eq=False)
class Workload:
    """What one step is to do."""

    preset: str
    config: VJEPAConfig
    masks: Masks
    video: Tensor  # uint8 [B, C, T, H, W]
    dtype: torch.dtype
    packing: str

    @property
    def clips(self) -> int:
        return self.video.shape[0]

    @property
    def device(self) -> torch.device:
        return self.video.device

    @property
    def recipe(self) -> TrainConfig:
        """The published one, but clipping from the first step on, as after the warm-up, and with an average so fast that
        the loss of the second step shows whether it was updated."""
        return TrainConfig(
            total_steps=90_000,
            warmup_steps=12_000,
            clip_after_step=0,
            momentum=(FAST, 1.0),
            precision=PRECISIONS[self.dtype],
            batch_size=self.clips,
            device=str(self.device),
        )

    def model(self) -> VJEPA:
        """A model of one's own, always with the same weights."""
        return copy.deepcopy(weights(self.config)).to(self.device)

    def in_float32(self) -> Workload:
        """The same in float32."""
        return dataclasses.replace(self, dtype=torch.float32)

    def normalised(self) -> Tensor:
        """The clips in float32, with the mean and the deviation of the pixels taken out."""
        mean, std = (torch.tensor(values, device=self.device) for values in self.config.normalisation)
        scaled = (self.video.movedim(1, -1).float() / 255 - mean) / std
        return scaled.movedim(-1, 1).contiguous()

    def rectangles(self) -> tuple[list[Tensor], list[Tensor]]:
        """Context and target ids [B, n] of each mask kind."""
        return rectangles(self.masks.context, self.clips), rectangles(self.masks.target, self.clips)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def once(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """`call` without gradients, in the workload's precision, when it is first needed; the same result from then on."""

        @functools.cache
        def result() -> Any:
            with torch.no_grad(), self.autocast():
                return call()

        return result


def workload(
    preset: str,
    clips: int,
    dtype: torch.dtype,
    device: torch.device,
    packing: str = "truncate",
    **changes: Any,
) -> Workload:
    """The workload of a preset with some fields changed, such as image_size; the same numbers each time."""
    width = VJEPAConfig.from_preset(preset, **changes).embed_dim
    config = VJEPAConfig.from_preset(preset, init_std=1 / math.sqrt(width), **changes)
    generator = torch.Generator().manual_seed(0)
    masks = MultiBlock(grid=config.grid, packing=packing)(clips, generator).to(device)
    shape = (clips, config.in_channels, config.num_frames, *config.image_hw)
    video = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    return Workload(preset, config, masks, video, dtype, packing)


@functools.lru_cache(maxsize=1)
def weights(config: VJEPAConfig) -> VJEPA:
    """The model that all start from, on the CPU: predictions as large as what they predict, so that the loss sees all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VJEPA(config)
        nn.init.normal_(model.predictor.mask_tokens, std=MASK_TOKEN_STD)
    return model


def set_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """lr of all groups and weight decay of those that are `decayed`."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = values.lr, values.weight_decay if group["decayed"] else 0.0


def decayed_apart(*modules: nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters with weight decay, and without: biases and one-dimensional ones."""
    trained = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    plain = {name for name, p in trained if p.ndim == 1 or "bias" in name}
    return [
        {"params": [p for name, p in trained if (name not in plain) == decayed], "decayed": decayed}
        for decayed in (True, False)
    ]


def with_gradients(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in module.parameters() if p.requires_grad]


def draw_gradients(*modules: nn.Module) -> None:
    """Gradients of a plausible size, for the update alone."""
    for module in modules:
        for p in with_gradients(module):
            p.grad = torch.randn_like(p) * 1e-3


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer keeps."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def loss_of(outcome: Any) -> float:
    """The loss as a number, whoever returned it."""
    return float(outcome["loss"] if hasattr(outcome, "keys") else outcome)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
