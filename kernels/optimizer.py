"""AdamWEMA: AdamW, the exponential moving average of the weights, and low-precision copies of both, as one optimizer.

    g: gradient, p: parameter, s: shadow, k: step from 1
    p <- p - lr * weight_decay * p
    a <- b1 a + (1 - b1) g,   q <- b2 q + (1 - b2) g^2
    p <- p - lr * (a / (1 - b1^k)) / (sqrt(q / (1 - b2^k)) + eps)
    s <- m s + (1 - m) p                      then copies of p and s, rounded

One pass over memory moves 40 bytes for a float32 parameter: read p, g, a, q, s; write p, a, q, s and two bfloat16
copies. The native library takes that one; the reference takes three: torch's AdamW, the average, the copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _native_adamw
from . import _reference_optimizer as reference
from ._checks import describe
from ._dispatch import Row, choose, define, register
from ._native import device_of, walkable
from .ema import (
    COPY_DTYPES,
    by_device,
    check_momentum,
    check_pairs,
    local,
    local_list,
    momentum_tensor,
    native_cpu_why_not,
    native_cuda_why_not,
    native_unfit,
)

WIDE = (torch.float32,)


def _unfit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    shadows: list[Tensor],
    param_copies: list[Tensor],
    shadow_copies: list[Tensor],
    *numbers: object,
) -> str | None:
    for tensors in (params, exp_avgs, exp_avg_sqs, shadows):
        if not walkable(tensors, WIDE):
            other = next(tensor for tensor in tensors if not walkable([tensor], WIDE))
            return f"it needs contiguous float32 parameters, moments and shadows, got {describe(other)}"
    return native_unfit(grads, param_copies, shadow_copies)


_cpu, _cuda = (partial(step, walked=True) for step in (_native_adamw.adamw_ema_cpu, _native_adamw.adamw_ema_cuda))
register(Row("adamw_ema_", "cpu", _cpu, why_not=native_cpu_why_not, unfit=_unfit))
register(
    Row(
        "adamw_ema_",
        "cuda",
        _cuda,
        why_not=native_cuda_why_not,
        unfit=_unfit,
        automatic=False,  # before it has been measured against the reference on a GPU
    )
)
register(Row("adamw_ema_", "reference", reference.adamw_ema_))


def _update(
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
    if grad_factor is not None and set(map(device_of, params)) - {grad_factor.device}:
        raise ValueError(f"grad_factor must be on the device of all params, got {describe(grad_factor)}")
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, shadows, param_copies, shadow_copies)
    numbers = (lr, beta1, beta2, eps, weight_decay, momentum, grad_factor)
    for device, own in by_device(*lists):
        choose("adamw_ema_", device, *own, *numbers).forward(*own, *numbers)
    changed = (params, exp_avgs, exp_avg_sqs, steps, shadows, param_copies, shadow_copies)
    torch.autograd.graph.increment_version([tensor for tensors in changed for tensor in tensors])


def _fake(*arguments: object, **options: object) -> None:
    return None


define(
    "adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] shadows, Tensor(f!)[] param_copies, Tensor(g!)[] shadow_copies, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, float momentum, Tensor? grad_factor=None) -> ()",
    _update,
    _fake,
)


def _number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """`value` as a float with low <= value < high, or an error; tensors on a device are not read."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not low <= value < high:
        raise ValueError(f"{name} must be at least {low:g} and below {high:g}, got {value}")
    return float(value)


def _check_group(group: dict[str, Any]) -> tuple[float, float, float, float, float]:
    """lr, beta1, beta2, eps and weight decay of a group, or an error."""
    if group.get("amsgrad") or group.get("maximize"):
        raise ValueError("params must have amsgrad=False and maximize=False, got a group with one of them set")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {describe(betas)}")
    return (
        _number("lr", group["lr"], 0),
        _number("betas[0]", betas[0], 0, 1),
        _number("betas[1]", betas[1], 0, 1),
        _number("eps", group["eps"], 0),
        _number("weight_decay", group["weight_decay"], 0),
    )


GradFactor = Tensor | list[Tensor | None] | tuple[Tensor | None, ...] | None


class AdamWEMA(torch.optim.Optimizer):
    """AdamW on `params`, then shadow <- momentum * shadow + (1 - momentum) * param, then low-precision copies of both.

    Args:
        params: tensors or parameter groups, as for torch.optim.AdamW.
        shadows: one tensor or None for each parameter in the same order, float32, of its shape and device.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW, for each group; lr in units of the parameter.
        momentum: of the average, 0..1; set `.momentum` between steps to follow a schedule.
        copies: torch.bfloat16 or torch.float16: keep copies of parameters and shadows in this dtype.

    Attributes:
        momentum: see above. It is not in the state_dict, which is exactly that of torch.optim.AdamW, to and from which
            it loads; nor are the shadows: they belong to the network that follows.
        param_copies, shadow_copies: lists in the order of the parameters (None where there is no shadow); empty without
            `copies`. Call `refresh_copies()` after writing to parameters or shadows by other means than `step()`.

    A parameter without a gradient keeps its value, its shadow still follows. Everything is checked before anything is
    written. Groups added later have no shadows. DTensors are updated shard by shard, without communication.

    Raises:
        TypeError, ValueError: tensors that do not pair up, shadows of lower precision than float32, numbers out of
            range, sparse gradients, amsgrad or maximize in a loaded state.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        shadows: Iterable[Tensor | None],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.998,
        copies: torch.dtype | None = None,
    ) -> None:
        if copies is not None and copies not in COPY_DTYPES:
            raise TypeError(f"copies must be torch.bfloat16, torch.float16 or None, got {copies}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_group(defaults)
        flags = {"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False}
        choices = {"foreach": None, "fused": None, "decoupled_weight_decay": True}
        super().__init__(params, {**defaults, **flags, **choices})  # the keys of torch.optim.AdamW, which loads them
        for group in self.param_groups:
            _check_group(group)
        self.momentum = momentum
        all_params = [param for group in self.param_groups for param in group["params"]]
        if isinstance(shadows, Tensor) or not isinstance(shadows, Iterable):
            raise TypeError(f"shadows must be a list of tensors or None, got {describe(shadows)}")
        all_shadows = list(shadows)
        if len(all_shadows) != len(all_params):
            raise ValueError(f"shadows must have {len(all_params)} entries like params, got {len(all_shadows)}")
        paired = [(s, p) for s, p in zip(all_shadows, all_params, strict=True) if s is not None]
        for shadow, param in paired:
            if not isinstance(shadow, Tensor):
                raise TypeError(f"shadows must be tensors or None, got {describe(shadow)}")
            if getattr(shadow, "placements", None) != getattr(param, "placements", None):
                raise ValueError("shadows must be sharded like params, got another placement")
        check_pairs(
            ("shadows", "params"),
            local_list(shadow for shadow, _ in paired),
            local_list(param for _, param in paired),
            (torch.float32, torch.float64),
        )
        self._shadows: dict[Tensor, Tensor] = {param: shadow for shadow, param in paired}
        self.param_copies: list[Tensor] = []
        self.shadow_copies: list[Tensor | None] = []
        if copies is not None:
            self.param_copies = [local(p).detach().to(copies) for p in all_params]
            self.shadow_copies = [None if s is None else local(s).detach().to(copies) for s in all_shadows]
        self._copies_of: dict[Tensor, tuple[Tensor, Tensor | None]] = dict(
            zip(all_params, zip(self.param_copies, self.shadow_copies, strict=True), strict=False)
        )

    @property
    def momentum(self) -> float:
        """Momentum of the average at the next step, 0..1."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        self._momentum = check_momentum(value)

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write the low-precision copies again."""
        for param, (param_copy, shadow_copy) in self._copies_of.items():
            param_copy.copy_(local(param))
            if shadow_copy is not None:
                shadow_copy.copy_(local(self._shadows[param]))

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_factor: GradFactor = None
    ) -> Any:
        """One update; returns what `closure` returns (None without one).

        Args:
            closure: computes the loss again, with gradients.
            grad_factor: what gradients are multiplied by, such as unscaling times clipping: a float32 scalar on the
                device of the parameters, or one (or None) for each group; it is not waited for. The gradients
                themselves stay.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hyper = [_check_group(group) for group in self.param_groups]
        factors = self._check_factors(grad_factor)
        for group in self.param_groups:
            for param in group["params"]:
                self._check_grad(param)
        for group, numbers, factor in zip(self.param_groups, hyper, factors, strict=True):
            followed: list[Tensor] = []
            alone: list[Tensor] = []
            still: list[Tensor] = []
            for param in group["params"]:
                if param in self._shadows:
                    (still if param.grad is None else followed).append(param)
                elif param.grad is not None:
                    alone.append(param)
            for params in (followed, alone):
                if not params:
                    continue
                states = [self._state_of(param) for param in params]
                torch.ops.vjepa.adamw_ema_(
                    local_list(params),
                    local_list(param.grad for param in params),  # type: ignore[misc]
                    local_list(state["exp_avg"] for state in states),
                    local_list(state["exp_avg_sq"] for state in states),
                    [state["step"] for state in states],
                    self._local_shadows(params) if params is followed else [],
                    self._copies(params, 0),
                    self._copies(params, 1) if params is followed else [],
                    *numbers,
                    self.momentum,
                    factor,
                )
            if still:
                torch.ops.vjepa.ema_update_(
                    self._local_shadows(still),
                    local_list(still),
                    self._copies(still, 1),
                    momentum_tensor(self.momentum),
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an AdamWEMA or of a torch.optim.AdamW (without amsgrad and maximize)."""
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update(foreach=None, fused=None, capturable=False, differentiable=False)
        for state in self.state.values():  # the count is read on the host, whatever kernel wrote the state
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_momentum", "_shadows", "param_copies", "shadow_copies", "_copies_of")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def _local_shadows(self, params: Sequence[Tensor]) -> list[Tensor]:
        return local_list(self._shadows[param] for param in params)

    def _copies(self, params: Sequence[Tensor], place: int) -> list[Tensor]:
        """Copies of the parameters (place 0) or of their shadows (1), all of which are there or none."""
        pairs = (self._copies_of[param] for param in params if self.param_copies and param in self._copies_of)
        return [pair[place] for pair in pairs]  # type: ignore[misc]

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _check_factors(self, grad_factor: GradFactor) -> list[Tensor | None]:
        """A factor or None for each group."""
        if grad_factor is not None and not isinstance(grad_factor, Tensor | list | tuple):
            raise TypeError(f"grad_factor must be a 0-d float32 tensor or a list, got {describe(grad_factor)}")
        if grad_factor is None or isinstance(grad_factor, Tensor):
            factors = [grad_factor] * len(self.param_groups)
        else:
            factors = list(grad_factor)
        if len(factors) != len(self.param_groups):
            raise ValueError(f"grad_factor must have {len(self.param_groups)} entries like groups, got {len(factors)}")
        for factor, group in zip(factors, self.param_groups, strict=True):
            if factor is None:
                continue
            if not isinstance(factor, Tensor) or factor.ndim or factor.dtype != torch.float32:
                raise TypeError(f"grad_factor must be a 0-d float32 tensor, got {describe(factor)}")
            for param in group["params"]:
                if param.device != factor.device:
                    raise ValueError(f"grad_factor must be on the device of {describe(param)}, got {describe(factor)}")
        return factors

    @staticmethod
    def _check_grad(param: Tensor) -> None:
        grad = param.grad
        if grad is None:
            return
        if grad.is_sparse:
            raise TypeError(f"params must have dense gradients, got a sparse one for {describe(param)}")
        if grad.dtype != param.dtype or grad.shape != param.shape or grad.device != param.device:
            raise ValueError(f"gradients must be like their parameter {describe(param)}, got {describe(grad)}")
