"""Random-tube masks: a random share of the spatial positions is hidden, the same ones at every time step.

The shuffle is the one of the released V-JEPA sampler, draw for draw: hidden positions first, then the visible ones,
permuted by a Fisher-Yates shuffle from the last position down, where the partner of position i is a 32-bit draw cut to
the bits of i, drawn again while it is above i. That is how NumPy's legacy generator shuffles, and torch's CPU
generator and NumPy's give the same 32-bit draws for the same seed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vjepa.masks.checks import check_draw, check_grid, is_int, is_number
from vjepa.masks.container import Masks
from vjepa.masks.packing import check_packing, pack

# Bits taken from each 32-bit draw: enough for any plane, and few enough for torch to use one draw for each number.
DRAW_BITS = 24


class RandomTube:
    """Sampler of random-tube masks; calling it gives the `Masks` of one batch.

    Args:
        grid: tokens of a clip as (t, h, w).
        ratio: share of the h x w positions to hide, over all time; ``int(h w (1 - ratio))`` positions stay visible.
        packing: as in `MultiBlock`; all sets have the same length, so "truncate" drops nothing.
        hidden_ratio: for "budget", the share of a clip's tokens that the encoder must not see.
        num_kinds: independent masks for each clip.

    Raises:
        ValueError: naming the argument that is out of range, or a ratio that leaves nothing visible or nothing hidden.
    """

    def __init__(
        self,
        grid: tuple[int, int, int] = (8, 14, 14),
        ratio: float = 0.9,
        packing: str = "exact",
        hidden_ratio: float = 0.9,
        num_kinds: int = 1,
    ) -> None:
        self.grid = check_grid(grid)
        _, h, w = self.grid
        if h * w >= 1 << DRAW_BITS:
            raise ValueError(f"grid must have fewer than {1 << DRAW_BITS} positions in h x w, got {self.grid}")
        if not is_number(ratio) or not 0 < ratio < 1:
            raise ValueError(f"ratio must be between 0 and 1, both excluded, got {ratio!r}")
        if not is_int(num_kinds) or num_kinds < 1:
            raise ValueError(f"num_kinds must be an int of at least 1, got {num_kinds!r}")
        check_packing(packing, hidden_ratio)
        self.ratio = float(ratio)
        self.visible = int(h * w * (1.0 - self.ratio))
        if not 0 < self.visible < h * w:
            raise ValueError(
                f"ratio must leave 1..{h * w - 1} visible positions on a grid of {h} x {w}, got {ratio}, which leaves "
                f"{self.visible}"
            )
        self.packing = packing
        self.hidden_ratio = float(hidden_ratio)
        self.num_kinds = num_kinds

    def __call__(self, batch_size: int, generator: torch.Generator) -> Masks:
        """Draw the masks of a batch.

        Args:
            batch_size: clips B (at least 1).
            generator: CPU generator, left where the draws end. Seeded with ``s`` it gives what the released sampler
                gives after ``numpy.random.seed(s)``, call after call.

        Returns:
            `Masks` on the CPU: ``num_kinds`` * B sets, mask kind major, clip minor, token ids ascending.
        """
        check_draw(batch_size, generator)
        t, h, w = self.grid
        plane = [True] * (h * w - self.visible) + [False] * self.visible
        hidden = _shuffles(plane, self.num_kinds * batch_size, generator)
        target = hidden.repeat(1, t).reshape(self.num_kinds, batch_size, t * h * w)
        return pack(~target, target, self.packing, self.hidden_ratio, generator)

    def __repr__(self) -> str:
        return (
            f"RandomTube(grid={self.grid}, ratio={self.ratio}, packing={self.packing!r}, "
            f"hidden_ratio={self.hidden_ratio}, num_kinds={self.num_kinds})"
        )


def _shuffles(plane: list[bool], count: int, generator: torch.Generator) -> Tensor:
    """``count`` shuffles of ``plane``: bool [count, length]. Advances ``generator`` by exactly the draws they use."""
    state = generator.get_state()
    draws = _draws(generator, chunk=2 * len(plane))
    swaps = [(i, (1 << i.bit_length()) - 1) for i in range(len(plane) - 1, 0, -1)]
    shuffled, rejected = [], 0
    for _ in range(count):
        row = plane.copy()
        for i, bits in swaps:
            while (j := next(draws) & bits) > i:
                rejected += 1
            row[i], row[j] = row[j], row[i]
        shuffled.append(row)
    generator.set_state(state)
    torch.randint(1 << DRAW_BITS, (count * len(swaps) + rejected,), generator=generator)
    return torch.tensor(shuffled)


def _draws(generator: torch.Generator, chunk: int) -> Iterator[int]:
    """The generator's 32-bit draws (their low bits), one at a time, fetched in chunks."""
    while True:
        yield from torch.randint(1 << DRAW_BITS, (chunk,), generator=generator).tolist()
