"""python -m vjepa.kernels: versions, devices, which backend serves each operator, and why not the others."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

import torch

from . import _dispatch, _native

PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _device_line(device: torch.device) -> str:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()}, {capability}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def _native_lines() -> list[str]:
    lines = []
    for part, (runs, reason) in (("cpu", _native.available()), ("cuda", _native.cuda_available())):
        lines.append(f"  native {part:<10} {'yes' if runs else f'no: {reason}'}")
    if _native.available()[0]:
        facts = ", ".join(f"{name} {value}" for name, value in _native.build_info().items() if value)
        lines.append(f"  native library    {facts}")
    return lines


def _serving(op: str, device: torch.device) -> str:
    try:
        return _dispatch.select(op, device).name
    except RuntimeError as error:
        return f"NONE: {error}"


def report() -> str:
    """The whole diagnostics text."""
    lines = ["versions"]
    lines.append(f"  python            {platform.python_version()}")
    lines.append(f"  torch             {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    lines += [f"  {package:<17} {_version(package)}" for package in PACKAGES]
    lines += ["native library", *_native_lines()]
    devices = _devices()
    lines.append("devices")
    lines += [f"  {device!s:<17} {_device_line(device)}" for device in devices]
    for device in devices:
        lines.append(f"backends on {device} ({_dispatch.VARIABLE}={_dispatch.requested()})")
        obstacles: dict[str, list[str]] = {}
        for op in _dispatch.operators():
            rows = _dispatch.explain(op, device)
            runs = ", ".join(f"{name}: {says}" for name, says in rows.items() if says in _dispatch.RUNS)
            lines.append(f"  {op:<17} {_serving(op, device)}  ({runs})")
            for name, says in rows.items():
                if says not in _dispatch.RUNS:
                    obstacles.setdefault(f"{name}: {says}", []).append(op)
        lines += [f"  not {why} ({', '.join(ops)})" for why, ops in obstacles.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.stdout.write(report() + "\n")
    except ValueError as error:  # VJEPA_KERNELS is not the name of a backend
        sys.exit(str(error))
