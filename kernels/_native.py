"""The native library (csrc) behind ctypes: found and loaded on first use, never on import.

`libvjepa_native` has a C ABI and knows nothing of PyTorch, so one binary serves every version of it. The installer puts
it beside this file, with `native.json`, which says what was built and why anything was not.
"""

from __future__ import annotations

import ctypes
import functools
import json
import operator
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["NativeError", "available", "build_info", "cuda_available"]

ABI_VERSION = 2  # VJEPA_ABI_VERSION of csrc/capi.h
NO_COPY = -1
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COPY_DTYPES = (torch.bfloat16, torch.float16)
TABLES_KEPT = 16  # on the device: of an average, of an optimizer's groups, and of a few other networks
STATUS_CUDA = 9

LIBRARY_NAMES = ("libvjepa_native.so", "libvjepa_native.dylib", "vjepa_native.dll")


class NativeError(RuntimeError):
    """The native library refused a call; the message is its own sentence."""


class EMAEntry(ctypes.Structure):
    """`vjepa_ema_tensor` of csrc/capi.h."""

    _fields_ = [
        ("target", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("copy", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("source_dtype", ctypes.c_int64),
        ("copy_dtype", ctypes.c_int64),
    ]


class AdamWEntry(ctypes.Structure):
    """`vjepa_adamw_tensor` of csrc/capi.h."""

    _fields_ = [
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("shadow", ctypes.c_void_p),
        ("param_copy", ctypes.c_void_p),
        ("shadow_copy", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("grad_dtype", ctypes.c_int64),
        ("copy_dtype", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


class AdamWGroup(ctypes.Structure):
    """`vjepa_adamw_group` of csrc/capi.h."""

    _fields_ = [
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("step", ctypes.c_int64),
        ("lr_address", ctypes.c_void_p),
    ]


class AdamWScalars(ctypes.Structure):
    """`vjepa_adamw_scalars` of csrc/capi.h: addresses, of which each may be None."""

    _fields_ = [("grad_factor", ctypes.c_void_p), ("found_inf", ctypes.c_void_p), ("momentum", ctypes.c_void_p)]


class Chunk(ctypes.Structure):
    """`vjepa_chunk` of csrc/capi.h."""

    _fields_ = [
        ("tensor", ctypes.c_int64),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("packed", ctypes.c_int64),
    ]


@functools.cache
def _record() -> dict:
    """What the installer wrote: `{"library": name or null, "cpu": reason or null, "cuda": reason or null}`."""
    path = Path(__file__).with_name("native.json")
    if not path.exists():
        return {"library": None, "cpu": "the package was not installed (run `pip install -e .`)", "cuda": None}
    return json.loads(path.read_text())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason."""
    record = _record()
    folder = Path(__file__).parent
    path = next((folder / name for name in LIBRARY_NAMES if (folder / name).exists()), None)
    if path is None:
        return (
            None,
            f"the native library was not built: {record['cpu'] or 'its file is gone; install the package again'}",
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the native library does not load: {error}"
    library.vjepa_abi_version.restype = ctypes.c_int32
    found = library.vjepa_abi_version()
    if found != ABI_VERSION:
        return None, f"the native library has ABI {found}, expected {ABI_VERSION}; install the package again"
    entries, params, chunks = map(ctypes.POINTER, (EMAEntry, AdamWEntry, Chunk))
    groups, scalars = map(ctypes.POINTER, (AdamWGroup, AdamWScalars))
    i32, i64, f64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    prototypes = {
        "vjepa_build_info": (ctypes.c_char_p, []),
        "vjepa_status_string": (ctypes.c_char_p, [i32]),
        "vjepa_cuda_error": (ctypes.c_char_p, []),
        "vjepa_set_team": (i32, [pointer]),
        "vjepa_ema_cpu": (i32, [entries, i64, f64, i32]),
        "vjepa_ema_plan": (i32, [entries, i64, i64, chunks, i64, ctypes.POINTER(i64)]),
        "vjepa_ema_cuda": (i32, [pointer, pointer, i64, f64, pointer, i32, pointer]),
        "vjepa_ema_cuda_on_host": (i32, [entries, chunks, i64, f64, pointer]),
        "vjepa_adamw_cpu": (i32, [params, i64, groups, i64, scalars, f64, i32]),
        "vjepa_adamw_plan": (i32, [params, i64, i64, chunks, i64, ctypes.POINTER(i64)]),
        "vjepa_adamw_cuda": (i32, [pointer, pointer, i64, groups, i64, scalars, f64, i32, pointer]),
        "vjepa_adamw_cuda_on_host": (i32, [params, chunks, i64, groups, i64, scalars, f64]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.vjepa_set_team(openmp_team())
    if hasattr(os, "register_at_fork"):  # the threads of the runtime stay behind in the parent
        os.register_at_fork(after_in_child=functools.partial(library.vjepa_set_team, None))
    return library, ""


def openmp_team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch computes with, None if it has another interface."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # a library's handle searches what the library loaded
    except (AttributeError, OSError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def library() -> ctypes.CDLL:
    loaded, reason = _load()
    if loaded is None:
        raise NativeError(reason)
    return loaded


def available() -> tuple[bool, str]:
    """Whether the CPU part can serve, and if not, why, as a sentence."""
    loaded, reason = _load()
    return loaded is not None, reason


def cuda_available() -> tuple[bool, str]:
    """Whether the CUDA part was built and a GPU is there, and if not, why, as a sentence. Does not initialise CUDA."""
    loaded, reason = _load()
    if loaded is None:
        return False, reason
    if not build_info()["cuda"]:
        return False, f"the CUDA part was not built: {_record()['cuda'] or 'no reason was recorded'}"
    if not torch.cuda.is_available():
        return False, "PyTorch finds no CUDA device"
    return True, ""


def build_info() -> dict[str, str]:
    """Version, compiler, instruction sets, CUDA version and architectures of the library ("" for what is not there)."""
    return json.loads(library().vjepa_build_info())


def check(status: int) -> None:
    if status:
        sentence = library().vjepa_status_string(status).decode()
        detail = library().vjepa_cuda_error().decode() if status == STATUS_CUDA else ""
        raise NativeError(f"{sentence}: {detail}" if detail else sentence)


dtype_of, device_of = map(operator.attrgetter, ("dtype", "device"))


def walkable(tensors: Sequence[Tensor], dtypes: Iterable[torch.dtype]) -> bool:
    """Whether all are contiguous and of one of the dtypes."""
    return set(map(dtype_of, tensors)) <= set(dtypes) and all(map(Tensor.is_contiguous, tensors))


def check_lists(
    device_type: str, named: Mapping[str, tuple[Sequence[Tensor], Sequence[torch.dtype]]], walked: bool = False
) -> None:
    """Raise unless all lists pair up in number, elements and device with the first, with dtypes of their own, contiguous.

    The library sees only addresses. Whole lists are compared first: a step calls this for hundreds of tensors.
    `walked`: the caller knows that they are `walkable`.
    """
    (first_name, (first, _)), *_ = named.items()
    numels, devices = list(map(Tensor.numel, first)), set(map(device_of, first))
    one_device = len(devices) == 1 and devices.copy().pop().type == device_type
    for name, (tensors, dtypes) in named.items():
        if len(tensors) != len(first):
            raise ValueError(f"{name}: expected {len(first)} tensors, one for each of {first_name}, got {len(tensors)}")
        if (
            one_device
            and (walked or walkable(tensors, dtypes))
            and (tensors is first or list(map(Tensor.numel, tensors)) == numels)
            and (tensors is first or set(map(device_of, tensors)) == devices)
        ):
            continue
        for k, tensor in enumerate(tensors):
            if tensor.dtype not in dtypes:
                expected = " or ".join(str(dtype) for dtype in dtypes)
                raise TypeError(f"{name}[{k}]: expected dtype {expected}, got {tensor.dtype}")
            if tensor.numel() != numels[k]:
                raise ValueError(f"{name}[{k}]: expected shape {tuple(first[k].shape)}, got {tuple(tensor.shape)}")
            if tensor.device.type != device_type or tensor.device != first[k].device:
                wanted = first[k].device if first[k].device.type == device_type else device_type
                raise ValueError(f"{name}[{k}]: expected device {wanted}, got {tensor.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{k}]: expected a contiguous tensor, got strides {tensor.stride()}")


def addresses(tensors: Sequence[Tensor]) -> Iterable[int]:
    return map(Tensor.data_ptr, tensors)


def table_of(entry: type[ctypes.Structure], *columns: Iterable[int]) -> ctypes.Array:
    """Rows of 64-bit words as an array of `entry`, which has as many fields as there are columns."""
    words = array("q", chain.from_iterable(zip(*columns, strict=True)))
    count = len(words) * words.itemsize // ctypes.sizeof(entry)
    return (entry * count).from_buffer(words) if count else (entry * 0)()


def plan(function: Callable[..., int], table: ctypes.Array, chunk_elements: int) -> ctypes.Array[Chunk]:
    """The chunks of a CUDA kernel's grid, one for each block, by the library's `function`."""
    count = ctypes.c_int64()
    check(function(table, len(table), chunk_elements, None, 0, ctypes.byref(count)))
    chunks = (Chunk * count.value)()
    check(function(table, len(table), chunk_elements, chunks, len(chunks), ctypes.byref(count)))
    return chunks


class DeviceTable:
    """A table of tensors and its chunks in the memory of one CUDA device."""

    def __init__(self, table: ctypes.Array, chunks: ctypes.Array[Chunk], device: torch.device) -> None:
        self.num_chunks = len(chunks)
        self._words = [torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device) for part in (table, chunks)]
        self.arguments = (*map(Tensor.data_ptr, self._words), self.num_chunks)

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until what `stream` was given so far is done, even if the table is dropped."""
        for words in self._words:
            words.record_stream(stream)


# by content: a table is addresses and sizes, right for whatever tensors have these
_device_tables: OrderedDict[tuple[torch.device, bytes], DeviceTable] = OrderedDict()
_captured: set[DeviceTable] = set()  # CUDA graphs hold their addresses, and nothing says when a graph is gone


def launch(
    table: ctypes.Array,
    device: torch.device,
    plan_table: Callable[[ctypes.Array], ctypes.Array[Chunk]],
    function: Callable[..., int],
    *arguments: Any,
) -> None:
    """function(tensors, chunks, num_chunks, *arguments, device, stream) on the current stream of `device`.

    The table goes to the device the first time it is seen, which waits for the copy; not while a CUDA graph is captured.
    """
    key = (device, bytes(table))
    known = _device_tables.get(key)
    if known is None:
        chunks = plan_table(table)
        if not len(chunks):
            return
        known = _device_tables[key] = DeviceTable(table, chunks, device)
    _device_tables.move_to_end(key)
    while len(_device_tables) > TABLES_KEPT:
        _device_tables.popitem(last=False)
    stream = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():
        _captured.add(known)
    else:
        known.used_on(stream)
    check(function(*known.arguments, *arguments, device.index, stream.cuda_stream))
