"""Triton as an option: where it can serve and why not, when it is imported, and what is said of its variants."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from vjepa.kernels import _dispatch, _triton, backend, gather_tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IMPORTED_LATE = """
import sys, torch
from vjepa.kernels import TokenIndices, backend, gather_tokens
x, sets = torch.randn(2, 5, 3), TokenIndices.from_sets([torch.tensor([4, 1]), torch.tensor([0])])
plain = gather_tokens(x, sets)
before = any(name.startswith("vjepa.kernels._triton_") for name in sys.modules)
with backend("triton"):
    same = torch.equal(gather_tokens(x, sets), plain)
print(before, same, "vjepa.kernels._triton_gather" in sys.modules)
"""


@pytest.fixture
def capability(monkeypatch):
    """Pretends that the GPU has a compute capability."""

    def pretend(major, minor):
        monkeypatch.setattr(_triton, "capability", lambda device: (major, minor))

    return pretend


def test_cpu_tensors_are_for_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "installed", lambda: True)
    for value in ("1", "true", "ON", "Yes", "y"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert _triton.why_not(CPU) is None
    for value in ("0", "", "off"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert _triton.why_not(CPU) == "Triton serves CPU tensors only under its interpreter: set TRITON_INTERPRET=1"


def test_cuda_tensors_need_a_gpu_that_is_new_enough(monkeypatch, capability):
    monkeypatch.setattr(_triton, "installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for version in ((8, 0), (8, 9), (9, 0), (12, 0)):
        capability(*version)
        assert _triton.why_not(GPU) is None
    capability(7, 5)
    assert _triton.why_not(GPU) == "cuda:0 has compute capability 7.5; 8.0 or newer is needed"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in _triton.why_not(GPU)


def test_other_devices_and_a_missing_triton(monkeypatch):
    assert _triton.why_not(torch.device("meta")) == "it serves CUDA devices, not meta"
    monkeypatch.setattr(_triton, "installed", lambda: False)
    for device in (CPU, GPU):
        assert _triton.why_not(device).startswith("Triton is not installed; get it with: pip install triton")


@pytest.mark.parametrize(
    "op", ["gather_tokens", "masked_l1_loss", "predictor_tokens", "scatter_tokens", "tubelet_embed"]
)
def test_an_explicit_choice_raises_with_the_reason(monkeypatch, op):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_triton, "installed", lambda: True)
    with backend("triton"), pytest.raises(RuntimeError, match=f"backend triton cannot serve {op} on cpu: .*set TRITON"):
        _dispatch.select(op, CPU)
    monkeypatch.setattr(_triton, "installed", lambda: False)
    with backend("triton"), pytest.raises(RuntimeError, match=f"cannot serve {op} on cpu: Triton is not installed"):
        _dispatch.select(op, CPU)
    assert _dispatch.select(op, CPU).name != "triton"


def test_the_reason_reaches_the_caller(monkeypatch, make_sets):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with backend("triton"), pytest.raises(RuntimeError, match="backend triton cannot serve gather_tokens on cpu"):
        gather_tokens(torch.zeros(1, 4, 2), make_sets((2,), 4))


@pytest.mark.skipif(not _triton.installed(), reason="Triton is not installed")
def test_kernels_are_imported_when_they_are_wanted():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_LATE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True", "True"]


def test_the_device_of_a_tensor_is_made_current_if_it_is_not(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for device in (CPU, GPU, torch.device("cuda", 1)):
        with _triton.device_of(SimpleNamespace(device=device)):
            pass
    assert entered == [torch.device("cuda", 1)]


def test_next_power_of_2():
    numbers = [0, 1, 2, 3, 4, 5, 24, 64, 65, 384, 1024, 1408]
    assert [_triton.next_power_of_2(n) for n in numbers] == [1, 1, 2, 4, 4, 8, 32, 64, 128, 512, 1024, 2048]


def test_ceil_div():
    assert [_triton.ceil_div(n, 16) for n in (0, 1, 15, 16, 17, 32)] == [0, 1, 1, 1, 2, 2]
