"""Tables of tensors in the memory of a CUDA device, and launches over them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch

from ._native import Grid, check, library


def first_chunks(numels: Iterable[int], elements: int) -> array[int]:
    """How many chunks of at most `elements` come before each tensor, and how many there are."""
    return array("q", accumulate((-(-numel // elements) for numel in numels), initial=0))


class DeviceTable:
    """Launches over one table of tensors; its words go to the device again only when they or the stream have changed.

    Nothing waits for the device. A CUDA graph captures the writing of the words too: they hold addresses that are the
    graph's own, in memory that is the graph's own.
    """

    def __init__(self, numels: Iterable[int], elements: int, device: torch.device) -> None:
        self.chunks, self._elements, self._device = first_chunks(numels, elements), elements, device
        self._memory: torch.Tensor | None = None
        self._written: tuple[int, bytes] | None = None  # stream and words

    def launch(self, words: array[int], function: Callable[..., int], *arguments: Any) -> None:
        """function(tensors, grid, *arguments, device, stream) on the current stream of the device."""
        if not self.chunks[-1]:
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            capturing = torch.cuda.is_current_stream_capturing()
            memory, content = self._memory, (stream, words.tobytes())
            if capturing or memory is None or content != self._written:
                whole = words + self.chunks
                memory = torch.empty(len(whole), dtype=torch.int64, device=self._device)
                start, count = whole.buffer_info()
                check(library().vjepa_write_cuda(memory.data_ptr(), start, count, self._device.index, stream))
            if not capturing:
                self._memory, self._written = memory, content
            tensors = memory.data_ptr()
            grid = Grid(tensors + 8 * len(words), len(self.chunks) - 1, self.chunks[-1], self._elements)
            check(function(tensors, grid, *arguments, self._device.index, stream))
