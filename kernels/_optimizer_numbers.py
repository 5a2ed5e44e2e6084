"""The numbers of a step of AdamWEMA: from its parameter groups, from its caller, and from torch.amp.GradScaler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._adamw import Numbers, check_scalar
from ._checks import describe
from ._native import device_of
from ._tensor_lists import local

STATE = ("step", "exp_avg", "exp_avg_sq")  # of a parameter that has had a gradient
Scalars = Tensor | list[Tensor | None] | tuple[Tensor | None, ...] | None


def _number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """`value` as a float with low <= value < high, or an error; tensors on a device are not read."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not low <= value < high:
        raise ValueError(f"{name} must be at least {low:g} and below {high:g}, got {value}")
    return float(value)


def check_group(group: dict[str, Any]) -> list[float]:
    """lr (0 if it is on a device), beta1, beta2, eps and weight decay of a group, or an error."""
    if group.get("amsgrad") or group.get("maximize"):
        raise ValueError("params must have amsgrad=False and maximize=False, got a group with one of them set")
    betas, lr = group["betas"], group["lr"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {describe(betas)}")
    if group.get("capturable") and on_device(lr):
        check_scalar("lr", lr)
        lr = 0.0
    return [
        _number("lr", lr, 0),
        _number("betas[0]", betas[0], 0, 1),
        _number("betas[1]", betas[1], 0, 1),
        _number("eps", group["eps"], 0),
        _number("weight_decay", group["weight_decay"], 0),
    ]


def check_state(state_dict: Mapping[str, Any]) -> None:
    """Raise unless this is the state of a torch.optim.AdamW whose numbers are in range."""
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"state_dict must be that of AdamW, got one without {name}")
    for group in state_dict["param_groups"]:
        missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
        if missing:
            raise ValueError(f"state_dict must be that of AdamW, got a group without {missing[0]}")
        check_group(group)
    for key, its in state_dict["state"].items():
        missing = [name for name in STATE if name not in its] if its else []
        if missing:
            raise ValueError(f"state_dict must be that of AdamW, got a state of parameter {key} without {missing[0]}")


def on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def numbers_of(optimizer: Any, grad_factor: Scalars, found_inf: Tensor | None) -> Numbers:
    """All that a step of `optimizer` is told besides tensors, checked."""
    groups = optimizer.param_groups
    hyper = [number for group in groups for number in check_group(group)]
    if len({bool(group["capturable"]) for group in groups}) > 1:
        raise ValueError("params must have one capturable for all groups, got some with and some without")
    devices = set(map(device_of, (param for group in groups for param in group["params"])))
    check_capture(groups, devices)
    lrs = [group["lr"] for group in groups]
    lrs = [lr if on_device(lr) else _constant(float(lr), devices) for lr in lrs] if any(map(on_device, lrs)) else []
    factors = _factors(grad_factor, len(groups), devices)
    # what torch.amp.GradScaler leaves for the step of an optimizer that `_step_supports_amp_scaling`
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if isinstance(scale, Tensor):
        unscale = scale.reshape(()).float().reciprocal()
        factors = [factor.to(unscale.device) * unscale for factor in factors] or [unscale] * len(groups)
    if isinstance(found, Tensor):
        found_inf = found.reshape(()).float()
    if found_inf is not None:
        found_inf = _scalar_on("found_inf", found_inf, devices)
        if not groups[0]["capturable"] and any(device.type != "cpu" for device in devices):
            raise ValueError("found_inf must come with capturable=True for params on a device, got capturable=False")
    return Numbers([len(group["params"]) for group in groups], hyper, optimizer.momentum, lrs, factors, found_inf)


def check_capture(groups: list[dict[str, Any]], devices: set[torch.device]) -> None:
    """Raise if a CUDA graph is to hold a step that counts on the host: it would replay the first count for ever."""
    counted_here = not all(group["capturable"] for group in groups)
    if counted_here and any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing():
        raise ValueError("params must have capturable=True where a CUDA graph captures the step, got capturable=False")


def _factors(grad_factor: Scalars, count: int, devices: set[torch.device]) -> list[Tensor]:
    """A factor for each of `count` groups, or none."""
    if grad_factor is not None and not isinstance(grad_factor, Tensor | list | tuple):
        raise TypeError(f"grad_factor must be a 0-d float32 tensor or a list, got {describe(grad_factor)}")
    factors = [grad_factor] * count if grad_factor is None or isinstance(grad_factor, Tensor) else list(grad_factor)
    if len(factors) != count:
        raise ValueError(f"grad_factor must have {count} entries like groups, got {len(factors)}")
    checked = [None if factor is None else _scalar_on("grad_factor", factor, devices) for factor in factors]
    if all(factor is None for factor in checked):
        return []
    return [_constant(1.0, devices) if factor is None else factor for factor in checked]


def _constant(value: float, devices: set[torch.device]) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=min(devices, key=str))


def _scalar_on(name: str, value: object, devices: set[torch.device]) -> Tensor:
    """`value` as a plain tensor that can be read where the parameters are, or an error."""
    check_scalar(name, value)
    if not all(placement.is_replicate() for placement in getattr(value, "placements", ())):
        raise ValueError(f"{name} must be a 0-d float32 tensor whole on every process, got a part of one")
    if value.device.type != "cpu" and value.device not in devices:  # type: ignore[attr-defined]
        expected = " or ".join(sorted(map(str, devices)))
        raise ValueError(f"{name} must be on the device of params ({expected}) or on the CPU, got {describe(value)}")
    return local(value)  # type: ignore[arg-type]
