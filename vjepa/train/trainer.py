"""One optimizer step of V-JEPA, and everything it takes to continue from it later.

Step k, from 0:  lr, weight decay, momentum m <- schedules at k
                 z = predictor(encoder(context)),  h = layer_norm(target_encoder(clip))     both mask kinds in one pass
                 loss = mean |z - h|;  backward;  encoder's and predictor's norms clipped apart if k >= clip_after_step
                 AdamW;  target <- m target + (1 - m) encoder, with the encoder's weights after AdamW
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vjepa
from vjepa.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    CheckpointError,
    find_checkpoint,
    load_strictly,
    load_tensors,
    read_state,
    write_checkpoint,
)
from vjepa.config import VJEPAConfig
from vjepa.kernels import AdamWEMA, gradient_norms
from vjepa.masks import Masks
from vjepa.model import VJEPA
from vjepa.monitors import collapse_metrics
from vjepa.train.distributed import current_world, gather_objects, mean_over_ranks
from vjepa.train.guard import NonFiniteError
from vjepa.train.optimizer import load_moments, moment_tensors, parameter_groups
from vjepa.train.plain import to_plain
from vjepa.train.randomness import random_state, set_random_state
from vjepa.train.recipe import TrainConfig


class _Outputs(nn.Module):
    """`VJEPA.outputs` as a forward returning tensors, which is what DistributedDataParallel wraps."""

    def __init__(self, model: VJEPA) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs = self.model.outputs(video, masks)
        return outputs.loss, outputs.prediction.detach(), outputs.target_features.detach()


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


class Trainer:
    """Optimizer, schedules, clipping and moving average around one model.

    Args:
        model: The model; it is moved to the configured device and trained in place.
        config: The optimisation.

    Attributes:
        steps_done: Optimizer steps applied so far, which is also the number k of the next step.

    Inside an initialised torch.distributed process group, gradients are averaged over the processes.

    Raises:
        ValueError: The configured device does not exist.
    """

    def __init__(self, model: VJEPA, config: TrainConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.model = model.to(self.device)
        self.steps_done = 0
        self._schedules = config.schedules()
        model.set_activation_checkpointing(config.activation_checkpointing)
        groups, shadows = parameter_groups(model)
        self.optimizer = AdamWEMA(groups, shadows, betas=config.betas, eps=config.eps)
        self._clipped_apart = {
            "encoder": list(model.encoder.parameters()),
            "predictor": list(model.predictor.parameters()),
        }
        self._forward: nn.Module = _Outputs(model)
        if current_world().size > 1:
            self._forward = DistributedDataParallel(
                self._forward, device_ids=[self.device] if self.device.type == "cuda" else None
            )

    def step(self, video: torch.Tensor, masks: Masks, *, monitors: bool = False) -> dict[str, float]:
        """Trains on one batch.

        Args:
            video: Clips [B, C, T, H, W], uint8 or float, on any device.
            masks: Context and target sets of the same B clips.
            monitors: Also measure target_std, effective_rank and predictor_variance (see `vjepa.monitors`).

        Returns:
            loss (mean over processes), lr, weight_decay, momentum, grad_norm_encoder and grad_norm_predictor (before
            clipping), and the monitors when asked for.

        Raises:
            ValueError: Not one mask pair per clip, or fewer clips than accumulation_steps.
            NonFiniteError: Loss or gradients are not finite; weights, optimizer and random generators are then as
                before the call.
        """
        if video.shape[0] != masks.num_clips:
            raise ValueError(f"masks must be for the {video.shape[0]} clips of video, got masks for {masks.num_clips}.")
        generator_before = torch.get_rng_state()
        scheduled = self._schedules.at(self.steps_done)
        self._set_schedules(*scheduled)
        loss, measured = self._accumulate_gradients(video, masks, monitors)
        parts = self._clipped_apart
        norms = dict(zip(parts, gradient_norms([p.grad for p in its] for its in parts.values()), strict=True))
        tensors = {"loss": loss, **{f"grad_norm_{part}": norm for part, norm in norms.items()}, **measured}
        # The only wait for the device in a step: the guard needs these numbers before the weights may change.
        numbers = dict(zip(tensors, torch.stack([t.float() for t in tensors.values()]).tolist(), strict=True))
        guarded = {name: numbers[name] for name in ("loss", *(f"grad_norm_{part}" for part in parts))}
        if not all(abs(number) < float("inf") for number in guarded.values()):
            raise self._refuse(guarded, generator_before)
        self.optimizer.step(grad_factor=self._clip_factors(norms))
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return {
            "loss": numbers.pop("loss"),
            "lr": scheduled.lr,
            "weight_decay": scheduled.weight_decay,
            "momentum": scheduled.momentum,
            **numbers,
        }

    def _set_schedules(self, lr: float, weight_decay: float, momentum: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        self.optimizer.momentum = momentum

    def _clip_factors(self, norms: dict[str, torch.Tensor]) -> list[torch.Tensor | None] | None:
        """What the gradients of each parameter group are multiplied by, so that no part's norm exceeds the limit.

        As torch.nn.utils.clip_grad_norm_ does it, but in the optimizer's pass over the gradients.
        """
        limit = self.config.clip_grad
        if limit is None or self.steps_done < self.config.first_clipped_step:
            return None
        factors = {part: (limit / (norm + 1e-6)).clamp(max=1.0) for part, norm in norms.items()}
        return [factors[group["part"]] for group in self.optimizer.param_groups]

    def _accumulate_gradients(
        self, video: torch.Tensor, masks: Masks, monitors: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients of the batch loss, one micro-batch after the other; monitors look at the first."""
        parts = masks.split(self.config.accumulation_steps)
        videos = video.split([part.num_clips for part in parts])
        total = torch.zeros((), device=self.device)
        measured: dict[str, torch.Tensor] = {}
        for number, (clips, part) in enumerate(zip(videos, parts, strict=True)):
            if isinstance(self._forward, DistributedDataParallel):
                self._forward.require_backward_grad_sync = number == len(parts) - 1
            clips, part = clips.to(self.device, non_blocking=True), part.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss, prediction, features = self._forward(clips, part)
            # The loss is a mean over sets, so a micro-batch counts by its share of them.
            loss = loss * (part.num_sets / masks.num_sets)
            loss.backward()
            total += loss.detach()
            if monitors and number == 0:
                measured = collapse_metrics(features, prediction)
        return mean_over_ranks(total), measured

    def _refuse(self, values: dict[str, float], generator_before: torch.Tensor) -> NonFiniteError:
        bad = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(generator_before)
        return NonFiniteError(self.steps_done, values, bad)

    def save(self, directory: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> Path:
        """Writes a checkpoint directory, whole or not at all (see `vjepa.checkpoint`).

        In a process group every process must call it; rank 0 writes.

        Args:
            directory: Where the checkpoint will be; one that is there already is replaced.
            extra: JSON values to keep beside it.

        Returns:
            The directory.

        Raises:
            CheckpointError: It cannot be written; what was there before stays.
        """
        generators = gather_objects(random_state())
        if current_world().rank == 0:
            write_checkpoint(
                directory,
                self.model.state_dict(),
                moment_tensors(self.model, self.optimizer),
                {
                    "step": self.steps_done,
                    "versions": {"vjepa": vjepa.__version__, "torch": torch.__version__},
                    "model": to_plain(self.model.config.to_dict()),
                    "train": self.config.to_dict(),
                    "extra": extra or {},
                    "random": generators,
                },
            )
        return Path(directory)

    @classmethod
    def resume(cls, directory: str | os.PathLike[str], config: TrainConfig | None = None) -> Trainer:
        """Builds model and trainer as they were saved, and sets the random generators: the next step is the next step.

        Args:
            directory: A checkpoint directory, or a run directory (its newest checkpoint is read).
            config: Replaces the saved optimisation, for example to change the device.

        Raises:
            CheckpointError: No checkpoint there, an incomplete or unreadable one, or one that does not fit.
        """
        checkpoint = find_checkpoint(directory)
        state = read_state(checkpoint)
        try:
            model_config = VJEPAConfig.from_dict(state["model"])
            config = config or TrainConfig.from_dict(state["train"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The state of {checkpoint} does not describe a training run: {error}.") from error
        trainer = cls(VJEPA(model_config), config)
        trainer.load(checkpoint)
        return trainer

    def load(self, checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
        """Takes weights, optimizer, step and random generators from a checkpoint of the same architecture.

        Returns:
            The extra values it was saved with.

        Raises:
            CheckpointError: The checkpoint is incomplete, unreadable, or of another architecture.
        """
        checkpoint = find_checkpoint(checkpoint)
        state = read_state(checkpoint)
        load_strictly(self.model, load_tensors(checkpoint / MODEL_FILE), checkpoint / MODEL_FILE)
        load_moments(self.model, self.optimizer, load_tensors(checkpoint / OPTIMIZER_FILE), checkpoint / OPTIMIZER_FILE)
        try:
            generators, rank = state["random"], current_world().rank
            if rank < len(generators):
                set_random_state(generators[rank])
            self.steps_done = int(state["step"])
            return state["extra"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"The state of {checkpoint} is damaged: {type(error).__name__} {error}.") from error
