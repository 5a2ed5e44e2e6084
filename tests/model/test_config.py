import dataclasses
import json

import pytest

from vjepa.config import PRESETS, ModelConfig, VJEPAConfig


def test_defaults_are_vit_large():
    config = VJEPAConfig()
    assert config == VJEPAConfig.from_preset("vit_large")
    assert (config.grid, config.num_tokens, config.image_hw) == ((8, 14, 14), 1568, (224, 224))
    assert (config.predictor_heads, config.predictor_embed_dim // config.predictor_heads) == (16, 24)
    assert config.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_rectangular_image_and_other_channels():
    config = VJEPAConfig(image_size=[96, 160], num_frames=6, tubelet_size=1, in_channels=12)
    assert config.grid == (6, 6, 10)
    assert config.image_hw == (96, 160)
    assert config.normalisation == ((0.5,) * 12, (0.5,) * 12)


def test_pixel_statistics_replace_the_defaults():
    config = VJEPAConfig(in_channels=1, pixel_mean=(0.2,), pixel_std=(0.1,))
    assert config.normalisation == ((0.2,), (0.1,))


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = VJEPAConfig.from_preset(name, image_size=(256, 192), pixel_mean=(0.1, 0.2, 0.3))
    assert VJEPAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"image_size": 100}, ValueError, "image_size must be a multiple of patch_size=16, got 100"),
        ({"image_size": (224, 100)}, ValueError, "image_size must be a multiple"),
        ({"image_size": (224, 224, 3)}, ValueError, "image_size must be an int or"),
        ({"image_size": 224.0}, TypeError, "image_size must be an int, got 224.0"),
        ({"num_frames": 5}, ValueError, "num_frames must be a multiple of tubelet_size=2, got 5"),
        ({"num_frames": 1}, ValueError, "set tubelet_size=1"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"depth": True}, TypeError, "depth must be an int"),
        ({"embed_dim": 1000}, ValueError, "embed_dim must be a multiple of num_heads=16, got 1000"),
        ({"num_heads": 2}, ValueError, "embed_dim / num_heads must be at most 256, got 1024 / 2"),
        ({"predictor_num_heads": 7}, ValueError, "predictor_embed_dim must be a multiple of predictor_num_heads=7"),
        ({"embed_dim": 36, "num_heads": 6, "uniform_power": False}, ValueError, "embed_dim must be a multiple of 8"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be a positive number, .*got 0"),
        ({"mlp_ratio": float("nan")}, ValueError, "mlp_ratio must be a positive number, .*got nan"),
        ({"uniform_power": "false"}, TypeError, "uniform_power must be a bool, got 'false'"),
        ({"pixel_mean": 0.5}, TypeError, "pixel_mean must be a sequence of numbers, one for each channel, got 0.5"),
        ({"pixel_std": (0.5, float("nan"), 0.5)}, ValueError, "pixel_std must be positive"),
        ({"pixel_mean": (0.5,)}, ValueError, "pixel_mean must have in_channels=3 numbers"),
        ({"pixel_std": (0.5, 0.0, 0.5)}, ValueError, "pixel_std must be positive"),
        ({"init_std": 0.0}, ValueError, r"init_std must be a number between 0 and 1, got 0\.0"),
        ({"init": "xavier"}, ValueError, "init must be 'scaled' or 'reference', got 'xavier'"),
    ],
)
def test_unusable_values_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        VJEPAConfig(**fields)


@pytest.mark.parametrize(
    "make", [lambda **more: VJEPAConfig.from_preset("vit_tiny", **more), lambda **more: VJEPAConfig.from_dict(more)]
)
def test_unknown_field_names_the_nearest(make):
    with pytest.raises(ValueError, match="VJEPAConfig has no 'embed_dims': did you mean 'embed_dim'"):
        make(embed_dims=192)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="no 'vit_larg': did you mean 'vit_large'"):
        VJEPAConfig.from_preset("vit_larg")
    with pytest.raises(ValueError, match=r"expected one of vit_tiny, .*vit_giant"):
        VJEPAConfig.from_preset("resnet50")


def test_model_config_has_every_field_and_builds():
    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    assert ours == {field.name for field in dataclasses.fields(VJEPAConfig)} | {"preset"}
    assert ModelConfig().build() == VJEPAConfig()
    built = ModelConfig("vit_small", num_frames=8, uniform_power=False, init="reference").build()
    assert built == VJEPAConfig.from_preset("vit_small", num_frames=8, uniform_power=False, init="reference")
