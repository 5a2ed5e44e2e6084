"""The target encoder as a CUDA graph: clips of one shape, no gradient, and weights that are updated where they lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls before the capture, in which libraries allocate their workspaces and kernels are compiled


class TargetGraph(nn.Module):
    """encoder(clips) for whole clips on a GPU, launched as one graph for each shape and dtype; without gradient.

    The result is overwritten by the next call. Memory: a copy of the clips, and the graph's own buffers.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._graphs: dict[tuple[torch.Size, torch.dtype], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        key = (clips.shape, clips.dtype)
        if key not in self._graphs:
            self._graphs[key] = self._capture(clips)
        graph, taken, given = self._graphs[key]
        taken.copy_(clips)
        graph.replay()
        return given

    def _capture(self, clips: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        taken = clips.clone()
        stream = torch.cuda.Stream(clips.device)
        stream.wait_stream(torch.cuda.current_stream(clips.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.encoder(taken)
        torch.cuda.current_stream(clips.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as the one that pins batches, may allocate meanwhile
        with torch.cuda.device(clips.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            given = self.encoder(taken)
        return graph, taken, given
