"""The optimisation of a run: its length, schedules, clipping and precision."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from vjepa.schedules import Schedules
from vjepa.train.plain import to_plain

PRECISIONS = ("bf16", "fp32")


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """ValueError that names the setting, what was expected and what came."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one run. The defaults are the published ViT-L recipe; only the lengths must be given.

    Args:
        total_steps: Optimizer steps of the whole run; the schedules are laid out over this many.
        warmup_steps: Steps during which the learning rate rises linearly from start_lr to lr.
        scale: The cosine schedules are stretched to scale x total_steps and cut off at the end (a factor, no unit).
        start_lr: Learning rate the warm-up starts from.
        lr: Peak learning rate.
        final_lr: Learning rate at the end of the stretched cosine.
        weight_decay: AdamW weight decay at the start (none on biases and one-dimensional parameters).
        final_weight_decay: Weight decay at the end of the stretched cosine.
        momentum: Momentum of the target encoder's moving average, at the start and at the end of the stretched line.
        betas: AdamW decay rates of the first and second moment.
        eps: AdamW denominator constant.
        clip_grad: Largest gradient norm, for encoder and predictor apart; null never clips.
        clip_after_step: Steps done before clipping begins: step k, from 0, is clipped if k >= this. null: warmup_steps.
        precision: "bf16" (matrix products in bfloat16, weights, norms and moments in float32) or "fp32".
        batch_size: Clips per optimizer step and process.
        accumulation_steps: Micro-batches one step is computed in; less memory, the same gradient to rounding.
        activation_checkpointing: Recompute each block in the backward pass: less memory, about a third more time.
        target_graph: Launch the target encoder as one CUDA graph: less work for the host, more memory. Needs a CUDA
            device, bf16 and a single process.
        device: "auto" (CUDA when there is one, else the CPU), or a torch device such as "cpu" or "cuda:1".
        steps: Stop after this many of total_steps (the schedules stay laid out over total_steps); null runs all.

    Raises:
        ValueError: A value out of its range, naming the field.
    """

    total_steps: int
    warmup_steps: int
    scale: float = 1.25
    start_lr: float = 2e-4
    lr: float = 6.25e-4
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: tuple[float, float] = (0.998, 1.0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float | None = 10.0
    clip_after_step: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    batch_size: int = 24
    accumulation_steps: int = 1
    activation_checkpointing: bool = False
    target_graph: bool = False
    device: str = "auto"
    steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "momentum", tuple(self.momentum))
        object.__setattr__(self, "betas", tuple(self.betas))
        require(self.precision in PRECISIONS, "train.precision", " or ".join(map(repr, PRECISIONS)), self.precision)
        require(
            self.clip_grad is None or (self.clip_grad > 0 and not math.isnan(self.clip_grad)),
            "train.clip_grad", "positive or null", self.clip_grad,
        )  # fmt: skip
        require(
            self.clip_after_step is None or self.clip_after_step >= 0,
            "train.clip_after_step", "0 or more, or null", self.clip_after_step,
        )  # fmt: skip
        require(self.batch_size >= 1, "train.batch_size", "at least 1 clip", self.batch_size)
        require(
            1 <= self.accumulation_steps <= self.batch_size,
            "train.accumulation_steps", f"between 1 and batch_size ({self.batch_size})", self.accumulation_steps,
        )  # fmt: skip
        require(
            self.steps is None or 0 < self.steps <= self.total_steps,
            "train.steps", f"between 1 and total_steps ({self.total_steps}), or null", self.steps,
        )  # fmt: skip
        require(
            all(0 <= b < 1 for b in self.betas) and len(self.betas) == 2, "train.betas", "two in [0, 1)", self.betas
        )
        require(self.eps > 0, "train.eps", "positive", self.eps)
        self.schedules()

    def schedules(self) -> Schedules:
        """The three schedules this configuration lays out.

        Raises:
            ValueError: Lengths or values the schedules refuse.
        """
        names = {f.name for f in dataclasses.fields(Schedules)}
        return Schedules(**{name: getattr(self, name) for name in names})

    @property
    def last_step(self) -> int:
        """Steps done when the run ends."""
        return self.total_steps if self.steps is None else self.steps

    @property
    def first_clipped_step(self) -> int:
        """The first step k, from 0, whose gradients are clipped."""
        return self.warmup_steps if self.clip_after_step is None else self.clip_after_step

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`."""
        return cls(**values)
