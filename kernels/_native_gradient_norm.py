"""The gradient norms of the native library: tables of tensors from lists of tensors, on a CPU and on CUDA devices."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, count, repeat

import torch
from torch import Tensor

from ._native import (
    DTYPE_CODES,
    NormEntry,
    addresses,
    check,
    codes_of,
    dtype_of,
    library,
    one_run,
    table_of,
    words_of,
)
from ._native_launch import DeviceTable

CHUNK_ELEMENTS = 1 << 16  # VJEPA_NORM_CHUNK of csrc/capi.h: with others a GPU would add in another order than a CPU


def walkable(tensors: Sequence[Tensor]) -> bool:
    """Whether the library can walk all: each one run of memory, in whatever order, of a dtype that it reads."""
    if not DTYPE_CODES.keys() >= set(map(dtype_of, tensors)):
        return False
    if any(tensor.layout != torch.strided for tensor in tensors):
        return False
    return all(map(Tensor.is_contiguous, tensors)) or all(map(one_run, tensors))


def groups_of(sizes: Iterable[int]) -> Iterable[int]:
    """The group of each tensor."""
    return chain.from_iterable(map(repeat, count(), sizes))


def words(gradients: Sequence[Tensor], sizes: Sequence[int]) -> array[int]:
    """The rows of the table of `walkable` tensors on one device, `sizes` of them in each group."""
    groups = list(groups_of(sizes))
    numels = map(Tensor.numel, gradients)
    return words_of(len(groups), addresses(gradients), numels, codes_of(gradients), groups)


def offsets_of(chunks: Sequence[int], sizes: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """The first chunk of each group, and in the end the number of chunks."""
    return (ctypes.c_int64 * (len(sizes) + 1))(*(chunks[place] for place in accumulate(sizes, initial=0)))


def norms_cpu(gradients: Sequence[Tensor], sizes: Sequence[int], threads: int | None = None) -> Tensor:
    """[len(sizes)] float32, the L2 norms of groups of `walkable` CPU tensors, in one threaded pass.

    threads: at most so many (default: `torch.get_num_threads()`); the result does not depend on it.
    """
    table = table_of(NormEntry, words(gradients, sizes))
    norms = torch.empty(len(sizes), dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads() if threads is None else threads
    check(library().vjepa_norms_cpu(table, len(table), len(sizes), norms.data_ptr(), threads))
    return norms


def norms_cuda(gradients: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """`norms_cpu` on one CUDA device, in two launches on its current stream; asynchronous."""
    rows, device = words(gradients, sizes), gradients[0].device
    check(library().vjepa_norms_check(table_of(NormEntry, rows), len(gradients), len(sizes)))
    table = DeviceTable(map(Tensor.numel, gradients), CHUNK_ELEMENTS, device)
    offsets = offsets_of(table.chunks, sizes)
    norms = torch.zeros(len(sizes), dtype=torch.float32, device=device)
    partials = torch.empty(table.chunks[-1], dtype=torch.float64, device=device)
    function, written = library().vjepa_norms_cuda, (partials.data_ptr(), norms.data_ptr())
    table.launch(rows, function, offsets, len(sizes), *written)
    return norms
