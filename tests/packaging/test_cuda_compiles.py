"""Every .cu compiles without a warning and without spilling, for every architecture in use; no GPU needed."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    """The script beside this file as a module."""
    spec = importlib.util.spec_from_file_location("vjepa_tests_cuda_code", Path(__file__).with_name("cuda_code.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cuda_code = load()
needs_nvcc = pytest.mark.skipif(cuda_code.NVCC is None, reason="nvcc not found")
needs_names = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt not found")

KERNEL = "_ZN5vjepa38_GLOBAL__N__5b418fe2_6_ema_cu_61ab9f6a10ema_kernelEPK16vjepa_ema_tensorPK11vjepa_chunkdPKd"
REPORT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_90'
ptxas info    : Function properties for {KERNEL}
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 45 bytes smem
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_80'
ptxas info    : Function properties for {KERNEL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 65 registers, used 0 barriers, 384 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def compiled():
    return cuda_code.compile_all()


@needs_nvcc
@needs_names
def test_every_kernel_compiles_for_every_architecture_without_spills(compiled):
    known = cuda_code.known_architectures()
    assert known
    expected = {(path, name, arch) for path in cuda_code.SOURCES for name in cuda_code.declared(path) for arch in known}
    assert {(cuda_code.ROOT / k.source, k.name.partition("<")[0], k.arch) for k in compiled} == expected
    faults = [fault for kernel in compiled for fault in kernel.faults]
    assert not faults, "\n".join(faults)


@needs_nvcc
@needs_names
def test_the_document_lists_what_there_is(compiled):
    """To the number, where it was written with this nvcc."""
    text = cuda_code.DOCUMENT.read_text()
    version, known = cuda_code.nvcc_version(), cuda_code.known_architectures()
    listed = {row for row in cuda_code.listed(text) if row[2] in known}
    assert listed == {(kernel.source, kernel.name, kernel.arch) for kernel in compiled}, "run `make aot`"
    if version == cuda_code.documented_version(text):
        assert text == cuda_code.document(compiled, version), "run `make aot`"


def test_the_document_can_be_read_back():
    kernels = [cuda_code.Kernel("csrc/cuda/x.cu", "kernel<float, 4>", arch, 40, 0, 0, 0) for arch in (80, 90)]
    text = cuda_code.document(kernels, "13.0.88")
    assert cuda_code.listed(text) == {("csrc/cuda/x.cu", "kernel<float, 4>", arch) for arch in (80, 90)}
    assert cuda_code.documented_version(text) == "13.0.88"
    assert "| kernel<float, 4> | sm_80 | 40 | 0 | none |" in text.splitlines()


@needs_names
def test_a_report_is_read_and_faults_are_seen():
    one, other = cuda_code.read_report("x.cu", REPORT)
    assert one == cuda_code.Kernel("x.cu", "ema_kernel", 80, 65, 0, 0, 0)
    assert other == cuda_code.Kernel("x.cu", "ema_kernel", 90, 31, 45, 8, 12)
    assert one.faults == ["x.cu: ema_kernel for sm_80 needs 65 registers, 64 are allowed"]
    assert other.faults == ["x.cu: ema_kernel for sm_90 spills: 8 bytes stored, 12 loaded"]
    with pytest.raises(ValueError, match=r"nothing of registers or spills of .*ema_kernel.* for sm_80"):
        cuda_code.read_report("x.cu", REPORT.replace("Used 65", "Uses 65"))


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("vjepa::(anonymous namespace)::kernel(int const*, vjepa::Groups)", "kernel"),
        ("void vjepa::kernel<float, (vjepa::Kind)1, 256>(float const*)", "kernel<float, (Kind)1, 256>"),
        ("void kernel<vjepa::Row<std::pair<int, bool> >, true>(int)", "kernel<Row<std::pair<int, bool> >, true>"),
        ("kernel", "kernel"),
    ],
)
def test_names_are_short(demangled, short):
    assert cuda_code.short_name(demangled) == short


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "sentence"), [("int unused = 0;", "unused"), ("nothing", "failed:")], ids=["warning", "error"]
)
def test_a_warning_is_an_error(tmp_path, body, sentence):
    source = tmp_path / "x.cu"
    source.write_text(f"__global__ void kernel() {{ {body} }}\n")
    with pytest.raises(RuntimeError, match=sentence):
        cuda_code.compile_source(source)
