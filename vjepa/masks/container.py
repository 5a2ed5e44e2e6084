"""`Masks`: the context and target token sets of a batch, packed without padding."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vjepa.kernels import TokenIndices


@dataclass(frozen=True, eq=False, repr=False)
class Masks:
    """Context and target tokens of a batch: S sets, one for each clip and mask kind, mask kind major, clip minor.

    Args:
        context: the visible tokens, S sets; ``context.clip`` names the clip of each set.
        target: the hidden tokens to predict, S sets in the same order.
        kind: int64 [S], the mask kind of each set, from 0.
        num_clips: clips of the batch (B). 0, the default, reads it off ``context.clip``, which waits for the device if
            that is not on the CPU; samplers, `to`, `pin_memory` and `split` always pass it on.
        num_kinds: mask kinds (K), likewise from ``kind``.

    Raises:
        TypeError: an argument of another type.
        ValueError: numbers of sets or devices that differ, a target set of another clip than its context, an empty set,
            a negative kind, fewer clips than the sets name.
    """

    context: TokenIndices
    target: TokenIndices
    kind: Tensor
    num_clips: int = 0
    num_kinds: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "target"):
            if not isinstance(getattr(self, name), TokenIndices):
                raise TypeError(f"{name} must be a TokenIndices, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.kind, Tensor) or self.kind.is_floating_point() or self.kind.dtype == torch.bool:
            raise TypeError(f"kind must be an int tensor, got {getattr(self.kind, 'dtype', type(self.kind).__name__)}")
        sets = self.context.num_sets
        if sets == 0:
            raise ValueError("context must hold at least one set, got 0")
        if self.target.num_sets != sets:
            raise ValueError(f"target must have as many sets as context ({sets}), got {self.target.num_sets}")
        if self.kind.shape != (sets,):
            raise ValueError(f"kind must have shape [{sets}], one number for each set, got {list(self.kind.shape)}")
        for name, device in (("target", self.target.clip.device), ("kind", self.kind.device)):
            if device != self.context.clip.device:
                raise ValueError(f"{name} must be on the device of context ({self.context.clip.device}), got {device}")
        if self.kind.is_cpu and int(self.kind.min()) < 0:
            raise ValueError(f"kind must not be negative, got {int(self.kind.min())}")
        if self.context.clip.is_cpu and self.target.clip.is_cpu and not self.context.clip.equal(self.target.clip):
            raise ValueError("target.clip must equal context.clip, got sets of different clips")
        for name in ("context", "target"):
            lengths = set_lengths(getattr(self, name))
            if min(lengths) < 1:
                raise ValueError(f"{name} must have no empty set, got no token in set {lengths.index(min(lengths))}")
        if self.num_clips and self.context.num_clips and self.num_clips < self.context.num_clips:
            raise ValueError(f"num_clips must be at least {self.context.num_clips}, got {self.num_clips}")
        if not self.num_clips:
            object.__setattr__(self, "num_clips", self.context.num_clips or int(self.context.clip.max()) + 1)
        if not self.num_kinds:
            object.__setattr__(self, "num_kinds", int(self.kind.max()) + 1)

    @property
    def num_sets(self) -> int:
        """S, the number of sets."""
        return self.context.num_sets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Masks:
        """The same masks on ``device``."""
        return Masks(
            self.context.to(device, non_blocking=non_blocking),
            self.target.to(device, non_blocking=non_blocking),
            self.kind.to(device, non_blocking=non_blocking),
            self.num_clips,
            self.num_kinds,
        )

    def pin_memory(self) -> Masks:
        """The same masks in page-locked host memory (also what a DataLoader calls with ``pin_memory=True``)."""
        return Masks(
            self.context.pin_memory(), self.target.pin_memory(), self.kind.pin_memory(), self.num_clips, self.num_kinds
        )

    def split(self, parts: int) -> list[Masks]:
        """Cut the batch into ``parts`` contiguous groups of clips, for gradient accumulation.

        Sizes are those of ``torch.tensor_split`` (they differ by at most one clip); clips are numbered from 0 in every
        part, so part i goes with ``video.tensor_split(parts)[i]``. Meant for masks on the CPU, as samplers return
        them.

        Raises:
            ValueError: ``parts`` is not within 1..num_clips.
        """
        clips = self.num_clips
        if not 1 <= parts <= clips:
            raise ValueError(f"parts must be within 1..{clips} (the number of clips), got {parts}")
        if parts == 1:
            return [self]
        clip = self.context.clip.tolist()
        base, extra = divmod(clips, parts)
        starts = [part * base + min(part, extra) for part in range(parts + 1)]
        out = []
        for start, stop in pairwise(starts):
            sets = [s for s, c in enumerate(clip) if start <= c < stop]
            out.append(
                Masks(
                    _select(self.context, sets, start),
                    _select(self.target, sets, start),
                    self.kind[sets],
                    stop - start,
                    self.num_kinds,
                )
            )
        return out

    def __repr__(self) -> str:
        spans = []
        for name in ("context", "target"):
            lengths = set_lengths(getattr(self, name))
            spans.append(f"{name} {min(lengths)}..{max(lengths)} (mean {sum(lengths) / len(lengths):.1f})")
        return (
            f"Masks(clips={self.num_clips}, kinds={self.num_kinds}, tokens per set: {', '.join(spans)}, "
            f"device={self.kind.device})"
        )


def set_lengths(tokens: TokenIndices) -> list[int]:
    """Tokens of each set, as a list."""
    lengths = tokens.lengths
    return lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)


def _select(tokens: TokenIndices, sets: list[int], first_clip: int) -> TokenIndices:
    """The given sets of ``tokens``, with clips numbered from ``first_clip``."""
    all_lengths = set_lengths(tokens)
    chunks = tokens.indices.split(all_lengths)
    lengths = tuple(all_lengths[s] for s in sets)
    offsets = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return TokenIndices(
        torch.cat([chunks[s] for s in sets]),
        offsets.to(tokens.indices.device),
        tokens.clip[sets] - first_clip,
        lengths,
    )
