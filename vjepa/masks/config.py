"""`MaskConfig`: the masks section of a configuration file."""

from dataclasses import dataclass
from typing import Literal, get_args

from vjepa.masks.checks import check_grid, is_int, is_number
from vjepa.masks.multiblock import CausalMultiBlock, MultiBlock, check_aspect, check_kinds
from vjepa.masks.packing import Packing, check_packing
from vjepa.masks.tube import RandomTube

Strategy = Literal["multiblock", "tube", "causal"]
STRATEGIES = get_args(Strategy)


@dataclass
class MaskConfig:
    """Which tokens of a clip are hidden.

    Args:
        strategy: multiblock (unions of blocks over all time), tube (random positions over all time) or causal
            (multiblock with the context within the first frames).
        kinds: for multiblock and causal, a (number of blocks, spatial scale) pair for each mask kind.
        aspect: for multiblock and causal, the range of block height over width.
        packing: exact (nothing dropped), budget (context sub-sampled uniformly to hidden_ratio) or truncate (sets cut
            to the shortest of the batch, as the released recipe does).
        hidden_ratio: for budget, the share of a clip's tokens that the encoder must not see.
        tube_ratio: for tube, the share of spatial positions to hide.
        causal_frames: for causal, the context lies within this many first frames (video frames, a multiple of the
            tubelet's frames).
    """

    strategy: Strategy = "multiblock"
    kinds: tuple[tuple[int, float], ...] = ((8, 0.15), (2, 0.7))
    aspect: tuple[float, float] = (0.75, 1.5)
    packing: Packing = "exact"
    hidden_ratio: float = 0.9
    tube_ratio: float = 0.9
    causal_frames: int = 6

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        self.kinds = check_kinds(self.kinds)
        self.aspect = check_aspect(self.aspect)
        check_packing(self.packing, self.hidden_ratio)
        if not is_number(self.tube_ratio) or not 0 < self.tube_ratio < 1:
            raise ValueError(f"tube_ratio must be between 0 and 1, both excluded, got {self.tube_ratio!r}")
        if not is_int(self.causal_frames) or self.causal_frames < 1:
            raise ValueError(f"causal_frames must be an int of at least 1, got {self.causal_frames!r}")

    @property
    def num_kinds(self) -> int:
        """Masks of each clip: how many mask tokens the predictor needs."""
        return 1 if self.strategy == "tube" else len(self.kinds)

    def build(
        self, grid: tuple[int, int, int], tubelet_size: int | None = None
    ) -> MultiBlock | CausalMultiBlock | RandomTube:
        """The sampler for clips of ``grid`` = (t, h, w) tokens.

        Args:
            grid: tokens of a clip.
            tubelet_size: frames of one time step; only needed, and then required, by the causal strategy.

        Raises:
            ValueError: the grid is too small for the masks, or ``causal_frames`` does not fit the clip.
        """
        grid = check_grid(grid)
        if self.strategy == "tube":
            return RandomTube(grid, self.tube_ratio, self.packing, self.hidden_ratio)
        if self.strategy == "multiblock":
            return MultiBlock(grid, self.kinds, self.aspect, self.packing, self.hidden_ratio)
        if tubelet_size is None:
            raise ValueError(
                "tubelet_size must be given for strategy causal, whose causal_frames counts frames, got None"
            )
        steps, rest = divmod(self.causal_frames, tubelet_size)
        if rest or not 1 <= steps <= grid[0]:
            raise ValueError(
                f"causal_frames must be a multiple of the tubelet's {tubelet_size} frames and at most the clip's "
                f"{grid[0] * tubelet_size}, got {self.causal_frames}"
            )
        return CausalMultiBlock(grid, self.kinds, self.aspect, self.packing, self.hidden_ratio, context_steps=steps)
