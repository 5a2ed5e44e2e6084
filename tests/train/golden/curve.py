"""A training problem of 200 steps that anybody can compute again: what a change of the step must not move.

    python tests/train/golden/curve.py tests/train/golden/curve.json        records it anew

A curve is a list of losses. Beside the curves stands how far rounding alone moves them: the largest difference to a run
whose batches hold the same clips in another order.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from vjepa import VJEPA, Masks, VJEPAConfig
from vjepa.kernels import TokenIndices
from vjepa.masks import MultiBlock
from vjepa.train import TrainConfig, Trainer

_spec = importlib.util.spec_from_file_location("golden_formula", Path(__file__).parent / "formula.py")
assert _spec is not None and _spec.loader is not None
formula = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(formula)

STEPS, CLIPS, SIZE, FRAMES = 200, 4, 64, 4
MODEL = {
    "image_size": SIZE,
    "num_frames": FRAMES,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 2,
    "predictor_embed_dim": 32,
    "predictor_depth": 2,
}
RECIPE = {
    "total_steps": STEPS,
    "warmup_steps": 20,
    "start_lr": 1e-4,
    "lr": 4e-4,
    "momentum": (0.98, 1.0),
    "clip_grad": 0.2,
    "clip_after_step": 40,
    "device": "cpu",
    "batch_size": CLIPS,
}
WEIGHT = 0.12  # of what formula.weight gives to matrices


def model() -> VJEPA:
    """Weights by formula: like the recipe's in size."""
    net = VJEPA(VJEPAConfig(**MODEL))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            values = formula.weight(name.removeprefix("target_"), tuple(parameter.shape))
            parameter.copy_(values if "norm" in name and name.endswith("weight") else WEIGHT * values)
    return net


def clips(step: int) -> torch.Tensor:
    """uint8 [CLIPS, 3, FRAMES, SIZE, SIZE]: blocks of whole numbers that move, each clip its own way."""
    place = torch.arange(SIZE)
    frames = []
    for clip in range(CLIPS):
        seed = 7919 * (step * CLIPS + clip) + 104729
        for t in range(FRAMES):
            y, x = (place + t * (1 + clip)) // 4, (place - t * (step % 3)) // 4
            tile = (y[:, None] * 40503 + x[None, :] * 2654435 + seed).remainder(65521)
            frames.append(torch.stack([(tile * (3 + 2 * c)).remainder(251) for c in range(3)]))
    video = torch.stack(frames).view(CLIPS, FRAMES, 3, SIZE, SIZE).transpose(1, 2)
    return video.to(torch.uint8).contiguous()


def masks(step: int) -> Masks:
    """Exact packing on the grid of 2 x 8 x 8 tokens."""
    return MultiBlock(grid=(2, 8, 8))(CLIPS, torch.Generator().manual_seed(step))


def reordered(sets: TokenIndices) -> TokenIndices:
    """The same sets with the clips of each mask kind from last to first."""
    kinds = sets.num_sets // CLIPS
    order = [kind * CLIPS + clip for kind in range(kinds) for clip in reversed(range(CLIPS))]
    parts = sets.indices.split(sets.lengths)
    return TokenIndices.from_sets([parts[place] for place in order], clip=torch.arange(CLIPS).repeat(kinds))


def curve(precision: str, backwards: bool = False, **changes: object) -> list[float]:
    """Losses of all steps; `backwards`: with the clips of each batch in the opposite order."""
    trainer = Trainer(model(), TrainConfig(**{**RECIPE, "precision": precision, **changes}))
    losses = []
    for step in range(STEPS):
        video, sets = clips(step), masks(step)
        if backwards:
            video, sets = video.flip(0), Masks(reordered(sets.context), reordered(sets.target), sets.kind)
        losses.append(trainer.step(video, sets)["loss"])
    return losses


def main() -> None:
    torch.set_num_threads(1)
    recorded = {}
    for precision in ("fp32", "bf16"):
        losses, again = curve(precision), curve(precision, backwards=True)
        rounding = max(abs(a - b) for a, b in zip(losses, again, strict=True))
        recorded[precision] = {"rounding": rounding, "losses": [round(loss, 7) for loss in losses]}
        print(precision, f"{losses[0]:.5f} -> {losses[-1]:.5f}, lowest {min(losses):.5f}, rounding {rounding:.2g}")
    Path(sys.argv[1]).write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    main()
