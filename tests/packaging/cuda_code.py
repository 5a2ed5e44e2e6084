"""Compiles every .cu with nvcc for every architecture and reads from what ptxas prints what became of the kernels.

    python tests/packaging/cuda_code.py check    as a table
    python tests/packaging/cuda_code.py table    the same table, into docs/cuda_kernels.md

Needs nvcc, the compiler and the binutils that it works with, and no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "cuda_kernels.md"
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
MAXIMUM_REGISTERS = 64  # per thread: four blocks of 256 threads on a multiprocessor
# Architectures one after the other, not --threads=0, which mixes what ptxas prints about them.
FLAGS = ("-O3", "-std=c++17", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v")

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Kernel:
    """What one kernel became for one architecture."""

    source: str  # in csrc
    name: str  # with its template arguments
    arch: int
    registers: int  # of a thread
    shared: int  # bytes of a block
    stored: int  # bytes that a thread spills
    loaded: int  # and reads back

    @property
    def faults(self) -> list[str]:
        found = []
        if self.stored or self.loaded:
            found.append(f"spills: {self.stored} bytes stored, {self.loaded} loaded")
        if self.registers > MAXIMUM_REGISTERS:
            found.append(f"needs {self.registers} registers, {MAXIMUM_REGISTERS} are allowed")
        return [f"{self.source}: {self.name} for sm_{self.arch} {fault}" for fault in found]


def ask(*command: object, given: str | None = None) -> str:
    """What a command prints, warnings too; raises RuntimeError with it, if the command fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}")
    return done.stdout


def nvcc_version() -> str:
    """Such as 13.0.88."""
    found = re.search(r"V(\d+\.\d+\.\d+)", ask(NVCC, "--version"))
    if found is None:
        raise RuntimeError(f"{NVCC} --version names no version")
    return found.group(1)


def known_architectures() -> tuple[int, ...]:
    """Those of ours that this nvcc compiles for."""
    listed = ask(NVCC, "--list-gpu-arch").split()
    return tuple(arch for arch in ARCHITECTURES if f"compute_{arch}" in listed)


def short_name(demangled: str) -> str:
    """`kernel<float, 4>` from `void vjepa::(anonymous namespace)::kernel<float, 4>(float const*, int)`."""
    text = demangled.replace("(anonymous namespace)::", "").replace("vjepa::", "")
    depth = start = 0
    for place, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if depth == 0 and letter in " :":
            start = place + 1
        elif depth == 0 and letter == "(":
            return text[start:place]
    return text[start:]


def declared(source: Path) -> set[str]:
    """Names of the kernels in a source."""
    text = re.sub(r"__launch_bounds__\([^()]*\)", "", source.read_text())
    return set(re.findall(r"__global__\s+void\s+(\w+)\s*\(", text))


def read_report(source: str, report: str) -> list[Kernel]:
    """The kernels of a source from what `ptxas -v` prints about it; those of a header come with each source."""
    _, *parts = ENTRY.split(report)
    found = []
    for mangled, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        registers, spilled = REGISTERS.search(text), SPILLED.findall(text)
        if registers is None or not spilled:
            raise ValueError(f"ptxas says nothing of registers or spills of {mangled} for sm_{arch}: {text!r}")
        shared = SHARED.search(text)
        stored, loaded = (sum(map(int, numbers)) for numbers in zip(*spilled, strict=True))
        usage = int(registers.group(1)), int(shared.group(1)) if shared else 0, stored, loaded
        found.append(Kernel(source, short_name(ask("c++filt", mangled).strip()), int(arch), *usage))
    return sorted(found, key=lambda kernel: (kernel.name, kernel.arch))


def compile_source(source: Path) -> list[Kernel]:
    """Raises RuntimeError with what nvcc prints, if it fails or warns."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known_architectures()]
    with tempfile.TemporaryDirectory() as folder:
        report = ask(NVCC, *FLAGS, *targets, "-c", source, "-o", Path(folder) / "out.o")
    return read_report(str(source.relative_to(ROOT)), report)


def compile_all() -> list[Kernel]:
    with ThreadPoolExecutor() as pool:
        return [kernel for found in pool.map(compile_source, SOURCES) for kernel in found]


INTRODUCTION = """\
# CUDA C++ kernels, compiled

Written by `make aot` with nvcc {version}, without a GPU: every kernel of `csrc/cuda`, compiled for sm_80, sm_90, sm_100 and
sm_120, and what ptxas says of it. Registers are those of a thread, of which {maximum} are allowed, so that a multiprocessor
holds four blocks of 256 threads; shared memory is that of a block, in bytes, without what a launch asks for besides; spills
are bytes that a thread stores to local memory and loads from it.

Where nvcc is found, `make test` compiles them again and fails on a warning, on a spill, on more registers, and if a kernel
or an architecture is missing here. The numbers must be these with nvcc {version} alone: other versions may choose other
registers. The Triton kernels are in [ahead_of_time.md](ahead_of_time.md).
"""
HEADER = ("kernel", "for", "registers", "shared memory", "spills")


def document(found: list[Kernel], version: str) -> str:
    """The Markdown of docs/cuda_kernels.md."""
    lines = [INTRODUCTION.format(version=version, maximum=MAXIMUM_REGISTERS)]
    for source in dict.fromkeys(kernel.source for kernel in found):
        lines += [f"## {source}", "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
        for kernel in (kernel for kernel in found if kernel.source == source):
            spills = f"{kernel.stored} + {kernel.loaded}" if kernel.stored or kernel.loaded else "none"
            row = (kernel.name, f"sm_{kernel.arch}", str(kernel.registers), str(kernel.shared), spills)
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def documented_version(text: str) -> str:
    """The nvcc that the document was written with."""
    found = re.search(r"with nvcc (\d+\.\d+\.\d+)", text)
    if found is None:
        raise ValueError("the document names no nvcc")
    return found.group(1)


def listed(text: str) -> set[tuple[str, str, int]]:
    """Source, kernel and architecture of each row of the document."""
    found, source = set(), ""
    for line in text.splitlines():
        if line.startswith("## "):
            source = line.removeprefix("## ")
        elif row := re.match(r"\| (.+?) \| sm_(\d+) \|", line):
            found.add((source, row.group(1), int(row.group(2))))
    return found


def main(command: str = "") -> None:
    if command not in ("check", "table"):
        sys.exit(__doc__)
    if NVCC is None:
        print(f"nvcc not found: {DOCUMENT.relative_to(ROOT)} stays as it is")
        return
    version = nvcc_version()
    if missing := set(ARCHITECTURES) - set(known_architectures()):
        sys.exit(f"nvcc must compile for {sorted(ARCHITECTURES)}, got nvcc {version} without {sorted(missing)}")
    found = compile_all()
    text, wrong = document(found, version), [fault for kernel in found for fault in kernel.faults]
    if command == "check":
        print(text)
    elif not wrong:
        DOCUMENT.write_text(text)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
