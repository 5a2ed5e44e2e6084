"""tubelet_embed of whole clips and of kept tokens, against Conv3d and patchify + linear, both then gathered.

A GPU gets a batch of 24 clips with the masks of a step; a CPU one clip, of which 200 tokens are kept.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.kernels import TokenIndices, tubelet_embed

from .harness import Work, compiled, dtype_name
from .workloads import FRAMES, LENGTH, SIZE, TUBELET, WIDTH, doubles, masks, rows_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 3 * TUBELET[0] * TUBELET[1] * TUBELET[2]
CLIPS, KEPT = {"cuda": 24, "cpu": 1}, 200
DTYPES = (torch.bfloat16, torch.float32)


def normalised(video: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels as the model sees them, computed at least in float32."""
    if video.dtype != torch.uint8:
        return video.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor([1 / (255 * s) for s in STD], dtype=wide, device=video.device).view(3, 1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], dtype=wide, device=video.device)
    return video.to(wide).mul_(scale).add_(shift.view(3, 1, 1, 1)).to(dtype)


def pick(tokens: Tensor, rows: Tensor | None) -> Tensor:
    return tokens if rows is None else tokens.reshape(-1, WIDTH).index_select(0, rows)


def by_conv(video: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, rows: Tensor | None) -> Tensor:
    tokens = F.conv3d(normalised(video, weight.dtype), weight, bias, stride=TUBELET)
    return pick(tokens.flatten(2).transpose(1, 2) + pos_embed, rows)


def by_linear(video: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, rows: Tensor | None) -> Tensor:
    pixels = normalised(video, weight.dtype)
    patches = pixels.unflatten(2, (-1, 2)).unflatten(4, (-1, 16)).unflatten(6, (-1, 16))  # B C T t H h W w
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(video.shape[0], LENGTH, -1)
    return pick(F.linear(patches, weight.flatten(1), bias) + pos_embed, rows)


def kept(tokens: str, clips: int) -> tuple[TokenIndices | None, str, str | None]:
    """The sets, their name and their packing."""
    if tokens == "whole":
        return None, "whole clips", None
    if clips == 1:
        ids = torch.randperm(LENGTH)[:KEPT].sort().values
        return TokenIndices.from_sets([ids]), f"{KEPT} of {LENGTH} tokens", None
    sets = masks(tokens, clips).context
    return sets, f"{sets.total / clips:.0f} tokens a clip (both masks)", tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("tokens", ["whole", "truncate", "exact"])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def bench_tubelet(compare, device, tokens, pixels, dtype, direction):
    backward = direction != "forward"
    if backward and (tokens == "whole" or pixels == "float"):
        pytest.skip("backward is measured as training runs it: kept tokens of uint8 clips")
    if tokens == "exact" and (device.type == "cpu" or pixels == "float"):
        pytest.skip("exact is measured on a GPU from uint8; it differs from truncate in the number of tokens alone")
    clips = CLIPS[device.type]
    sets, name, packing = kept(tokens, clips)
    sets = None if sets is None else sets.to(device)
    rows = None if sets is None else rows_of(sets)
    number = clips * LENGTH if sets is None else sets.total
    video = torch.randint(0, 256, (clips, 3, FRAMES, SIZE, SIZE), dtype=torch.uint8, device=device)
    video = video if pixels == "uint8" else normalised(video, dtype)
    norm = {"mean": MEAN, "std": STD} if pixels == "uint8" else {}
    weight = (torch.randn(WIDTH, 3, *TUBELET, device=device) * 0.02).to(dtype).requires_grad_(backward)
    bias = torch.randn(WIDTH, device=device).to(dtype).requires_grad_(backward)
    pos_embed = torch.randn(LENGTH, WIDTH, device=device).to(dtype)
    grad = torch.randn(number, WIDTH, device=device).to(dtype) if backward else None

    def step(embed, video, weight, bias, pos_embed, grad):
        out = embed(video, weight, bias, pos_embed)
        return (out, *torch.autograd.grad(out, (weight, bias), grad)) if backward else out

    def ours():
        return step(lambda *given: tubelet_embed(*given, sets, **norm), video, weight, bias, pos_embed, grad)

    def peer(embed):
        return lambda: step(lambda *given: embed(*given, rows), video, weight, bias, pos_embed, grad)

    then = "" if sets is None else " + gather"
    truth = step(
        lambda *given: by_linear(*given, rows),
        video if pixels == "uint8" else video.double(),
        *doubles(weight, bias, pos_embed),
        None if grad is None else grad.double(),
    )
    exact = tuple(tensor.detach() for tensor in (truth if backward else (truth,)))
    size, passes = weight.element_size(), 2 if backward else 1
    moved = passes * (number * (PATCH * video.element_size() + WIDTH * size) + WIDTH * PATCH * size)
    compare(
        Work(
            "tubelet",
            f"{name}, {pixels} video, {direction}",
            dtype_name(dtype),
            {"video": list(video.shape), "weight": list(weight.shape), "out": list(exact[0].shape)},
            packing,
            bytes_moved=moved + min(number, LENGTH) * WIDTH * size,
            flop=passes * 2 * number * PATCH * WIDTH,
        ),
        "tubelet_embed",
        ours,
        {
            f"Conv3d{then}": peer(by_conv),
            f"patchify + linear{then}": peer(by_linear),
            f"torch.compile of patchify + linear{then}": peer(compiled(by_linear)),
        },
        exact,
    )
