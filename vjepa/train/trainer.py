"""One optimizer step of V-JEPA, and everything it takes to continue from it later.

Step k, from 0:  lr, weight decay, momentum m <- schedules at k
                 z = predictor(encoder(context)),  h = layer_norm(target_encoder(clip))     both mask kinds in one pass
                 loss = mean |z - h|;  backward;  encoder's and predictor's norms clipped apart if k >= clip_after_step
                 AdamW;  target <- m target + (1 - m) encoder, with the encoder's weights after AdamW
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
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
from vjepa.train.low_precision import COPIES, LowPrecision
from vjepa.train.memory import keep_freed_memory
from vjepa.train.network import forward_of, resolve_device
from vjepa.train.numbers import StepNumbers
from vjepa.train.optimizer import load_moments, moment_tensors, parameter_groups
from vjepa.train.plain import to_plain
from vjepa.train.randomness import random_state, set_random_state
from vjepa.train.recipe import TrainConfig
from vjepa.train.transfer import Transfer


class Trainer:
    """Optimizer, schedules, clipping and moving average around one model.

    Args:
        model: The model; it is moved to the configured device and trained in place.
        config: The optimisation.

    Attributes:
        steps_done: Optimizer steps applied so far, which is also the number k of the next step.

    In bf16 one process computes with `network`, a twin of the model: hooks on matrices belong there. A batch whose memory is
    used again must stay what it is until the numbers of its step were read.

    Inside an initialised torch.distributed process group, gradients are averaged over the processes. On a CPU under glibc
    the process keeps from then on the memory that it frees (see `vjepa.train.memory`).

    Raises:
        ValueError: The configured device does not exist.
    """

    def __init__(self, model: VJEPA, config: TrainConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.model = model.to(self.device)
        self._awaited: StepNumbers | None = None
        self._halted = torch.zeros((), device=self.device, dtype=torch.float32)
        self._begin_at(0)
        self._schedules = config.schedules()
        model.set_activation_checkpointing(config.activation_checkpointing)
        groups, shadows = parameter_groups(model)
        on_cpu, alone = self.device.type == "cpu", current_world().size == 1
        if on_cpu:
            keep_freed_memory()
        # with several processes gradients are averaged in float32, which autocast gives
        copies = COPIES if config.precision == "bf16" and alone else None
        self.optimizer = AdamWEMA(
            groups, shadows, betas=config.betas, eps=config.eps, copies=copies, capturable=not on_cpu
        )
        self._low = LowPrecision(model, self.optimizer) if copies else None
        self._forward = forward_of(self.network, config, self.device)
        self._parts = {
            "encoder": list(model.encoder.parameters()),
            "predictor": list(model.predictor.parameters()),
        }
        self._transfer = Transfer(self.device)
        self._waits = on_cpu  # for the numbers of a step before it changes the weights

    @property
    def network(self) -> VJEPA:
        """What a step computes with: the model, or in bf16 its twin, whose matrices are the optimizer's copies."""
        return self._low.twin if self._low else self.model

    def step(self, video: torch.Tensor, masks: Masks, *, monitors: bool = False) -> StepNumbers:
        """Trains on one batch. On a GPU nothing waits for it: what it computed arrives while the host goes on.

        Args:
            video: Clips [B, C, T, H, W], uint8 or float, on any device.
            masks: Context and target sets of the same B clips.
            monitors: Also measure target_std, effective_rank and predictor_variance (see `vjepa.monitors`).

        Returns:
            A mapping of floats: loss (mean over processes), lr, weight_decay, momentum, grad_norm_encoder and
            grad_norm_predictor (before clipping), and the monitors when asked for. On a GPU, reading one waits for it.

        Raises:
            ValueError: Not one mask pair per clip, or fewer clips than accumulation_steps.
            NonFiniteError: Loss or gradients of a step are not finite: of this one on a CPU, of the one before on a GPU,
                where `settle`, `save` and reading a number tell it too. Weights, optimizer, random generators and
                steps_done are then as before that step, whatever was done since.
        """
        if video.shape[0] != masks.num_clips:
            raise ValueError(f"masks must be for the {video.shape[0]} clips of video, got masks for {masks.num_clips}.")
        self.optimizer.zero_grad(set_to_none=True)  # whatever others, or a step that failed, have left
        generator_before = torch.get_rng_state()
        scheduled = self._schedules.at(self.steps_done)
        self._set_schedules(*scheduled)
        loss, measured = self._accumulate_gradients(video, masks, monitors)
        norms = dict(zip(self._parts, gradient_norms(self._gradients(part) for part in self._parts), strict=True))
        guarded = {"loss": loss, **{f"grad_norm_{part}": norm for part, norm in norms.items()}}

        def check(numbers: dict[str, float]) -> None:
            self._check({name: numbers[name] for name in guarded}, step, (video, masks), generator_before)

        step = self.steps_done
        numbers = StepNumbers(scheduled._asdict(), {**guarded, **measured}, check)
        if self._waits:
            numbers.settle()  # raises before the weights change
        found_inf = None if self._waits else self._halt(guarded, scheduled.momentum)
        self.optimizer.step(grad_factor=self._clip_factors(norms), found_inf=found_inf)
        self.optimizer.zero_grad(set_to_none=True)
        if self._low is not None:
            self._low.written()
        self.steps_done += 1
        self._settle_and_await(numbers)
        self._transfer.wait()
        return numbers

    def settle(self) -> None:
        """Waits for the last step on a GPU; raises NonFiniteError if it was refused."""
        self._settle_and_await(None)

    def _settle_and_await(self, numbers: StepNumbers | None) -> None:
        """Looks at the step before, which the device has done or nearly so: the host is never further ahead."""
        before, self._awaited = self._awaited, numbers
        if before is not None:
            before.settle()

    def _halt(self, guarded: dict[str, torch.Tensor], momentum: float) -> torch.Tensor:
        """1 on the device from a step that is not finite until the host has noticed, else 0; then averages stay, too."""
        finite = torch.stack([value.float() for value in guarded.values()]).isfinite().all()
        self._halted = torch.maximum(self._halted, 1 - finite.to(torch.float32))
        moving = torch.full((), momentum, dtype=torch.float64, device=self.device)
        self.optimizer.momentum = torch.where(self._halted > 0, 1.0, moving)
        return self._halted

    def _check(
        self,
        values: dict[str, float],
        step: int,
        batch: tuple[torch.Tensor, Masks],
        generator_before: torch.Tensor,
    ) -> None:
        """Raise NonFiniteError, everything being as before `step`, unless its numbers are finite."""
        if all(map(math.isfinite, values.values())):
            return
        self._begin_at(step)  # a step that came after was left out by the device
        at_hand = any(gradient is not None for part in self._parts for gradient in self._gradients(part))
        if not at_hand and current_world().size == 1:  # else the others would have to compute it again, too
            with torch.enable_grad():
                self._accumulate_gradients(*batch, monitors=False)
        bad = [
            name
            for name, parameter in self.model.named_parameters()
            if (gradient := self._gradient(parameter)) is not None and not bool(gradient.isfinite().all())
        ]
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(generator_before)
        raise NonFiniteError(step, values, bad)

    def _begin_at(self, step: int) -> None:
        """Nothing was refused and nothing is awaited."""
        self.steps_done, self._awaited = step, None
        self._halted = torch.zeros((), device=self.device, dtype=torch.float32)

    def _gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The gradient of a parameter, or of its copy that the step computes with."""
        if parameter.grad is None and self._low is not None and parameter in self._low.of:
            return self._low.of[parameter].grad
        return parameter.grad

    def _gradients(self, part: str) -> list[torch.Tensor | None]:
        return list(map(self._gradient, self._parts[part]))

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
        if self._low is not None:
            self._low.refresh()
        autocast = self.config.precision == "bf16" and self._low is None
        parts = masks.split(self.config.accumulation_steps)
        videos = video.split([part.num_clips for part in parts])
        total = torch.zeros((), device=self.device)
        measured: dict[str, torch.Tensor] = {}
        for number, (clips, part) in enumerate(zip(videos, parts, strict=True)):
            if isinstance(self._forward, DistributedDataParallel):
                self._forward.require_backward_grad_sync = number == len(parts) - 1
            clips, part = self._transfer(clips, part)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                loss, prediction, features = self._forward(clips, part)
            # The loss is a mean over sets, so a micro-batch counts by its share of them.
            loss = loss * (part.num_sets / masks.num_sets)
            loss.backward()
            total += loss.detach()
            if self._low is not None and len(parts) > 1:
                self._low.add_gradients()
            if monitors and number == 0:
                measured = collapse_metrics(features, prediction)
        return mean_over_ranks(total), measured

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
            NonFiniteError: The last step on a GPU was refused.
        """
        self.settle()
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
            self._begin_at(int(state["step"]))
            return state["extra"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"The state of {checkpoint} is damaged: {type(error).__name__} {error}.") from error
