"""Records what the released V-JEPA trainer computes on the problem of formula.py.

    python tests/train/golden/record.py CHECKOUT tests/train/golden/released_trainer.json

CHECKOUT is a clone of the released repository, which is not part of this project and has a licence of its own. Its
trainer runs as it is; only its data loading is replaced, its starting weights are set, and its log and checkpoint are
intercepted.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import formula


def canonical(name: str) -> str:
    """A released parameter name as this project has it."""
    return name.removeprefix("module.").removeprefix("backbone.")


def fill(prefix: str, module: torch.nn.Module) -> None:
    """Sets every trained parameter of a released module to its formula."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(formula.weight(f"{prefix}.{canonical(name)}", tuple(parameter.shape)))


def batches() -> list[tuple[Any, Any, Any]]:
    """All steps as the released loader yields them."""
    out = []
    for step in range(formula.STEPS_PER_EPOCH * formula.EPOCHS):
        sets = [formula.token_sets(step, kind) for kind in range(len(formula.CONTEXT_SIZES))]
        contexts, targets = ([torch.tensor(pair[i]) for pair in sets] for i in range(2))
        out.append(([[formula.video(step)]], contexts, targets))
    return out


class Loader:
    """Goes through the batches across epochs, as an endless loader would."""

    def __init__(self) -> None:
        self.left = batches()

    def __len__(self) -> int:
        return formula.STEPS_PER_EPOCH

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Any:
        return self.left.pop(0)


def settings() -> dict[str, Any]:
    """The problem as a configuration of the released trainer."""
    recipe = formula.RECIPE
    return {
        "meta": {"load_checkpoint": False, "seed": 0, "dtype": "float32", "use_sdpa": False},
        "mask": [{"ratio": 0.5}] * len(formula.CONTEXT_SIZES),
        "model": {
            "model_name": "vit_formula",
            "pred_depth": formula.PREDICTOR_DEPTH,
            "pred_embed_dim": formula.PREDICTOR_DIM,
            "uniform_power": True,
            "use_mask_tokens": True,
        },
        "data": {
            "batch_size": formula.CLIPS,
            "num_clips": 1,
            "num_frames": formula.FRAMES,
            "tubelet_size": formula.TUBELET,
            "sampling_rate": 1,
            "crop_size": formula.SIZE,
            "patch_size": formula.PATCH,
            "mask_type": "none",
        },
        "data_aug": {},
        "loss": {"loss_exp": 1.0, "reg_coeff": 0.0},
        "optimization": {
            "ipe": formula.STEPS_PER_EPOCH,
            "ipe_scale": 1.25,
            "epochs": formula.EPOCHS,
            "warmup": formula.WARMUP_EPOCHS,
            "ema": list(recipe["momentum"]),
            **{name: value for name, value in recipe.items() if name != "momentum"},
        },
    }


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    output = Path(sys.argv[2]).absolute()
    torch.set_num_threads(1)
    data_manager: Any = types.ModuleType("src.datasets.data_manager")
    data_manager.init_data = lambda **_: (Loader(), types.SimpleNamespace(set_epoch=lambda _: None))
    transforms: Any = types.ModuleType("app.vjepa.transforms")
    transforms.make_transforms = lambda **_: None
    sys.modules |= {data_manager.__name__: data_manager, transforms.__name__: transforms}

    import app.vjepa.train as released
    import src.models.vision_transformer as vision_transformer

    vision_transformer.__dict__["vit_formula"] = lambda **options: vision_transformer.VisionTransformer(
        embed_dim=formula.EMBED_DIM,
        depth=formula.DEPTH,
        num_heads=formula.HEADS,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        **options,
    )
    build = released.init_video_model

    def build_filled(**options: Any) -> Any:
        encoder, predictor = build(**options)
        fill("encoder", encoder)
        fill("predictor", predictor)
        return encoder, predictor

    rows: list[dict[str, float]] = []
    saved: dict[str, Any] = {}

    class Log:
        def __init__(self, *_: Any) -> None: ...

        def log(
            self,
            epoch: int,
            itr: int,
            loss: float,
            _j: float,
            _r: float,
            encoder_norm: float,
            predictor_norm: float,
            *_: Any,
        ) -> None:
            rows.append({"loss": loss, "grad_norm_encoder": encoder_norm, "grad_norm_predictor": predictor_norm})

    released.init_video_model, released.CSVLogger = build_filled, Log
    torch.save = lambda values, _path: saved.update(values)  # type: ignore[assignment]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        released.main({**settings(), "logging": {"folder": folder, "write_tag": "golden"}})
    weights = {}
    for part in ("encoder", "predictor", "target_encoder"):
        for name, tensor in saved[part].items():
            if "pos_embed" not in name:
                key = f"{part}.{canonical(name)}"
                weights[key] = formula.sums(key, tensor)
    output.write_text(json.dumps({"torch": torch.__version__, "steps": rows, "weights": weights}, indent=1) + "\n")


if __name__ == "__main__":
    main()
