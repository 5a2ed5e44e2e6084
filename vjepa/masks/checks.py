"""Argument checks that all mask samplers share."""

from collections.abc import Iterable

import torch


def check_grid(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid as (t, h, w); ``ValueError`` unless it is three ints of at least 1."""
    values = tuple(grid) if isinstance(grid, Iterable) else (grid,)
    if len(values) != 3 or not all(is_int(n) and n >= 1 for n in values):
        raise ValueError(f"grid must be (t, h, w), three ints of at least 1, got {values}")
    return values


def check_draw(batch_size: int, generator: torch.Generator) -> None:
    """Raise unless the batch size is an int of at least 1 and the generator a torch.Generator on the CPU."""
    if not is_int(batch_size):
        raise TypeError(f"batch_size must be an int, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, where masks are drawn, got one on {generator.device}")


def is_number(value: object) -> bool:
    """True for an int or a float that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_int(value: object) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
