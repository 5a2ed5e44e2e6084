"""The released V-JEPA code as a contender, run from a checkout of it, whose path `--reference-repo` gives.

Its networks, its wrappers for several masks and its gathering are called as they are; what its trainer does around
them is done here without its logging: AdamW with PyTorch's defaults, clipping of encoder and predictor apart, and the
moving average from tensor to tensor. It gets our weights.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .steps import Workload, decayed_apart
from .straight import NORM_EPS, PREDICTOR_MLP_RATIO, Straight

PACKAGE = "src"  # what the checkout calls its package
MODULES = {
    "encoders": "models.vision_transformer",
    "predictors": "models.predictor",
    "wrappers": "models.utils.multimask",
    "masks": "masks.utils",
}


@contextmanager
def only_here(path: Path) -> Iterator[None]:
    """The package can be imported inside of the block; outside, that name means what it meant before."""

    def belong() -> list[str]:
        return [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]

    before = {name: sys.modules.pop(name) for name in belong()}
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in belong():
            del sys.modules[name]
        sys.modules.update(before)


def check_checkout(path: str | Path) -> Path:
    """`path` made absolute.

    Raises:
        ValueError: It is no checkout of the released code.
    """
    root = Path(path).resolve()
    files = [root / PACKAGE / f"{module.replace('.', '/')}.py" for module in MODULES.values()]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"--reference-repo must be a checkout of the released V-JEPA code; {path} has no {missing[0].relative_to(root)}"
        )
    return root


def released_code(path: str | Path) -> SimpleNamespace:
    """The modules of the released code that a step needs; ValueError where there is no such checkout."""
    root = check_checkout(path)
    with only_here(root):
        found = {key: importlib.import_module(f"{PACKAGE}.{module}") for key, module in MODULES.items()}
    return SimpleNamespace(**found)


class Released(Straight):
    """Training by the released networks."""

    def __init__(self, work: Workload, path: str | Path) -> None:
        self.code = released_code(path)
        super().__init__(work)

    def build(self) -> None:
        work, config, code = self.work, self.work.config, self.code
        height, width = config.image_hw
        if height != width:
            raise ValueError(f"the released code takes square clips, got {height} x {width}")
        common = {
            "img_size": height,
            "patch_size": config.patch_size,
            "num_frames": config.num_frames,
            "tubelet_size": config.tubelet_size,
            "embed_dim": config.embed_dim,
            "qkv_bias": True,
            "norm_layer": partial(nn.LayerNorm, eps=NORM_EPS),
            "uniform_power": config.uniform_power,
            "use_sdpa": True,
        }
        encoder = code.encoders.VisionTransformer(
            depth=config.depth, num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, **common
        )
        predictor = code.predictors.VisionTransformerPredictor(
            predictor_embed_dim=config.predictor_embed_dim,
            depth=config.predictor_depth,
            num_heads=config.predictor_heads,
            mlp_ratio=PREDICTOR_MLP_RATIO,
            use_mask_tokens=True,
            num_mask_tokens=config.num_mask_tokens,
            zero_init_mask_tokens=True,
            **common,
        )
        model = work.model()
        load(encoder, model.encoder.state_dict())
        tokens = model.predictor.state_dict()
        rows = tokens.pop("mask_tokens")
        load(predictor, tokens | {f"mask_tokens.{number}": row for number, row in enumerate(rows)})
        self.encoder = code.wrappers.MultiMaskWrapper(encoder.to(work.device))
        self.predictor = code.wrappers.PredictorMultiMaskWrapper(predictor.to(work.device))
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        recipe = work.recipe
        groups = decayed_apart(self.encoder, self.predictor)
        self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps)

    def contexts(self) -> list[Tensor]:
        return self.encoder(self.clips, self.seen)

    def predictions(self, contexts: Sequence[Tensor]) -> list[Tensor]:
        # the second argument are targets, which the networks of the recipe do not look at
        return self.predictor(list(contexts), [None] * len(self.hidden), self.seen, self.hidden)

    def loss(self, predictions: Sequence[Tensor], features: Tensor) -> Tensor:
        with torch.no_grad():
            normed = F.layer_norm(features, features.shape[-1:])
            targets = self.code.masks.apply_masks(normed, self.hidden, concat=False)
        losses = [(z - h).abs().mean() for z, h in zip(predictions, targets, strict=True)]
        return sum(losses) / len(losses)


def load(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Our weights, by the same names; its position tables, which are constants, stay.

    Raises:
        ValueError: Names differ.
    """
    theirs = {name: p for name, p in network.named_parameters() if "pos_embed" not in name}
    if differing := sorted(theirs.keys() ^ weights.keys()):
        raise ValueError(f"the released code at this commit has other weights: {', '.join(differing)}")
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(weights[name].view_as(p))
