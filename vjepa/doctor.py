"""`vjepa doctor`: what this installation can do, what is missing, and the command that gets it.

Needs torch alone. Exit code 0 when nothing that pretraining needs is missing, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Package:
    """A package by import name and by the name pip knows, what it is for, and the extra of vjepa that brings it."""

    module: str
    distribution: str
    purpose: str
    extra: str = "train"
    required: bool = True


PACKAGES = (
    Package("torch", "torch", "everything", extra=""),
    Package("numpy", "numpy", "clips and arrays"),
    Package("av", "av", "decoding video (PyAV, brings FFmpeg)"),
    Package("safetensors", "safetensors", "checkpoints"),
    Package("jsonargparse", "jsonargparse", "configuration and options"),
    Package("yaml", "pyyaml", "configuration files"),
    Package("rich", "rich", "the progress line"),
    Package("tensorboard", "tensorboard", "TensorBoard metrics"),
    Package("PIL", "pillow", "pictures and the report"),
    Package("pyarrow", "pyarrow", "Parquet manifests", extra="parquet", required=False),
    Package("triton", "triton", "Triton kernels; CUDA builds of torch bring it", extra="", required=False),
    Package("flash_attn", "flash-attn", "FlashAttention backend", extra="flash-attn", required=False),
    Package("xformers", "xformers", "xformers backend", extra="xformers", required=False),
)
DECODERS = {  # what people's files hold -> FFmpeg's decoders for it, software ones
    "h264": ("h264",),
    "hevc": ("hevc",),
    "vp9": ("vp9", "libvpx-vp9"),
    "av1": ("libdav1d", "libaom-av1"),
    "mpeg4": ("mpeg4",),
}
SHARED_MEMORY = "/dev/shm"
ENOUGH_SHARED_MEMORY = 1.0  # GiB; a batch of 24 clips of 16 x 224 x 224 is 0.06, and each worker has a few in flight
SHARED_MEMORY_REMEDY = "docker run --shm-size=8g (or --ipc=host), or set --data.num_workers 0"
NEEDED_DECODERS = ("h264",)  # the format of the demo's own clips; the others matter only for files that use them


@dataclass
class Report:
    """Lines to print, and the problems that make pretraining impossible."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        self.lines += ["", title] if self.lines else [title]

    def row(self, name: str, text: str) -> None:
        self.lines.append(f"  {name:<20} {text}")


def main(argv: Sequence[str]) -> int:
    """Prints the report; returns 0 when pretraining can run here, 1 when something it needs is missing."""
    parser = argparse.ArgumentParser(
        prog="vjepa doctor",
        description="Versions, devices, native library, decoders, kernels; what is missing and how to get it. "
        "Exit code: 0 healthy, 1 when something that pretraining needs is missing.",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error (type: flag, default: off)"
    )
    parser.parse_args(argv)
    report = examine()
    print("\n".join(report.lines))
    return 1 if report.problems else 0


def examine() -> Report:
    """Looks at everything."""
    report = Report()
    present = _packages(report)
    if "torch" in present:
        _devices(report)
        _native(report)
        _kernels(report)
    if "av" in present:
        _decoders(report)
    report.section("Verdict")
    if report.problems:
        report.lines += [f"  problem: {problem}" for problem in report.problems]
    else:
        report.lines.append("  healthy: pretraining can run here")
    return report


def _packages(report: Report) -> set[str]:
    """Versions; returns the modules that import."""
    report.section("Packages")
    report.row("vjepa", _version(Package("vjepa", "vjepa", "")))
    report.row("python", f"{platform.python_version()} ({sys.executable})")
    report.row("system", platform.platform())
    present = set()
    for package in PACKAGES:
        reason = import_problem(package.module)
        if reason is None:
            present.add(package.module)
            report.row(package.distribution, _version(package))
            continue
        target = f"'vjepa[{package.extra}]'" if package.extra else package.distribution
        state = reason.replace("not found", "MISSING" if package.required else "not installed")
        report.row(package.distribution, f"{state}; for {package.purpose}; get it with: pip install {target}")
        if package.required:
            report.problems.append(f"{package.distribution} is missing ({package.purpose}): pip install {target}")
    return present


def import_problem(module: str) -> str | None:
    """Why `module` cannot be imported, in one line, or None when it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        return "not found" if absent else f"does not import: {' '.join(str(error).split())}"
    return None


def _version(package: Package) -> str:
    try:
        version = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    if package.module == "av":
        import av

        version += (
            f" (FFmpeg {av.ffmpeg_version_info}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"
        )
    return version


def _devices(report: Report) -> None:
    import torch

    report.section("Devices")
    sized = hasattr(os, "sysconf")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if sized else float("nan")
    instructions = torch.backends.cpu.get_cpu_capability()
    threads = f"torch uses {torch.get_num_threads()} of {os.cpu_count()} logical processors"
    report.row("cpu", f"{threads}, {instructions}, {memory:.1f} GiB memory")
    _shared_memory(report)
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        report.row("cuda", f"none (torch is {built})")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        version = torch.version.cuda
        report.row(f"cuda:{index}", f"{found.name}, {memory:.0f} GiB, sm_{found.major}{found.minor}, CUDA {version}")


def _shared_memory(report: Report) -> None:
    """Batches of worker processes travel through it; containers often have 64 MiB, and fail with a bus error."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    total, _, free = (size / 2**30 for size in shutil.disk_usage(SHARED_MEMORY))
    advice = "" if free >= ENOUGH_SHARED_MEMORY else "; LITTLE for worker processes: " + SHARED_MEMORY_REMEDY
    report.row("shared memory", f"{free:.2f} of {total:.2f} GiB free in {SHARED_MEMORY}{advice}")


def _native(report: Report) -> None:
    from vjepa.kernels import _native

    report.section("Native library")
    runs, reason = _native.available()
    if runs:
        report.row("cpu", ", ".join(f"{name} {value}" for name, value in _native.build_info().items() if value))
    else:
        report.row("cpu", f"not available: {reason}")
    runs, reason = _native.cuda_available()
    report.row("cuda", "available" if runs else f"not available: {reason}")


def _kernels(report: Report) -> None:
    import torch

    import vjepa.kernels  # noqa: F401  fills the table
    from vjepa.kernels import _dispatch

    report.section(
        f"Kernels (backend asked for: {_dispatch.requested()}; python -m vjepa.kernels tells why not the others)"
    )
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    for op in _dispatch.operators():
        report.row(op, ", ".join(f"{device.type}: {_serving(op, device)}" for device in devices))


def _serving(op: str, device: torch.device) -> str:
    from vjepa.kernels import _dispatch

    try:
        return _dispatch.select(op, device).name
    except RuntimeError as error:
        return f"none: {error}"


def _decoders(report: Report) -> None:
    report.section("Video decoders")
    remedy = "pip install --force-reinstall --only-binary=:all: av"
    for codec, names in DECODERS.items():
        found = next((name for name in names if has_decoder(name)), None)
        if found:
            report.row(codec, f"yes ({found})" if found != codec else "yes")
            continue
        report.row(codec, f"no: this FFmpeg has no {' or '.join(names)}; get one that has with: {remedy}")
        if codec in NEEDED_DECODERS:
            report.problems.append(f"no decoder for {codec}: {remedy}")
    report.row("torchcodec", torchcodec_state())


def torchcodec_state() -> str:
    """Whether `data.decoder: torchcodec` works, with the reason where it does not."""
    try:
        from vjepa.data.errors import DataError
        from vjepa.data.torchcodec_frames import video_decoder
    except ImportError as error:  # numpy is missing, which has been told already
        return f"not looked for: {error}"
    try:
        video_decoder()
    except DataError as error:
        return f"no (optional): {error}"
    version = _version(Package("torchcodec", "torchcodec", ""))
    return f"yes ({version}), with --data.decoder torchcodec"


def has_decoder(name: str) -> bool:
    """Whether this FFmpeg has the decoder `name`."""
    import av

    try:
        av.codec.Codec(name, "r")
    except ValueError:
        return False
    return True
