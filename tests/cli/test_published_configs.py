"""configs/pretrain: every file parses, and the published recipes have the published numbers."""

from pathlib import Path

import pytest

from vjepa.cli import main
from vjepa.cli_config import build_parser, parse
from vjepa.masks import mask_generator
from vjepa.train.config import PretrainConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
RECIPES = ("vitl16", "vith16", "vith16_384")


def load(name: str, *argv: str):
    parser = build_parser("pretrain", "", PretrainConfig)
    return parser.instantiate(parse(parser, ["--config", str(CONFIGS / f"{name}.yaml"), *argv], PretrainConfig))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_parses_into_a_model_that_its_masks_fit(path):
    config = load(path.stem)
    model = config.model.build()
    masks = config.masks.build(model.grid, model.tubelet_size)(2, mask_generator(0))
    assert masks.num_clips == 2 and masks.num_sets == 2 * config.masks.num_kinds
    assert max(masks.context.lengths) < model.num_tokens
    assert config.masks.num_kinds <= model.num_mask_tokens


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipe(name):
    config = load(name)
    train = config.train
    assert (train.total_steps, train.warmup_steps, train.scale) == (90_000, 12_000, 1.25)
    assert (train.start_lr, train.lr, train.final_lr) == (2e-4, 6.25e-4, 1e-6)
    assert (train.weight_decay, train.final_weight_decay, train.momentum) == (0.04, 0.4, (0.998, 1.0))
    assert (train.betas, train.eps) == ((0.9, 0.999), 1e-8)
    assert (train.clip_grad, train.first_clipped_step, train.precision) == (10.0, 12_000, "bf16")
    assert train.batch_size == (2400 if name.endswith("384") else 3072)
    assert train.batch_size % train.accumulation_steps == 0
    data = config.data
    assert (data.frame_stride, data.scale, data.aspect, data.hflip) == (4, (0.3, 1.0), (0.75, 1.35), True)
    assert (config.masks.strategy, config.masks.packing) == ("multiblock", "exact")
    assert (config.masks.kinds, config.masks.aspect) == (((8, 0.15), (2, 0.7)), (0.75, 1.5))
    assert [
        name in source.path for name, source in zip(("Kinetics", "Something", "HowTo100M"), data.sources, strict=True)
    ] == [True] * 3


@pytest.mark.parametrize(
    ("name", "encoder", "grid"),
    [
        ("vitl16", (1024, 24, 16), (8, 14, 14)),
        ("vith16", (1280, 32, 16), (8, 14, 14)),
        ("vith16_384", (1280, 32, 16), (8, 24, 24)),
    ],
)
def test_published_architecture(name, encoder, grid):
    model = load(name).model.build()
    assert (model.embed_dim, model.depth, model.num_heads) == encoder
    assert (model.grid, model.num_frames, model.patch_size, model.tubelet_size) == (grid, 16, 16, 2)
    assert (model.predictor_embed_dim, model.predictor_depth, model.predictor_heads) == (384, 12, 16)


def test_published_schedule_of_vit_l():
    """Values of SPEC: learning rate, weight decay and momentum at four steps."""
    schedules = load("vitl16").train.schedules()
    for step, expected in {
        0: (2.00035e-4, 0.0400000001, 0.998),
        12_000: (6.249999998e-4, 0.05001391, 0.99821333),
        45_000: (4.7319558e-4, 0.16438172, 0.9988),
        89_999: (7.5042e-5, 0.36562306, 0.99959998),
    }.items():
        assert schedules.at(step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("command", ["pretrain", "masks"])
def test_a_recipe_as_it_is_says_which_sources_to_fill_in(command, capsys):
    assert main([command, "--config", str(CONFIGS / "vitl16.yaml")]) == 1
    err = capsys.readouterr().err
    assert "data.sources[0].path (<Kinetics-710" in err and "data.sources[2].path (<HowTo100M" in err


def test_a_path_on_the_command_line_replaces_the_sources(tmp_path, capsys):
    assert main(["pretrain", "--config", str(CONFIGS / "vitl16.yaml"), "--data.path", str(tmp_path / "none")]) == 1
    assert "data path does not exist" in capsys.readouterr().err
