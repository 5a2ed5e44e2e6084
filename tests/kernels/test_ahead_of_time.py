"""Triton without a GPU: what every kernel becomes on every architecture, and that another mask compiles nothing.

With the Triton that is installed and with Triton 3.6.0, which `make test` puts into a folder of its own. Both compile in
processes of their own, at the same time, because the tests of this process run kernels under Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load(name: str) -> ModuleType:
    """A script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(f"vjepa_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ahead_of_time = load("ahead_of_time")
OLDER = ahead_of_time.OLDER
LAUNCHES = Path(__file__).with_name("launches.py")
CARELESS = "careless"
SPILLING, CLEAN = "REG:128 STACK:8 SHARED:1024 LOCAL:0", "REG:40 STACK:0 SHARED:0 LOCAL:0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the fixture compiles everything
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Any]]:
    """What became of each variant, by version of Triton; those of careless.py too."""
    found: dict[str, list[Any]] = {}
    for fact in ahead_of_time.compile_everywhere(CARELESS, *ahead_of_time.modules()):
        found.setdefault(fact.triton, []).append(fact)
    return found


@pytest.fixture(scope="module")
def launched() -> dict[str, list[Any]]:
    """What launches.py prints about a training step, by version of Triton."""
    return ahead_of_time.run_with_each_triton(LAUNCHES, "step")


@pytest.fixture(scope="module")
def carelessly_launched() -> dict[str, list[Any]]:
    """What it prints about a kernel that is specialised on the number of tokens."""
    return ahead_of_time.run_with_each_triton(LAUNCHES, CARELESS)


@pytest.fixture(params=["installed", OLDER])
def of_version(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], Any]:
    """Picks the entry of one version of Triton."""
    versions = list(ahead_of_time.environments())
    version = versions[0] if request.param == "installed" else OLDER
    if version not in versions:
        pytest.skip(
            f"Triton {OLDER} is not in {ahead_of_time.older_folder()}: make test puts it there, or name its folder in "
            f"{ahead_of_time.OLDER_VARIABLE}"
        )
    return lambda found: found[version]


def test_every_variant_compiles_without_a_fault(compiled, of_version):
    facts = [fact for fact in of_version(compiled) if fact.module != CARELESS]
    assert {fact.arch for fact in facts} == {80, 90, 100, 120}
    assert {fact.module for fact in facts} == set(ahead_of_time.modules())
    wrong = ahead_of_time.faults(facts)
    assert not wrong, "\n".join(wrong)


def test_the_document_lists_what_there_is(compiled):
    facts = [fact for found in compiled.values() for fact in found if fact.module != CARELESS]
    listed = ahead_of_time.listed(ahead_of_time.DOCUMENT.read_text())
    assert listed == {(fact.module, fact.variant, f"sm_{fact.arch}") for fact in facts}, "run `make aot`"
    assert ahead_of_time.listed(ahead_of_time.document(facts)) == listed


def test_careless_kernels_are_refused(compiled, of_version):
    faults: dict[tuple[str, int], str] = {
        (fact.variant, fact.arch): "; ".join(fact.faults) for fact in of_version(compiled) if fact.module == CARELESS
    }
    for arch in (80, 90, 100, 120):
        assert "spills: " in faults["spilling", arch]
        assert faults["narrow", arch] == "has no matrix instructions; has no 16-byte loads"
        assert "cannot be compiled" in faults["broken", arch]
    assert "needs 163840 bytes of shared memory, there are 101376" in faults["greedy", 120]
    assert "shared memory" not in faults["greedy", 80]


def test_matrix_instructions_of_every_architecture_are_seen(compiled, of_version):
    kinds = {fact.arch: set(fact.matrix) for fact in of_version(compiled) if fact.variant == "greedy"}
    assert kinds == {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}, 120: {"HMMA"}}


def test_another_mask_compiles_nothing(launched, of_version):
    (report,) = of_version(launched)
    assert report["late"] == []
    assert report["not_launched"] == []


def test_what_is_launched_is_what_is_compiled_ahead_of_time(launched, of_version):
    (report,) = of_version(launched)
    assert report["unlisted"] == []
    assert report["without_variant"] == []


def test_a_kernel_specialised_on_the_number_of_tokens_is_seen(carelessly_launched, of_version):
    (report,) = of_version(carelessly_launched)
    assert [kernel["kernel"] for kernel in report["late"]] == ["careless.specialised_kernel"] * 2
    assert [kernel["types"]["num_tokens"] for kernel in report["late"]] == ["i32", "constexpr"]


def code(*instructions: str) -> str:
    lines = [f"        /*{16 * n:04x}*/                   {text} ;" for n, text in enumerate((*instructions, "EXIT"))]
    return "\n".join(["\t.target\tsm_90a", *lines])


@pytest.mark.parametrize(
    ("instruction", "matrix", "wide_loads", "spills"),
    [
        ("LDG.E.128 R4, desc[UR8][R2.64]", {}, 1, 0),
        ("@!P0 LDG.E.128.CONSTANT R4, [R2.64]", {}, 1, 0),
        ("@P3 LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64]", {}, 1, 0),
        ("LDG.E.ENL2.256 R4, R8, desc[UR8][R2.64]", {}, 1, 0),
        ("@!UP1 UTMALDG.2D [UR8], [UR4]", {}, 1, 0),
        ("LDG.E.LTC128B.64 R4, [R2.64]", {}, 0, 0),
        ("STG.E.128 desc[UR4][R2.64], R4", {}, 0, 0),
        ("LDS.128 R4, [R2]", {}, 0, 0),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {"HMMA": 1}, 0, 0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", {"HGMMA": 1}, 0, 0),
        ("@P1 UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR4], tmem[UR10]", {"UTCHMMA": 1}, 0, 0),
        ("QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4", {"QMMA": 1}, 0, 0),
        ("FFMA R4, R5, R6, R7", {}, 0, 0),
        ("STL.64 [R1+0x8], R2", {}, 0, 1),
        ("@P0 LDL R2, [R1]          &wr=0x2          ?trans1", {}, 0, 1),
    ],
)
def test_instructions_are_told_apart(instruction, matrix, wide_loads, spills):
    fact = ahead_of_time.Fact("module", "variant", "kernel", 90, OLDER)
    ahead_of_time.judge(fact, CLEAN, code("MOV R1, R2", instruction), matrix=False, wide=False)
    assert (fact.matrix, fact.wide_loads, fact.spills) == (matrix, wide_loads, spills)
    assert len(fact.faults) == bool(spills) + bool(matrix)  # neither was expected


def test_local_memory_is_a_spill_and_missing_code_an_error():
    fact = ahead_of_time.Fact("module", "variant", "kernel", 90, OLDER)
    ahead_of_time.judge(fact, SPILLING, code(), matrix=False, wide=False)
    assert fact.faults == ["spills: 8 bytes of local memory, 0 instructions"]
    with pytest.raises(ValueError, match="no machine code for sm_100"):
        ahead_of_time.read_instructions(code(), 100)
    with pytest.raises(ValueError, match="no machine code for sm_90"):
        ahead_of_time.read_instructions("\t.target\tsm_90a", 90)
    with pytest.raises(ValueError, match="no resource usage"):
        ahead_of_time.read_usage("")
