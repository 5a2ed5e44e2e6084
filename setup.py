"""Builds csrc into the native library of vjepa.kernels; the metadata is in pyproject.toml.

The library has a C ABI: no torch at build time, no network, one binary for every Python and PyTorch. Whatever cannot be
built here is left out and the reason kept in native.json beside the library; the package works without it.
VJEPA_CUDA_ARCHS="80;90" chooses the compute capabilities, VJEPA_CUDA_ARCHS=none leaves the CUDA part out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libvjepa_native.so", "libvjepa_native.dylib", "vjepa_native.dll")
RECORD = "native.json"


class BuildError(Exception):
    """CMake or a compiler refused; the message is what it said first."""


def run_cmake(build_folder: Path, options: list[str]) -> Path:
    """Configures and builds csrc in `build_folder` and returns the library."""
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build_folder), "-G", "Ninja", *options]
    for command in (configure, ["cmake", "--build", str(build_folder)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        print(done.stdout, file=sys.stderr)
        if done.returncode:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            blamed = next((place for place, line in enumerate(lines) if "error" in line.lower()), 0)
            its = lines[blamed : blamed + 1]
            while its and its[-1].endswith(":") and lines[blamed + len(its) :]:  # CMake goes on on the next line
                its.append(lines[blamed + len(its)])
            raise BuildError(" ".join(its) or f"cmake exited with {done.returncode}")
    return next(build_folder / name for name in LIBRARIES if (build_folder / name).exists())


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDA_HOME or CUDA_PATH first, then PATH, then the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin") for home in homes] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


def build_library(folder: Path, version: str) -> dict[str, str | None]:
    """Puts the library into `folder`; returns its name and, where a part is missing, the reason ("cpu", "cuda")."""
    missing = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
    if missing:
        reason = f"{' and '.join(missing)} not found on PATH"
        return {"library": None, "cpu": reason, "cuda": reason}
    archs = os.environ.get("VJEPA_CUDA_ARCHS", "80;90;100").replace(",", ";").replace(" ", ";")
    nvcc, reason = find_nvcc(), "nvcc not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
    if archs in ("", "none"):
        nvcc, reason = None, "VJEPA_CUDA_ARCHS asked for none"
    with tempfile.TemporaryDirectory() as temporary:
        library, options = None, [f"-DVJEPA_VERSION={version}"]
        if nvcc:
            try:
                cuda = ["-DVJEPA_CUDA=ON", f"-DVJEPA_NVCC={nvcc}", f"-DVJEPA_CUDA_ARCHS={archs}"]
                library = run_cmake(Path(temporary) / "cuda", options + cuda)
            except BuildError as error:
                reason = f"{nvcc} failed: {error}"
        if library is None:
            try:
                library = run_cmake(Path(temporary) / "cpu", [*options, "-DVJEPA_CUDA=OFF"])
            except BuildError as error:
                return {"library": None, "cpu": f"the C++ build failed: {error}", "cuda": reason}
            nvcc = None
        shutil.copy2(library, folder / library.name)
        return {"library": library.name, "cpu": None, "cuda": None if nvcc else reason}


class build_native(Command):
    """Writes the native library and its record into the built package, or into kernels/ for an editable install."""

    description = "build the native library of vjepa.kernels"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def folder(self) -> Path:
        return ROOT / "kernels" if self.editable_mode else Path(self.build_lib or "") / "vjepa" / "kernels"

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            (self.folder / name).unlink(missing_ok=True)
        record = build_library(self.folder, self.distribution.get_version())
        for part in ("cpu", "cuda"):
            if record[part]:
                print(f"vjepa: the native {part} part is left out: {record[part]}", file=sys.stderr)
        (self.folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def get_source_files(self) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())

    def get_outputs(self) -> list[str]:
        return [str(path) for name in (*LIBRARIES, RECORD) if (path := self.folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and, since the ABI is C, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


build.sub_commands.append(("build_native", None))

setup(
    packages=[*find_packages(include=["vjepa", "vjepa.*"]), "vjepa.kernels"],
    package_dir={"vjepa.kernels": "kernels"},
    cmdclass={"build_native": build_native, "bdist_wheel": PlatformWheel},
    distclass=NativeDistribution,
)
