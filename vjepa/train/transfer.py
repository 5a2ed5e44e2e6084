"""Clips and masks on their way to the device, beside what it computes."""

from __future__ import annotations

import torch

from vjepa.masks import Masks


class Transfer:
    """Copies a batch to `device`; on a GPU by a stream of its own, so that the copy runs beside the step before.

    Page-locked tensors (the loader's are) are copied without a wait of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def __call__(self, video: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, Masks]:
        if self._stream is None:
            return video.to(self._device), masks.to(self._device)
        with torch.cuda.stream(self._stream):
            there = video.to(self._device, non_blocking=True), masks.to(self._device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in (there[0], *_tensors(there[1])):
            tensor.record_stream(computing)  # or its memory could be given away while the step still reads it
        return there

    def wait(self) -> None:
        """Until the last batch has been read, which does not wait for what the device computes: its memory is free again."""
        if self._copied is not None:
            self._copied.synchronize()


def _tensors(masks: Masks) -> list[torch.Tensor]:
    sets = (masks.context, masks.target)
    return [masks.kind, *(tensor for one in sets for tensor in (one.indices, one.cu_seqlens, one.clip))]
