"""What the loader hands to a training step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vjepa.data.errors import BadFile
from vjepa.data.transform import Crop
from vjepa.masks import Masks


@dataclass(frozen=True)
class ClipRef:
    """Where a clip came from: enough to read it again with `read_clip`.

    Attributes:
        path: the file.
        start: first sampled frame, in seconds from the start of the video.
        interval: seconds from one sampled frame to the next.
        crop: rectangle of the displayed frame.
        flip: whether it was mirrored.
    """

    path: str
    start: float
    interval: float
    crop: Crop
    flip: bool


@dataclass(frozen=True, eq=False)
class Batch:
    """The clips and masks of one step.

    Attributes:
        step: number of the step, from 0.
        video: uint8 [B,C,T,H,W].
        labels: int64 [B], -1 where a clip has none.
        clips: B references.
        masks: drawn for these clips, or None without a mask sampler.
        bad: files met and skipped while making this batch, in the order met.
        draws: files tried in all: B + the bad ones.
        seconds: time a worker spent making the batch.
    """

    step: int
    video: Tensor
    labels: Tensor
    clips: list[ClipRef]
    masks: Masks | None = None
    bad: list[BadFile] = field(default_factory=list)
    draws: int = 0
    seconds: float = 0.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on a device."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=non_blocking)
        video = self.video.to(device, non_blocking=non_blocking)
        return replace(self, video=video, labels=self.labels.to(device, non_blocking=non_blocking), masks=masks)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, video=self.video.pin_memory(), labels=self.labels.pin_memory(), masks=masks)
