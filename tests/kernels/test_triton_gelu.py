"""GELU inside Triton kernels and its derivative, of every number of 16 bits, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

from vjepa.kernels import _triton_gelu  # noqa: E402

END = _triton_gelu.END.value
POLYNOMIAL = 1.4e-4  # relative error, that of its float32 operations and of the exponential included
SLOPE = 4e-5  # absolute error of the derivative
TAIL = 3.2e-2  # relative error of the values below the least float16
BLOCK = 1 << 14


@triton.jit
def _gelu_kernel(x_ptr, value_ptr, again_ptr, slope_ptr, EXACT: tl.constexpr, B: tl.constexpr):
    place_B = tl.program_id(0) * B + tl.arange(0, B)
    x_B = tl.load(x_ptr + place_B)
    again_B, slope_B = _triton_gelu.gelu_and_slope(x_B, EXACT)
    tl.store(value_ptr + place_B, _triton_gelu.gelu(x_B, EXACT))
    tl.store(again_ptr + place_B, again_B)
    tl.store(slope_ptr + place_B, slope_B)


def compute(x, exact, device):
    """gelu and its derivative of float32 x, in float64."""
    padded = torch.zeros(-(-x.numel() // BLOCK) * BLOCK, device=device)
    padded[: x.numel()] = x
    value, again, slope = (torch.full_like(padded, float("nan")) for _ in range(3))
    _gelu_kernel[padded.numel() // BLOCK,](padded, value, again, slope, exact, BLOCK)
    torch.testing.assert_close(value, again, rtol=0, atol=0, equal_nan=True)
    return value[: x.numel()].double(), slope[: x.numel()].double()


def formula(x):
    """In float64, with the small values of negative x as exact as the large ones."""
    below = torch.special.erfc(x * -(0.5**0.5)) / 2
    return x * below, below + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


def numbers(dtype, device):
    """All finite ones, in float32."""
    x = torch.arange(1 << 16, device=device).to(torch.int16).view(dtype).float()
    return x[x.isfinite()]


@pytest.mark.filterwarnings("ignore:overflow")  # of NumPy, below Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(device, dtype):
    x = numbers(dtype, device)
    value, slope = compute(x, False, device)
    exact, exact_slope = formula(x.double())
    inside, least = x >= -END, torch.finfo(torch.float32).tiny
    error = (value - exact).abs()
    assert bool((error <= POLYNOMIAL * exact.abs() + least)[inside].all())
    assert bool((error <= TAIL * exact.abs() + least)[~inside].all())
    assert float(exact[~inside].abs().max()) < 6.1e-8
    assert float((slope - exact_slope).abs().max()) <= SLOPE

    half_a_unit = torch.finfo(dtype).eps / 2
    rounded = (value.to(dtype).double() - exact).abs()
    coarse = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = (half_a_unit * (1 + POLYNOMIAL) + POLYNOMIAL) * exact.abs()
    assert bool((rounded <= allowed + 0.52 * coarse + least)[inside].all())


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_infinite_and_none(device):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38, -3.4e38, 1e-45], device=device)
    value, slope = compute(x, False, device)
    assert value.tolist()[:2] == [float("inf"), 0] and value[2].isnan()
    assert value.tolist()[3:7] == [0, 0, torch.tensor(3.4e38).item(), 0]
    assert slope.tolist()[:2] == [1, 0] and slope[2].isnan()
    torch.testing.assert_close(slope[3:5], torch.full_like(slope[3:5], 0.5), rtol=0, atol=SLOPE)
    assert slope.tolist()[5:7] == [1, 0]


def test_float32_is_as_exact_as_pytorch(check_accuracy, device):
    x = torch.cat((torch.linspace(-12, 12, 20001), torch.randn(5000) * 1e-3)).to(device).requires_grad_()
    value, slope = compute(x.detach(), True, device)
    plain = F.gelu(x)
    (plain_slope,) = torch.autograd.grad(plain.sum(), x)
    exact, exact_slope = formula(x.detach().double())
    check_accuracy(value.float(), plain.detach(), exact)
    check_accuracy(slope.float(), plain_slope, exact_slope)
