"""From boolean token tables to packed `Masks`, with or without dropping tokens.

Legend: K mask kinds, B clips, L tokens of a clip. Tables are bool [K, B, L], in (t, h, w) token order.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from vjepa.kernels import TokenIndices
from vjepa.masks.checks import is_number
from vjepa.masks.container import Masks

Packing = Literal["exact", "budget", "truncate"]
"""exact: nothing dropped. budget: each context sub-sampled uniformly to a hidden ratio. truncate: every context, and
every target, of a mask kind cut to the shortest one of the batch, which drops the last tokens in time (the released
recipe)."""
PACKINGS: tuple[str, ...] = get_args(Packing)


def check_packing(packing: str, hidden_ratio: float) -> None:
    """Raise ``ValueError`` for an unknown packing or a hidden ratio outside (0, 1)."""
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
    if not is_number(hidden_ratio) or not 0 < hidden_ratio < 1:
        raise ValueError(f"hidden_ratio must be between 0 and 1, both excluded, got {hidden_ratio!r}")


def pack(context: Tensor, target: Tensor, packing: str, hidden_ratio: float, generator: torch.Generator) -> Masks:
    """Masks of a batch from its context and target tables (bool [K, B, L] on the CPU, no row empty).

    ``budget`` is the only packing that draws from ``generator``, and it does so last: the blocks of a given generator
    are the same in all three packings.
    """
    if packing == "budget":
        context = _subsample(context, hidden_ratio, generator)
    elif packing == "truncate":
        context, target = _truncate(context), _truncate(target)
    kinds, clips, _ = context.shape
    clip = torch.arange(clips).repeat(kinds)
    kind = torch.arange(kinds).repeat_interleave(clips)
    return Masks(_tokens(context, clip), _tokens(target, clip.clone()), kind, clips, kinds)


def _subsample(context: Tensor, hidden_ratio: float, generator: torch.Generator) -> Tensor:
    """Keep a uniformly drawn subset of each row, of at most ``(1 - hidden_ratio) L`` tokens (at least one)."""
    keep = max(1, round(context.shape[-1] * (1 - hidden_ratio)))
    key = torch.rand(context.shape, generator=generator).masked_fill_(~context, 2.0)
    chosen = torch.zeros_like(context).scatter_(-1, key.topk(keep, largest=False).indices, True)
    return chosen & context


def _truncate(table: Tensor) -> Tensor:
    """Keep the first tokens of each row, as many as the shortest row of its kind has."""
    rank = table.cumsum(-1, dtype=torch.int32)
    shortest = rank[..., -1].amin(1)
    return table & (rank <= shortest[:, None, None])


def _tokens(table: Tensor, clip: Tensor) -> TokenIndices:
    """The true positions of each row of ``table`` as one set."""
    length = table.shape[-1]
    rows = table.reshape(-1, length)
    counts = rows.sum(-1)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    indices = torch.arange(length).expand_as(rows).masked_select(rows)
    return TokenIndices(indices, offsets, clip, tuple(counts.tolist()))
