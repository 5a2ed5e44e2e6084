"""Triton as an option: where it can run, how its kernels are found, launched and listed for compilation ahead of time.

Nothing here imports Triton before a kernel is wanted: the kernels of an op live in `_triton_<op>.py`, whose functions
:func:`row` imports at their first call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Row

INTERPRETER = "TRITON_INTERPRET"  # set to 1 before the first kernel: NumPy runs the kernels, on CPU tensors
OLDEST = (8, 0)  # compute capability: bfloat16 matrix instructions
# Options of every launch. A product and a sum are rounded once: Triton 3.9 warns unless that is said, 3.10 changes its mind.
LAUNCH = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, as Triton itself decides it."""
    return os.environ.get(INTERPRETER, "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; it is not imported."""
    return find_spec("triton") is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot serve tensors on `device`, with the remedy, or None."""
    if not installed():
        return "Triton is not installed; get it with: pip install triton (Linux; CUDA builds of torch bring it)"
    if device.type == "cuda":
        if interpreted():
            return f"{INTERPRETER}=1 is set, under which kernels serve CPU tensors only; unset it"
        found = capability(device)
        if found < OLDEST:
            return f"{device} has compute capability {found[0]}.{found[1]}; 8.0 or newer is needed"
        return None
    if device.type == "cpu":
        return None if interpreted() else f"Triton serves CPU tensors only under its interpreter: set {INTERPRETER}=1"
    return f"it serves CUDA devices, not {device.type}"


def row(
    op: str, module: str, forward: str, backward: str | None = None, unfit: Callable[..., str | None] | None = None
) -> Row:
    """The table row that serves `op` with functions of `vjepa.kernels.<module>`, imported at their first call.

    Not automatic before it has been measured beside the reference on a GPU: until then it is reached by name.
    """
    optional = {} if backward is None else {"backward": _lazy(module, backward)}
    if unfit is not None:
        optional["unfit"] = unfit
    return Row(op, "triton", _lazy(module, forward), why_not=why_not, automatic=False, **optional)


def _lazy(module: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"{__package__}.{module}"), name)(*arguments)

    return call


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one while kernels are launched; nothing where it is already, or on a CPU."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number` (1 for 0)."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, size: int) -> int:
    """Blocks of `size` that hold `number`. triton.cdiv, which may be called in kernels too, takes microseconds here."""
    return -(-number // size)


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launcher launches it, to be compiled ahead of time.

    Args:
        name: op, direction, dtypes and widths, for the table.
        kernel: the `triton.jit` function.
        types: Triton type of each run-time argument by name, e.g. {"x_ptr": "*bf16", "num_rows": "i32"}.
        constants: value of each constexpr by name (also of arguments that are None).
        divisible: names of run-time arguments known to be multiples of 16 (pointers aligned to 16 bytes, widths).
        num_warps, num_stages: as launched.
        matrix: it must contain matrix instructions; if not, it must contain none (float32 would be rounded to TF32).
        wide: it must move rows by 16-byte accesses.
        archs: the architectures on which it is launched.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    wide: bool = True
    archs: tuple[int, ...] = (80, 90, 100, 120)
    ones: tuple[str, ...] = field(default=())  # run-time arguments that are 1 (unit strides), which Triton folds
