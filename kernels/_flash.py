"""The flash_attn_4, flash_attn_3, flash_attn_2 and torch_varlen backends of varlen_attention: flash attention of others.

All take 16-bit floats on NVIDIA GPUs, rows that begin at multiples of 16 bytes, and offsets on the device; of the lengths
they need the longest, which the host knows. Their log-sum-exp is the natural logarithm, [G, N], as ours is, so that one
backend may do the forward pass and another the backward pass.

Their backward pass adds by atomics, in an order that changes from run to run, unless PyTorch is told to be deterministic.

N queries, G heads, E head_dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dispatch import Row
from ._triton import capability, device_of

ALIGNED = 16  # bytes: the kernels read rows in pieces of so many
PIECE = ALIGNED // 2  # so many 16-bit floats

Sides = tuple[Tensor, Tensor, int, int]  # offsets of queries and keys, longest sequence of queries and of keys


class Library(NamedTuple):
    """Two functions that serve the forward and the backward pass on GPUs of some major compute capabilities."""

    forward: Callable[[Tensor, Tensor, Tensor, Sides, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sides, float], tuple[Tensor, Tensor, Tensor]]


class Package(NamedTuple):
    """Where a version of FlashAttention is found, and how its functions are called, all arguments by their names."""

    name: str  # for pip
    module: str
    forward: str
    forward_only: dict[str, Any]  # arguments beyond tensors, offsets and scale
    backward: str
    backward_only: dict[str, Any]
    lse: str  # the backward function's name for it
    capabilities: tuple[int, ...]


_PLAIN = {"dropout_p": 0.0, "causal": False}
PACKAGES = {
    "flash_attn_4": Package(
        name="flash-attn-4",
        module="flash_attn.cute.interface",
        forward="_flash_attn_fwd",
        forward_only={"return_lse": True},
        backward="_flash_attn_bwd",
        backward_only={},
        lse="lse",
        capabilities=(9, 10, 11, 12),
    ),
    "flash_attn_3": Package(
        name="flash-attn-3",
        module="flash_attn_interface",
        forward="_flash_attn_forward",
        forward_only={},
        backward="_flash_attn_backward",
        backward_only={},
        lse="softmax_lse",
        capabilities=(9,),
    ),
    "flash_attn_2": Package(
        name="flash-attn",
        module="flash_attn.flash_attn_interface",
        forward="_flash_attn_varlen_forward",
        forward_only=_PLAIN,
        backward="_flash_attn_varlen_backward",
        backward_only={
            **_PLAIN,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        },
        lse="softmax_lse",
        capabilities=(8, 9, 10, 11, 12),
    ),
}


def _by_name(sides: Sides, scale: float) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
    return dict(zip(names, (*sides, scale), strict=True))


def _names(function: Any) -> dict[str, bool]:
    """A function's arguments, and whether each must be given; flash_attn makes some functions operators of PyTorch."""
    if isinstance(function, torch.library.CustomOpDef):
        arguments = function._opoverload._schema.arguments
        return {argument.name: not argument.has_default_value() for argument in arguments}
    parameters = inspect.signature(function).parameters
    return {name: parameter.default is inspect.Parameter.empty for name, parameter in parameters.items()}


def _mismatch(module: Any, function: str, given: set[str]) -> str | None:
    """Why `function` of a module cannot be called with arguments of these names, or None."""
    if not hasattr(module, function):
        return f"has no {function}"
    names = _names(getattr(module, function))
    if unknown := given - set(names):
        return f"has a {function} that does not take {', '.join(sorted(unknown))}"
    required = {name for name, must in names.items() if must}
    return f"has a {function} that wants {', '.join(sorted(required - given))} too" if required - given else None


@functools.cache
def library(name: str) -> Library | str:
    """The functions of an installed version of FlashAttention, or why they cannot be used."""
    package = PACKAGES[name]
    try:
        module = import_module(package.module)
    except ModuleNotFoundError as error:
        return f"{package.name} is not installed ({error})"
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
    ) as error:  # built for another PyTorch, or with other parts
        return f"{package.name} does not import: {type(error).__name__}: {error}"

    def forward(q: Tensor, k: Tensor, v: Tensor, sides: Sides, scale: float) -> tuple[Tensor, Tensor]:
        function = getattr(module, package.forward)
        out, lse, *_ = function(q=q, k=k, v=v, **_by_name(sides, scale), **package.forward_only)
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sides: Sides, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        given = {"q": q, "k": k, "v": v, "out": out, "dout": grad, package.lse: lse, **_by_name(sides, scale)}
        given |= dict(zip(("dq", "dk", "dv"), grads, strict=True), **package.backward_only)
        getattr(module, package.backward)(**given, deterministic=torch.are_deterministic_algorithms_enabled())
        return grads

    common = {"q", "k", "v", *_by_name((Tensor(), Tensor(), 0, 0), 1.0)}
    needed = {
        package.forward: common | {*package.forward_only},
        package.backward: common
        | {"out", "dout", package.lse, "dq", "dk", "dv", "deterministic", *package.backward_only},
    }
    for function, names in needed.items():
        if why := _mismatch(module, function, names):
            return f"this version of {package.name} {why}"
    return Library(forward, backward)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, sides: Sides, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *sides, 0.0, False, False, scale=scale)
    return out, lse


def _torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sides: Sides, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of the generator for dropout, which there is none
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *sides, 0.0, False, state, q.new_empty(0), scale=scale
    )


TORCH = Library(_torch_forward, _torch_backward)


def aligned(x: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous, begin at multiples of 16 bytes and are not the same, else a copy."""
    piece, strides = ALIGNED // x.element_size(), x.stride()[:-1]
    apart = 0 not in strides and not any(stride % piece for stride in strides)
    there = apart and x.stride(-1) == 1 and x.data_ptr() % ALIGNED == 0
    return x if there else x.clone(memory_format=torch.contiguous_format)


def _functions(name: str) -> Library:
    found = TORCH if name == "torch_varlen" else library(name)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """See reference.varlen_attention."""
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    sides = (cu_seqlens, kv_cu_seqlens, int(lengths.max()), int(kv_lengths.max()))
    with device_of(q):  # of which some ask for the current one's architecture and stream
        out, lse = _functions(name).forward(aligned(q), aligned(k), aligned(v), sides, scale)
    return out.contiguous(), lse.contiguous()


def backward(
    name: str,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    scale: float,
    kv_cu_seqlens: Tensor,
    kv_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.varlen_attention_backward."""
    if q.numel() == 0:
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    sides = (cu_seqlens, kv_cu_seqlens, int(lengths.max()), int(kv_lengths.max()))
    grad, q, k, v, out = (aligned(x) for x in (grad, q, k, v, out))
    with device_of(q):
        grad_q, grad_k, grad_v = _functions(name).backward(grad, q, k, v, out, lse.contiguous(), sides, scale)
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()


def unfit(q: Tensor, scale: float, *lengths: object) -> str | None:
    """Why no flash attention of others takes such heads, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] % PIECE:
        return f"its kernels need a head_dim that is a multiple of {PIECE}, got {q.shape[2]}"
    return None if scale > 0 else f"its kernels need a positive scale, got {scale}"


def _unfit_torch(q: Tensor, scale: float, *lengths: object) -> str | None:
    major, minor = capability(q.device)
    if q.shape[2] > 192 and (major == 12 or (major == 8 and minor > 0)):
        return f"its backward pass computes heads of up to 192 on compute capability {major}.{minor}, got {q.shape[2]}"
    return unfit(q, scale)


def _unfit_4(q: Tensor, scale: float, *lengths: object) -> str | None:
    major = capability(q.device)[0]
    widest = 256 if major == 9 else 128
    if q.shape[2] > widest:
        return f"its kernels compute heads of up to {widest} here, got {q.shape[2]}"
    if major == 12 and torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic on compute capability 12"
    return unfit(q, scale)


UNFIT = {"torch_varlen": _unfit_torch, "flash_attn_4": _unfit_4}


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors on `device`, or None."""
    if device.type != "cuda":
        return f"it serves CUDA devices, not {device.type}"
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs"
    if name == "torch_varlen" and not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash attention"
    wanted = (8, 9, 10, 11, 12) if name == "torch_varlen" else PACKAGES[name].capabilities
    major, minor = capability(device)
    if major not in wanted:
        return f"{device} has compute capability {major}.{minor}; its kernels are for {', '.join(map(str, wanted))}.x"
    found = TORCH if name == "torch_varlen" else library(name)
    return found if isinstance(found, str) else None


def rows() -> Iterator[Row]:
    """A row for each. PyTorch's own is automatic: its other kernels need a call for each sequence."""
    for name in (*PACKAGES, "torch_varlen"):
        yield Row(
            "varlen_attention",
            name,
            functools.partial(forward, name),
            functools.partial(backward, name),
            functools.partial(why_not, name),
            UNFIT.get(name, unfit),
            automatic=name == "torch_varlen",
        )
