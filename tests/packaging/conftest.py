"""Builds the package once: sdist from a copy of the tree, wheel from the sdist, editable wheel from the copy. And both
kinds of threads of the native library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vjepa.kernels import _native

ROOT = Path(__file__).resolve().parents[2]
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.dll", "native.json", "results", "*.egg-info")
PARTS = ("csrc", "kernels", "vjepa", "configs", "benchmarks")


def copy_tree(destination: Path) -> Path:
    """The sources of the package, without anything generated."""
    destination.mkdir()
    for name in PARTS:
        shutil.copytree(ROOT / name, destination / name, ignore=GENERATED)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, destination / path.name)
    return destination


def run_hook(hook: str, source: Path, out: Path, **environment: str) -> Path:
    """Runs one hook of the build backend in `source`, as pip does, without network, and returns what it made.

    Without the CUDA part unless `environment` asks for it: it takes longest, and once is enough.
    """
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    environ = {**os.environ, "VJEPA_CUDA_ARCHS": "none", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    """A largest error is drawn with the numbers: which test comes before must not decide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def call_backend():
    return run_hook


@dataclass(frozen=True)
class Built:
    source: Path  # the copied tree, in which the editable install was built
    sdist: Path
    wheel: Path
    wheel_tree: Path  # the wheel, unpacked
    editable_tree: Path  # the editable wheel, unpacked


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    source = copy_tree(folder / "source")
    sdist = run_hook("build_sdist", source, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    wheel = run_hook("build_wheel", next((folder / "unpacked").iterdir()), folder / "wheel", VJEPA_CUDA_ARCHS="80")
    editable = run_hook("build_editable", source, folder / "editable")
    for name, path in (("wheel_tree", wheel), ("editable_tree", editable)):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / name)
    return Built(source, sdist, wheel, folder / "wheel_tree", folder / "editable_tree")


@pytest.fixture(params=["PyTorch's threads", "own threads"])
def team(request):
    """Both kinds of threads, if PyTorch's OpenMP runtime has the interface."""
    address = _native.openmp_team()
    if request.param == "own threads":
        _native.library().vjepa_set_team(None)
    elif address is None:
        pytest.skip("PyTorch's OpenMP runtime has no GOMP_parallel")
    yield request.param
    _native.library().vjepa_set_team(address)
