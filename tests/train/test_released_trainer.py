"""A step is the released trainer's step: losses, gradient norms and weights recorded from it (see golden/record.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from vjepa import VJEPA, Masks, VJEPAConfig
from vjepa.kernels import TokenIndices
from vjepa.train import TrainConfig, Trainer

GOLDEN = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_formula", GOLDEN / "formula.py")
formula = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(formula)


def formula_model() -> VJEPA:
    config = VJEPAConfig(
        image_size=formula.SIZE,
        num_frames=formula.FRAMES,
        patch_size=formula.PATCH,
        tubelet_size=formula.TUBELET,
        embed_dim=formula.EMBED_DIM,
        depth=formula.DEPTH,
        num_heads=formula.HEADS,
        predictor_embed_dim=formula.PREDICTOR_DIM,
        predictor_depth=formula.PREDICTOR_DEPTH,
    )
    model = VJEPA(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "predictor.mask_tokens":
                for kind, token in enumerate(parameter):
                    token.copy_(formula.weight(f"{name}.{kind}", (1, 1, *token.shape)).flatten())
            else:
                parameter.copy_(formula.weight(name.removeprefix("target_"), tuple(parameter.shape)))
    return model


def formula_masks(step: int) -> Masks:
    kinds = range(len(formula.CONTEXT_SIZES))
    clip = torch.tensor([c for _ in kinds for c in range(formula.CLIPS)])

    def pack(which: int) -> TokenIndices:
        sets = [torch.tensor(ids) for kind in kinds for ids in formula.token_sets(step, kind)[which]]
        return TokenIndices.from_sets(sets, clip=clip)

    kind = torch.tensor([k for k in kinds for _ in range(formula.CLIPS)])
    return Masks(pack(0), pack(1), kind)


def run(accumulation_steps: int = 1, activation_checkpointing: bool = False) -> tuple[VJEPA, list[dict[str, float]]]:
    steps = formula.STEPS_PER_EPOCH * formula.EPOCHS
    config = TrainConfig(
        total_steps=steps,
        warmup_steps=formula.STEPS_PER_EPOCH * formula.WARMUP_EPOCHS,
        clip_after_step=formula.FIRST_CLIPPED_STEP,
        precision="fp32",
        device="cpu",
        accumulation_steps=accumulation_steps,
        activation_checkpointing=activation_checkpointing,
        **formula.RECIPE,
    )
    trainer = Trainer(formula_model(), config)
    return trainer.model, [trainer.step(formula.video(k), formula_masks(k)) for k in range(steps)]


@pytest.mark.parametrize(("accumulation_steps", "checkpointing"), [(1, False), (2, False), (3, True)])
def test_losses_norms_and_weights_equal_the_released_trainers(accumulation_steps: int, checkpointing: bool) -> None:
    golden = json.loads((GOLDEN / "released_trainer.json").read_text())
    model, numbers = run(accumulation_steps, checkpointing)
    for step, (ours, theirs) in enumerate(zip(numbers, golden["steps"], strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6), f"step {step}"
        if step >= formula.FIRST_CLIPPED_STEP:  # the released trainer only measures norms once it clips
            for name in ("grad_norm_encoder", "grad_norm_predictor"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5), f"step {step}"
    assert any(n["grad_norm_encoder"] > formula.RECIPE["clip_grad"] for n in numbers[formula.FIRST_CLIPPED_STEP :])
    weights = dict(model.named_parameters())
    rows = weights.pop("predictor.mask_tokens")
    weights |= {f"predictor.mask_tokens.{kind}": row for kind, row in enumerate(rows)}
    assert weights.keys() == golden["weights"].keys()
    for name, theirs in golden["weights"].items():
        ours = formula.sums(name, weights[name])
        assert ours["abs_sum"] == pytest.approx(theirs["abs_sum"], rel=1e-5), name
        assert ours["sum"] == pytest.approx(theirs["sum"], abs=1e-5 * theirs["abs_sum"]), name
