"""The directions of the code base: csrc -> kernels -> vjepa, never back; and importing has no side effect."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
PACKAGE = sorted((ROOT / "vjepa").rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"})
SUBMODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE
    if path.name != "__main__.py"
)
MAXIMUM_LINES = 450
COMPILER = ("cpuid.h", "cuda_runtime.h", "emmintrin.h", "immintrin.h", "stdint.h")
SYSTEM = ("sys/syscall.h", "unistd.h")  # of Linux, to ask for leave to use AMX

# Runs in a fresh interpreter: imports torch, then each module in turn, and prints how the world changed with each.
PROBE = """
import importlib, json, os, sys, threading
import torch

def world():
    native = "libvjepa_native" in open("/proc/self/maps").read() if sys.platform == "linux" else False
    return {
        "the settings of PyTorch": str((torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())),
        "the environment": str(sorted(os.environ.items())),
        "the random generator": torch.random.get_rng_state().sum().item() + torch.initial_seed(),
        "CUDA": torch.cuda.is_initialized(),
        "the threads": threading.active_count(),
        "the native library": native,
    }

before = world()
for module in sys.argv[1:]:
    modules = set(sys.modules)
    importlib.import_module(module)
    after = world()
    print(json.dumps({
        "module": module,
        "changed": [name for name in before if before[name] != after[name]],
        "new": sorted(set(sys.modules) - modules),
    }))
    before = after
"""
# Modules that torch itself loads late, when operators are registered, if they are installed.
LOADED_BY_TORCH = {
    "torch",
    "sympy",
    "mpmath",
    "numpy",
    "jinja2",
    "markupsafe",
    "typing_extensions",
    "triton",
    "networkx",
}


def imported_modules(path: Path, package: str) -> set[str]:
    """Absolute names of everything a file imports anywhere in it, relative imports resolved against `package`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            found |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
    return found


def probe(*modules: str) -> list[dict]:
    done = subprocess.run([sys.executable, "-c", PROBE, *modules], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_resolver_sees_every_kind_of_import(tmp_path):
    source = tmp_path / "x.py"
    source.write_text("import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\nfrom ..h import i\n")
    assert imported_modules(source, "p.q") == {"a.b", "c", "p.q.e", "p.q.f", "p.h"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_nothing_of_vjepa_but_themselves(path):
    ours = {name for name in imported_modules(path, "vjepa.kernels") if name.split(".")[0] == "vjepa"}
    assert not [name for name in ours if name.split(".")[:2] != ["vjepa", "kernels"]]


def test_reference_imports_torch_alone():
    imported = imported_modules(ROOT / "kernels" / "reference.py", "vjepa.kernels")
    foreign = {name.split(".")[0] for name in imported} - {"torch"} - set(sys.stdlib_module_names)
    assert not foreign


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
def test_csrc_includes_only_itself_the_standard_library_the_compiler_and_cuda(path):
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.MULTILINE):
        if bracket == '"':
            assert (path.parent / name).resolve().is_relative_to(ROOT / "csrc")
            assert (path.parent / name).exists()
        else:
            assert "/" not in name or name in SYSTEM, f"{path.name} includes {name}"
            assert name in (*COMPILER, *SYSTEM) or not name.endswith(".h")


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_package_imports_neither_tests_nor_benchmarks(path):
    package = ".".join(path.parent.relative_to(ROOT).parts)
    tops = {name.split(".")[0] for name in imported_modules(path, package)}
    assert not tops & {"tests", "benchmarks", "kernels", "setup"}


def test_core_imports_need_torch_alone():
    package, kernels = probe("vjepa", "vjepa.kernels")
    assert [name for name in package["new"] if name.startswith("vjepa")] == ["vjepa"]
    assert not [name for name in kernels["new"] if name.startswith("vjepa") and not name.startswith("vjepa.kernels")]
    tops = {name.split(".")[0] for seen in (package, kernels) for name in seen["new"]}
    assert not tops - {"vjepa"} - LOADED_BY_TORCH - set(sys.stdlib_module_names)


def test_importing_has_no_side_effect():
    modules = [name for name in SUBMODULES if name.count(".") <= 1]
    changed = {seen["module"]: seen["changed"] for seen in probe("vjepa.kernels", *modules) if seen["changed"]}
    assert not changed


@pytest.mark.parametrize("path", [*KERNELS, *PACKAGE, *NATIVE], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= MAXIMUM_LINES


def test_kernels_refuse_to_be_imported_as_a_top_level_package():
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "vjepa.kernels" in done.stderr
