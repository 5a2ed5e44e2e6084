"""ema_update_ and EMA: the exponential moving average of a network's weights.

    t <- m t + (1 - m) s      for every target t and its source s, computed as t + (1 - m)(s - t)

12 bytes and 3 FLOP for a float32 weight (read t and s, write t), 2 more bytes for a bfloat16 copy: memory-bound.
Targets are float32: with m near 1 the update is below half a unit in the last place of bfloat16 and would vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from . import _native, _native_ema
from . import _reference_optimizer as reference
from ._checks import describe
from ._dispatch import Row, choose, define, register
from ._native import device_of, dtype_of

COPY_DTYPES = (torch.bfloat16, torch.float16)
PLAIN = {Tensor, nn.Parameter}  # types whose lists are checked as wholes: a step has hundreds of tensors


def _native_cpu(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float) -> None:
    _native_ema.ema_update_cpu(targets, sources, momentum, copies or None, walked=True)


def _native_cuda(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float | Tensor) -> None:
    _native_ema.ema_update_cuda(targets, sources, momentum, copies or None, walked=True)


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


def native_unfit(*lists: list[Tensor]) -> str | None:
    """Why the native library cannot walk tensors of these lists, or None."""
    for tensors in lists:
        if not _native.walkable(tensors, _native.DTYPE_CODES):
            wrong = (tensor for tensor in tensors if not _native.walkable([tensor], _native.DTYPE_CODES))
            return f"it needs contiguous tensors of at most 32 bits, got {describe(next(wrong))}"
    return None


def _native_unfit(
    targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float | Tensor
) -> str | None:
    return native_unfit(targets, sources, copies)  # the dtypes of targets and copies are the operator's own


register(Row("ema_update_", "cpu", _native_cpu, why_not=native_cpu_why_not, unfit=_native_unfit))
# not automatic before it has been measured against the reference on a GPU
register(Row("ema_update_", "cuda", _native_cuda, why_not=native_cuda_why_not, unfit=_native_unfit, automatic=False))
register(Row("ema_update_", "reference", reference.ema_update_))


def by_device(*lists: list[Tensor]) -> Iterator[tuple[torch.device, tuple[list[Tensor], ...]]]:
    """Each device of the first list's tensors, and of each list (or empty list) those at their places."""
    devices = list(map(device_of, lists[0]))
    for device in dict.fromkeys(devices):
        if devices.count(device) == len(devices):
            yield device, lists
        else:
            places = [place for place, its in enumerate(devices) if its == device]
            yield device, tuple([tensors[place] for place in places] if tensors else [] for tensors in lists)


def _update(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    share = momentum if momentum.device.type != "cpu" else check_momentum(momentum.item())
    if isinstance(share, Tensor) and set(map(device_of, targets)) - {share.device}:
        raise ValueError(f"momentum must be on the device of all targets or on the CPU, got {describe(share)}")
    for device, lists in by_device(targets, sources, copies):
        choose("ema_update_", device, *lists, share).forward(*lists, share)
    torch.autograd.graph.increment_version([*targets, *copies])


def _fake(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    return None


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


def check_pairs(
    names: tuple[str, str], firsts: Sequence[Tensor], seconds: Sequence[Tensor], first_dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise unless both lists pair up in number, shape and device, and the first have one of the dtypes."""
    if len(firsts) != len(seconds):
        raise ValueError(f"{names[1]} must have {len(firsts)} tensors like {names[0]}, got {len(seconds)}")
    if (  # of lists as they should be, and not in a trace: it knows little of map
        not torch.compiler.is_compiling()
        and set(map(type, firsts)) | set(map(type, seconds)) <= PLAIN
        and set(map(dtype_of, firsts)) <= set(first_dtypes)
        and all(map(Tensor.is_floating_point, seconds))
        and all(map(Tensor.is_same_size, firsts, seconds))
        and list(map(device_of, firsts)) == list(map(device_of, seconds))
    ):
        return
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        for name, tensor in zip(names, (first, second), strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{number}] must be a tensor, got {describe(tensor)}")
        if first.dtype not in first_dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in first_dtypes)
            raise TypeError(f"{names[0]}[{number}] must be {expected}, got {describe(first)}")
        if not second.is_floating_point():
            raise TypeError(f"{names[1]}[{number}] must be a floating tensor, got {describe(second)}")
        if second.shape != first.shape or second.device != first.device:
            raise ValueError(f"{names[1]}[{number}] must be {describe(first)} like {names[0]}, got {describe(second)}")


def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """t <- momentum * t + (1 - momentum) * s for all tensors, in place, without autograd.

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
    check_pairs(("targets", "sources"), targets, sources, (torch.float32, torch.float64))
    with torch.no_grad():
        torch.ops.vjepa.ema_update_(targets, sources, [], share)


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor (sharing its memory), any other tensor itself; no communication."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def local_list(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    whole = list(tensors)
    if not torch.compiler.is_compiling() and set(map(type, whole)) <= PLAIN:
        return whole
    return [local(tensor) for tensor in whole]


class EMA:
    """Keeps `target_module` the exponential moving average of `source_module`; the pairs are found once, here.

    Parameters are paired by name; one shared between names (tied) is updated once. Buffers are left alone: they are
    constants, such as position tables. DTensor parameters are updated shard by shard, without communication.

    Args:
        target_module: parameters float32; the module that follows.
        source_module: same parameter names, shapes, devices and sharding.
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
        self._targets: list[Tensor] = list(targets.values())
        self._sources: list[Tensor] = [sources[name] for name in targets]
        for name, target, source in zip(targets, self._targets, self._sources, strict=True):
            if getattr(target, "placements", None) != getattr(source, "placements", None):
                raise ValueError(f"source_module must be sharded like target_module, got another placement of {name}")
        check_pairs(
            ("target_module", "source_module"),
            local_list(self._targets),
            local_list(self._sources),
            (torch.float32, torch.float64),
        )
        self.copies: dict[str, Tensor] = {}
        if copies is not None:
            self.copies = {name: local(target).detach().to(copies) for name, target in targets.items()}

    def update(self, momentum: float | Tensor) -> None:
        """t <- momentum * t + (1 - momentum) * s for every parameter, and the copies, in one pass for each device."""
        share = momentum_tensor(momentum)
        with torch.no_grad():
            torch.ops.vjepa.ema_update_(
                local_list(self._targets),
                local_list(self._sources),
                list(self.copies.values()),
                share,
            )
