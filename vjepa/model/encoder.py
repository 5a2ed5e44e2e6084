"""The video encoder: tubelet embedding, transformer blocks, final norm. Hidden tokens are never computed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vjepa.config import VJEPAConfig
from vjepa.kernels import TokenIndices, tubelet_embed
from vjepa.model.blocks import LAYER_NORM_EPS, Block, add_norm, run_blocks
from vjepa.model.position_table import PositionTable
from vjepa.model.precision import product_dtype


class TubeletProjection(nn.Module):
    """Weight [D, C, t, h, w] and bias [D] of the tubelet embedding, named and shaped as a 3D convolution's."""

    def __init__(self, config: VJEPAConfig):
        super().__init__()
        patch = config.patch_size
        shape = (config.embed_dim, config.in_channels, config.tubelet_size, patch, patch)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(config.embed_dim))


class PatchEmbed(nn.Module):
    """Video [B, C, T, H, W] -> tokens [B, L, D], or packed [N, D] of the tubelets named by `indices` alone.

    uint8 video is scaled to 0..1 and normalised with the config's pixel mean and std on the way.
    """

    def __init__(self, config: VJEPAConfig):
        super().__init__()
        self.proj = TubeletProjection(config)
        self.mean, self.std = config.normalisation

    def forward(self, video: Tensor, pos_embed: Tensor, indices: TokenIndices | None = None) -> Tensor:
        dtype = product_dtype(self.proj.weight)  # float32 positions keep the tokens in float32
        weight, bias = self.proj.weight.to(dtype), self.proj.bias.to(dtype)
        if video.is_floating_point():
            return tubelet_embed(video.to(weight.dtype), weight, bias, pos_embed, indices)
        return tubelet_embed(video, weight, bias, pos_embed, indices, mean=self.mean, std=self.std)


class Encoder(nn.Module):
    """Vision transformer with joint space-time attention over the tubelets of a clip.

    forward(video, indices=None)
        video    [B, C, T, H, W] or images [B, C, H, W]; uint8 (normalised here) or floating point (taken as it is).
                 T, H, W any multiples of the tubelet: positions are interpolated for sizes other than the config's. A
                 single frame is repeated to fill one tubelet; expand an image to `num_frames` frames for the protocol
                 of the published image results.
        indices  the tokens to compute, S sets; None: all of every clip
        returns  [B, L, D], or packed [N, D] when `indices` is given
    Raises ValueError or TypeError naming the argument on a wrong shape or dtype.
    """

    def __init__(self, config: VJEPAConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.positions = PositionTable(config.embed_dim, config.grid, config.uniform_power)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.activation_checkpointing = False
        self._whole_clips: dict[tuple[int, int, torch.device], Tensor] = {}

    def forward(self, video: Tensor, indices: TokenIndices | None = None) -> Tensor:
        clips = self.as_clips(video)
        grid = self.grid_of(clips)
        tokens = self.patch_embed(clips, self.positions(grid), indices)
        if indices is not None:
            return self._transform(tokens, indices.cu_seqlens, indices.lengths)
        batch, length, width = tokens.shape
        cu_seqlens = self._whole_clip_offsets(batch, length, tokens.device)
        return self._transform(tokens.flatten(0, 1), cu_seqlens, (length,) * batch).view(batch, length, width)

    def _transform(self, tokens: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        x, branch = run_blocks(self.blocks, tokens, cu_seqlens, lengths, self.activation_checkpointing)
        return add_norm(x, branch, self.norm, x.dtype)[1]

    def _whole_clip_offsets(self, batch: int, length: int, device: torch.device) -> Tensor:
        """cu_seqlens of `batch` sequences of `length` tokens, made once per shape and device."""
        if torch.compiler.is_compiling():
            return _offsets(batch, length, device)
        key = (batch, length, device)
        if key not in self._whole_clips:
            with torch.inference_mode(False):
                self._whole_clips[key] = _offsets(batch, length, device)
        return self._whole_clips[key]

    def as_clips(self, video: Tensor) -> Tensor:
        """`video` as [B, C, T, H, W], T a multiple of the tubelet: an image becomes one (repeated) tubelet."""
        config = self.config
        if not isinstance(video, Tensor):
            raise TypeError(f"video must be a tensor, got {type(video).__name__}")
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise TypeError(f"video must be uint8 or floating point, got {video.dtype}")
        clips = video.unsqueeze(2) if video.ndim == 4 else video
        if clips.ndim != 5 or clips.shape[1] != config.in_channels:
            expected = f"(B, {config.in_channels}, T, H, W) or (B, {config.in_channels}, H, W)"
            raise ValueError(f"video must have shape {expected}, got {tuple(video.shape)}")
        if clips.shape[2] == 1:
            clips = clips.expand(-1, -1, config.tubelet_size, -1, -1)
        frames, height, width = clips.shape[2:]
        patch = config.patch_size
        if min(clips.shape) < 1 or frames % config.tubelet_size or height % patch or width % patch:
            tubelet = f"{config.tubelet_size} x {patch} x {patch}"
            raise ValueError(f"video must be whole {tubelet} tubelets of T x H x W, got shape {tuple(video.shape)}")
        return clips

    def grid_of(self, clips: Tensor) -> tuple[int, int, int]:
        """Tokens along (t, h, w) of `clips` [B, C, T, H, W]."""
        frames, height, width = clips.shape[2:]
        patch = self.config.patch_size
        return frames // self.config.tubelet_size, height // patch, width // patch


def _offsets(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
