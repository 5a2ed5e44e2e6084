"""AdamW with moving average and copies in the native library: tables from lists of tensors, on a CPU and on CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ._native import (
    COPY_DTYPES,
    DTYPE_CODES,
    NO_COPY,
    AdamWEntry,
    AdamWGroup,
    AdamWScalars,
    Chunk,
    addresses,
    check,
    check_lists,
    device_of,
    dtype_of,
    launch,
    library,
    plan,
    table_of,
)

CHUNK_ELEMENTS = 1 << 14  # per CUDA block: 0.65 MB of traffic, a thousand blocks for the smallest ViT

Numbers = tuple[float, float, float, float, float]  # lr, beta1, beta2, eps, weight decay


def entries(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    shadows: Sequence[Tensor],
    param_copies: Sequence[Tensor],
    shadow_copies: Sequence[Tensor],
    steps: Iterable[int],
    groups: Iterable[int],
    device_type: str,
    walked: bool = False,
) -> ctypes.Array[AdamWEntry]:
    """The table of the step, of tensors that can be updated so; shadows and copies are there for all or for none.

    steps: addresses of how many were done before, or zeros.
    """
    wide = (torch.float32,)
    named = {
        "params": (params, wide),
        "grads": (grads, tuple(DTYPE_CODES)),
        "exp_avgs": (exp_avgs, wide),
        "exp_avg_sqs": (exp_avg_sqs, wide),
    }
    optional = {
        "shadows": (shadows, wide),
        "param_copies": (param_copies, COPY_DTYPES),
        "shadow_copies": (shadow_copies, COPY_DTYPES),
    }
    check_lists(device_type, named | {name: pair for name, pair in optional.items() if pair[0]}, walked)
    if bool(shadow_copies) != bool(shadows and param_copies):
        raise ValueError("shadow_copies: expected them with shadows and param_copies, and only then")
    if any(first.dtype != second.dtype for first, second in zip(param_copies, shadow_copies, strict=False)):
        raise TypeError("shadow_copies: expected the dtypes of param_copies")

    def optional_addresses(tensors: Sequence[Tensor]) -> Sequence[int]:
        return list(addresses(tensors)) if tensors else [0] * len(params)

    codes = DTYPE_CODES.__getitem__
    return table_of(
        AdamWEntry,
        addresses(params),
        addresses(grads),
        addresses(exp_avgs),
        addresses(exp_avg_sqs),
        optional_addresses(shadows),
        optional_addresses(param_copies),
        optional_addresses(shadow_copies),
        steps,
        map(Tensor.numel, params),
        map(codes, map(dtype_of, grads)),
        map(codes, map(dtype_of, param_copies)) if param_copies else repeat(NO_COPY, len(params)),
        groups,
    )


def chunks_of(table: ctypes.Array[AdamWEntry], chunk_elements: int = CHUNK_ELEMENTS) -> ctypes.Array[Chunk]:
    return plan(library().vjepa_adamw_plan, table, chunk_elements)


def groups_of(steps: Sequence[Tensor], numbers: Numbers) -> tuple[list[int], ctypes.Array[AdamWGroup]]:
    """Each parameter's group, and the groups: one for each number of steps that was done before this one."""
    done = torch.stack(list(steps)).tolist() if steps else []
    order = {count: group for group, count in enumerate(dict.fromkeys(done))}
    groups = (AdamWGroup * len(order))(*(AdamWGroup(*numbers, int(count), None) for count in order))
    return [order[count] for count in done], groups


def check_steps(params: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} tensors, one for each of params, got {len(steps)}")
    on_cpu = set(map(device_of, steps)) <= {torch.device("cpu")}
    if on_cpu and set(map(dtype_of, steps)) <= {torch.float32} and not any(map(Tensor.dim, steps)):
        return
    for k, step in enumerate(steps):
        if step.ndim or step.dtype != torch.float32 or step.device.type != "cpu":
            raise ValueError(f"steps[{k}]: expected a float32 scalar on cpu, got {step.dtype} on {step.device}")


def scalars_of(grad_factor: Tensor | None, device: torch.device) -> AdamWScalars | None:
    if grad_factor is None:
        return None
    if grad_factor.ndim or grad_factor.dtype != torch.float32 or grad_factor.device != device:
        given = f"{tuple(grad_factor.shape)} {grad_factor.dtype} on {grad_factor.device}"
        raise ValueError(f"grad_factor: expected a float32 scalar on {device}, got {given}")
    return AdamWScalars(grad_factor.data_ptr(), None, None)


def adamw_ema_cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    shadows: Sequence[Tensor],
    param_copies: Sequence[Tensor],
    shadow_copies: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    grad_factor: Tensor | None = None,
    threads: int | None = None,
    walked: bool = False,
) -> None:
    """AdamW on `params`, moving average in `shadows`, copies of both, in place, in one threaded pass on the CPU.

    All contiguous CPU tensors, float32 but grads (float32, bfloat16 or float16) and copies (bfloat16 or float16);
    steps: float32 scalars, how many steps were done before; they count this one. shadows and copies may be empty.
    grad_factor: float32 scalar by which gradients are multiplied. threads: at most so many (default:
    `torch.get_num_threads()`); the result does not depend on it.
    walked: the caller has seen that dtypes and layouts are these.
    Raises ValueError, TypeError or NativeError as `ema_update_cpu` does; nothing is written then.
    """
    check_steps(params, steps)
    rows = (AdamWGroup * 1)(AdamWGroup(lr, beta1, beta2, eps, weight_decay, 0, None))
    lists = (params, grads, exp_avgs, exp_avg_sqs, shadows, param_copies, shadow_copies)
    table = entries(*lists, addresses(steps), repeat(0, len(params)), "cpu", walked)
    scalars = scalars_of(grad_factor, torch.device("cpu"))
    threads = torch.get_num_threads() if threads is None else threads
    check(library().vjepa_adamw_cpu(table, len(table), rows, len(rows), scalars, momentum, threads))


def adamw_ema_cuda(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    shadows: Sequence[Tensor],
    param_copies: Sequence[Tensor],
    shadow_copies: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    grad_factor: Tensor | None = None,
    walked: bool = False,
) -> None:
    """`adamw_ema_cpu` on one CUDA device, in one launch on its current stream; asynchronous. The steps lie on the CPU."""
    check_steps(params, steps)
    groups, rows = groups_of(steps, (lr, beta1, beta2, eps, weight_decay))
    lists = (params, grads, exp_avgs, exp_avg_sqs, shadows, param_copies, shadow_copies)
    table = entries(*lists, repeat(0, len(params)), groups, "cuda", walked)
    if not params:
        return
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise ValueError(f"params: expected one device, got {sorted(map(str, devices))}")
    device = devices.pop()
    scalars = scalars_of(grad_factor, device)
    launch(table, device, chunks_of, library().vjepa_adamw_cuda, rows, len(rows), scalars, momentum)
    torch._foreach_add_(list(steps), 1)
