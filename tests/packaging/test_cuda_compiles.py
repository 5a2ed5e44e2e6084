"""Every .cu compiles without a warning and without spilling, for every architecture in use; no GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = ("80", "90", "100", "120")
MAXIMUM_REGISTERS = 64  # per thread: four blocks of 256 threads on a multiprocessor

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
@pytest.mark.parametrize("source", sorted(CSRC.rglob("*.cu")), ids=lambda path: path.stem)
def test_compiles_for_every_architecture_without_spills(source, tmp_path):
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in ARCHITECTURES if f"compute_{arch}" in listed]
    assert known
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    flags = [
        "-O3",
        "-std=c++17",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-Wall,-Wextra",
        "-Xptxas",
        "-v",
        "--threads=0",
    ]
    done = subprocess.run(
        [NVCC, *flags, *targets, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    kernels = source.read_text().count("__global__")
    assert len(registers) == kernels * len(known)
    assert len(spills) == 2 * kernels * len(known)
    assert not any(spills), done.stderr
    assert max(registers) <= MAXIMUM_REGISTERS, done.stderr
