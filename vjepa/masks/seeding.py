"""One random generator for the masks of each step and rank, as a pure function."""

import hashlib

import torch

from vjepa.masks.checks import is_int


def mask_seed(seed: int, rank: int, step: int) -> int:
    """63-bit seed of the masks of one step on one rank: BLAKE2b of the three numbers."""
    for name, value, low in (("seed", seed, None), ("rank", rank, 0), ("step", step, 0)):
        if not is_int(value):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if low is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    digest = hashlib.blake2b(f"vjepa.masks {seed} {rank} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mask_generator(seed: int, rank: int = 0, step: int = 0) -> torch.Generator:
    """A fresh CPU generator that depends on nothing but its arguments.

    So masks do not depend on the number of loader workers, on which of them draws, or on where a run was resumed; ranks
    and steps get unrelated streams.

    Args:
        seed: the run's seed, any int.
        rank: index of the process, from 0.
        step: index of the batch, from 0.

    Raises:
        TypeError, ValueError: an argument that is not an int, a negative rank or step.
    """
    return torch.Generator().manual_seed(mask_seed(seed, rank, step))
