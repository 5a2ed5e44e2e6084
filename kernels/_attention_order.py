"""Which backends of varlen_attention were fastest, on a device like this one and for heads and lengths like these.

The measurements are those of `_attention_measured.py`. Nearest is what differs by the smallest factors in head_dim and in
the mean length of the queries' sequences. Those of one length have measurements of their own, as they can share a call
without padding; where there are none, those of unlike lengths tell, never the other way round.
"""

from __future__ import annotations

from functools import lru_cache
from math import log2

import torch
from torch import Tensor

from . import _cpu_attention
from ._attention_measured import MEASURED
from ._triton import capability


def order(device: torch.device, q: Tensor, scale: float, lengths: Tensor, kv_lengths: Tensor) -> tuple[str, ...]:
    """Names of backends, fastest first; none where nothing like it was measured."""
    kind = _kind(device)
    if kind not in MEASURED or q.shape[0] == 0:
        return ()
    alike = len(set(lengths.tolist())) == 1 and len(set(kv_lengths.tolist())) == 1
    dtype = "bfloat16" if q.dtype == torch.float16 else str(q.dtype).removeprefix("torch.")  # as fast
    return nearest(kind, dtype, q.shape[2], round(log2(q.shape[0] / lengths.shape[0]), 2), alike)


def _kind(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu_amx" if _cpu_attention.tiles() else "cpu"
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    return "sm_{}{}".format(*capability(device))


@lru_cache(maxsize=64)
def nearest(kind: str, dtype: str, head_dim: int, size: float, alike: bool) -> tuple[str, ...]:
    """The order of the nearest measurement; `size`: log2 of the mean tokens of a sequence."""
    found = [entry for entry in MEASURED.get(kind, ()) if entry[0] == dtype]
    found = [entry for entry in found if entry[3] and alike] or [entry for entry in found if not entry[3]]

    def distance(entry: tuple[str, int, int, bool, tuple[str, ...]]) -> float:
        return abs(log2(entry[1] / head_dim)) + abs(log2(entry[2]) - size)

    return min(found, key=distance)[4] if found else ()
