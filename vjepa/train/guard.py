"""The NaN guard: a non-finite step is never applied, and what is needed to compute it again is written down."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vjepa.checkpoint import load_tensors, save_tensors
from vjepa.kernels import TokenIndices
from vjepa.masks import Masks

if TYPE_CHECKING:
    from vjepa.train.trainer import Trainer

BATCH_FILE, REPORT_FILE, CHECKPOINT_DIR = "batch.safetensors", "report.json", "checkpoint"


class NonFiniteError(RuntimeError):
    """The loss or a gradient of a step is not finite; the weights are those of before that step.

    Attributes:
        step: The step, from 0, that was not applied.
        values: loss, grad_norm_encoder, grad_norm_predictor.
        parameters: Names of the parameters whose gradient is not finite.
        clips: Files of the batch, where known.
        bundle: Directory with what reproduces the step, where one was written.
    """

    def __init__(
        self,
        step: int,
        values: dict[str, float],
        parameters: Sequence[str],
        clips: Sequence[str] = (),
        bundle: str | os.PathLike[str] | None = None,
    ) -> None:
        self.step, self.values, self.parameters = step, dict(values), tuple(parameters)
        self.clips, self.bundle = tuple(clips), None if bundle is None else Path(bundle)
        message = f"Step {step} is not finite (" + ", ".join(f"{k} {v:g}" for k, v in self.values.items()) + ")"
        if self.parameters:
            more = "" if len(self.parameters) <= 3 else f" and {len(self.parameters) - 3} more"
            message += f"; non-finite gradients: {', '.join(self.parameters[:3])}{more}"
        message += "; the weights were left as they were."
        if self.clips:
            message += f" Clips of the batch: {', '.join(self.clips)}."
        if self.bundle:
            message += f" What reproduces it is in {self.bundle}."
        super().__init__(message)


def save_bundle(
    directory: str | os.PathLike[str],
    trainer: Trainer,
    video: torch.Tensor,
    masks: Masks,
    error: NonFiniteError,
    clips: Sequence[dict[str, Any]],
) -> Path:
    """Writes batch, masks, clips, and a checkpoint of weights, optimizer and random generators as before the step.

    `Trainer.resume(directory / "checkpoint").step(*load_batch(directory))` computes the step again.

    Raises:
        CheckpointError, OSError: The bundle cannot be written.
    """
    directory = Path(directory)
    trainer.save(directory / CHECKPOINT_DIR)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {"video": video, "kind": masks.kind}
    lengths = {}
    for name, indices in (("context", masks.context), ("target", masks.target)):
        tensors |= {
            f"{name}.indices": indices.indices,
            f"{name}.cu_seqlens": indices.cu_seqlens,
            f"{name}.clip": indices.clip,
        }
        lengths[name] = list(indices.lengths)
    save_tensors(tensors, directory / BATCH_FILE)
    report = {
        "step": error.step,
        "values": {name: repr(value) for name, value in error.values.items()},
        "parameters": list(error.parameters),
        "clips": list(clips),
        "lengths": lengths,
    }
    (directory / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return directory


def load_batch(directory: str | os.PathLike[str]) -> tuple[torch.Tensor, Masks]:
    """The video and masks of a bundle that `save_bundle` wrote.

    Raises:
        CheckpointError: The batch cannot be read.
    """
    directory = Path(directory)
    tensors = load_tensors(directory / BATCH_FILE)
    lengths = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))["lengths"]

    def token_indices(name: str) -> TokenIndices:
        return TokenIndices(
            tensors[f"{name}.indices"], tensors[f"{name}.cu_seqlens"], tensors[f"{name}.clip"], tuple(lengths[name])
        )

    return tensors["video"], Masks(token_indices("context"), token_indices("target"), tensors["kind"])
