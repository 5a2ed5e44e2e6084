"""Lists of hundreds of tensors, which operators update in place: by device, by shard, in pairs, as they were.

Whole lists are compared where that is enough: a loop in Python over all tensors takes longer than to update some models.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._checks import describe
from ._native import device_of, dtype_of

PLAIN = {Tensor, nn.Parameter}  # types that are what they seem
layout_of = operator.attrgetter("layout")
bytes_of = operator.attrgetter("nbytes")
WIDE = (torch.float32, torch.float64)  # a step of an average or an optimizer vanishes in less


def by_device(*lists: list[Tensor]) -> Iterator[tuple[torch.device, list[int], tuple[list[Tensor], ...]]]:
    """Each device of the first list's tensors, their places, and of each list (or empty list) those at these places."""
    devices = list(map(device_of, lists[0]))
    for device in dict.fromkeys(devices):
        if devices.count(device) == len(devices):
            yield device, list(range(len(devices))), lists
        else:
            places = [place for place, its in enumerate(devices) if its == device]
            yield device, places, tuple([tensors[place] for place in places] if tensors else [] for tensors in lists)


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor (sharing its memory), any other tensor itself; no communication."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor is of a subclass such as DTensor."""
    return set(map(type, tensors)) <= PLAIN


def local_list(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    whole = list(tensors)
    if not torch.compiler.is_compiling() and plain(whole):
        return whole
    return [local(tensor) for tensor in whole]


def traced() -> bool:
    """Whether somebody records or replaces what operators do now, so that only operators may be called."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether these are the same tensor objects."""
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


def alike(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> bool:
    """Whether pairs have one shape and one device; both are plain tensors, as many."""
    return all(map(Tensor.is_same_size, firsts, seconds)) and (
        len(set(map(device_of, firsts)) | set(map(device_of, seconds))) < 2
        or list(map(device_of, firsts)) == list(map(device_of, seconds))
    )


def check_pairs(
    names: tuple[str, str],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    first_dtypes: tuple[torch.dtype, ...],
    places: Sequence[int] = (),
) -> None:
    """Raise unless both lists pair up in number, shape and device, and the first have one of the dtypes.

    places: where the caller has the pairs, for errors; by default one after the other.
    """
    if len(firsts) != len(seconds):
        raise ValueError(f"{names[1]} must have {len(firsts)} tensors like {names[0]}, got {len(seconds)}")
    if (  # of lists as they should be, and not in a trace: it knows little of map
        not torch.compiler.is_compiling()
        and plain(firsts)
        and plain(seconds)
        and set(map(dtype_of, firsts)) <= set(first_dtypes)
        and all(dtype.is_floating_point for dtype in set(map(dtype_of, seconds)))
        and set(map(layout_of, firsts)) | set(map(layout_of, seconds)) <= {torch.strided}
        and alike(firsts, seconds)
    ):
        return
    for number, first, second in zip(places or range(len(firsts)), firsts, seconds, strict=True):
        for name, tensor in zip(names, (first, second), strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{number}] must be a tensor, got {describe(tensor)}")
            if tensor.layout != torch.strided:
                raise TypeError(f"{name}[{number}] must be dense, got {describe(tensor)} in {tensor.layout}")
        if first.dtype not in first_dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in first_dtypes)
            raise TypeError(f"{names[0]}[{number}] must be {expected}, got {describe(first)}")
        if not second.is_floating_point():
            raise TypeError(f"{names[1]}[{number}] must be a floating tensor, got {describe(second)}")
        if second.shape != first.shape or second.device != first.device:
            raise ValueError(f"{names[1]}[{number}] must be {describe(first)} like {names[0]}, got {describe(second)}")


def shards_of(tensor: Tensor) -> object:
    """How a DTensor is spread over which processes, None for any other tensor."""
    return getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


def check_shards(
    names: tuple[str, str], firsts: Sequence[Tensor], seconds: Sequence[Tensor], entries: Sequence[str] = ()
) -> None:
    """Raise unless both tensors of each pair have the same shards on the same processes, or none has any."""
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        if shards_of(first) != shards_of(second):
            entry = f" of {entries[number]}" if entries else ""
            raise ValueError(f"{names[1]} must be sharded like {names[0]}, got another placement{entry}")


def layouts(tensors: Sequence[Tensor]) -> list[tuple[int, ...]] | None:
    """None of tensors that are all contiguous, otherwise the strides."""
    return None if all(map(Tensor.is_contiguous, tensors)) else list(map(Tensor.stride, tensors))


class Kept:
    """An update that was prepared for tensors, and what they were then.

    whole: tensors that others may give other memory, shapes or dtypes. places: those that nobody else changes but to
    move them or to free them, after which others may have their address.
    """

    def __init__(self, run: Any, whole: Sequence[Tensor], places: Sequence[Tensor] = ()) -> None:
        self.run = run
        self._whole, self._all = list(whole), [*whole, *places]
        self._seen = self._look()

    def _look(self) -> list[object]:
        of_all = [list(map(one, self._all)) for one in (Tensor.data_ptr, bytes_of)]
        return [*of_all, *(list(map(one, self._whole)) for one in (type, dtype_of)), layouts(self._whole)]

    def holds(self) -> bool:
        """Whether they are the same still."""
        return self._look() == self._seen
