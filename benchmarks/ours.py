"""Our step as bench_step calls it: `vjepa.train.Trainer` for the whole, its public pieces for the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vjepa.kernels import gradient_norms, masked_l1_loss
from vjepa.train import Trainer

from .steps import (
    CONTEXT,
    LOSS,
    PREDICTOR,
    TARGET,
    UPDATE,
    Workload,
    draw_gradients,
    moments,
    set_schedule,
    with_gradients,
)
from .straight import gradients

TINY = 1e-6  # added to a norm before it divides, as in PyTorch's clipping


class Ours:
    """Training by this library; clips are uint8, masks any sets of tokens."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.trainer = Trainer(work.model(), work.recipe)
        self.model = self.trainer.model

    def step(self) -> Any:
        return self.trainer.step(self.work.video, self.work.masks)

    def parts(self) -> dict[str, Callable[[], Any]]:
        work, net, optimizer = self.work, self.trainer.network, self.trainer.optimizer
        video, masks, grid = work.video, work.masks, work.config.grid
        seen, features = (
            work.once(lambda: net.encoder(video, masks.context)),
            work.once(lambda: net.target_encoder(video)),
        )
        predicted = work.once(lambda: net.predictor(seen(), masks.context, masks.target, masks.kind, grid))
        draw_gradients(net.encoder, net.predictor)
        grads = [[p.grad for p in module.parameters()] for module in (net.encoder, net.predictor)]
        limit, values = work.recipe.clip_grad, work.recipe.schedules().at(0)
        set_schedule(optimizer, values)
        optimizer.momentum = values.momentum

        def target() -> Tensor:
            with torch.no_grad(), work.autocast():
                return net.target_encoder(video)

        def context() -> Tensor:
            with work.autocast():
                out = net.encoder(video, masks.context)
            gradients([out], with_gradients(net.encoder))
            return out

        def predictor() -> Tensor:
            x = seen().detach().requires_grad_()
            with work.autocast():
                out = net.predictor(x, masks.context, masks.target, masks.kind, grid)
            gradients([out], [*with_gradients(net.predictor), x])
            return out

        def loss() -> Tensor:
            z = predicted().detach().requires_grad_()
            with work.autocast():
                value = masked_l1_loss(z, features(), masks.target)
            torch.autograd.grad(value, [z])
            return value

        def update() -> None:
            factors = [(limit / (norm + TINY)).clamp(max=1.0) for norm in gradient_norms(grads)]
            by_part = dict(zip(("encoder", "predictor"), factors, strict=True))
            optimizer.step(grad_factor=[by_part[group["part"]] for group in optimizer.param_groups])

        calls = (target, context, predictor, loss, update)
        return dict(zip((TARGET, CONTEXT, PREDICTOR, LOSS, UPDATE), calls, strict=True))

    def state(self) -> Iterable[Tensor]:
        optimizer = self.trainer.optimizer
        copies = [*(optimizer.param_copies or []), *(optimizer.shadow_copies or [])]
        return [*self.model.parameters(), *moments(optimizer), *(copy for copy in copies if copy is not None)]
