"""The operator of AdamWEMA: who takes a step on which tensors, of whatever devices, in one pass over their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native_adamw
from . import _reference_optimizer as reference
from ._adamw import Lists, Numbers, check_adamw_apart, check_lists, check_numbers, counted_elsewhere
from ._apart import Reach
from ._checks import describe
from ._dispatch import Row, choose, define, register
from ._native import DTYPE_CODES, dtype_of, unwalkable
from ._tensor_lists import by_device
from .ema import momentum_value, native_cpu_why_not, native_cuda_why_not

FLOAT32 = {torch.float32}


def _unfit(lists: Lists) -> str | None:
    for name, dtypes in (
        ("params", FLOAT32),
        ("grads", set(DTYPE_CODES)),
        ("exp_avgs", FLOAT32),
        ("exp_avg_sqs", FLOAT32),
        ("shadows", FLOAT32),
    ):
        tensors = getattr(lists, name)
        if not set(map(dtype_of, tensors)) <= dtypes:
            wrong = next(tensor for tensor in tensors if tensor.dtype not in dtypes)
            expected = "at most 32 bits" if len(dtypes) > 1 else "float32"
            return f"it needs tensors of {expected} in {name}, got {describe(wrong)}"
    return unwalkable({name: tensors for name, tensors in lists._asdict().items() if name != "steps"})


class _ReferenceStep:
    def __init__(self, lists: Lists) -> None:
        self.lists = lists
        self.loaded: Lists | None = None
        self.written = Reach(
            tensor for name, tensors in lists._asdict().items() if name != "grads" for tensor in tensors
        )
        self.checked = False

    def load(self, grads: list[Tensor]) -> None:
        loaded = self.lists._replace(grads=grads)
        if not (self.checked and self.written.leaves(grads)):
            check_adamw_apart(loaded)
        self.checked, self.loaded = True, loaded

    def run(self, numbers: Numbers) -> None:
        loaded, self.loaded = self.loaded, None  # gradients live no longer than their step
        assert loaded is not None
        reference.adamw_ema_(loaded, numbers)


def _row(name: str, step: Callable[[Lists], Any], **options: Any) -> None:
    register(Row("adamw_ema_", name, prepare=step, **options))


_row("cpu", _native_adamw.CPUStep, why_not=native_cpu_why_not, unfit=_unfit)
# not automatic before it has been measured against the reference on a GPU
_row("cuda", _native_adamw.CUDAStep, why_not=native_cuda_why_not, unfit=_unfit, automatic=False)
_row("reference", _ReferenceStep)


class Step:
    """Steps on checked lists, which stay as they are: `load(grads)` refuses what may be refused, `run(numbers)` does it.

    Gradients are at each step of the layout that they are of now; none is kept.
    """

    def __init__(self, lists: Lists) -> None:
        moved = [param for param, step in zip(lists.params, lists.steps, strict=True) if step.numel()]
        self._changed = [*moved, *lists.shadows, *lists.param_copies, *lists.shadow_copies]
        self._counted_elsewhere = counted_elsewhere(lists)
        self._parts: list[tuple[torch.device, list[int], Any]] = []
        for device, places, own in by_device(*lists):
            part = Lists(*own)
            step = choose("adamw_ema_", device, part).prepare(part._replace(grads=[]))
            self._parts.append((device, places, step))

    def load(self, grads: list[Tensor]) -> None:
        for _, places, step in self._parts:
            step.load(grads if len(places) == len(grads) else [grads[place] for place in places])

    def run(self, numbers: Numbers) -> None:
        if self._counted_elsewhere and (numbers.found_inf is not None or numbers.lrs):
            raise ValueError("steps must lie with their params where found_inf or lrs are given, got steps on the CPU")
        told = [numbers.on(device, places) for device, places, _ in self._parts]  # all, before the first is written
        for (_, _, step), its in zip(self._parts, told, strict=True):
            step.run(its)
        torch.autograd.graph.increment_version(self._changed)


def _update(*arguments: Any) -> None:
    lists, numbers = Lists(*arguments[:8]), Numbers(*arguments[8:])
    numbers = numbers._replace(momentum=momentum_value(numbers.momentum))
    check_lists(lists)
    check_numbers(lists, numbers)
    step = Step(lists)
    step.load(lists.grads)
    step.run(numbers)


def _fake(*arguments: Any) -> None:
    check_lists(Lists(*arguments[:8]))  # here, too: one tensor on the meta device is enough to come here


define(
    "adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] shadows, Tensor(f!)[] param_copies, Tensor(g!)[] shadow_copies, int[] group_sizes, float[] hyper, "
    "Tensor momentum, Tensor[] lrs, Tensor[] grad_factors, Tensor? found_inf) -> ()",
    _update,
    _fake,
)
