import math

import pytest
import torch

from vjepa.model import VJEPA


@pytest.fixture(scope="module", params=["scaled", "reference"])
def model(request, tools):
    torch.manual_seed(0)
    sizes = {"embed_dim": 192, "num_heads": 3, "depth": 3, "predictor_embed_dim": 96, "predictor_depth": 3}
    return VJEPA(tools.small_config(init=request.param, **sizes)).requires_grad_(False)


def blocks_of(model):
    return (*enumerate(model.encoder.blocks, 1), *enumerate(model.predictor.predictor_blocks, 1))


def test_matrices_are_truncated_normal_and_rescaled_with_depth(model):
    scaled = model.config.init == "scaled"
    # a normal truncated at 2 std has 0.8796 of its std
    std = 0.02 * (0.87962566 if scaled else 1)
    for number, block in blocks_of(model):
        divisor = math.sqrt(2 * number) if scaled else 1
        for weight, expected in (
            (block.attn.qkv.weight, std),
            (block.mlp.fc1.weight, std),
            (block.attn.proj.weight, std / divisor),
            (block.mlp.fc2.weight, std / divisor),
        ):
            assert float(weight.std()) == pytest.approx(expected, rel=0.03)
            assert abs(float(weight.mean())) < 0.05 * expected
    widest = max(float(block.attn.qkv.weight.abs().max()) for _, block in blocks_of(model))
    assert (widest <= 0.04) == scaled
    assert float(model.encoder.patch_embed.proj.weight.std()) == pytest.approx(std, rel=0.03)


def test_biases_norms_and_mask_tokens_are_neutral(model):
    for name, values in model.named_parameters():
        if name.endswith("bias") or "mask_tokens" in name:
            assert not values.any(), name
        elif "norm" in name:
            assert (values == 1).all(), name


def test_seed_decides_every_weight(tools):
    def build():
        torch.manual_seed(3)
        return VJEPA(tools.small_config()).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("init", ["scaled", "reference"])
def test_init_std_scales_the_matrices(tools, init):
    sizes = {"embed_dim": 192, "num_heads": 3, "depth": 1, "predictor_embed_dim": 96, "predictor_depth": 1}
    model = VJEPA(tools.small_config(init=init, init_std=0.08, **sizes)).requires_grad_(False)
    std = 0.08 * (0.87962566 if init == "scaled" else 1)
    assert float(model.encoder.blocks[0].attn.qkv.weight.std()) == pytest.approx(std, rel=0.03)
    assert float(model.predictor.predictor_blocks[0].mlp.fc1.weight.std()) == pytest.approx(std, rel=0.03)
