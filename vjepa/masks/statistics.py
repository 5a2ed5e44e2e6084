"""What a batch of masks hides, in numbers."""

from statistics import fmean, pstdev
from typing import Any

import torch

from vjepa.kernels import TokenIndices
from vjepa.masks.checks import check_grid
from vjepa.masks.container import Masks, set_lengths


def mask_statistics(masks: Masks, grid: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Set sizes of each mask kind, as plain numbers (JSON-ready).

    Args:
        masks: masks on the CPU.
        grid: tokens of a clip as (t, h, w); adds the shares that need it.

    Returns:
        ``{"clips": B, "kinds": [...]}`` with, for each mask kind, ``kind`` (its number), ``sets``, and ``context`` and
        ``target``: dicts with mean, std (population), min and max of the tokens in a set. With ``grid`` also ``hidden``
        (mean share of a clip's tokens that the encoder does not see), ``dropped`` (mean share that is neither context
        nor target), and ``context_over_time``: the share of each time step's tokens that is context, t numbers.
    """
    result: dict[str, Any] = {"clips": masks.num_clips, "kinds": []}
    kinds = masks.kind.tolist()
    context_lengths, target_lengths = set_lengths(masks.context), set_lengths(masks.target)
    for kind in sorted(set(kinds)):
        sets = [s for s, k in enumerate(kinds) if k == kind]
        context = [context_lengths[s] for s in sets]
        target = [target_lengths[s] for s in sets]
        row: dict[str, Any] = {
            "kind": kind,
            "sets": len(sets),
            "context": _summary(context),
            "target": _summary(target),
        }
        if grid is not None:
            t, h, w = check_grid(grid)
            row["hidden"] = 1 - fmean(context) / (t * h * w)
            row["dropped"] = 1 - (fmean(context) + fmean(target)) / (t * h * w)
            row["context_over_time"] = _over_time(masks.context, sets, (t, h, w))
        result["kinds"].append(row)
    return result


def _summary(lengths: list[int]) -> dict[str, float]:
    return {"mean": fmean(lengths), "std": pstdev(lengths), "min": min(lengths), "max": max(lengths)}


def _over_time(tokens: TokenIndices, sets: list[int], grid: tuple[int, int, int]) -> list[float]:
    t, h, w = grid
    chunks = tokens.indices.split(set_lengths(tokens))
    counts = torch.bincount(torch.cat([chunks[s] for s in sets]) // (h * w), minlength=t)
    return (counts / (len(sets) * h * w)).tolist()
