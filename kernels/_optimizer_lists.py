"""The tensors of a step of AdamWEMA, as lists: what belongs to its parameters at every step, and at this one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._adamw import Lists, nothing
from ._checks import describe
from ._native import dtype_of
from ._tensor_lists import alike, layout_of, local_list, plain, shards_of


def check_grads(params: list[Tensor], grads: list[Tensor]) -> None:
    """Raise unless gradients are like their parameters; those of the same shards, if they are sharded."""
    if (
        plain(params)
        and plain(grads)
        and set(map(layout_of, grads)) <= {torch.strided}
        and list(map(dtype_of, params)) == list(map(dtype_of, grads))
        and alike(params, grads)
    ):
        return
    for param, grad in zip(params, grads, strict=True):
        if grad.layout != torch.strided:
            raise TypeError(f"params must have dense gradients, got a sparse one for {describe(param)}")
        if grad.dtype != param.dtype or grad.shape != param.shape or grad.device != param.device:
            raise ValueError(f"gradients must be like their parameter {describe(param)}, got {describe(grad)}")
        if shards_of(grad) != shards_of(param):
            raise ValueError(f"gradients must be sharded like their parameter {describe(param)}, got another placement")


def gradients(params: list[Tensor], copies: dict[Tensor, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """For each parameter the tensor that learns, itself or its copy, and the gradient of that, None without one."""
    learning, grads = params, [param.grad for param in params]
    for place, param in enumerate(params if copies else ()):
        copy, _ = copies.get(param, (None, None))
        if copy is None or copy.grad is None:
            continue
        if learning is params:
            learning = list(params)
        if grads[place] is not None:
            raise ValueError(f"params must have a gradient or their copy has, got both for {describe(param)}")
        learning[place], grads[place] = copy, copy.grad
    return learning, grads


class Own:
    """What belongs to a list of parameters at every step, in their order; empty tensors for what they lack."""

    def __init__(self, params: list[Tensor], shadows: dict[Tensor, Tensor], copies: dict[Tensor, Any]) -> None:
        def of(values: Iterable[Tensor | None]) -> list[Tensor]:
            return [nothing() if value is None else value for value in values]

        self.params = params
        self.shadows = of(shadows.get(param) for param in params)
        self.param_copies = of(copies.get(param, (None, None))[0] for param in params) if copies else []
        self.shadow_copies = of(copies.get(param, (None, None))[1] for param in params) if copies else []
        # for parameters without gradient: gradient, moments and step
        self.lacking = [tuple(nothing() for _ in range(4)) for _ in params]

    def lists(self, grads: list[Tensor | None], states: list[dict[str, Tensor]]) -> Lists:
        """With their gradients and states at this step."""
        rows = [
            lacking if grad is None else (grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            for grad, state, lacking in zip(grads, states, self.lacking, strict=True)
        ]
        columns = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])
        its_grads, exp_avgs, exp_avg_sqs, steps = map(local_list, columns)
        return Lists(
            local_list(self.params),
            its_grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            local_list(self.shadows),
            self.param_copies,
            self.shadow_copies,
        )
