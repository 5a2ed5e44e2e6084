"""V-JEPA from the best parts that PyTorch has: what a careful user would assemble without this library.

Clips become patches once, which a linear map embeds: all of them for the target encoder, the kept ones alone for the
context. Both mask kinds go through each layer together, packed; attention is a call of scaled_dot_product_attention
for each kind. Targets are gathered before they are normalised. Norms, clipping and average are foreach operations,
AdamW is the fused one, and nothing waits for the loss.

Legend: N packed tokens, B clips, D features, P numbers of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .steps import Workload, set_schedule
from .straight import Encoder, Layer, Predictor, Straight

Shapes = Sequence[tuple[int, int]]  # B, n of each mask kind


def patches(clips: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B * L, P], in the order of a convolution's weight."""
    x = clips
    for axis, size in zip((2, 4, 6), tubelet, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(0, 3)


def attend(layer: Layer, x_ND: Tensor, shapes: Shapes) -> Tensor:
    qkv = layer.attn.qkv(x_ND).unflatten(-1, (3, layer.attn.heads, -1))
    outs = []
    for (clips, tokens), part in zip(shapes, qkv.split([b * n for b, n in shapes]), strict=True):
        q, k, v = part.unflatten(0, (clips, tokens)).permute(2, 0, 3, 1, 4)
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return layer.attn.proj(outs[0] if len(outs) == 1 else torch.cat(outs))


def run_layers(layers: nn.ModuleList, x_ND: Tensor, shapes: Shapes) -> Tensor:
    for layer in layers:
        x_ND = x_ND + attend(layer, layer.norm1(x_ND), shapes)
        x_ND = x_ND + layer.mlp["fc2"](F.gelu(layer.mlp["fc1"](layer.norm2(x_ND))))
    return x_ND


class Assembled(Straight):
    """The straight step with each of its parts replaced; contexts and predictions are packed, in lists of one."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        config, length = work.config, work.config.num_tokens
        self.patches = patches(self.clips, (config.tubelet_size, config.patch_size, config.patch_size))
        first = torch.arange(work.clips, device=work.device)[:, None] * length
        self.seen_rows, self.hidden_rows = (
            torch.cat([(ids + first).flatten() for ids in kinds]) for kinds in (self.seen, self.hidden)
        )
        self.seen_shapes, self.hidden_shapes = ([tuple(ids.shape) for ids in k] for k in (self.seen, self.hidden))
        self.slow, self.fast = (list(network.parameters()) for network in (self.target, self.encoder))

    def make_optimizer(self, **options: bool) -> torch.optim.Optimizer:
        return super().make_optimizer(fused=True, **options)

    def encode(self, encoder: Encoder, patches_NP: Tensor, positions_ND: Tensor, shapes: Shapes) -> Tensor:
        convolution = encoder.patch_embed["proj"]
        x = F.linear(patches_NP, convolution.weight.flatten(1), convolution.bias) + positions_ND
        return encoder.norm(run_layers(encoder.blocks, x, shapes))

    @torch.no_grad()
    def features(self) -> Tensor:
        clips, length = self.work.clips, self.work.config.num_tokens
        positions = self.target.positions.repeat(clips, 1)
        return self.encode(self.target, self.patches, positions, [(clips, length)]).view(clips, length, -1)

    def contexts(self) -> list[Tensor]:
        positions = self.encoder.positions[torch.cat([ids.flatten() for ids in self.seen])]
        return [self.encode(self.encoder, self.patches[self.seen_rows], positions, self.seen_shapes)]

    def predictions(self, contexts: Sequence[Tensor]) -> list[Tensor]:
        predictor: Predictor = self.predictor
        seen = predictor.predictor_embed(contexts[0])
        tokens, shapes, rows, start = [], [], [], 0
        sets = zip(seen.split([ids.numel() for ids in self.seen]), self.seen, self.hidden, strict=True)
        for kind, (part, seen_ids, hidden_ids) in enumerate(sets):
            visible = part.view(*seen_ids.shape, -1) + predictor.positions[seen_ids]
            token = predictor.mask_tokens[kind % len(predictor.mask_tokens)]
            both = torch.cat([visible, token + predictor.positions[hidden_ids]], dim=1)
            clips, count = both.shape[:2]
            numbers = torch.arange(start, start + clips * count, device=both.device).view(clips, count)
            rows.append(numbers[:, seen_ids.shape[1] :].flatten())
            tokens.append(both.flatten(0, 1))
            shapes.append((clips, count))
            start += clips * count
        x = run_layers(predictor.predictor_blocks, torch.cat(tokens), shapes)[torch.cat(rows)]
        return [predictor.predictor_proj(predictor.predictor_norm(x))]

    def loss(self, predictions: Sequence[Tensor], features: Tensor) -> Tensor:
        with torch.no_grad():
            rows = features.flatten(0, 1)[self.hidden_rows]
            targets = F.layer_norm(rows, rows.shape[-1:])
        sizes = [b * n for b, n in self.hidden_shapes]
        pairs = zip(predictions[0].split(sizes), targets.split(sizes), strict=True)
        return torch.stack([F.l1_loss(z.float(), h.float()) for z, h in pairs]).mean()

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        torch._foreach_lerp_(self.slow, self.fast, 1 - momentum)

    def step(self) -> Any:
        values = self.work.recipe.schedules().at(self.done)
        set_schedule(self.optimizer, values)
        loss = self.forward()
        loss.backward()
        self.update(values.momentum)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()
