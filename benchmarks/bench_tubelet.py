"""tubelet_embed of the kept tokens, from uint8 video, against Conv3d and patchify + linear, both then gathered."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vjepa.kernels import tubelet_embed
from vjepa.masks import MultiBlock

CLIPS, FRAMES, SIZE, WIDTH = 2, 16, 224, 384
TUBELET = (2, 16, 16)
TOKENS = 8 * 14 * 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bench_tubelet_kept(compare, device):
    sampler = MultiBlock(kinds=((8, 0.15), (2, 0.7)), packing="exact")
    indices = sampler(CLIPS, torch.Generator().manual_seed(0)).context.to(device)
    video = torch.randint(0, 256, (CLIPS, 3, FRAMES, SIZE, SIZE), dtype=torch.uint8, device=device)
    weight = torch.randn(WIDTH, 3, *TUBELET, device=device) * 0.02
    bias, pos_embed = torch.randn(WIDTH, device=device), torch.randn(TOKENS, WIDTH, device=device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1, 1) for v in (MEAN, STD))
    lengths = torch.tensor(indices.lengths, device=device)
    rows = indices.indices + torch.repeat_interleave(indices.clip, lengths, output_size=indices.total) * TOKENS

    def ours() -> torch.Tensor:
        return tubelet_embed(video, weight, bias, pos_embed, indices, mean=MEAN, std=STD)

    def conv() -> torch.Tensor:
        tokens = F.conv3d((video / 255 - mean) / std, weight, bias, stride=TUBELET)
        return (tokens.flatten(2).transpose(1, 2) + pos_embed).reshape(-1, WIDTH).index_select(0, rows)

    def linear() -> torch.Tensor:
        pixels = (video / 255 - mean) / std
        patches = pixels.unflatten(2, (-1, 2)).unflatten(4, (-1, 16)).unflatten(6, (-1, 16))  # B C T t H h W w
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(CLIPS, TOKENS, -1)
        tokens = F.linear(patches, weight.flatten(1), bias) + pos_embed
        return tokens.view(-1, WIDTH).index_select(0, rows)

    calls = {"vjepa": ours, "Conv3d + gather": conv, "patchify + linear + gather": linear}
    with torch.no_grad():
        for call in calls.values():
            torch.testing.assert_close(call(), conv(), rtol=1e-4, atol=1e-4)
        work = f"{CLIPS} clips, {indices.total} tokens of both masks, {WIDTH} wide, uint8 to float32, packing exact"
        patch = weight[0].numel()
        moved = indices.total * (patch + 4 * WIDTH) + 4 * weight.numel()
        flop = 2 * indices.total * patch * WIDTH
        compare("tubelet", work, calls, bytes_moved=moved, flop=flop)
