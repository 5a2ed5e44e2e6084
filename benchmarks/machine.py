"""What a number cannot be read without: the machine, the versions, and what the machine does at best in the same run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vjepa.kernels._cpu_attention import has_amx

from .clocks import Call, Clock
from .harness import GIGA, TERA, Contender, Outcome, dtype_name, take_turns

ROOT = Path(__file__).resolve().parents[1]
AMX = "amx"  # the capability of a CPU that has it
EXPS = 16  # of all architectures from sm_80 to sm_120


@dataclass(frozen=True)
class Ceilings:
    """GB/s of a copy far beyond the caches, and TFLOP/s of a large square matrix product for each dtype.

    Exponentials a second are not measured: the exp units make EXPS a clock and SM, at the highest clock.
    """

    copy_gb_s: float
    gemm_tflop_s: dict[str, float]
    exp_s: float | None = None

    def set_shares(self, outcome: Outcome) -> None:
        """Write into the results what share of the ceilings they reach."""
        gemm = self.gemm_tflop_s.get(outcome.work.dtype)
        for result in outcome.results:
            if result.gb_s is not None and not outcome.work.in_place:
                result.share_of_copy = result.gb_s / self.copy_gb_s
            if result.tflop_s is not None and gemm is not None:
                result.share_of_gemm = result.tflop_s / gemm
            if outcome.work.exps and self.exp_s is not None:
                result.share_of_exp = outcome.work.exps / result.median / self.exp_s


def measure_ceilings(device: torch.device, clock: Clock) -> Ceilings:
    """The fastest of some repetitions, on random data (on zeros a GPU is faster)."""
    numel, side, rounds = (1 << 28, 8192, 13) if device.type == "cuda" else (1 << 25, 1536, 6)

    def fastest(call: Call) -> float:
        return min(take_turns([Contender("", call)], clock, rounds)[""])

    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source)) / GIGA
    gemm = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        gemm[dtype_name(dtype)] = 2 * side**3 / fastest(lambda a=a, b=b: a @ b) / TERA
    return Ceilings(copy, gemm, _exponentials(device))


def _exponentials(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    return EXPS * about.multi_processor_count * about.clock_rate * 1e3


def machine(device: torch.device) -> dict[str, str | None]:
    """Names and versions. Where there is no git, the commit is read from the environment variable COMMIT."""
    cuda = device.type == "cuda"
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if cuda else AMX if has_amx() else None,
        "driver": _output(*query) if cuda else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit + ("+" if changed else "") if commit else os.environ.get("COMMIT"),
        "date": time.strftime("%Y-%m-%d"),
    }


def available_memory() -> int:
    """Bytes that a process may still take: what Linux holds available, elsewhere all there is; a container's limit."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    known = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    amounts = known or [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit, taken = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and taken.exists() and limit.read_text().strip() != "max":
        amounts.append(int(limit.read_text()) - int(taken.read_text()))
    return min(amounts)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def slug(about: dict[str, str | None]) -> str:
    """What names the files of a machine."""
    if about["kind"] == "cpu":
        return "cpu" if about["capability"] is None else f"cpu-{about['capability']}"
    return re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower())


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    tiles = " with AMX" if has_amx() else ""
    return f"{models[0] if models else platform.machine()}{tiles}, {torch.get_num_threads()} threads"
