"""One full pretraining step: target, context, predictor, loss, backward, clipping, AdamW, moving average.

Ours against straight PyTorch (straight.py), the same compiled layer by layer, the best parts of PyTorch
(assembled.py), and, with --reference-repo PATH, the released code (released.py): the same weights, masks packed by
truncation, clips and dtype; who has another loss is not timed. In bfloat16 weights are float32 and products run in
bfloat16. Model FLOP are counted in flops.py, so that the share of a large matrix product is the model-FLOP
utilisation. Peak memory is all that a contender needs: what a step adds, and weights, averages, moments and copies.

On a CPU: ViT-S, 2 clips; torch.compile takes part in a small model, which also checks two steps of everybody in
float32. On a GPU: ViT-L and ViT-H, 24 clips; bench_step_largest.py has the largest batch that fits.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from .contenders import Runner, contenders, verifier, work_of
from .harness import FEWEST_ROUNDS, Wrong, dtype_name
from .steps import PARTS, UPDATE, workload

MODELS = {"cpu": ("vit_small",), "cuda": ("vit_large", "vit_huge")}
CLIPS = {"cpu": 2, "cuda": 24}
ROUNDS = {"cpu": 3, "cuda": FEWEST_ROUNDS}
FEW_ROUNDS = 2  # in float32, of parts, and of exact packing, where all rounds would take too long on a CPU
NAMES = {"vit_tiny": "ViT-Ti", "vit_small": "ViT-S", "vit_base": "ViT-B", "vit_large": "ViT-L", "vit_huge": "ViT-H"}
SMALL = {"image_size": 64, "depth": 3, "predictor_depth": 3}  # on a CPU a step of half a second or less
SMALL_CLIPS = 4
PART_CLIPS = {"cpu": 1, "cuda": 24}
PART_ERROR = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-17}  # of a mean magnitude; see `bench_step_parts`


def title(model: str, clips: int, size: int = 224) -> str:
    return f"{NAMES[model]}, {clips} clip{'s' * (clips > 1)} of 16 x {size} x {size}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("number", [0, 1])
def bench_step(race, device, reference_repo, number, dtype):
    if number >= len(MODELS[device.type]):
        pytest.skip("on a CPU one model is measured")
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is measured on a CPU")
    model, clips = MODELS[device.type][number], CLIPS[device.type]
    work = workload(model, clips, dtype, device)
    rounds = FEW_ROUNDS if dtype == torch.float32 else ROUNDS[device.type]
    entry = work_of(work, title(model, clips), rounds)
    everybody = contenders(work, reference_repo, compiles=device.type == "cuda")
    race(entry, everybody, verifier(work))


@pytest.mark.timeout(900)
def bench_step_exact(race, device):
    """Ours alone on masks of which nothing is dropped: the others know rectangles only."""
    model, clips = MODELS[device.type][0], CLIPS[device.type]
    work = workload(model, clips, torch.bfloat16, device, packing="exact")

    def verify(call: Runner, factor: float) -> None:
        call.first()  # losses of packed sets are compared in the tests

    race(work_of(work, title(model, clips), FEW_ROUNDS), contenders(work, None, peers=False), verify)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def bench_step_small(race, device, reference_repo, dtype):
    """Everybody, the compiled one on a CPU too; two steps are checked, so that gradients and updates are."""
    work = workload("vit_tiny", SMALL_CLIPS, dtype, device, **SMALL)
    name = f"{title('vit_tiny', SMALL_CLIPS, SMALL['image_size'])}, 3 + 3 blocks"
    entry = work_of(work, name, FEWEST_ROUNDS)
    everybody = contenders(work, reference_repo, compiles=dtype == torch.bfloat16 and device.type == "cpu")
    race(entry, everybody, verifier(work, steps=2))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def bench_step_parts(race, device, reference_repo, part):
    """Parts alone. A result is known by its mean magnitude, which roundings of single numbers hardly move."""
    model, clips = MODELS[device.type][0], PART_CLIPS[device.type]
    work = workload(model, clips, torch.bfloat16, device)
    everybody = contenders(work, reference_repo)
    expected: list[float] = []

    def verify(call: Runner, factor: float) -> None:
        call.part = part
        found = call.first()
        if part == UPDATE:
            return  # nothing comes back; bench_step_small checks what it does
        magnitude = mean_magnitude(found)
        expected.append(magnitude)  # the first one is ours under auto
        if not abs(magnitude - expected[0]) <= PART_ERROR[work.dtype] * abs(expected[0]):
            raise Wrong(f"mean magnitude {magnitude:.6g}, ours has {expected[0]:.6g}")

    everybody = [dataclasses.replace(contender, memory=None) for contender in everybody]
    name = f"{title(model, clips)}: {PARTS[part]}"
    rounds = FEWEST_ROUNDS if device.type == "cuda" else FEW_ROUNDS
    race(work_of(work, name, rounds, part=part), everybody, verify)


def mean_magnitude(found: object) -> float:
    """Of all numbers in a tensor or in a list of tensors."""
    tensors = found if isinstance(found, list) else [found]
    return sum(float(t.detach().double().abs().sum()) for t in tensors) / sum(t.numel() for t in tensors)
