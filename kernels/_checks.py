"""Argument checks shared by the public functions: one sentence with the argument, what was expected and what came.

Checks of shapes and dtypes run in the public functions and trace under torch.compile. Checks of values run inside the
operators, on host tensors only, so that they also run in compiled code and never wait for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(value: object) -> str:
    """What came, for an error message: shape and dtype of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str | bool) else type(value).__name__


def check_tensor(name: str, value: object, shape: str, ndim: int, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise unless `value` is a tensor of `ndim` dimensions (spelled `shape` in the message) and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {describe(value)}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have the shape {shape}, got {describe(value)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {names}, got {describe(value)}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {describe(value)}")


def check_ids(name: str, ids: Tensor, limit: int, of: str) -> None:
    """Raise unless every id lies in 0..limit-1; ids on a device are not read (that would wait for it)."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    bounds = torch.aminmax(ids)
    smallest, largest = bounds[0].item(), bounds[1].item()
    if smallest < 0 or largest >= limit:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"{name} must be between 0 and {limit - 1} ({of}), got {wrong}")


def lengths_tensor(lengths: Sequence[int] | Tensor) -> Tensor:
    """Host lengths as the int64 CPU tensor that the operators take."""
    if isinstance(lengths, Tensor):
        return lengths if lengths.dtype == torch.int64 else lengths.to(torch.int64)
    return torch.tensor(lengths, dtype=torch.int64, device="cpu")  # whatever torch.set_default_device says


def check_lengths(name: str, lengths: object) -> None:
    """Raise unless `lengths` is a sequence of ints or a 1-D int tensor on the CPU."""
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu" or lengths.ndim != 1 or lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be ints or a 1-D int64 tensor on the CPU, got {describe(lengths)}")
    elif not isinstance(lengths, tuple | list):
        raise TypeError(f"{name} must be a tuple of ints or a 1-D int tensor on the CPU, got {describe(lengths)}")
    elif not torch.compiler.is_compiling():
        for number, length in enumerate(lengths):
            if not hasattr(length, "__index__"):
                raise TypeError(f"{name} must be ints, got {describe(length)} in entry {number}")


def check_offsets(cu_seqlens: Tensor, sets: int, total: int) -> None:
    """Raise unless there is one more offset than sets and, where they are on the host, they rise from 0 to `total`."""
    if cu_seqlens.shape[0] != sets + 1:
        raise ValueError(f"cu_seqlens must have {sets + 1} entries, one more than sets, got {cu_seqlens.shape[0]}")
    if cu_seqlens.device.type == "cpu":
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != total or offsets != sorted(offsets):
            raise ValueError(f"cu_seqlens must rise from 0 to the {total} tokens given, got {offsets}")


def check_sets(name: str, cu_seqlens: Tensor, lengths: Sequence[int] | Tensor, total: int) -> None:
    """Raise unless lengths are >= 0, sum to `total` and, where `cu_seqlens` is on the host, agree with it."""
    values = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if cu_seqlens.shape[0] != len(values) + 1:
        raise ValueError(
            f"{name}cu_seqlens must have {len(values) + 1} entries, one more than {name}lengths, "
            f"got {cu_seqlens.shape[0]}"
        )
    if min(values, default=0) < 0:
        raise ValueError(f"{name}lengths must not be negative, got {min(values)}")
    if sum(values) != total:
        raise ValueError(f"{name}lengths must sum to the {total} tokens given, got a sum of {sum(values)}")
    if cu_seqlens.device.type == "cpu" and cu_seqlens.tolist() != [0, *accumulate(values)]:
        raise ValueError(f"{name}cu_seqlens must be the running sum of {name}lengths, got {cu_seqlens.tolist()}")


def check_no_empty_set(name: str, lengths: Tensor) -> None:
    """Raise if a set has no token."""
    values = lengths.tolist()
    if not values:
        raise ValueError(f"{name} must have at least one set, got none")
    if min(values) < 1:
        raise ValueError(f"{name} must have no empty set, got 0 tokens in set {values.index(min(values))}")


def dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """What autocast, where it is on, makes of an argument of a matrix product; float64 it leaves alone."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):  # the meta device has none
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
