"""The EMA update of the native library: a table from lists of tensors, once, and updates by it."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
from ._tensor_lists import check_apart

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


def check_table(
    table: ctypes.Array[EMAEntry], targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor]
) -> None:
    """Raise unless the library can walk the table."""
    status = library().vjepa_ema_check(table, len(table))
    if status == STATUS_OVERLAP:
        check_apart({"targets": targets, "copies": copies}, {"sources": sources})
    check(status)


def prepare_cpu(
    targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] = (), threads: int | None = None
) -> Callable[[float], None]:
    """update(momentum): t <- momentum * t + (1 - momentum) * s, in place, for all tensors in one threaded pass.

    targets: float32 CPU tensors. sources: of the same shapes, float32, bfloat16 or float16. copies: none or as many,
    bfloat16 or float16; they receive the new targets rounded to nearest even, in the same pass. All checked, walkable,
    and to be kept as they are for as long as `update` is called. threads: at most so many (default:
    `torch.get_num_threads()`); the result does not depend on it.
    Raises ValueError here on tensors that share memory with one that is written, NativeError in `update` on a momentum
    outside [0, 1]; nothing is written then.
    """
    kept = words(targets, sources, copies)
    table = table_of(EMAEntry, kept)
    check_table(table, targets, sources, copies)

    def update(momentum: float) -> None:
        workers = torch.get_num_threads() if threads is None else threads
        check(library().vjepa_ema_cpu(table, len(table), momentum, workers))

    return update


def prepare_cuda(
    targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] = ()
) -> Callable[[float | Tensor], None]:
    """`prepare_cpu` for tensors of one CUDA device: one launch on its current stream; asynchronous.

    momentum: also a float64 scalar on that device, read when the launch runs, which a CUDA graph can replay.
    """
    kept = words(targets, sources, copies)
    check_table(table_of(EMAEntry, kept), targets, sources, copies)
    on_device = DeviceTable(map(Tensor.numel, targets), CHUNK_ELEMENTS, targets[0].device)

    def update(momentum: float | Tensor) -> None:
        numbers = (0.0, momentum.data_ptr()) if isinstance(momentum, Tensor) else (momentum, None)
        on_device.launch(kept, library().vjepa_ema_cuda, *numbers)

    return update
