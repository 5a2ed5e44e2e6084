"""`vjepa doctor`: what it reports, what counts as healthy, and that it works with torch alone."""

import importlib
import re

import pytest

from vjepa import doctor
from vjepa.cli import main


@pytest.fixture
def without(monkeypatch):
    """Makes some modules impossible to import, as if they were not installed (or broken)."""
    real = importlib.import_module

    def hide(*names: str, error=lambda name: ModuleNotFoundError(f"No module named {name!r}", name=name)):
        def pretend(name, *rest):
            if name in names:
                raise error(name)
            return real(name, *rest)

        monkeypatch.setattr(doctor.importlib, "import_module", pretend)

    return hide


def test_a_complete_installation_is_healthy(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for pattern in (
        r"^  vjepa +\d",
        r"^  torch +\d",
        r"^  av +\d.*FFmpeg",
        r"^  cpu +torch uses \d+ of \d+",
        r"^  varlen_attention +cpu: \w+",
        r"^  tubelet_embed +cpu: \w+",
        r"^  h264 +yes",
        r"^  healthy: ",
    ):
        assert re.search(pattern, out, re.M), pattern
    assert {"h264", "hevc", "vp9", "av1", "mpeg4"} <= set(re.findall(r"^  (\w+) +(?:yes|no)", out, re.M))


def test_without_av_it_says_what_is_missing_and_how_to_get_it(without, capsys):
    without("av")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: av is missing (decoding video (PyAV, brings FFmpeg)): pip install 'vjepa[train]'" in out
    assert "Video decoders" not in out
    assert "healthy" not in out


def test_torch_alone_is_enough_to_be_told(without, capsys):
    without(*(package.module for package in doctor.PACKAGES if package.module != "torch"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "Native library" in out and "varlen_attention" in out
    required = [package.distribution for package in doctor.PACKAGES if package.required and package.module != "torch"]
    assert re.findall(r"problem: (\S+) is missing", out) == required


def test_an_optional_package_is_no_problem(without, capsys):
    without("pyarrow", "flash_attn", "xformers", "triton")
    assert main(["doctor"]) == 0
    assert "pip install 'vjepa[parquet]'" in capsys.readouterr().out


def test_a_package_that_does_not_load_is_told_with_its_reason(without):
    without("av", error=lambda name: OSError("libavcodec.so: cannot open shared object file"))
    report = doctor.examine()
    assert any("does not import: libavcodec.so: cannot open" in line for line in report.lines)
    assert len(report.problems) == 1


def test_a_missing_decoder_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "has_decoder", lambda name: name not in ("libdav1d", "libaom-av1"))
    report = doctor.examine()
    assert any(re.match(r"  av1 +no: .*pip install", line) for line in report.lines)
    assert report.problems == [], "AV1 matters only to those who have such files"
    monkeypatch.setattr(doctor, "has_decoder", lambda name: name != "h264")
    assert doctor.examine().problems[0].startswith("no decoder for h264")


def test_torchcodec_is_optional_and_told(without):
    from vjepa.data.torchcodec_frames import video_decoder

    video_decoder.cache_clear()
    without("torchcodec.decoders")
    report = doctor.examine()
    assert any(re.match(r"  torchcodec +no \(optional\): .*pip install 'vjepa\[torchcodec\]'", x) for x in report.lines)
    assert report.problems == []


def test_decoders_are_really_asked_for():
    assert doctor.has_decoder("h264")
    assert not doctor.has_decoder("no_such_codec")


def test_little_shared_memory_is_told_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", str(tmp_path))
    sizes = {"free": 64 * 2**20}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: (2**34, 2**34 - sizes["free"], sizes["free"]))
    row = next(line for line in doctor.examine().lines if "shared memory" in line)
    assert f"0.06 of 16.00 GiB free in {tmp_path}; LITTLE for worker processes" in row and "--shm-size" in row
    sizes["free"] = 2**33
    assert not any("LITTLE" in line for line in doctor.examine().lines)


def test_the_native_library_says_why_it_is_not_there(monkeypatch):
    from vjepa.kernels import _native

    monkeypatch.setattr(_native, "available", lambda: (False, "it was not built: no compiler"))
    monkeypatch.setattr(_native, "cuda_available", lambda: (False, "no nvcc"))
    report = doctor.examine()
    assert any("not available: it was not built: no compiler" in line for line in report.lines)
    assert any("not available: no nvcc" in line for line in report.lines)
