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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["NativeError", "available", "build_info", "cuda_available"]

ABI_VERSION = 5  # VJEPA_ABI_VERSION of csrc/capi.h
NO_COPY = -1
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COPY_DTYPES = (torch.bfloat16, torch.float16)
STATUS_CUDA = 8
STATUS_OVERLAP = 9

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
        ("grad_factor", ctypes.c_void_p),
    ]


class AdamWScalars(ctypes.Structure):
    """`vjepa_adamw_scalars` of csrc/capi.h: addresses, of which each may be None."""

    _fields_ = [("found_inf", ctypes.c_void_p), ("momentum", ctypes.c_void_p)]


class NormEntry(ctypes.Structure):
    """`vjepa_norm_tensor` of csrc/capi.h."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


class Matrix(ctypes.Structure):
    """`vjepa_matrix` of csrc/capi_block.h."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int64)]


class Grid(ctypes.Structure):
    """`vjepa_grid` of csrc/capi.h."""

    _fields_ = [
        ("first_chunks", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
        ("elements", ctypes.c_int64),
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
    entries, params, grid = map(ctypes.POINTER, (EMAEntry, AdamWEntry, Grid))
    groups, scalars = map(ctypes.POINTER, (AdamWGroup, AdamWScalars))
    i32, i64, f64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    prototypes = {
        "vjepa_build_info": (ctypes.c_char_p, []),
        "vjepa_status_string": (ctypes.c_char_p, [i32]),
        "vjepa_cuda_error": (ctypes.c_char_p, []),
        "vjepa_set_team": (i32, [pointer]),
        "vjepa_ema_cpu": (i32, [entries, i64, f64, i32]),
        "vjepa_ema_check": (i32, [entries, i64]),
        "vjepa_ema_cuda": (i32, [pointer, grid, f64, pointer, i32, pointer]),
        "vjepa_ema_cuda_on_host": (i32, [pointer, grid, f64, pointer]),
        "vjepa_adamw_cpu": (i32, [params, i64, groups, i64, scalars, f64, i32]),
        "vjepa_adamw_check": (i32, [params, i64]),
        "vjepa_adamw_cuda": (i32, [pointer, grid, groups, i64, scalars, f64, i32, pointer]),
        "vjepa_adamw_cuda_on_host": (i32, [pointer, grid, groups, i64, scalars, f64]),
        "vjepa_write_cuda": (i32, [pointer, pointer, i64, i32, pointer]),
        "vjepa_write_cuda_on_host": (i32, [pointer, pointer, i64]),
    }
    norms, i64s = ctypes.POINTER(NormEntry), ctypes.POINTER(i64)
    prototypes |= {
        "vjepa_norms_check": (i32, [norms, i64, i64]),
        "vjepa_norms_cpu": (i32, [norms, i64, i64, pointer, i32]),
        "vjepa_norms_cuda": (i32, [pointer, grid, i64s, i64, pointer, pointer, i32, pointer]),
        "vjepa_norms_cuda_on_host": (i32, [pointer, grid, i64s, i64, pointer, pointer]),
    }
    matrix = ctypes.POINTER(Matrix)
    prototypes |= {
        "vjepa_gelu_cpu": (i32, [pointer, i64, i32, pointer, pointer, i32]),
        "vjepa_gelu_backward_cpu": (i32, [pointer, pointer, i64, i64, i64, i32, pointer, pointer, pointer, i32]),
        "vjepa_column_sums_cpu": (i32, [pointer, i64, i64, i64, i32, pointer, i32]),
        "vjepa_layer_norm_cpu": (
            i32,
            [matrix] * 2 + [pointer] * 2 + [i64, i64, f64, pointer, pointer, i32, pointer, i32],
        ),
        "vjepa_layer_norm_backward_cpu": (
            i32,
            [matrix] * 3 + [pointer] * 2 + [i64, i64, pointer, pointer, i32, pointer, pointer, i32],
        ),
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


def one_run(tensor: Tensor) -> bool:
    """Whether the elements of `tensor` fill one run of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def unwalkable(lists: Mapping[str, Sequence[Tensor]]) -> str | None:
    """Why the library, which walks runs of memory, cannot walk what is at the same place of all lists, or None.

    Empty tensors stand for what is not there; so do empty lists.
    """
    given = {name: tensors for name, tensors in lists.items() if tensors}
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in given.values()):
        return None
    for k, place in enumerate(zip(*given.values(), strict=True)):
        there = [(name, tensor) for name, tensor in zip(given, place, strict=True) if tensor.numel()]
        for name, tensor in there:
            if tensor.is_contiguous() and there[0][1].is_contiguous():
                continue
            if not one_run(tensor) or tensor.stride() != there[0][1].stride():
                return (
                    f"it walks tensors as one run of memory, all in the same order, "
                    f"got {name}[{k}] of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
    return None


def addresses(tensors: Sequence[Tensor]) -> Iterable[int]:
    return map(Tensor.data_ptr, tensors)


def codes_of(tensors: Sequence[Tensor]) -> list[int]:
    """The library's names of their dtypes."""
    dtypes = list(map(dtype_of, tensors))
    if len(set(dtypes)) == 1:
        return [DTYPE_CODES[dtypes[0]]] * len(dtypes)
    return [DTYPE_CODES[dtype] for dtype in dtypes]


def words_of(count: int, *columns: Iterable[int]) -> array[int]:
    """The `count` rows of a table, word after word."""
    words = array("q", bytes(8 * count * len(columns)))
    for place, column in enumerate(columns):
        words[place :: len(columns)] = array("q", column)
    return words


def table_of(entry: type[ctypes.Structure], words: array[int]) -> ctypes.Array:
    """Rows of 64-bit words as an array of `entry`, which shares their memory."""
    count = len(words) * words.itemsize // ctypes.sizeof(entry)
    return (entry * count).from_buffer(words) if count else (entry * 0)()
