"""EMA and AdamW + EMA in plain PyTorch: the specification, the fallback and the baseline, like reference.py.

Nothing here reads a device tensor on the host.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ._adamw import Lists, Numbers
from ._native import one_run


def ema_update_(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float | Tensor) -> None:
    """targets <- targets + (1 - momentum) (sources - targets), then copies <- targets."""
    if not targets:
        return
    with _writing(targets, copies):
        _ema_update(targets, sources, copies, momentum)


def _writing(*lists: list[Tensor]) -> AbstractContextManager[Any]:
    """Where tensors may be written: those that were made in inference mode nowhere else."""
    return torch.inference_mode() if any(any(map(Tensor.is_inference, tensors)) for tensors in lists) else nullcontext()


def _ema_update(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float | Tensor) -> None:
    same = [source.to(target.dtype) for target, source in zip(targets, sources, strict=True)]
    if isinstance(momentum, Tensor):  # on a device, where nobody may wait for its value
        weights = {dtype: (1 - momentum).to(dtype) for dtype in {target.dtype for target in targets}}
        for target, source in zip(targets, same, strict=True):
            target.lerp_(source, weights[target.dtype])
    else:
        torch._foreach_lerp_(targets, same, 1 - momentum)
    if copies:
        torch._foreach_copy_(copies, targets)


def _walked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or copies of them, all in one order of elements: torch's fused kernel does not look at strides."""
    first = tensors[0]
    if all(tensor.stride() == first.stride() for tensor in tensors) and (first.is_contiguous() or one_run(first)):
        return tensors
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)


def adamw_ema_(lists: Lists, numbers: Numbers) -> None:
    """torch's AdamW on params, then the EMA of them in shadows, then both into their low-precision copies."""
    with _writing(*lists):
        _adamw_ema(lists, numbers)


def _adamw_ema(lists: Lists, numbers: Numbers) -> None:
    found_inf = None if numbers.found_inf is None else (numbers.found_inf != 0).to(torch.float32)
    for number, (places, (lr, beta1, beta2, eps, weight_decay)) in enumerate(numbers.groups()):
        own = [tensors[places] for tensors in lists[:5]]
        there = [step.numel() > 0 for step in own[-1]]
        params, grads, exp_avgs, exp_avg_sqs, steps = (list(compress(tensors, there)) for tensors in own)
        if not params:
            continue
        if numbers.grad_factors:
            grads = list(torch._foreach_mul(grads, numbers.grad_factors[number]))
        grads = [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)]  # a scalar took the factor's
        # torch's fused kernel wants the step counts where the params are, its other one on the host
        fused = steps[0].device == params[0].device
        given = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
        walked = [_walked(*tensors) if fused else tensors for tensors in given]
        adamw(
            [param for param, *_ in walked],
            [grad for _, grad, *_ in walked],
            [exp_avg for *_, exp_avg, _ in walked],
            [exp_avg_sq for *_, exp_avg_sq in walked],
            [],
            steps,
            foreach=not fused,
            fused=fused,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=numbers.lrs[number] if numbers.lrs else lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        for tensors, copied in zip(given, walked, strict=True):
            if tensors[0] is not copied[0]:
                torch._foreach_copy_([tensors[0], *tensors[2:]], [copied[0], *copied[2:]])
    there = [shadow.numel() > 0 for shadow in lists.shadows]
    ema_update_(list(compress(lists.shadows, there)), list(compress(lists.params, there)), [], numbers.momentum)
    for copies, originals in ((lists.param_copies, lists.params), (lists.shadow_copies, lists.shadows)):
        there = [copy.numel() > 0 for copy in copies]
        if any(there):
            torch._foreach_copy_(list(compress(copies, there)), list(compress(originals, there)))


def gradient_norms(gradients: list[Tensor], sizes: list[int]) -> Tensor:
    """[len(sizes)] float32: the L2 norm of each group, `sizes` tensors after one another, summed in float64."""
    norms, first = [], 0
    for size in sizes:
        group = gradients[first : first + size]
        first += size
        if group:
            norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(group, 2, torch.float64))))
        else:
            norms.append(torch.zeros((), dtype=torch.float64, device=gradients[0].device))
    return torch.stack(norms).float()
