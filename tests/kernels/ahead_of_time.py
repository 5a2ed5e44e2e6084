"""Compiles every Triton variant ahead of time and reads from its machine code what became of it. No GPU is needed.

    python tests/kernels/ahead_of_time.py facts [_triton_gather ...]    as lines of JSON, with the Triton that Python finds
    python tests/kernels/ahead_of_time.py check [_triton_gather ...]    as a table, with each Triton of `environments()`
    python tests/kernels/ahead_of_time.py table                         the same table, into docs/ahead_of_time.md

Not for the process of the other tests: Triton's interpreter, under which those run, replaces what is needed here. Besides
torch and Triton it needs nothing but the tools that Triton brings, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for the tests, which load this file as a module of another name
import attention_model

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "ahead_of_time.md"
# Dynamic shared memory that a block may ask for, in bytes, of each architecture that is compiled for.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
OLDER = "3.6.0"  # compiled with besides the newest: the Triton that PyTorch 2.10 and 2.11 were released with
OLDER_VARIABLE = "VJEPA_TRITON_3_6"  # the folder it is in, if not the one that `make test` installs it into

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)|^(\.L_\w+):", re.MULTILINE)
JUMP = re.compile(r"`\((\.L_\w+)\)")
TARGET = re.compile(r"EF_CUDA_SM(\d+)|\.target\s+sm_(\d+)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MATRIX = re.compile(
    r"(UTC)?[A-Z]*MMA"
)  # HMMA, HGMMA (sm_90), UTCHMMA (tcgen05 of sm_100), and their kin for other types
SPILLS = {"STL", "LDL"}  # store to and load from local memory
LOADS = {"LD", "LDG", "LDGSTS"}
BULK_LOADS = {"UTMALDG", "UBLKCP"}  # the copy engine: whole tiles
WIDE = {"128", "256"}
SUMS = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"}  # those with a 2, of sm_100, do two


@dataclass
class Fact:
    """What one variant became for one architecture."""

    module: str
    variant: str
    kernel: str
    arch: int
    triton: str
    registers: int = 0  # of a thread
    shared: int = 0  # bytes of a block
    spilled: int = 0  # bytes of local memory of a thread
    spills: int = 0  # instructions that touch it
    matrix: dict[str, int] = field(default_factory=dict)  # matrix instructions by kind
    wide_loads: int = 0  # loads of at least 16 bytes of a thread
    loop: int = 0  # instructions of its longest loop,
    exps: int = 0  # of which make an exponential or the like,
    sums: int = 0  # and add or multiply in float32
    pairs: int = 0  # of attention: pairs of query and key of a thread and step,
    width: int = 0  # and the head's width, all parts together
    faults: list[str] = field(default_factory=list)


def read_usage(text: str) -> tuple[int, int]:
    """Registers and bytes of stack and local memory, from `cuobjdump -res-usage`: the most of any function."""
    found = [tuple(map(int, numbers)) for numbers in USAGE.findall(text)]
    if not found:
        raise ValueError(f"no resource usage in {text!r}")
    return max(usage[0] for usage in found), max(usage[1] + usage[3] for usage in found)


def read_instructions(text: str, arch: int) -> Counter[str]:
    """How often each instruction stands in the output of nvdisasm."""
    found = Counter(name for name, _, _ in INSTRUCTION.findall(text) if name)
    targets = {number for numbers in TARGET.findall(text) for number in numbers if number}
    if str(arch) not in targets or "EXIT" not in found:
        raise ValueError(f"no machine code for sm_{arch} in {text[:200]!r}")
    return found


def read_loop(text: str) -> list[str]:
    """Instructions of the longest loop in the output of nvdisasm that holds no other: from a label to the jump back."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for name, rest, label in INSTRUCTION.findall(text):
        if label:
            labels[label] = len(names)
            continue
        names.append(name)
        target = JUMP.search(rest) if name == "BRA" else None
        if target and target.group(1) in labels:
            loops.append((labels[target.group(1)], len(names)))
    inner = [loop for loop in loops if not any(loop[0] <= a and b <= loop[1] and loop != (a, b) for a, b in loops)]
    first, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return names[first:end]


def judge(fact: Fact, usage: str, code: str, matrix: bool, wide: bool) -> None:
    """Fill in `fact` from what Triton's tools print about the machine code, faults among it."""
    fact.registers, fact.spilled = read_usage(usage)
    loop = [instruction.split(".")[0] for instruction in read_loop(code)]
    fact.loop, fact.exps, fact.sums = len(loop), loop.count("MUFU"), sum(name in SUMS for name in loop)
    for instruction, count in read_instructions(code, fact.arch).items():
        name, *modifiers = instruction.split(".")
        if name in SPILLS:
            fact.spills += count
        if MATRIX.fullmatch(name):
            fact.matrix[name] = fact.matrix.get(name, 0) + count
        if name in BULK_LOADS or (name in LOADS and WIDE & set(modifiers)):
            fact.wide_loads += count
    if fact.spilled or fact.spills:
        fact.faults.append(f"spills: {fact.spilled} bytes of local memory, {fact.spills} instructions")
    if fact.shared > SHARED[fact.arch]:
        fact.faults.append(f"needs {fact.shared} bytes of shared memory, there are {SHARED[fact.arch]}")
    if matrix and not fact.matrix:
        fact.faults.append("has no matrix instructions")
    if fact.matrix and not matrix:
        fact.faults.append("has matrix instructions, which compute float32 as TF32")
    if wide and not fact.wide_loads:
        fact.faults.append("has no 16-byte loads")


# ----------------------------------------------------------------------------------------- with the Triton at hand


def modules() -> list[str]:
    """Names of the modules of kernels that are launched; others hold what these share."""
    found = (path for path in (ROOT / "kernels").glob("_triton_*.py") if "def variants()" in path.read_text())
    return sorted(path.stem for path in found)


def variants(module: str) -> list[Any]:
    """The variants of a module of kernels, or of one beside this script."""
    found = import_module(f"vjepa.kernels.{module}" if module.startswith("_triton") else module)
    return getattr(found, "variants", list)()


def options(variant: Any) -> dict[str, Any]:
    """The options with which a variant is launched."""
    launch = import_module("vjepa.kernels._triton").LAUNCH
    return {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **launch}


def specialisation(variant: Any) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Types of all parameters in their order, values of the constants and names of the multiples of 16, as launched."""
    constants = {**variant.constants, **dict.fromkeys(variant.ones, 1)}
    names = variant.kernel.arg_names
    unknown = {*constants, *variant.types, *variant.divisible} - set(names)
    missing = set(names) - {*constants, *variant.types}
    if unknown or missing:
        raise ValueError(f"{variant.name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    types = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    return types, constants, tuple(name for name in names if name in variant.divisible and name not in constants)


def compile_variant(variant: Any, arch: int) -> tuple[bytes, int]:
    """Machine code and bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, divisible = specialisation(variant)
    place = {name: (number,) for number, name in enumerate(types)}
    source = ASTSource(
        variant.kernel,
        types,
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(variant))
    return compiled.asm["cubin"], compiled.metadata.shared


def attention_of(variant: Any) -> tuple[int, int]:
    """Pairs of query and key of a thread and step, and the width of the head; 0 and 0 for other kernels."""
    given = variant.constants
    if "WALKED" not in given:
        return 0, 0
    return given["OWNED"] * given["WALKED"] // (32 * variant.num_warps), given["E0"] + given["E1"]


def ask(tool: str, *arguments: object) -> str:
    """What one of the tools that Triton brings prints."""
    import triton

    command = [getattr(triton.knobs.nvidia, tool).path, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def why(error: BaseException) -> str:
    """One line about a failed compilation: what it was first, where in the kernel, and the last words."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    words = [line.strip() for line in str(cause).splitlines() if line.strip(" ^")]
    place = re.match(r"at \d+:\d+", str(error))
    return f"cannot be compiled: {type(cause).__name__} {place.group() if place else ''}: {words[-1] if words else ''}"


def facts(names: list[str]) -> Iterator[Fact]:
    """Compiles every variant of the modules for every architecture."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        for module in names or modules():
            for variant in variants(module):
                for arch in variant.archs:
                    fact = Fact(module, variant.name, variant.kernel.__name__, arch, triton.__version__)
                    fact.pairs, fact.width = attention_of(variant)
                    try:
                        cubin, fact.shared = compile_variant(variant, arch)
                        path.write_bytes(cubin)
                        usage, code = ask("cuobjdump", "-res-usage", path), ask("nvdisasm", "-ndf", path)
                        judge(fact, usage, code, variant.matrix, variant.wide)
                    except Exception as error:  # of whatever type: it is reported with the kernel's name, and fails
                        fact.faults.append(why(error))
                    yield fact


# ------------------------------------------------------------------------------------------- with several Tritons


def older_folder() -> Path:
    """Where Triton 3.6.0 is looked for."""
    return Path(os.environ.get(OLDER_VARIABLE) or Path(sys.prefix) / f"triton-{OLDER}")


def environments() -> dict[str, dict[str, str]]:
    """For each Triton here, by version, the environment of a process that uses it to compile, not to interpret.

    What a launch does not ask for is off there, so that a launch that does not ask for `LAUNCH` differs.
    """
    if find_spec("triton") is None:
        return {}
    import triton

    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    clean["TRITON_DEFAULT_FP_FUSION"] = "0"
    found = {triton.__version__: clean}
    if (older_folder() / "triton").is_dir():
        path = os.pathsep.join([str(older_folder()), *filter(None, [os.environ.get("PYTHONPATH")])])
        found.setdefault(OLDER, {**clean, "PYTHONPATH": path})
    return found


def run_with_each_triton(script: Path, *arguments: str, timeout: float = 900) -> dict[str, list[Any]]:
    """Runs a script with each Triton, all at once; the lines of JSON that each printed, by version of Triton.

    Raises:
        RuntimeError: with what it printed, if one failed.
    """

    def run(environment: dict[str, str]) -> list[Any]:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, str(script), *arguments],
                env={**environment, "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        if done.returncode:
            raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    found = environments()
    with ThreadPoolExecutor() as pool:
        return dict(zip(found, pool.map(run, found.values()), strict=True))


def compile_everywhere(*names: str) -> list[Fact]:
    """Every variant of the modules, by default of all, for every architecture with every Triton here."""
    by_version = run_with_each_triton(Path(__file__), "facts", *names)
    return [Fact(**fact) for found in by_version.values() for fact in found]


def faults(found: list[Fact]) -> list[str]:
    """A line for each fault of a kernel, with the architectures and versions of Triton that show it."""
    where: dict[str, list[str]] = {}
    for fact in found:
        for fault in fact.faults:
            line = f"{fact.module}: {fact.variant} ({fact.kernel}) {fault}"
            where.setdefault(line, []).append(f"sm_{fact.arch} with Triton {fact.triton}")
    return [f"{line}: {', '.join(places)}" for line, places in where.items()]


# -------------------------------------------------------------------------------------------------------- document

INTRODUCTION = """\
# Triton kernels, compiled ahead of time

Written by `make aot`, without a GPU: every variant of every Triton kernel, compiled for sm_80, sm_90, sm_100 and sm_120, and
what its machine code shows. `make test` compiles them again and fails on a spill, on more shared memory than the
architecture has, on a matrix kernel without matrix instructions (or another with them: a product of float32 that asks for
full precision), and on a kernel that moves rows without 16-byte loads.

Where versions of Triton differ, each is shown: {versions}. Registers are those of a thread, of at most 255; shared memory is
that of a block, in bytes; the rest counts instructions of the code, which a loop runs more often. The last column counts
those of the longest loop that has no other in it, and of these the ones of the exp unit and the additions and
multiplications of float32. The kernels in CUDA C++ are in [cuda_kernels.md](cuda_kernels.md).

"""
HEADER = ("kernel", "for", "registers", "shared memory", "spills", "matrix instructions", "16-byte loads", "loop")


def cells(fact: Fact) -> tuple[str, ...]:
    matrix = ", ".join(f"{count} {name}" for name, count in sorted(fact.matrix.items())) or "none"
    loop = f"{fact.loop}: {fact.exps} exp, {fact.sums} float" if fact.loop else "none"
    wide = str(fact.wide_loads or "none")
    return str(fact.registers), str(fact.shared), str(fact.spills or "none"), matrix, wide, loop


def document(found: list[Fact]) -> str:
    """The Markdown of docs/ahead_of_time.md."""
    rows: dict[str, dict[tuple[str, str], list[tuple[str, ...]]]] = {}
    for fact in found:
        row = rows.setdefault(fact.module, {}).setdefault((fact.variant, f"sm_{fact.arch}"), [])
        row.append(cells(fact))
    lines = [INTRODUCTION.format(versions=" / ".join(dict.fromkeys(fact.triton for fact in found)))]
    for module, by_variant in rows.items():
        lines += [f"## kernels/{module}.py", "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
        for key, versions in by_variant.items():
            merged = [" / ".join(dict.fromkeys(values)) for values in zip(*versions, strict=True)]
            lines.append(f"| {' | '.join((*key, *merged))} |")
        lines.append("")
    lines.append(attention_model.section(found))
    return "\n".join(lines).rstrip() + "\n"


def listed(text: str) -> set[tuple[str, str, str]]:
    """Module, variant and architecture of each row of the document."""
    found, module = set(), ""
    for line in text.splitlines():
        if line.startswith("## kernels/"):
            module = line.removeprefix("## kernels/").removesuffix(".py")
        elif line.startswith("| ") and (row := line.strip("| ").split(" | "))[1].startswith("sm_"):
            found.add((module, row[0], row[1]))
    return found


def main(command: str = "", *names: str) -> None:
    if command == "facts":
        for fact in facts(list(names)):
            print(json.dumps(asdict(fact)), flush=True)
        return
    if command not in ("check", "table") or (command == "table" and names):
        sys.exit(__doc__)
    if command == "table" and len(environments()) < 2:
        sys.exit(f"Triton, and Triton {OLDER} in the folder named by {OLDER_VARIABLE}, must be installed")
    found = compile_everywhere(*names)
    text, wrong = document(found), faults(found)
    if command == "check":
        print(text)
    elif not wrong:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(text)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
