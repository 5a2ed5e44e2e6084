"""The EMA update of the native library: a table from lists of tensors, once, and updates by it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ._apart import check_apart
from ._native import (
    NO_COPY,
    STATUS_OVERLAP,
    EMAEntry,
    addresses,
    check,
    codes_of,
    library,
    table_of,
    words_of,
)
from ._native_launch import DeviceTable

CHUNK_ELEMENTS = 1 << 16  # per CUDA block: 0.75 MB of traffic, several hundred blocks for the smallest ViT


def words(targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor]) -> array[int]:
    """The rows of the table; copies are there for all targets or for none."""
    count = len(targets)
    return words_of(
        count,
        addresses(targets),
        addresses(sources),
        addresses(copies) if copies else [0] * count,
        map(Tensor.numel, targets),
        codes_of(sources),
        codes_of(copies) if copies else [NO_COPY] * count,
    )


class Update:
    """update(momentum): t <- momentum * t + (1 - momentum) * s, in place, for all tensors in one pass.

    targets: float32. sources: of the same shapes, float32, bfloat16 or float16. copies: none or as many, bfloat16 or
    float16; they receive the new targets rounded to nearest even, in the same pass. All checked and walkable, on one
    device; they are held, and must keep memory, shape and dtype.
    Raises ValueError if a tensor shares memory with one that is written, and NativeError in an update on a momentum
    outside [0, 1]; nothing is written then.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] = ()) -> None:
        self.tensors = targets, sources, copies
        self.words = words(targets, sources, copies)
        self.table = table_of(EMAEntry, self.words)
        status = library().vjepa_ema_check(self.table, len(self.table))
        if status == STATUS_OVERLAP:
            check_apart({"targets": targets, "copies": copies}, {"sources": sources})
        check(status)


class CPUUpdate(Update):
    """In one threaded pass on the CPU; the result does not depend on the number of threads.

    threads: at most so many (default: `torch.get_num_threads()`).
    """

    threads: int | None = None

    def __call__(self, momentum: float) -> None:
        threads = torch.get_num_threads() if self.threads is None else self.threads
        check(library().vjepa_ema_cpu(self.table, len(self.table), momentum, threads))


class CUDAUpdate(Update):
    """In one launch on the current stream of a CUDA device; asynchronous.

    momentum: also a float64 scalar on that device, read when the launch runs, which a CUDA graph can replay.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] = ()) -> None:
        super().__init__(targets, sources, copies)
        self.on_device = DeviceTable(map(Tensor.numel, targets), CHUNK_ELEMENTS, targets[0].device)

    def __call__(self, momentum: float | Tensor) -> None:
        numbers = (0.0, momentum.data_ptr()) if isinstance(momentum, Tensor) else (momentum, None)
        self.on_device.launch(self.words, library().vjepa_ema_cuda, *numbers)
