"""ema_update_ and EMA: the exponential moving average of a network's weights.

    t <- m t + (1 - m) s      for every target t and its source s, computed as t + (1 - m)(s - t)

12 bytes and 3 FLOP for a float32 weight (read t and s, write t), 2 more bytes for a bfloat16 copy: memory-bound.
Targets are float32: with m near 1 the update is below half a unit in the last place of bfloat16 and would vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _native, _native_ema
from . import _reference_optimizer as reference
from ._apart import check_apart
from ._checks import describe
from ._dispatch import Row, choose, define, register, requested, without_autocast
from ._native import COPY_DTYPES, device_of, dtype_of
from ._tensor_lists import (
    WIDE,
    Kept,
    by_device,
    check_pairs,
    check_shards,
    local,
    local_list,
    plain,
    same,
    traced,
)


def native_cpu_why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it serves tensors on the CPU"
    ok, reason = _native.available()
    return None if ok else reason


def native_cuda_why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it serves tensors on a CUDA device"
    ok, reason = _native.cuda_available()
    return None if ok else reason


def _native_unfit(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor]) -> str | None:
    for name, tensors in (("targets", targets), ("sources", sources)):
        dtypes = {torch.float32: 0} if tensors is targets else _native.DTYPE_CODES
        if not set(map(dtype_of, tensors)) <= set(dtypes):
            wrong = next(tensor for tensor in tensors if tensor.dtype not in dtypes)
            return f"it needs tensors of at most 32 bits in {name}, got {describe(wrong)}"
    return _native.unwalkable({"targets": targets, "sources": sources, "copies": copies})


_cpu, _cuda = _native_ema.CPUUpdate, _native_ema.CUDAUpdate
register(Row("ema_update_", "cpu", why_not=native_cpu_why_not, unfit=_native_unfit, prepare=_cpu))
# not automatic before it has been measured against the reference on a GPU
register(Row("ema_update_", "cuda", why_not=native_cuda_why_not, unfit=_native_unfit, automatic=False, prepare=_cuda))


def _reference(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor]) -> Callable[[float | Tensor], None]:
    check_apart({"targets": targets, "copies": copies}, {"sources": sources})
    return partial(reference.ema_update_, targets, sources, copies)


register(Row("ema_update_", "reference", prepare=_reference))


def prepare(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor]) -> Callable[[float | Tensor], None]:
    """update(momentum) of checked tensors of any devices; all that may be refused is refused before it."""
    updates = [
        choose("ema_update_", device, *lists).prepare(*lists)
        for device, _, lists in by_device(targets, sources, copies)
    ]

    def update(momentum: float | Tensor) -> None:
        for one in updates:
            one(momentum)
        torch.autograd.graph.increment_version([*targets, *copies])

    return update


def _check(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor]) -> None:
    check_pairs(("targets", "sources"), targets, sources, WIDE)
    if copies:
        check_pairs(("targets", "copies"), targets, copies, WIDE)


def _update(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    share = momentum_value(momentum)
    _check(targets, sources, copies)
    check_momentum_device(share, targets)
    prepare(targets, sources, copies)(share)


def _fake(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    _check(targets, sources, copies)  # here, too: one tensor on the meta device is enough to come here


define(
    "ema_update_",
    "(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] copies, Tensor momentum) -> ()",
    _update,
    _fake,
)


def check_momentum(momentum: float) -> float:
    """`momentum` as a float, or an error unless it lies in 0..1."""
    if not isinstance(momentum, int | float):
        raise TypeError(f"momentum must be a number, got {describe(momentum)}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
    return float(momentum)


def momentum_tensor(momentum: float | Tensor) -> Tensor:
    """`momentum` as the 0-d tensor that the operator takes, which checks the value of one on the CPU."""
    if not isinstance(momentum, Tensor):
        return torch.tensor(check_momentum(momentum), dtype=torch.float64, device="cpu")
    if momentum.ndim or (momentum.device.type != "cpu" and momentum.dtype != torch.float64):
        raise ValueError(
            f"momentum must be a number, a 0-d tensor on the CPU or a 0-d float64 tensor on a device, "
            f"got {describe(momentum)}"
        )
    return momentum


def momentum_value(momentum: float | Tensor) -> float | Tensor:
    """`momentum` as a float in 0..1, or as the tensor on a device that it is, or an error."""
    if not isinstance(momentum, Tensor):
        return check_momentum(momentum)
    checked = momentum_tensor(momentum)
    return check_momentum(checked.item()) if checked.device.type == "cpu" else checked


def check_momentum_device(momentum: float | Tensor, targets: Sequence[Tensor]) -> None:
    """Raise unless a momentum that nobody may wait for is where it is needed."""
    if isinstance(momentum, Tensor) and set(map(device_of, targets)) - {momentum.device}:
        raise ValueError(f"momentum must be on the device of all targets or on the CPU, got {describe(momentum)}")


def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """t <- momentum * t + (1 - momentum) * s for all tensors, in place, without autograd; of DTensors shard by shard.

    Args:
        targets: list (or another iterable, such as `module.parameters()`) of float32 or float64 tensors; each memory
            once.
        sources: as many tensors of the same shapes on the same devices, any floating dtype.
        momentum: m, 0 <= m <= 1; a 0-d CPU tensor is taken too, on whose value torch.compile does not specialise, and a
            0-d float64 tensor on the device of all targets, which a CUDA graph reads anew and whose range is not checked.

    Raises:
        TypeError: a target of lower precision (the update would round away), something that is no tensor.
        ValueError: lists, shapes or devices that do not pair up, momentum outside 0..1. Nothing is changed then.
    """
    for name, tensors in (("targets", targets), ("sources", sources)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
            raise TypeError(f"{name} must be a list of tensors, got {describe(tensors)}")
    targets, sources = list(targets), list(sources)
    share = momentum_tensor(momentum)
    if torch.compiler.is_compiling() or not (plain(targets) and plain(sources)):  # else the operator checks them
        check_pairs(("targets", "sources"), targets, sources, WIDE)
        check_shards(("targets", "sources"), targets, sources)
        targets, sources = local_list(targets), local_list(sources)
    with torch.no_grad():
        torch.ops.vjepa.ema_update_(targets, sources, [], share)


class EMA:
    """Keeps `target_module` the exponential moving average of `source_module`; the pairs are found once, here.

    Parameters are paired by name; one shared between names (tied) is updated once. Buffers are left alone: they are
    constants, such as position tables. DTensor parameters are updated shard by shard, without communication.

    Args:
        target_module: parameters float32; the module that follows.
        source_module: same parameter names, shapes, devices and sharding; what is tied in the target is tied here.
        copies: bfloat16 or float16: keep a copy of each target in this dtype, written in the same pass;
            `.copies` maps parameter names to them.

    Raises:
        TypeError: targets of lower precision, another `copies`.
        ValueError: names, shapes, devices or shardings that differ.
    """

    def __init__(self, target_module: nn.Module, source_module: nn.Module, copies: torch.dtype | None = None) -> None:
        for name, module in (("target_module", target_module), ("source_module", source_module)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {describe(module)}")
        if copies is not None and copies not in COPY_DTYPES:
            raise TypeError(f"copies must be torch.bfloat16, torch.float16 or None, got {copies}")
        targets = dict(target_module.named_parameters())  # a tied parameter has its first name only
        sources = dict(source_module.named_parameters(remove_duplicate=False))
        untied = dict(target_module.named_parameters(remove_duplicate=False))
        if set(untied) != set(sources):
            differing = sorted(set(untied) ^ set(sources))
            raise ValueError(
                f"source_module must have the parameter names of target_module, got a difference in {differing}"
            )
        first = {target: name for name, target in targets.items()}
        for name, target in untied.items():
            if sources[name] is not sources[first[target]]:
                raise ValueError(
                    f"source_module must tie parameters like target_module, got {name} apart from {first[target]}"
                )
        self._targets: list[Tensor] = list(targets.values())
        self._sources: list[Tensor] = [sources[name] for name in targets]
        check_shards(("target_module", "source_module"), self._targets, self._sources, list(targets))
        check_pairs(
            ("target_module", "source_module"),
            local_list(self._targets),
            local_list(self._sources),
            WIDE,
        )
        self._kept: dict[str, tuple[Kept, list[Tensor]]] = {}  # by the backend asked for
        self.copies: dict[str, Tensor] = {}
        if copies is not None:
            self.copies = {name: local(target).detach().to(copies) for name, target in targets.items()}

    def update(self, momentum: float | Tensor) -> None:
        """t <- momentum * t + (1 - momentum) * s for every parameter, and the copies, in one pass for each device."""
        copies = list(self.copies.values())
        with torch.no_grad():
            if traced() or not (plain(self._targets) and plain(self._sources)):
                lists = (local_list(self._targets), local_list(self._sources), copies)
                torch.ops.vjepa.ema_update_(*lists, momentum_tensor(momentum))
                return
            share = momentum_value(momentum)
            check_momentum_device(share, self._targets)
            asked = requested()
            kept, its_copies = self._kept.pop(asked, (None, copies))
            if kept is None or not (kept.holds() and same(copies, its_copies)):
                check_pairs(("target_module", "source_module"), self._targets, self._sources, WIDE)
                check_pairs(("target_module", "copies"), self._targets if copies else [], copies, WIDE)
                lists = (self._targets, self._sources, copies)
                kept = Kept(prepare(*lists), [tensor for tensors in lists for tensor in tensors])
            self._kept[asked] = kept, copies
            without_autocast(kept.run, share)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # addresses are good in this process alone
