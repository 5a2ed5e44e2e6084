"""The EMA update of the native library: tables of tensors from lists of tensors, on a CPU and on CUDA devices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from ._native import (
    COPY_DTYPES,
    DTYPE_CODES,
    NO_COPY,
    Chunk,
    EMAEntry,
    addresses,
    check,
    check_lists,
    dtype_of,
    launch,
    library,
    plan,
    table_of,
)

CHUNK_ELEMENTS = 1 << 16  # per CUDA block: 0.75 MB of traffic, several hundred blocks for the smallest ViT


def entries(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    device_type: str,
    walked: bool = False,
) -> ctypes.Array[EMAEntry]:
    """The table of the update, of tensors that can be updated so."""
    named = {"targets": (targets, (torch.float32,)), "sources": (sources, tuple(DTYPE_CODES))}
    if copies is not None:
        named["copies"] = (copies, COPY_DTYPES)
    check_lists(device_type, named, walked)
    codes = DTYPE_CODES.__getitem__
    return table_of(
        EMAEntry,
        addresses(targets),
        addresses(sources),
        repeat(0, len(targets)) if copies is None else addresses(copies),
        map(Tensor.numel, targets),
        map(codes, map(dtype_of, sources)),
        repeat(NO_COPY, len(targets)) if copies is None else map(codes, map(dtype_of, copies)),
    )


def chunks_of(table: ctypes.Array[EMAEntry], chunk_elements: int = CHUNK_ELEMENTS) -> ctypes.Array[Chunk]:
    return plan(library().vjepa_ema_plan, table, chunk_elements)


def ema_update_cpu(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor] | None = None,
    threads: int | None = None,
    walked: bool = False,
) -> None:
    """t <- momentum * t + (1 - momentum) * s, in place, for all tensors in one threaded pass on the CPU.

    targets: contiguous float32 CPU tensors. sources: same shapes, contiguous, float32, bfloat16 or float16.
    copies: same shapes, bfloat16 or float16; they receive the new targets rounded to nearest even, in the same pass.
    threads: at most so many (default: `torch.get_num_threads()`); the result does not depend on it.
    walked: the caller has seen that dtypes and layouts are these.
    Raises ValueError or TypeError on unfit tensors, NativeError on a momentum outside [0, 1], on tensors that share
    memory with one that is written, or without the library; nothing is written then.
    """
    table = entries(targets, sources, copies, "cpu", walked)
    threads = torch.get_num_threads() if threads is None else threads
    check(library().vjepa_ema_cpu(table, len(table), momentum, threads))


def ema_update_cuda(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    copies: Sequence[Tensor] | None = None,
    walked: bool = False,
) -> None:
    """`ema_update_cpu` on one CUDA device, in one launch on its current stream; asynchronous.

    momentum: also a float64 scalar on that device, read when the launch runs, which a CUDA graph can replay.
    """
    table = entries(targets, sources, copies, "cuda", walked)
    if not targets:
        return
    devices = {target.device for target in targets}
    if len(devices) > 1:
        raise ValueError(f"targets: expected one device, got {sorted(map(str, devices))}")
    numbers = (0.0, momentum.data_ptr()) if isinstance(momentum, Tensor) else (momentum, None)
    launch(table, devices.pop(), chunks_of, library().vjepa_ema_cuda, *numbers)
