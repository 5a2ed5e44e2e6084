"""A fixed position table that also serves clips of other sizes."""

import torch
from torch import Tensor, nn

from vjepa.positions import interpolate_positions, sincos_3d

MAX_RESAMPLED = 8  # tables kept: enough for the sizes a run alternates between, a bound when every clip has its own


class PositionTable(nn.Module):
    """Holds the [L, D] sin-cos table of one grid as a non-persistent buffer; called with a grid (t, h, w) it gives that
    grid's table [t*h*w, D], interpolated when it is another one (computed once per grid and device)."""

    table: Tensor

    def __init__(self, dim: int, grid: tuple[int, int, int], uniform_power: bool):
        super().__init__()
        self.grid = grid
        self.register_buffer("table", sincos_3d(dim, grid, uniform_power), persistent=False)
        self._resampled: dict[tuple[tuple[int, int, int], torch.device, torch.dtype], Tensor] = {}

    def forward(self, grid: tuple[int, int, int]) -> Tensor:
        if grid == self.grid:
            return self.table
        if torch.compiler.is_compiling():
            return interpolate_positions(self.table, self.grid, grid)
        key = (grid, self.table.device, self.table.dtype)
        if key not in self._resampled:
            if len(self._resampled) == MAX_RESAMPLED:
                self._resampled.pop(next(iter(self._resampled)))
            with torch.inference_mode(False):  # a table made while serving must still be usable in training
                self._resampled[key] = interpolate_positions(self.table, self.grid, grid)
        return self._resampled[key]
