import pickle
import subprocess
import sys

import pytest
import torch

import vjepa
from vjepa.config import PRESETS, VJEPAConfig
from vjepa.model import VJEPA

# weights of encoder and predictor, counted on the released models (position tables left out)
COUNTS = {
    "vit_tiny": (5_633_856, 21_443_136),
    "vit_small": (21_884_544, 21_590_784),
    "vit_base": (86_236_416, 21_886_080),
    "vit_large": (303_885_312, 22_082_944),
    "vit_huge": (631_648_000, 22_279_808),
    "vit_huge_384": (631_648_000, 22_279_808),
    "vit_giant": (1_012_173_952, 22_378_240),
}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_released_ones(name):
    with torch.device("meta"):
        model = VJEPA.from_preset(name)
    assert (count(model.encoder), count(model.predictor)) == COUNTS[name]
    assert count(model.target_encoder) == count(model.encoder)


def test_vit_huge_384_has_4608_tokens():
    assert VJEPAConfig.from_preset("vit_huge_384").num_tokens == 4608


def test_from_preset_overrides_and_errors(tools):
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "predictor_embed_dim": 16, "predictor_depth": 1}
    assert VJEPA.from_preset("vit_tiny", **small).config == VJEPAConfig.from_preset("vit_tiny", **small)
    with pytest.raises(ValueError, match="no 'pach_size': did you mean 'patch_size'"):
        VJEPA.from_preset("vit_tiny", pach_size=8)


def test_state_dict_keys_and_shapes(tools):
    config = tools.small_config(depth=1, predictor_depth=1, num_mask_tokens=3)
    block = {
        "norm1.weight": (24,),
        "norm1.bias": (24,),
        "attn.qkv.weight": (72, 24),
        "attn.qkv.bias": (72,),
        "attn.proj.weight": (24, 24),
        "attn.proj.bias": (24,),
        "norm2.weight": (24,),
        "norm2.bias": (24,),
        "mlp.fc1.weight": (96, 24),
        "mlp.fc1.bias": (96,),
        "mlp.fc2.weight": (24, 96),
        "mlp.fc2.bias": (24,),
    }
    encoder = {
        "patch_embed.proj.weight": (24, 3, 2, 8, 8),
        "patch_embed.proj.bias": (24,),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "norm.weight": (24,),
        "norm.bias": (24,),
    }
    narrow = {24: 16, 72: 48, 96: 64}
    predictor = {
        "predictor_embed.weight": (16, 24),
        "predictor_embed.bias": (16,),
        "mask_tokens": (3, 16),
        **{f"predictor_blocks.0.{name}": tuple(narrow[size] for size in shape) for name, shape in block.items()},
        "predictor_norm.weight": (16,),
        "predictor_norm.bias": (16,),
        "predictor_proj.weight": (24, 16),
        "predictor_proj.bias": (24,),
    }
    expected = {f"{part}.{name}": shape for part in ("encoder", "target_encoder") for name, shape in encoder.items()}
    expected |= {f"predictor.{name}": shape for name, shape in predictor.items()}
    assert {name: tuple(values.shape) for name, values in VJEPA(config).state_dict().items()} == expected


def test_a_model_survives_pickling(tools):
    model = tools.filled_model(tools.small_config())
    video = tools.formula("video", (1, 3, 8, 24, 32), torch.float32)
    assert torch.equal(pickle.loads(pickle.dumps(model)).encoder(video), model.encoder(video))


def test_exports():
    assert vjepa.VJEPA is VJEPA
    assert vjepa.VJEPAConfig is VJEPAConfig
    assert vjepa.__version__[0].isdigit()
    assert {"VJEPA", "Masks", "load_pretrained"} <= set(dir(vjepa))
    with pytest.raises(AttributeError, match="module 'vjepa' has no attribute 'VJPEA'"):
        vjepa.VJPEA  # noqa: B018


def test_importing_the_kernels_loads_no_other_part():
    code = "import sys, vjepa.kernels; print([m for m in sys.modules if m.startswith('vjepa.') and 'kernels' not in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
