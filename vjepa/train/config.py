"""A whole pretraining run as one tree of dataclasses: model, data, masks, optimisation, run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vjepa.config import ModelConfig
from vjepa.data import DataConfig
from vjepa.masks import MaskConfig
from vjepa.train.plain import to_plain
from vjepa.train.recipe import TrainConfig, require

__all__ = ["PretrainConfig", "RunConfig", "TrainConfig"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, how often, and what it does about trouble.

    Args:
        dir: Run directory: config.json, metrics.jsonl, bad_files.jsonl, checkpoints/, tensorboard/.
        seed: Seed of the initial weights, the clips drawn and the masks.
        log_every: Steps between two lines of metrics.
        checkpoint_every: Steps between two checkpoints; the last step always gets one.
        keep: Newest checkpoints that are kept.
        resume: Continue the run that is in dir, from its newest checkpoint (from step 0 when it has none yet).
        tensorboard: Write TensorBoard event files beside metrics.jsonl.
        stop_on_collapse: Save and stop when the collapse alarm goes off; otherwise it is only reported.
        deterministic: Refuse operations whose result varies from run to run on a GPU (slower; the CPU never varies).

    Raises:
        ValueError: A value out of its range, naming the field.
    """

    dir: str
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 2
    resume: bool = False
    tensorboard: bool = True
    stop_on_collapse: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep"):
            require(getattr(self, name) >= 1, f"run.{name}", "at least 1", getattr(self, name))
        require(bool(self.dir), "run.dir", "a directory", self.dir)


@dataclass(frozen=True)
class PretrainConfig:
    """A whole pretraining run.

    Args:
        train: Optimisation: length, schedules, batch, precision.
        run: Run directory, seed, logging, checkpoints, resuming.
        data: Videos and how clips are drawn from them.
        model: A preset and the fields of it to change.
        masks: How the context and the targets of a clip are chosen.
    """

    train: TrainConfig
    run: RunConfig
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)

    def to_dict(self) -> dict[str, Any]:
        """The whole tree as JSON values."""
        return to_plain(self)
