"""Absolute 3D sin-cos position tables and their interpolation to other clip sizes.

table[p] = [axis(t) | axis(h) | axis(w)] cut to D          p = (t*H + h)*W + w
axis(x)  = [sin(x f_0) .. sin(x f_n) | cos(x f_0) .. cos(x f_n)],   f_i = 10000^(-2i / d),   i < d / 2

d  the axis' share of the width: 2*ceil(D/6) each (uniform power), or (D/2, D/4, D/4) for (t, h, w)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10000.0  # the longest wavelength is 2 pi times this, as in "Attention is all you need"


def sincos_3d(dim: int, grid: tuple[int, int, int], uniform_power: bool = True) -> Tensor:
    """Position table [t*h*w, dim] float32 of a grid of (t, h, w) tokens, computed in float64.

    `uniform_power` gives each axis an equal, even share of `dim`, and the concatenation is cut to `dim`; otherwise
    time gets half of it and height and width a quarter each, and `dim` must be a multiple of 8.

    Raises TypeError for a `dim` that is no int, ValueError for a `dim` or `grid` that is out of range.
    """
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    _check_grid("grid", grid)
    if not uniform_power and dim % 8:
        raise ValueError(f"dim must be a multiple of 8 when uniform_power is False, got {dim}")
    shares = (2 * -(-dim // 6),) * 3 if uniform_power else (dim // 2, dim // 4, dim // 4)
    t, h, w = grid
    axes = [
        _sincos_1d(shares[0], t).view(t, 1, 1, -1).expand(t, h, w, -1),
        _sincos_1d(shares[1], h).view(1, h, 1, -1).expand(t, h, w, -1),
        _sincos_1d(shares[2], w).view(1, 1, w, -1).expand(t, h, w, -1),
    ]
    return torch.cat(axes, dim=-1).flatten(0, 2)[:, :dim].float().contiguous()


def _check_grid(name: str, grid: object) -> None:
    if not isinstance(grid, tuple | list) or len(grid) != 3 or not all(isinstance(n, int) and n >= 1 for n in grid):
        raise ValueError(f"{name} must be (t, h, w), three ints of at least 1, got {grid!r}")


def _sincos_1d(dim: int, length: int) -> Tensor:
    frequencies = BASE ** (torch.arange(dim // 2, dtype=torch.float64) / (-dim / 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def interpolate_positions(table: Tensor, grid: tuple[int, int, int], new_grid: tuple[int, int, int]) -> Tensor:
    """The table [t*h*w, D] of `grid` resampled to `new_grid`: [t'*h'*w', D]; `table` itself if the grids are equal.

    Trilinear over cell centres (`align_corners=False`), as the released encoder does for clips of another size: a
    larger clip is seen as a finer sampling of the same extent, not as a continuation of it. ValueError if the table
    does not have the rows of `grid`, or a grid is not three ints of at least 1.
    """
    _check_grid("grid", grid)
    _check_grid("new_grid", new_grid)
    t, h, w = grid
    if table.ndim != 2 or table.shape[0] != t * h * w:
        raise ValueError(f"table must have shape ({t * h * w}, D) for grid {tuple(grid)}, got {tuple(table.shape)}")
    if tuple(new_grid) == tuple(grid):
        return table
    volume = table.t().reshape(1, -1, t, h, w)
    resampled = F.interpolate(volume, size=tuple(new_grid), mode="trilinear", align_corners=False)
    return resampled.flatten(2)[0].t().contiguous()
