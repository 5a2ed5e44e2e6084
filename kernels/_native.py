"""The native library (csrc) behind ctypes: found and loaded on first use, never on import.

`libvjepa_native` has a C ABI and knows nothing of PyTorch, so one binary serves every version of it. The installer puts
it beside this file, with `native.json`, which says what was built and why anything was not.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "EMATable",
    "NativeError",
    "available",
    "build_info",
    "cuda_available",
    "ema_update_cpu",
    "ema_update_cuda",
]

ABI_VERSION = 1  # VJEPA_ABI_VERSION of csrc/capi.h
CHUNK_ELEMENTS = 1 << 16  # per CUDA block: 0.75 MB of traffic, several hundred blocks for the smallest ViT
NO_COPY = -1
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COPY_DTYPES = (torch.bfloat16, torch.float16)
STATUS_CUDA = 9

LIBRARY_NAMES = ("libvjepa_native.so", "libvjepa_native.dylib", "vjepa_native.dll")


class NativeError(RuntimeError):
    """The native library refused a call; the message is its own sentence."""


class TensorEntry(ctypes.Structure):
    """`vjepa_ema_tensor` of csrc/capi.h."""

    _fields_ = [
        ("target", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("copy", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("source_dtype", ctypes.c_int32),
        ("copy_dtype", ctypes.c_int32),
    ]


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
    entries, chunks = ctypes.POINTER(TensorEntry), ctypes.POINTER(Chunk)
    i32, i64, f64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    prototypes = {
        "vjepa_build_info": (ctypes.c_char_p, []),
        "vjepa_status_string": (ctypes.c_char_p, [i32]),
        "vjepa_cuda_error": (ctypes.c_char_p, []),
        "vjepa_ema_cpu": (i32, [entries, i64, f64, i32]),
        "vjepa_ema_plan": (i32, [entries, i64, i64, chunks, i64, ctypes.POINTER(i64)]),
        "vjepa_ema_cuda": (i32, [pointer, pointer, i64, f64, i32, pointer]),
        "vjepa_ema_cuda_on_host": (i32, [entries, chunks, i64, f64]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise NativeError(reason)
    return library


def available() -> tuple[bool, str]:
    """Whether the CPU part can serve, and if not, why, as a sentence."""
    library, reason = _load()
    return library is not None, reason


def cuda_available() -> tuple[bool, str]:
    """Whether the CUDA part was built and a GPU is there, and if not, why, as a sentence. Does not initialise CUDA."""
    library, reason = _load()
    if library is None:
        return False, reason
    if not build_info()["cuda"]:
        return False, f"the CUDA part was not built: {_record()['cuda'] or 'no reason was recorded'}"
    if not torch.cuda.is_available():
        return False, "PyTorch finds no CUDA device"
    return True, ""


def build_info() -> dict[str, str]:
    """Version, compiler, instruction sets, CUDA version and architectures of the library ("" for what is not there)."""
    return json.loads(_library().vjepa_build_info())


def _check(status: int) -> None:
    if status:
        library = _library()
        sentence = library.vjepa_status_string(status).decode()
        detail = library.vjepa_cuda_error().decode() if status == STATUS_CUDA else ""
        raise NativeError(f"{sentence}: {detail}" if detail else sentence)


def _entries(
    targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] | None, device_type: str
) -> ctypes.Array[TensorEntry]:
    """The table of the update; every tensor is checked here, because the library sees only addresses."""
    if len(sources) != len(targets):
        raise ValueError(f"sources: expected {len(targets)} tensors, one for each target, got {len(sources)}")
    if copies is not None and len(copies) != len(targets):
        raise ValueError(f"copies: expected {len(targets)} tensors, one for each target, got {len(copies)}")
    table = (TensorEntry * len(targets))()
    for k, (target, source) in enumerate(zip(targets, sources, strict=True)):
        copy = None if copies is None else copies[k]
        named = {"targets": (target, (torch.float32,)), "sources": (source, tuple(DTYPE_CODES))}
        if copy is not None:
            named["copies"] = (copy, COPY_DTYPES)
        for name, (tensor, dtypes) in named.items():
            if tensor.dtype not in dtypes:
                expected = " or ".join(str(dtype) for dtype in dtypes)
                raise TypeError(f"{name}[{k}]: expected dtype {expected}, got {tensor.dtype}")
            if tensor.shape != target.shape:
                raise ValueError(f"{name}[{k}]: expected shape {tuple(target.shape)}, got {tuple(tensor.shape)}")
            if tensor.device.type != device_type or tensor.device != target.device:
                wanted = target.device if target.device.type == device_type else device_type
                raise ValueError(f"{name}[{k}]: expected device {wanted}, got {tensor.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{k}]: expected a contiguous tensor, got strides {tensor.stride()}")
        table[k] = TensorEntry(
            target.data_ptr(),
            source.data_ptr(),
            None if copy is None else copy.data_ptr(),
            target.numel(),
            DTYPE_CODES[source.dtype],
            NO_COPY if copy is None else DTYPE_CODES[copy.dtype],
        )
    return table


def _plan(table: ctypes.Array[TensorEntry], chunk_elements: int = CHUNK_ELEMENTS) -> ctypes.Array[Chunk]:
    """The chunks of the CUDA kernel's grid, one for each block."""
    library = _library()
    count = ctypes.c_int64()
    _check(library.vjepa_ema_plan(table, len(table), chunk_elements, None, 0, ctypes.byref(count)))
    chunks = (Chunk * count.value)()
    _check(library.vjepa_ema_plan(table, len(table), chunk_elements, chunks, len(chunks), ctypes.byref(count)))
    return chunks


def ema_update_cpu(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor] | None = None,
    threads: int | None = None,
) -> None:
    """t <- momentum * t + (1 - momentum) * s, in place, for all tensors in one threaded pass on the CPU.

    targets: contiguous float32 CPU tensors. sources: same shapes, contiguous, float32, bfloat16 or float16.
    copies: same shapes, bfloat16 or float16; they receive the new targets rounded to nearest even, in the same pass.
    threads: at most so many (default: `torch.get_num_threads()`); the result does not depend on it.
    Raises ValueError or TypeError on unfit tensors, NativeError on a momentum outside [0, 1] or without the library.
    """
    table = _entries(targets, sources, copies, "cpu")
    threads = torch.get_num_threads() if threads is None else threads
    _check(_library().vjepa_ema_cpu(table, len(table), momentum, threads))


class EMATable:
    """The tables of a CUDA EMA update, built once and kept on the device; the tensors must stay where they are.

    All tensors contiguous on one CUDA device; dtypes as for `ema_update_cpu`.
    """

    def __init__(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] | None = None
    ) -> None:
        table = _entries(targets, sources, copies, "cuda")
        devices = {target.device for target in targets}
        if len(devices) > 1:
            raise ValueError(f"targets: expected one device, got {sorted(map(str, devices))}")
        chunks = _plan(table)
        self.num_chunks = len(chunks)
        self.device = devices.pop() if devices else None
        # The addresses in the tables are only as good as the tensors behind them.
        self._tensors = (list(targets), list(sources), None if copies is None else list(copies))
        if self.num_chunks:
            self._table = torch.frombuffer(bytearray(table), dtype=torch.uint8).to(self.device)
            self._chunks = torch.frombuffer(bytearray(chunks), dtype=torch.uint8).to(self.device)

    def update(self, momentum: float) -> None:
        """One launch on the current stream of the tensors' device; asynchronous."""
        if self.device is None or not self.num_chunks:
            return
        stream = torch.cuda.current_stream(self.device).cuda_stream
        device = self.device.index
        table, chunks = self._table.data_ptr(), self._chunks.data_ptr()
        _check(_library().vjepa_ema_cuda(table, chunks, self.num_chunks, momentum, device, stream))


def ema_update_cuda(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """`ema_update_cpu` on one CUDA device, in one launch. To update the same tensors again, keep an `EMATable`."""
    EMATable(targets, sources, copies).update(momentum)
