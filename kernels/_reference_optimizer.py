"""EMA and AdamW + EMA in plain PyTorch: the specification, the fallback and the baseline, like reference.py.

Nothing here reads a device tensor on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def ema_update_(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float | Tensor) -> None:
    """targets <- targets + (1 - momentum) (sources - targets), then copies <- targets."""
    if not targets:
        return
    same = [source.to(target.dtype) for target, source in zip(targets, sources, strict=True)]
    if isinstance(momentum, Tensor):  # on a device, where nobody may wait for its value
        for target, source in zip(targets, same, strict=True):
            target.lerp_(source, (1 - momentum).to(target.dtype))
    else:
        torch._foreach_lerp_(targets, same, 1 - momentum)
    if copies:
        torch._foreach_copy_(copies, targets)


def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    shadows: list[Tensor],
    param_copies: list[Tensor],
    shadow_copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    grad_factor: Tensor | None = None,
) -> None:
    """torch's AdamW on params, then the EMA of them in shadows, then both into their low-precision copies."""
    if not params:
        return
    if grad_factor is not None:
        grads = list(torch._foreach_mul(grads, grad_factor))
    # torch's fused kernel wants the step counts where the params are; ours are on the host, where reading them is free
    fused = params[0].device.type == "cpu"
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=not fused,
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if shadows:
        ema_update_(shadows, params, shadow_copies, momentum)
    if param_copies:
        torch._foreach_copy_(param_copies, params)
