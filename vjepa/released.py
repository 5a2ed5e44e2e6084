"""Reading the `.pth.tar` files of the released V-JEPA models.

Such a file holds encoder, predictor and target_encoder, each key with the prefix `module.backbone.`, beside optimizer
state that is not read. The names below the prefix are those of `vjepa.model` but for

    mask_tokens.i [1, 1, Dp]                       rows i of one parameter mask_tokens [K, Dp]
    pos_embed [1, L, D], predictor_pos_embed       constant tables, which a model here computes; they are compared

Shapes tell the architecture but for the number of heads (taken from the preset of the same width and depth) and how the
L positions split into (t, h, w) (16 frames and a square, unless told otherwise; the tables prove it right or wrong).
"""

from __future__ import annotations

import math
import os
import pickle
import re
from typing import Any

import torch

from vjepa.checkpoint import CheckpointError, load_strictly
from vjepa.config import PRESETS, VJEPAConfig
from vjepa.model import VJEPA
from vjepa.positions import sincos_3d

PARTS = ("encoder", "predictor", "target_encoder")
TABLES = {"encoder": "pos_embed", "predictor": "predictor_pos_embed", "target_encoder": "pos_embed"}
PREFIX = re.compile(r"^(module\.)?(backbone\.)?")
TABLE_TOLERANCE = 1e-2  # the released moving average rounds the target's table a little at every step

Tensors = dict[str, torch.Tensor]


def load_released(path: str | os.PathLike[str], **config_overrides: Any) -> VJEPA:
    """The model of a released `.pth.tar` file, with its weights, on the CPU.

    Args:
        path: The file. It is mapped, not read whole, and no code in it is executed.
        **config_overrides: Fields of VJEPAConfig that shapes cannot tell or tell wrong: num_heads, predictor_num_heads,
            num_frames, image_size, uniform_power, pixel_mean, pixel_std.

    Raises:
        CheckpointError: The file cannot be read, lacks a part, or has a missing, unexpected or misshapen key (all are
            listed), or position tables other than those of the configuration.
        ValueError: A field of the configuration that has to be given, or that VJEPAConfig refuses.
    """
    parts = _read_parts(path)
    tables = {part: _take_table(parts[part], part, path) for part in PARTS}
    parts["predictor"] = _stack_mask_tokens(parts["predictor"])
    config = VJEPAConfig.from_dict({**_infer(parts, tables["encoder"], config_overrides, path), **config_overrides})
    model = VJEPA(config)
    load_strictly(model, {f"{part}.{name}": t for part in PARTS for name, t in parts[part].items()}, path)
    for part, table in tables.items():
        _check_table(table, config, f"{part}.{TABLES[part]}", path)
    return model


def _read_parts(path: str | os.PathLike[str]) -> dict[str, Tensors]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"Cannot read {path}: expected a checkpoint directory or a released .pth.tar file ({reason})."
        ) from error
    missing = [part for part in PARTS if not isinstance(content, dict) or not isinstance(content.get(part), dict)]
    if missing:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} is not a released V-JEPA file: it lacks {', '.join(missing)}, and has {found}.")
    parts = {part: {PREFIX.sub("", name): t for name, t in content[part].items()} for part in PARTS}
    odd = [f"{part}.{n}" for part in PARTS for n, t in parts[part].items() if not isinstance(t, torch.Tensor)]
    if odd:
        raise CheckpointError(f"{path} is not a released V-JEPA file: expected tensors, not in {', '.join(odd)}.")
    return parts


def _take_table(tensors: Tensors, part: str, path: str | os.PathLike[str]) -> torch.Tensor:
    table = tensors.pop(TABLES[part], None)
    if table is None or table.ndim != 3 or table.shape[0] != 1:
        found = "nothing" if table is None else f"shape {tuple(table.shape)}"
        raise CheckpointError(f"{path}: expected {part}.{TABLES[part]} of shape (1, positions, width), got {found}.")
    return table[0]


def _stack_mask_tokens(predictor: Tensors) -> Tensors:
    """mask_tokens.0, .1 ... [1, 1, Dp] as one [K, Dp]; whatever is not of that form is left for the strict check."""
    count = sum(name.startswith("mask_tokens.") for name in predictor)
    names = [f"mask_tokens.{i}" for i in range(count)]
    if not names or not all(name in predictor and predictor[name].shape[:2] == (1, 1) for name in names):
        return predictor
    others = {name: tensor for name, tensor in predictor.items() if name not in names}
    return {**others, "mask_tokens": torch.cat([predictor[name][0] for name in names])}


def _infer(
    parts: dict[str, Tensors], table: torch.Tensor, given: dict[str, Any], path: str | os.PathLike[str]
) -> dict[str, Any]:
    """Fields of VJEPAConfig that the shapes tell."""
    encoder, predictor = parts["encoder"], parts["predictor"]
    try:
        width, channels, tubelet, patch, _ = encoder["patch_embed.proj.weight"].shape
        hidden = encoder["blocks.0.mlp.fc1.weight"].shape[0]
        narrow = predictor["predictor_embed.weight"].shape[0]
        kinds = predictor["mask_tokens"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a released V-JEPA file: cannot use {error}.") from error
    depth = _count(encoder, "blocks")
    heads = next((p["num_heads"] for p in PRESETS.values() if (p["embed_dim"], p["depth"]) == (width, depth)), None)
    if heads is None and "num_heads" not in given:
        raise ValueError(f"num_heads must be given: no preset has width {width} and depth {depth} as {path} has")
    frames = given.get("num_frames", 16)
    side = math.isqrt(table.shape[0] * tubelet // frames)
    sized = {"image_size": side * patch} if side else {}
    return {
        "num_frames": frames,
        **sized,
        "in_channels": channels,
        "patch_size": patch,
        "tubelet_size": tubelet,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": hidden / width,
        "predictor_embed_dim": narrow,
        "predictor_depth": _count(predictor, "predictor_blocks"),
        "num_mask_tokens": kinds,
    }


def _count(tensors: Tensors, name: str) -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{name}.")})


def _check_table(table: torch.Tensor, config: VJEPAConfig, name: str, path: str | os.PathLike[str]) -> None:
    what = f"image_size={config.image_size}, num_frames={config.num_frames}, uniform_power={config.uniform_power}"
    if table.shape[0] != config.num_tokens:
        raise CheckpointError(
            f"{path}: {name} has {table.shape[0]} positions, but {what} give {config.num_tokens}; give those it was "
            "trained with (the model takes clips of other sizes all the same)."
        )
    expected = sincos_3d(table.shape[1], config.grid, config.uniform_power)
    error = (table.float() - expected).abs().max().item()
    if not error <= TABLE_TOLERANCE:
        raise CheckpointError(
            f"{path}: {name} is not the table of {what} (it differs by up to {error:.2g}); give the values it was "
            "trained with."
        )
