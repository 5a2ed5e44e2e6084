"""What a step of AdamW with moving average is told: lists of tensors, and numbers of groups of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._apart import check_apart
from ._checks import describe
from ._native import COPY_DTYPES

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay")


def nothing() -> Tensor:
    """Stands for a tensor that a parameter lacks; not of the default device or dtype."""
    return torch.empty(0, dtype=torch.float32, device="cpu")


class Lists(NamedTuple):
    """Tensors of all groups, one after the other; what belongs to a parameter has its place.

    An empty tensor stands for what a parameter lacks: gradient (then also moments and step), shadow, copies. A list of
    shadows or copies may also be empty itself.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]  # float32 scalars, how many were done before: all on the host or all where the parameter is
    shadows: list[Tensor]
    param_copies: list[Tensor]
    shadow_copies: list[Tensor]

    def places(self) -> Iterator[tuple[Tensor, ...]]:
        """For each parameter what belongs to it, in the order of the fields."""
        lacking = [nothing()] * len(self.params)
        return zip(*(tensors or lacking for tensors in self), strict=True)


class Numbers(NamedTuple):
    """Numbers of the groups, and of the whole step. What is a tensor is read on the device, by nobody else."""

    group_sizes: list[int]  # parameters of each group
    hyper: list[float]  # HYPER of the first group, of the second, ...
    momentum: float | Tensor  # of the shadows; a tensor: 0-d float64
    lrs: list[Tensor]  # 0-d float32: one for each group, instead of the numbers, or none
    grad_factors: list[Tensor]  # 0-d float32: what gradients of each group are multiplied by, or none
    found_inf: Tensor | None  # 0-d float32: not 0: the step is not done, but shadows follow

    def groups(self) -> Iterator[tuple[slice, list[float]]]:
        """For each group the places of its parameters and its HYPER."""
        width = len(HYPER)
        for number, (start, end) in enumerate(pairwise(accumulate(self.group_sizes, initial=0))):
            yield slice(start, end), self.hyper[number * width : (number + 1) * width]

    def on(self, device: torch.device, places: list[int]) -> Numbers:
        """Those for the parameters at these places, which are all that lie on `device`."""

        def there(tensor: Tensor) -> Tensor:  # the host waits for what it reads, a device does not
            return tensor.to(device, non_blocking=device.type != "cpu")

        sizes = self.group_sizes
        if len(places) != sum(sizes):
            sizes = [sum(run.start <= place < run.stop for place in places) for run, _ in self.groups()]
        return Numbers(
            sizes,
            self.hyper,
            there(self.momentum) if isinstance(self.momentum, Tensor) else self.momentum,
            list(map(there, self.lrs)),
            list(map(there, self.grad_factors)),
            None if self.found_inf is None else there(self.found_inf),
        )


def check_lists(lists: Lists) -> None:
    """Raise unless what belongs to a parameter is like it or lacking as it may."""
    count = len(lists.params)
    for name, tensors in lists._asdict().items():
        if len(tensors) != count and (tensors or name not in ("shadows", "param_copies", "shadow_copies")):
            raise ValueError(f"{name} must have {count} tensors like params, got {len(tensors)}")
    if lists.shadow_copies and not (lists.param_copies and lists.shadows):
        raise ValueError("shadow_copies must come with shadows and param_copies, got them alone")
    for number, place in enumerate(lists.places()):
        param, grad, *moments, step, _, param_copy, shadow_copy = place
        for name, tensor in zip(Lists._fields, place, strict=True):
            if name == "steps" or not tensor.numel():
                continue
            moment = name in ("exp_avgs", "exp_avg_sqs")
            if tensor.shape != param.shape or tensor.device != param.device or (moment and tensor.dtype != param.dtype):
                raise ValueError(f"{name}[{number}] must be like params {describe(param)}, got {describe(tensor)}")
        if not isinstance(step, Tensor):
            raise TypeError(f"steps[{number}] must be a float32 scalar, got {describe(step)}")
        if not param.numel():
            continue
        lacking = {not tensor.numel() for tensor in (grad, step, *moments)}
        if len(lacking) > 1:
            raise ValueError(f"grads[{number}], its moments and its step must all be there or all be empty, got some")
        if step.numel() and (
            step.ndim or step.dtype != torch.float32 or step.device.type not in ("cpu", param.device.type)
        ):
            expected = f"float32 scalar on the CPU or on {param.device}"
            raise ValueError(f"steps[{number}] must be a {expected}, got {describe(step)}")
        has_shadow, has_copy, has_both = (tensor.numel() > 0 for tensor in place[5:])
        if has_both != (has_shadow and has_copy):
            raise ValueError(
                f"shadow_copies[{number}] must be there with shadow and copy of its parameter, and only then"
            )
        if has_copy and (param_copy.dtype not in COPY_DTYPES or (has_both and shadow_copy.dtype != param_copy.dtype)):
            got = f"{param_copy.dtype} and {shadow_copy.dtype}" if has_both else f"{param_copy.dtype}"
            raise TypeError(f"param_copies[{number}] and its shadow's must be bfloat16 or float16, got {got}")
    kinds = {(param.device, step.device) for param, step in zip(lists.params, lists.steps, strict=True) if step.numel()}
    if len(kinds) > len({device for device, _ in kinds}):
        raise ValueError("steps must lie all on the CPU or all with their params, got some here and some there")


def check_numbers(lists: Lists, numbers: Numbers) -> None:
    """Raise unless the groups are made of all parameters and there is what each needs."""
    groups, count = len(numbers.group_sizes), len(lists.params)
    if sum(numbers.group_sizes) != count or min(numbers.group_sizes, default=0) < 0:
        raise ValueError(f"group_sizes must sum to the {count} params, got {numbers.group_sizes}")
    if len(numbers.hyper) != groups * len(HYPER):
        raise ValueError(f"hyper must have {len(HYPER)} numbers for each of {groups} groups, got {len(numbers.hyper)}")
    for name, tensors in (("lrs", numbers.lrs), ("grad_factors", numbers.grad_factors)):
        if tensors and len(tensors) != groups:
            raise ValueError(f"{name} must have {groups} tensors, one for each group, or none, got {len(tensors)}")
        for number, tensor in enumerate(tensors):
            check_scalar(f"{name}[{number}]", tensor)
    if numbers.found_inf is not None:
        check_scalar("found_inf", numbers.found_inf)


def counted_elsewhere(lists: Lists) -> bool:
    """Whether steps lie on the CPU and their parameters do not."""
    return any(
        step.numel() and step.device != param.device for param, step in zip(lists.params, lists.steps, strict=True)
    )


def check_scalar(name: str, value: object) -> None:
    """Raise unless `value` is a number on a device."""
    if not isinstance(value, Tensor) or value.ndim or value.dtype != torch.float32:
        raise TypeError(f"{name} must be a 0-d float32 tensor, got {describe(value)}")


def check_adamw_apart(lists: Lists) -> None:
    """Raise if a tensor that is written shares memory with another one."""
    named = lists._asdict()
    grads, _ = named.pop("grads"), named.pop("steps")
    check_apart(named, {"grads": grads})
