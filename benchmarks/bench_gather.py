"""gather_tokens against index_select and against the gather over an expanded index of the usual masking code."""

from __future__ import annotations

import torch

from vjepa.kernels import gather_tokens
from vjepa.masks import MultiBlock

CLIPS, TOKENS, WIDTH = 8, 1568, 384


def bench_gather_context(compare, device):
    # Truncated masks, because the expanded gather needs a rectangle: same tokens for everyone.
    sampler = MultiBlock(kinds=((8, 0.15),), packing="truncate")
    indices = sampler(CLIPS, torch.Generator().manual_seed(0)).context.to(device)
    x = torch.randn(CLIPS, TOKENS, WIDTH, device=device)
    kept = indices.total // CLIPS
    rectangle = indices.indices.view(CLIPS, kept)
    rows = (rectangle + torch.arange(CLIPS, device=device)[:, None] * TOKENS).flatten()
    columns = rectangle[..., None].expand(-1, -1, WIDTH)
    calls = {
        "vjepa": lambda: gather_tokens(x, indices),
        "index_select": lambda: x.view(-1, WIDTH).index_select(0, rows),
        "expanded gather": lambda: torch.gather(x, 1, columns).view(-1, WIDTH),
    }
    expected = x[torch.arange(CLIPS, device=device)[:, None], rectangle].view(-1, WIDTH)
    for call in calls.values():
        assert torch.equal(call(), expected)
    work = f"{CLIPS} clips x {kept} of {TOKENS} tokens x {WIDTH}, float32, packing truncate"
    compare("gather", work, calls, bytes_moved=2 * indices.total * WIDTH * x.element_size())
