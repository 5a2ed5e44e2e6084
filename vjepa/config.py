"""The architecture of a V-JEPA model: one frozen dataclass, its presets, and its form in a YAML file."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_HEAD_DIM = 256  # the widest attention head that `vjepa.kernels.varlen_attention` takes


def unknown_key_message(what: str, key: str, valid: Iterable[str]) -> str:
    """The sentence for an unknown name: `what` was asked for `key`; the nearest of `valid`, or all of them."""
    names = list(valid)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}."
    return f"{what} has no {key!r}: {hint}"


@dataclass(frozen=True)
class VJEPAConfig:
    """Sizes of encoder, predictor and input. The defaults are ViT-L/16 on 16 frames of 224 x 224 pixels.

    image_size            pixels, int or (height, width), a multiple of `patch_size`: the size of the position table
    num_frames            frames of a clip, a multiple of `tubelet_size`: likewise
    in_channels           channels of a frame
    patch_size            pixels, height and width of a tubelet
    tubelet_size          frames of a tubelet
    embed_dim, depth, num_heads, mlp_ratio
                          of the encoder; `embed_dim` is the width D of the features
    predictor_embed_dim, predictor_depth, predictor_num_heads
                          of the predictor; heads None: as many as the encoder has
    num_mask_tokens       learned mask tokens; mask kind i uses token i mod num_mask_tokens
    uniform_power         share of the width given to the axes (t, h, w) in the position tables: equal shares, or
                          (1/2, 1/4, 1/4) when False (see `vjepa.positions.sincos_3d`)
    pixel_mean, pixel_std one number per channel, in units of 0..1, used for uint8 video only. None: ImageNet's for 3
                          channels, 0.5 otherwise
    init                  "scaled": truncated normal, depth-rescaled; "reference": see `vjepa.model.init`
    init_std              standard deviation of the matrices at the start; the recipe's 0.02 is for widths around 1000
                          (1 / sqrt(embed_dim) is 0.03 there)

    Raises ValueError or TypeError naming the field when a value cannot be used.
    """

    image_size: int | tuple[int, int] = 224
    num_frames: int = 16
    in_channels: int = 3
    patch_size: int = 16
    tubelet_size: int = 2
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    predictor_embed_dim: int = 384
    predictor_depth: int = 12
    predictor_num_heads: int | None = None
    num_mask_tokens: int = 2
    uniform_power: bool = True
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    init: Literal["scaled", "reference"] = "scaled"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("image_size", "pixel_mean", "pixel_std"):  # JSON and YAML know lists only
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _POSITIVE_INTS:
            _check_positive_int(name, getattr(self, name))
        if self.predictor_num_heads is not None:
            _check_positive_int("predictor_num_heads", self.predictor_num_heads)
        if not _is_number(self.mlp_ratio) or not 1 <= self.embed_dim * self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be a positive number, at least 1 / embed_dim, got {self.mlp_ratio!r}")
        if not isinstance(self.uniform_power, bool):
            raise TypeError(f"uniform_power must be a bool, got {self.uniform_power!r}")
        self._check_grid()
        self._check_width("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        self._check_width("predictor_embed_dim", self.predictor_embed_dim, "predictor_num_heads", self.predictor_heads)
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, tuple) or not all(map(_is_number, values)):
                raise TypeError(f"{name} must be a sequence of numbers, one for each channel, got {values!r}")
            if len(values) != self.in_channels:
                raise ValueError(f"{name} must have in_channels={self.in_channels} numbers, got {values!r}")
        if self.pixel_std is not None and not all(std > 0 for std in self.pixel_std):
            raise ValueError(f"pixel_std must be positive, got {self.pixel_std!r}")
        if self.init not in ("scaled", "reference"):
            raise ValueError(f"init must be 'scaled' or 'reference', got {self.init!r}")
        if not _is_number(self.init_std) or not 0 < self.init_std < 1:
            raise ValueError(f"init_std must be a number between 0 and 1, got {self.init_std!r}")

    def _check_grid(self) -> None:
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sizes) != 2:
            raise ValueError(f"image_size must be an int or (height, width), got {self.image_size!r}")
        for size in sizes:
            _check_positive_int("image_size", size)
            if size % self.patch_size:
                expected = f"a multiple of patch_size={self.patch_size}"
                raise ValueError(f"image_size must be {expected}, got {self.image_size!r}")
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames must be a multiple of tubelet_size={self.tubelet_size}, got {self.num_frames}"
                + (" (for single images set tubelet_size=1)" if self.num_frames == 1 else "")
            )

    def _check_width(self, width_name: str, width: int, heads_name: str, heads: int) -> None:
        if width % heads:
            raise ValueError(f"{width_name} must be a multiple of {heads_name}={heads}, got {width}")
        if width // heads > MAX_HEAD_DIM:
            raise ValueError(f"{width_name} / {heads_name} must be at most {MAX_HEAD_DIM}, got {width} / {heads}")
        if not self.uniform_power and width % 8:
            raise ValueError(f"{width_name} must be a multiple of 8 when uniform_power is False, got {width}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (t, h, w)."""
        height, width = self.image_hw
        return self.num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """L, the tokens of a clip."""
        t, h, w = self.grid
        return t * h * w

    @property
    def predictor_heads(self) -> int:
        """Heads of the predictor, the encoder's when not given."""
        return self.num_heads if self.predictor_num_heads is None else self.predictor_num_heads

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel that uint8 video is normalised with after scaling to 0..1."""
        colour = self.in_channels == 3
        mean = IMAGENET_MEAN if colour else (0.5,) * self.in_channels
        std = IMAGENET_STD if colour else (0.5,) * self.in_channels
        return self.pixel_mean or mean, self.pixel_std or std

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VJEPAConfig":
        """The preset `name` with some fields replaced. ValueError names the nearest valid preset or field."""
        if name not in PRESETS:
            raise ValueError(unknown_key_message("the list of presets", name, PRESETS))
        _check_keys("VJEPAConfig", overrides, cls)
        return cls(**{**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` gives an equal config back."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VJEPAConfig":
        """The config of `to_dict`. ValueError names an unknown key and the nearest valid one."""
        _check_keys("VJEPAConfig", values, cls)
        return cls(**values)


_POSITIVE_INTS = (
    "num_frames",
    "in_channels",
    "patch_size",
    "tubelet_size",
    "embed_dim",
    "depth",
    "num_heads",
    "predictor_embed_dim",
    "predictor_depth",
    "num_mask_tokens",
)

PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "vit_huge_384": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "image_size": 384},
    "vit_giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
}


@dataclass
class ModelConfig:
    """The `model:` section of a YAML file: a preset, and whatever of it is to be different.

    Args:
        preset: vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_huge_384 or vit_giant
        image_size: pixels, one number or [height, width] (preset: 224; vit_huge_384: 384)
        num_frames: frames per clip (preset: 16)
        in_channels: channels per frame (preset: 3)
        patch_size: pixels, height and width of a tubelet (preset: 16)
        tubelet_size: frames per tubelet (preset: 2)
        embed_dim: width of the encoder
        depth: blocks of the encoder
        num_heads: attention heads of the encoder
        mlp_ratio: hidden width of an MLP over the width of its block (preset: 4; vit_giant: 48/11)
        predictor_embed_dim: width of the predictor (preset: 384)
        predictor_depth: blocks of the predictor (preset: 12)
        predictor_num_heads: attention heads of the predictor (preset: as the encoder)
        num_mask_tokens: learned mask tokens, one per mask kind (preset: 2)
        uniform_power: equal shares of the width for t, h and w in the position tables (preset: true)
        pixel_mean: mean per channel, of pixels scaled to 0..1 (preset: ImageNet's, or 0.5 unless 3 channels)
        pixel_std: standard deviation per channel, likewise
        init: scaled (truncated normal, depth-rescaled) or reference (as the released code) (preset: scaled)
        init_std: standard deviation of the matrices at the start (preset: 0.02)
    """

    preset: str = "vit_large"
    image_size: int | tuple[int, int] | None = None
    num_frames: int | None = None
    in_channels: int | None = None
    patch_size: int | None = None
    tubelet_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    predictor_embed_dim: int | None = None
    predictor_depth: int | None = None
    predictor_num_heads: int | None = None
    num_mask_tokens: int | None = None
    uniform_power: bool | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    init: Literal["scaled", "reference"] | None = None
    init_std: float | None = None

    def build(self) -> VJEPAConfig:
        """The architecture: the preset with every field that was given. Errors as `VJEPAConfig.from_preset`."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "preset"}
        return VJEPAConfig.from_preset(self.preset, **{name: v for name, v in given.items() if v is not None})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_keys(what: str, values: Mapping[str, Any], cls: type) -> None:
    valid = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in valid:
            raise ValueError(unknown_key_message(what, key, valid))
