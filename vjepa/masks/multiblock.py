"""Multi-block masks: the hidden part of a clip is a union of blocks that span its whole duration.

For each mask kind ``(n, s)`` and batch one block size is drawn: ``a = int(s H W)`` positions with an aspect ratio
``r = h / w`` uniform in ``aspect``, so ``h = round(sqrt(a r))`` and ``w = round(sqrt(a / r))``, cut to the grid. Each
clip then draws n positions of that block. Target = union of the blocks, context = its complement.

The order of the random draws, and so the masks, is that of the released V-JEPA sampler (see `MultiBlock.__call__`).

Legend: K mask kinds, B clips, A attempts at a clip, n blocks, T x H x W token grid, L = T H W.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vjepa.masks.checks import check_draw, check_grid, is_int, is_number
from vjepa.masks.container import Masks
from vjepa.masks.packing import check_packing, pack

# torch's CPU generator serves a range below 2**28 with one 32-bit draw, which the shared draw of `_positions` needs.
MAX_TOKENS = 1 << 28
# A clip whose blocks leave no context is drawn again; a configuration that succeeds less often than this is an error.
MAX_ATTEMPTS = 2000

Kinds = Sequence[tuple[int, float]]


class MultiBlock:
    """Sampler of multi-block masks; calling it gives the `Masks` of one batch.

    Args:
        grid: tokens of a clip as (t, h, w).
        kinds: (number of blocks, spatial scale) of each mask kind; the scale is the share of the h x w plane that one
            block covers.
        aspect: range of the blocks' height over width.
        packing: "exact" (nothing dropped), "budget" (context sub-sampled uniformly to ``hidden_ratio``) or "truncate"
            (all sets of a kind cut to the shortest, as the released sampler does).
        hidden_ratio: for "budget", the share of a clip's tokens that the encoder must not see.

    Raises:
        ValueError: naming the argument that is out of range, or the kind whose block always hides the whole grid.
    """

    def __init__(
        self,
        grid: tuple[int, int, int] = (8, 14, 14),
        kinds: Kinds = ((8, 0.15), (2, 0.7)),
        aspect: tuple[float, float] = (0.75, 1.5),
        packing: str = "exact",
        hidden_ratio: float = 0.9,
    ) -> None:
        self.grid = check_grid(grid)
        if math.prod(self.grid) >= MAX_TOKENS:
            raise ValueError(f"grid must have fewer than {MAX_TOKENS} tokens, got {self.grid}")
        self.kinds = check_kinds(kinds)
        self.aspect = check_aspect(aspect)
        check_packing(packing, hidden_ratio)
        self.packing = packing
        self.hidden_ratio = float(hidden_ratio)
        self._check_room()

    @property
    def context_steps(self) -> int:
        """Time steps of the grid that may hold context, from the first."""
        return self.grid[0]

    def __call__(self, batch_size: int, generator: torch.Generator, iteration: int | None = None) -> Masks:
        """Draw the masks of a batch.

        Args:
            batch_size: clips B (at least 1).
            generator: CPU generator; everything drawn comes from it and it is left where the draws end.
            iteration: None, or the number of the call, from 0, to reproduce the released sampler. That one draws block
                positions from the default generator of its process, and the block size of each mask kind from a
                generator of its own, seeded with the number of the call. So after ``torch.manual_seed(s)`` its i-th
                call equals, for ``packing="truncate"``, the i-th call here with one generator seeded with ``s`` and
                ``iteration=i``. (Its loader workers share the count and have a default generator each.)

        Returns:
            `Masks` on the CPU: K * B sets, mask kind major, clip minor, token ids ascending, none empty.

        Raises:
            ValueError: bad arguments, or no context left after many attempts (the message names the kind).
        """
        check_draw(batch_size, generator)
        planes = []
        for blocks, scale in self.kinds:
            size_generator = generator if iteration is None else torch.Generator().manual_seed(iteration)
            planes.append(self._draw_kind(batch_size, blocks, scale, generator, size_generator))
        hidden = torch.stack(planes)
        t, h, w = self.grid
        target = hidden[:, :, None, :].repeat(1, 1, t, 1)
        target[:, :, self.context_steps :] = True
        target = target.reshape(len(self.kinds), batch_size, t * h * w)
        return pack(~target, target, self.packing, self.hidden_ratio, generator)

    def block_size(self, scale: float, aspect: float) -> tuple[int, int]:
        """Height and width in tokens of a block of the given spatial scale and aspect ratio."""
        _, h, w = self.grid
        area = int(h * w * scale)
        height = min(max(round(math.sqrt(area * aspect)), 1), h)
        width = min(max(round(math.sqrt(area / aspect)), 1), w)
        return height, width

    def _draw_kind(
        self, batch_size: int, blocks: int, scale: float, generator: torch.Generator, size_generator: torch.Generator
    ) -> Tensor:
        """Hidden positions of each clip for one mask kind: bool [B, H W], no row entirely true."""
        _, h, w = self.grid
        size = self._draw_size(scale, size_generator)
        accepted: list[Tensor] = []
        missing, attempts = batch_size, 0
        while missing:
            if attempts >= MAX_ATTEMPTS * batch_size:
                raise ValueError(
                    f"kinds: {blocks} blocks of {size[0]} x {size[1]} (spatial scale {scale}) leave no context on a "
                    f"grid of {h} x {w} in {attempts} attempts; expected fewer or smaller blocks, or a larger grid"
                )
            hidden = self._draw_planes(missing, blocks, size, generator)
            hidden = hidden[~hidden.all(-1)]
            attempts += missing
            missing -= len(hidden)
            accepted.append(hidden)
        return torch.cat(accepted)

    def _draw_size(self, scale: float, generator: torch.Generator) -> tuple[int, int]:
        """One block size; aspect ratios whose block would hide the whole plane are drawn again."""
        low, high = self.aspect
        _, h, w = self.grid
        for _ in range(MAX_ATTEMPTS):
            # The released sampler draws duration and scale first, even where their ranges are single values.
            _, _, share = torch.rand(3, generator=generator).tolist()
            size = self.block_size(scale, low + share * (high - low))
            if size != (h, w):
                return size
        raise ValueError(
            f"kinds: a block of spatial scale {scale} hides all of a {h} x {w} grid for {MAX_ATTEMPTS} aspect ratios "
            f"drawn from {self.aspect}; expected a smaller scale or a larger grid"
        )

    def _draw_planes(self, attempts: int, blocks: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Union of ``blocks`` blocks at uniform positions: bool [A, H W], true where hidden."""
        _, h, w = self.grid
        rooms = (h - size[0] + 1, w - size[1] + 1)
        # Top, left and start (always 0) of each block, in this order. (x mod ab) mod a = x mod a: one call with the
        # product of the ranges gives what a call for each number would give, from the same 32-bit draws.
        draws = torch.randint(rooms[0] * rooms[1], (attempts, blocks, 3), generator=generator)
        rows = _span(draws[..., 0] % rooms[0], size[0], h)
        columns = _span(draws[..., 1] % rooms[1], size[1], w)
        return torch.bmm(rows.transpose(1, 2), columns).flatten(1) > 0

    def _check_room(self) -> None:
        """Refuse a mask kind whose block hides the whole plane whatever the aspect ratio."""
        _, h, w = self.grid
        for blocks, scale in self.kinds:
            # Height grows and width shrinks with the aspect ratio, so the two ends decide unless both hide everything.
            ends = [self.block_size(scale, aspect) for aspect in self.aspect]
            if all(size == (h, w) for size in ends):
                raise ValueError(
                    f"kinds: a block of ({blocks}, {scale}) hides all of a {h} x {w} grid at every aspect ratio in "
                    f"{self.aspect}, which leaves no context; expected a smaller scale or a larger grid"
                )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(grid={self.grid}, kinds={self.kinds}, aspect={self.aspect}, "
            f"packing={self.packing!r}, hidden_ratio={self.hidden_ratio})"
        )


class CausalMultiBlock(MultiBlock):
    """Multi-block masks whose context lies within the first ``context_steps`` time steps of the token grid.

    Whatever is not context is target, the later time steps included. One time step is ``tubelet_size`` frames.

    Args:
        context_steps: time steps that may hold context, 1..t (t gives plain `MultiBlock`).
        grid, kinds, aspect, packing, hidden_ratio: as in `MultiBlock`.
    """

    def __init__(
        self,
        grid: tuple[int, int, int] = (8, 14, 14),
        kinds: Kinds = ((8, 0.15), (2, 0.7)),
        aspect: tuple[float, float] = (0.75, 1.5),
        packing: str = "exact",
        hidden_ratio: float = 0.9,
        *,
        context_steps: int = 3,
    ) -> None:
        super().__init__(grid, kinds, aspect, packing, hidden_ratio)
        if not is_int(context_steps):
            raise TypeError(f"context_steps must be an int, got {context_steps!r}")
        if not 1 <= context_steps <= self.grid[0]:
            raise ValueError(
                f"context_steps must be within 1..{self.grid[0]} (time steps of the grid), got {context_steps}"
            )
        self._context_steps = context_steps

    @property
    def context_steps(self) -> int:
        """Time steps of the grid that may hold context, from the first."""
        return self._context_steps

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, context_steps={self.context_steps})"


def check_kinds(kinds: Kinds) -> tuple[tuple[int, float], ...]:
    """Mask kinds as a tuple of (blocks, scale); ``ValueError`` unless blocks >= 1 and 0 < scale <= 1."""
    pairs = isinstance(kinds, Sequence) and all(isinstance(kind, Sequence) and len(kind) == 2 for kind in kinds)
    if not kinds or not pairs or not all(is_number(scale) for _, scale in kinds):
        raise ValueError(f"kinds must be one or more pairs (number of blocks, spatial scale), got {kinds!r}")
    checked = tuple((blocks, float(scale)) for blocks, scale in kinds)
    for blocks, scale in checked:
        if not is_int(blocks) or blocks < 1:
            raise ValueError(f"kinds: the number of blocks must be an int of at least 1, got {blocks!r}")
        if not 0 < scale <= 1:
            raise ValueError(f"kinds: the spatial scale must be above 0 and at most 1, got {scale}")
    return checked


def check_aspect(aspect: tuple[float, float]) -> tuple[float, float]:
    """Aspect range as two floats; ``ValueError`` unless 0 < low <= high < inf."""
    pair = isinstance(aspect, Sequence) and len(aspect) == 2 and all(map(is_number, aspect))
    if not pair or not 0 < aspect[0] <= aspect[1] < math.inf:
        raise ValueError(f"aspect must be (low, high) with 0 < low <= high, got {aspect!r}")
    return float(aspect[0]), float(aspect[1])


def _span(start: Tensor, size: int, length: int) -> Tensor:
    """Rows that are 1 on ``start .. start + size - 1`` and 0 elsewhere: [A, n] -> float32 [A, n, length]."""
    offset = torch.arange(length) - start[..., None]
    return ((offset >= 0) & (offset < size)).float()
