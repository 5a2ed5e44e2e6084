"""What the benchmarks of the token operators share: ViT-L on clips of 16 x 224 x 224, with masks as training draws them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vjepa.kernels import TokenIndices
from vjepa.masks import Masks, MultiBlock

FRAMES, SIZE, TUBELET = 16, 224, (2, 16, 16)
LENGTH = 8 * 14 * 14  # L
WIDTH, NARROW = 1024, 384  # of the encoder and of the predictor
SHORT, LONG = (8, 0.15), (2, 0.7)  # the recipe's kinds of masks


def masks(packing: str, clips: int, kinds: Sequence[tuple[int, float]] = (SHORT, LONG)) -> Masks:
    """The masks of one batch, always the same."""
    return MultiBlock(kinds=kinds, packing=packing)(clips, torch.Generator().manual_seed(0))


def rows_of(sets: TokenIndices, length: int = LENGTH) -> Tensor:
    """[N] rows of the packed tokens in a [B * L, ...] table; peers get them for nothing."""
    return sets.indices + per_token(sets.clip, sets) * length


def per_token(values_S: Tensor, sets: TokenIndices) -> Tensor:
    """[S] -> [N], each token the value of its set."""
    lengths = torch.as_tensor(sets.lengths, device=values_S.device)
    return torch.repeat_interleave(values_S, lengths, output_size=sets.total)


def rectangles(sets: TokenIndices, clips: int) -> list[Tensor]:
    """[B, n] ids of each mask kind; all sets of a kind have one length (packing truncate)."""
    kinds = sets.num_sets // clips
    parts = sets.indices.split([clips * sets.lengths[clips * kind] for kind in range(kinds)])
    return [part.view(clips, -1) for part in parts]


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Float64 copies, with gradients where the originals have them: what the exact results are computed from."""
    return tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors)


def detached(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Exact results without their graph."""
    return tuple(tensor.detach() for tensor in tensors)
