"""The sdist, the wheel and the editable install: what is in them, and that they work."""

from __future__ import annotations

import email
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vjepa.kernels import _native

ROOT = Path(__file__).resolve().parents[2]
NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and shutil.which("c++")),
    reason="no C++ compiler, cmake or ninja",
)


def python_files(folder: Path) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in folder.rglob("*.py")}


def test_sdist_holds_every_source(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    expected = native | python_files(ROOT / "vjepa") | python_files(ROOT / "kernels")
    assert not expected - names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", "native.json", ".pyc"))]


def test_wheel_from_sdist_maps_kernels_into_the_package(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    expected = python_files(ROOT / "vjepa") | {f"vjepa/{name}" for name in python_files(ROOT / "kernels")}
    assert not expected - names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"vjepa", "vjepa-0.1.0.dist-info"}
    assert {"vjepa/py.typed", "vjepa/kernels/native.json"} <= names


def test_wheel_serves_every_python_of_one_platform(built):
    name, version, python, abi, platform = built.wheel.stem.split("-")
    assert (name, version, python, abi) == ("vjepa", "0.1.0", "py3", "none")
    assert platform != "any"


def test_metadata_core_needs_torch_alone(built):
    metadata = email.message_from_string((built.wheel_tree / "vjepa-0.1.0.dist-info/METADATA").read_text())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert [str(r) for r in requirements if r.marker is None] == ["torch>=2.10"]
    assert {"train", "test", "bench", "flash-attn", "xformers", "torchcodec", "all"} <= set(
        metadata.get_all("Provides-Extra")
    )
    unbounded = [str(r) for r in requirements if r.name != "vjepa" and ">=" not in str(r.specifier)]
    assert not unbounded
    included = {
        extra for r in requirements if r.name == "vjepa" and r.marker.evaluate({"extra": "all"}) for extra in r.extras
    }
    assert {"train", "test", "bench"} <= included
    assert not included & {"flash-attn", "xformers", "torchcodec"}
    assert metadata["License-Expression"] == "Apache-2.0"


def test_console_script(built):
    text = (built.wheel_tree / "vjepa-0.1.0.dist-info/entry_points.txt").read_text()
    assert "vjepa = vjepa.cli:main" in text


@NEEDS_COMPILER
def test_wheel_carries_a_working_library(built):
    record = json.loads((built.wheel_tree / "vjepa/kernels/native.json").read_text())
    assert record["cpu"] is None
    assert (built.wheel_tree / "vjepa/kernels" / record["library"]).exists()
    if shutil.which("nvcc"):
        assert record["cuda"] is None
    code = (
        "import torch; from vjepa.kernels import _native as n, _native_ema as e; t = torch.ones(3); "
        "e.CPUUpdate([t], [torch.zeros(3)])(0.5); print(n.__file__, t.tolist(), n.build_info()['version'])"
    )
    # First on the path: the wheel's package must win over an editable install of the environment.
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:1] = [{str(built.wheel_tree)!r}]; {code}"],
        cwd=built.wheel_tree,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [
        str(built.wheel_tree / "vjepa/kernels/_native.py"),
        "[0.5, 0.5, 0.5] 0.1.0\n",
    ]


def test_editable_install_points_at_the_sources(built):
    code = (
        f"import site, importlib.util as u; site.addsitedir({str(built.editable_tree)!r}); "
        "print(u.find_spec('vjepa').origin); print(u.find_spec('vjepa.kernels').origin)"
    )
    # -S keeps the environment's own packages, and an editable install among them, out of the way.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = [built.source / "vjepa/__init__.py", built.source / "kernels/__init__.py"]
    assert done.stdout.split() == [str(path) for path in expected]


@NEEDS_COMPILER
def test_editable_install_puts_the_library_beside_the_sources(built):
    record = json.loads((built.source / "kernels/native.json").read_text())
    assert (built.source / "kernels" / record["library"]).exists()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"PATH": "/nonexistent"}, "cmake and ninja not found"), ({"CXX": "/nonexistent/c++"}, "/nonexistent/c++")],
    ids=["no cmake", "no compiler"],
)
def test_without_a_compiler_the_package_installs_and_keeps_the_reason(
    built, call_backend, tmp_path, environment, reason
):
    if "CXX" in environment and not shutil.which("cmake"):
        pytest.skip("no cmake to complain about the compiler")
    source = shutil.copytree(
        built.source, tmp_path / "source", ignore=shutil.ignore_patterns("*.so", "build", "*.dylib")
    )
    wheel = call_backend("build_wheel", source, tmp_path / "wheel", **environment)
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("vjepa/kernels/native.json"))
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    assert record["library"] is None
    assert reason in record["cpu"]
    assert record["cuda"]


def test_missing_library_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "native.json").write_text('{"library": null, "cpu": "cmake not found on PATH", "cuda": null}')
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    for cached in (_native._record, _native._load):
        cached.cache_clear()
    try:
        assert _native.available() == (False, "the native library was not built: cmake not found on PATH")
        with pytest.raises(_native.NativeError, match="cmake not found"):
            _native.build_info()
    finally:
        for cached in (_native._record, _native._load):
            cached.cache_clear()
