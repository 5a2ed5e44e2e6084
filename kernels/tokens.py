"""TokenIndices: S ragged sets of token ids, with their lengths on the host.

    set s holds indices[cu_seqlens[s] : cu_seqlens[s + 1]], lengths[s] ids of tokens of clip clip[s]

The lengths live on the host because launches, views and checks need them there; asking the device for them would wait.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ._checks import INTS, check_device, check_lengths, check_sets, check_tensor, describe


@dataclass(frozen=True, eq=False)
class TokenIndices:
    """S ragged sets of token ids.

    A clip may have several sets, and a set may name a token twice or be empty; only `predictor_tokens` and
    `masked_l1_loss` refuse empty sets.

    Args:
        indices: int64 [N], token id inside its own clip, 0 <= id < L.
        cu_seqlens: int32 [S+1], offsets of the sets in `indices`.
        clip: int64 [S], the clip each set belongs to.
        lengths: S ints on the host: a tuple, or an int CPU tensor (then torch.compile does not specialise on them).
        num_clips: clips in the batch, if known; learnt from `clip` (largest + 1) when that is on the CPU. Only
            `scatter_tokens` needs it.

    Values are checked where they are on the CPU; on another device they are trusted, as reading them would wait for it:
    build on the CPU, then `.to(device)`.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes or devices that disagree, negative ids or lengths, offsets that are not sums of the lengths.
    """

    indices: Tensor
    cu_seqlens: Tensor
    clip: Tensor
    lengths: tuple[int, ...] | Tensor
    num_clips: int | None = None
    max_index: int | None = field(default=None, repr=False)  # largest token id where it was seen on the host

    def __post_init__(self) -> None:
        check_tensor("indices", self.indices, "[N]", 1, (torch.int64,))
        check_tensor("cu_seqlens", self.cu_seqlens, "[S+1]", 1, (torch.int32,))
        check_tensor("clip", self.clip, "[S]", 1, (torch.int64,))
        check_device("cu_seqlens", self.cu_seqlens, "indices", self.indices)
        check_device("clip", self.clip, "indices", self.indices)
        check_lengths("lengths", self.lengths)
        if self.cu_seqlens.shape[0] != self.clip.shape[0] + 1:
            raise ValueError(
                f"cu_seqlens must have one entry more than clip ({self.clip.shape[0]}), got {self.cu_seqlens.shape[0]}"
            )
        if torch.compiler.is_compiling():
            return  # values are not known while tracing; the operators check them when they run
        if not isinstance(self.lengths, Tensor):
            object.__setattr__(self, "lengths", tuple(operator.index(length) for length in self.lengths))
        check_sets("", self.cu_seqlens, self.lengths, self.indices.shape[0])
        if self.num_clips is not None and not hasattr(self.num_clips, "__index__"):
            raise TypeError(f"num_clips must be an int or None, got {describe(self.num_clips)}")
        if self.indices.device.type == "cpu":
            object.__setattr__(self, "max_index", _largest("indices", self.indices))
            largest_clip = _largest("clip", self.clip)
            if self.num_clips is None:
                object.__setattr__(self, "num_clips", largest_clip + 1)
            elif largest_clip >= self.num_clips:
                raise ValueError(f"clip must be below num_clips ({self.num_clips}), got {largest_clip}")

    @property
    def max_seqlen(self) -> int:
        """Tokens of the largest set (0 without sets)."""
        if isinstance(self.lengths, Tensor):
            return int(self.lengths.max()) if self.lengths.numel() else 0
        return max(self.lengths, default=0)

    @property
    def num_sets(self) -> int:
        """S, the number of sets."""
        return self.clip.shape[0]

    @property
    def total(self) -> int:
        """N, the number of tokens in all sets."""
        return self.indices.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenIndices:
        """A copy on `device`; the lengths stay on the host. A copy to the CPU, where values are checked, does wait."""
        non_blocking = non_blocking and torch.device(device).type != "cpu"
        return replace(
            self,
            indices=self.indices.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            clip=self.clip.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> TokenIndices:
        """A copy in page-locked memory, from which `.to(device, non_blocking=True)` does not wait."""
        return replace(
            self,
            indices=self.indices.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
            clip=self.clip.pin_memory(),
        )

    @staticmethod
    def from_sets(
        sets: Sequence[Tensor],
        clip: Sequence[int] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> TokenIndices:
        """Pack a list of 1-D int tensors.

        Args:
            sets: S tensors of token ids, any int dtype, on one device.
            clip: the clip of each set, S ints (list or int tensor); 0..S-1 by default.
            device: where the result lives; by default where the sets are.

        Raises:
            TypeError, ValueError: see the class.
        """
        if isinstance(sets, Tensor) or not isinstance(sets, Sequence):
            raise TypeError(f"sets must be a list of 1-D int tensors, got {describe(sets)}")
        if not sets:
            raise ValueError("sets must have at least one set, got none")
        for number, ids in enumerate(sets):
            check_tensor(f"sets[{number}]", ids, "[n]", 1, INTS)
            check_device(f"sets[{number}]", ids, "sets[0]", sets[0])
        lengths = tuple(ids.shape[0] for ids in sets)
        offsets = torch.zeros(len(sets) + 1, dtype=torch.int32)
        offsets[1:] = torch.cumsum(torch.tensor(lengths), 0)
        indices = torch.cat([ids.to(torch.int64) for ids in sets])
        clips = torch.arange(len(sets)) if clip is None else torch.as_tensor(clip)
        check_tensor("clip", clips, "[S]", 1, INTS)
        if clips.shape[0] != len(sets):
            raise ValueError(f"clip must have one entry for each of the {len(sets)} sets, got {clips.shape[0]}")
        num_clips = _largest("clip", clips) + 1 if clips.device.type == "cpu" else None
        where = indices.device
        packed = TokenIndices(indices, offsets.to(where), clips.to(where, torch.int64), lengths, num_clips)
        return packed if device is None else packed.to(device)


def _largest(name: str, values: Tensor) -> int:
    if values.numel() == 0:
        return -1
    bounds = torch.aminmax(values)
    smallest, largest = int(bounds[0].item()), int(bounds[1].item())
    if smallest < 0:
        raise ValueError(f"{name} must not be negative, got {smallest}")
    return largest


def check_token_indices(name: str, value: object, device: torch.device) -> None:
    """Raise unless `value` is a TokenIndices on `device`."""
    if not isinstance(value, TokenIndices):
        raise TypeError(f"{name} must be a TokenIndices, got {describe(value)}")
    if value.indices.device != device:
        raise ValueError(f"{name} must be on {device} like the tokens, got {value.indices.device}")


def check_within(name: str, value: TokenIndices, batch: int, length: int) -> None:
    """Raise if ids seen on the host when `value` was built exceed B clips or L tokens."""
    if torch.compiler.is_compiling():
        return
    if value.max_index is not None and value.max_index >= length:
        raise ValueError(f"{name}.indices must be between 0 and {length - 1} (tokens of a clip), got {value.max_index}")
    if value.num_clips is not None and value.num_clips > batch:
        raise ValueError(f"{name}.clip must be between 0 and {batch - 1} (clips), got {value.num_clips - 1}")
