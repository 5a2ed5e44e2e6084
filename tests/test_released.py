"""Files laid out as the released ones: what is read from them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vjepa import VJEPA, VJEPAConfig, load_pretrained
from vjepa.checkpoint import CheckpointError
from vjepa.positions import sincos_3d

CONFIG = VJEPAConfig(
    image_size=32,
    patch_size=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    predictor_embed_dim=24,
    predictor_depth=1,
    mlp_ratio=3.0,
)
GIVEN: dict[str, Any] = {"num_heads": 3}


@pytest.fixture
def model() -> VJEPA:
    torch.manual_seed(0)
    model = VJEPA(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def released(model: VJEPA) -> dict[str, Any]:
    """The model as a released file holds it."""
    content: dict[str, Any] = {"opt": {"state": {}}, "scaler": None, "epoch": 300, "loss": 0.5, "lr": 6e-4}
    for part in ("encoder", "predictor", "target_encoder"):
        tensors = getattr(model, part).state_dict()
        table, width = ("predictor_pos_embed", 24) if part == "predictor" else ("pos_embed", 48)
        tensors[table] = sincos_3d(width, CONFIG.grid)[None]
        for i, token in enumerate(tensors.pop("mask_tokens", ())):
            tensors[f"mask_tokens.{i}"] = token[None, None]
        content[part] = {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}
    return content


def save(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "vit.pth.tar")
    return folder / "vit.pth.tar"


def test_every_weight_arrives_and_the_architecture_is_inferred(model, tmp_path):
    loaded = load_pretrained(save(released(model), tmp_path), **GIVEN)
    assert loaded.config == CONFIG
    theirs = model.state_dict()
    assert loaded.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in loaded.state_dict().items())


def test_heads_come_from_the_preset_of_the_same_shape_or_must_be_given(model, tmp_path):
    with pytest.raises(ValueError, match="num_heads must be given: no preset has width 48 and depth 2"):
        load_pretrained(save(released(model), tmp_path))
    small = VJEPAConfig.from_preset("vit_tiny", image_size=16, num_frames=16, predictor_depth=1)
    tiny = VJEPA(small)
    content = released(tiny)
    for part in ("encoder", "target_encoder"):
        content[part]["module.backbone.pos_embed"] = sincos_3d(192, small.grid)[None]
    content["predictor"]["module.backbone.predictor_pos_embed"] = sincos_3d(384, small.grid)[None]
    assert load_pretrained(save(content, tmp_path)).config == small


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("encoder", "blocks.1.mlp.fc2.bias", "missing encoder.blocks.1.mlp.fc2.bias"),
        ("target_encoder", "norm.weight", "missing target_encoder.norm.weight"),
        ("predictor", "mask_tokens.0", "cannot use 'mask_tokens'"),
        ("encoder", "pos_embed", "expected encoder.pos_embed of shape (1, positions, width), got nothing"),
        ("encoder", "patch_embed.proj.weight", "cannot use 'patch_embed.proj.weight'"),
    ],
)
def test_a_missing_key_is_an_error(part, name, words, model, tmp_path):
    content = released(model)
    del content[part][f"module.backbone.{name}"]
    with pytest.raises(CheckpointError) as raised:
        load_pretrained(save(content, tmp_path), **GIVEN)
    assert words in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_unexpected_and_misshapen_keys_are_listed(model, tmp_path):
    content = released(model)
    content["encoder"]["module.backbone.cls_token"] = torch.zeros(1, 1, 48)
    content["predictor"]["module.backbone.predictor_norm.bias"] = torch.zeros(25)
    with pytest.raises(CheckpointError) as raised:
        load_pretrained(save(content, tmp_path), **GIVEN)
    assert "unexpected encoder.cls_token (1, 1, 48)" in str(raised.value)
    assert "misshapen predictor.predictor_norm.bias: expected (24,), got (25,)" in str(raised.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image_size": 64}, "encoder.pos_embed has 128 positions, but image_size=64"),
        ({"num_frames": 4, "image_size": 64}, "is not the table of image_size=64, num_frames=4"),
        ({"uniform_power": False}, "is not the table of image_size=32, num_frames=16, uniform_power=False"),
    ],
)
def test_a_grid_that_the_position_tables_contradict_is_refused(given, words, model, tmp_path):
    with pytest.raises(CheckpointError) as raised:
        load_pretrained(save(released(model), tmp_path), **GIVEN, **given)
    assert words in str(raised.value)


def test_another_file_is_one_sentence(tmp_path):
    text = tmp_path / "vit.pth.tar"
    text.write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint directory or a released \.pth\.tar file"):
        load_pretrained(text)
    with pytest.raises(CheckpointError, match="lacks encoder, predictor, target_encoder, and has"):
        load_pretrained(save({"model": {}}, tmp_path))
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*nothing.pth.tar: .* found nothing"):
        load_pretrained(tmp_path / "nothing.pth.tar")


def test_no_code_of_the_file_is_executed(model, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    with pytest.raises(CheckpointError, match="Cannot read"):
        load_pretrained(save({**released(model), "opt": Harmful()}, tmp_path), **GIVEN)
    assert not (tmp_path / "harmed").exists()
