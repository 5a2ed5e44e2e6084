"""V-JEPA in straight PyTorch, as its papers describe it and one would write it at first.

A 3D convolution embeds the whole grid, whatever is kept of it; rows are chosen by gathering with expanded ids; encoder and
predictor run once for each mask kind; float32 weights are cast by autocast; gradients are clipped by clip_grad_norm_,
torch.optim.AdamW steps with its defaults, and the moving average goes from tensor to tensor. Parameters are named as ours.

Legend: B clips, L tokens of a clip, n tokens of one set, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa import VJEPAConfig
from vjepa.positions import sincos_3d

from .harness import compiled
from .steps import (  # fmt: skip
    CONTEXT,
    LOSS,
    PREDICTOR,
    TARGET,
    UPDATE,
    Workload,
    decayed_apart,
    draw_gradients,
    moments,
    set_schedule,
    with_gradients,
)

NORM_EPS = 1e-6
PREDICTOR_MLP_RATIO = 4.0


def expanded_gather(x_BLD: Tensor, ids_Bn: Tensor) -> Tensor:
    """The rows that `ids` names, by an index as large as the result."""
    return x_BLD.gather(1, ids_Bn.unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1]))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BnD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm block; `mlp` is a pair of linear maps with a GELU between them."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.attn = SelfAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x_BnD: Tensor) -> Tensor:
        x_BnD = x_BnD + self.attn(self.norm1(x_BnD))
        return x_BnD + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x_BnD))))


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class Encoder(nn.Module):
    """Clips [B, C, T, H, W] -> features of all tokens [B, L, D], or of the named ones [B, n, D]."""

    def __init__(self, config: VJEPAConfig) -> None:
        super().__init__()
        tubelet = (config.tubelet_size, config.patch_size, config.patch_size)
        convolution = nn.Conv3d(config.in_channels, config.embed_dim, kernel_size=tubelet, stride=tubelet)
        self.patch_embed = nn.ModuleDict({"proj": convolution})
        self.blocks = nn.ModuleList(
            Layer(config.embed_dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        table = sincos_3d(config.embed_dim, config.grid, config.uniform_power)
        self.register_buffer("positions", table, persistent=False)
        self.run = call

    def forward(self, clips: Tensor, ids_Bn: Tensor | None = None) -> Tensor:
        x = self.patch_embed["proj"](clips).flatten(2).transpose(1, 2) + self.positions
        if ids_Bn is not None:
            x = expanded_gather(x, ids_Bn)
        for layer in self.blocks:
            x = self.run(layer, x)
        return self.norm(x)


class Predictor(nn.Module):
    """Features of the context of one mask kind -> those of its targets."""

    def __init__(self, config: VJEPAConfig) -> None:
        super().__init__()
        width = config.predictor_embed_dim
        self.predictor_embed = nn.Linear(config.embed_dim, width)
        self.mask_tokens = nn.Parameter(torch.zeros(config.num_mask_tokens, width))
        self.predictor_blocks = nn.ModuleList(
            Layer(width, config.predictor_heads, PREDICTOR_MLP_RATIO) for _ in range(config.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(width, config.embed_dim)
        self.register_buffer("positions", sincos_3d(width, config.grid, config.uniform_power), persistent=False)
        self.run = call

    def forward(self, context_BnD: Tensor, seen_Bn: Tensor, hidden_Bm: Tensor, kind: int) -> Tensor:
        positions = self.positions.expand(len(seen_Bn), -1, -1)
        seen = self.predictor_embed(context_BnD) + expanded_gather(positions, seen_Bn)
        token = self.mask_tokens[kind % len(self.mask_tokens)]
        x = torch.cat([seen, token + expanded_gather(positions, hidden_Bm)], dim=1)
        for layer in self.predictor_blocks:
            x = self.run(layer, x)
        return self.predictor_proj(self.predictor_norm(x)[:, seen_Bn.shape[1] :])


class Straight:
    """Training with these networks. `compile_layers`: torch.compile of the layers, which hold all but the ends."""

    def __init__(self, work: Workload, compile_layers: bool = False) -> None:
        self.work, self.done = work, 0
        self.clips = work.normalised()
        self.seen, self.hidden = work.rectangles()
        self.build()
        if compile_layers:
            run = compiled(call)
            for network in (self.encoder, self.target, self.predictor):
                network.run = run

    def build(self) -> None:
        """Networks with the weights of the workload, and the optimizer."""
        model = self.work.model()
        self.encoder, self.predictor = Encoder(self.work.config), Predictor(self.work.config)
        for network, same in ((self.encoder, model.encoder), (self.predictor, model.predictor)):
            network.to(self.work.device).load_state_dict(same.state_dict())
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.optimizer = self.make_optimizer()

    def make_optimizer(self, **options: bool) -> torch.optim.Optimizer:
        recipe = self.work.recipe
        groups = decayed_apart(self.encoder, self.predictor)
        return torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, **options)

    # ---------------------------------------------------------------------------------------------------------- forward

    @torch.no_grad()
    def features(self) -> Tensor:
        """[B, L, D] of the target encoder."""
        return self.target(self.clips)

    def contexts(self) -> list[Tensor]:
        return [self.encoder(self.clips, ids) for ids in self.seen]

    def predictions(self, contexts: Sequence[Tensor]) -> list[Tensor]:
        sets = zip(contexts, self.seen, self.hidden, strict=True)
        return [self.predictor(*of_kind, kind) for kind, of_kind in enumerate(sets)]

    def loss(self, predictions: Sequence[Tensor], features: Tensor) -> Tensor:
        with torch.no_grad():
            normed = F.layer_norm(features, features.shape[-1:])
            targets = [expanded_gather(normed, ids) for ids in self.hidden]
        losses = [(z - h).abs().mean() for z, h in zip(predictions, targets, strict=True)]
        return sum(losses) / len(losses)

    def forward(self) -> Tensor:
        with self.work.autocast():
            features = self.features()
            return self.loss(self.predictions(self.contexts()), features)

    # ----------------------------------------------------------------------------------------------------------- update

    def update(self, momentum: float) -> None:
        """Clips, steps, and moves the average; gradients stay."""
        for network in (self.encoder, self.predictor):
            nn.utils.clip_grad_norm_(network.parameters(), self.work.recipe.clip_grad)
        self.optimizer.step()
        self.average(momentum)

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        for slow, fast in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            slow.mul_(momentum).add_((1 - momentum) * fast)

    def step(self) -> Any:
        """A step; reads the loss at its end, as the released recipe does."""
        values = self.work.recipe.schedules().at(self.done)
        set_schedule(self.optimizer, values)
        loss = self.forward()
        loss.backward()
        self.update(values.momentum)
        self.optimizer.zero_grad()
        self.done += 1
        return float(loss.detach())

    # ------------------------------------------------------------------------------------------------------------ parts

    def parts(self) -> dict[str, Callable[[], Any]]:
        work = self.work
        contexts, features = work.once(self.contexts), work.once(self.features)
        predictions = work.once(lambda: self.predictions(contexts()))
        draw_gradients(self.encoder, self.predictor)
        values = work.recipe.schedules().at(0)
        set_schedule(self.optimizer, values)

        def target() -> Tensor:
            with work.autocast():
                return self.features()

        def context() -> list[Tensor]:
            with work.autocast():
                out = self.contexts()
            gradients(out, with_gradients(self.encoder))
            return out

        def predictor() -> list[Tensor]:
            inputs = [x.detach().requires_grad_() for x in contexts()]
            with work.autocast():
                out = self.predictions(inputs)
            gradients(out, [*with_gradients(self.predictor), *inputs])
            return out

        def loss() -> Tensor:
            inputs = [z.detach().requires_grad_() for z in predictions()]
            with work.autocast():
                value = self.loss(inputs, features())
            torch.autograd.grad(value, inputs)
            return value

        calls = (target, context, predictor, loss, lambda: self.update(values.momentum))
        return dict(zip((TARGET, CONTEXT, PREDICTOR, LOSS, UPDATE), calls, strict=True))

    def state(self) -> Iterable[Tensor]:
        networks = (self.encoder, self.predictor, self.target)
        return [*(p for network in networks for p in network.parameters()), *moments(self.optimizer)]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of the sum of all magnitudes, as an L1 loss has them."""
    return torch.autograd.grad(outputs, inputs, [out.detach().sign() for out in outputs])
