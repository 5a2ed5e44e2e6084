"""The model's linear layers against torch.nn.functional.linear: values, gradients, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vjepa.kernels import backend
from vjepa.kernels._linear import linear

pytestmark = pytest.mark.usefixtures("used_memory")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def make(shape=(9, 24), features=40, dtype=FP32):
    inputs = [torch.randn(shape), torch.randn(features, shape[-1]) * shape[-1] ** -0.5, torch.randn(features)]
    return [x.to(dtype) for x in inputs], torch.randn(*shape[:-1], features).to(dtype)


def results(function, inputs, grad):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)]


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(9, 24), (1, 1), (2, 33, 17), (2, 3, 5, 8), (0, 24), (700, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(check_accuracy, name, dtype, shape, bias):
    inputs, grad = make(shape, 40, dtype)
    inputs[2] = inputs[2] if bias else None
    with backend(name):
        found = results(linear, inputs, grad)
    plain = results(F.linear, inputs, grad)
    exact = results(F.linear, [None if x is None else x.double() for x in inputs], grad.double())
    for ours, same_dtype, true in zip(found, plain, exact, strict=True):
        if ours.numel():
            check_accuracy(ours, same_dtype, true)
        if name == "reference" and shape != (1, 1):  # of which autograd takes the transposed product for dx
            assert torch.equal(ours, same_dtype)


@pytest.mark.parametrize("shape", [(1500, 384), (3, 201, 1536)], ids=str)
def test_large_products_of_float32(check_accuracy, shape):
    """Those that tiles of bfloat16 serve where a processor has them."""
    inputs, grad = make(shape, 390)
    found, plain = results(linear, inputs, grad), results(F.linear, inputs, grad)
    exact = results(F.linear, [x.double() for x in inputs], grad.double())
    for ours, same_dtype, true in zip(found, plain, exact, strict=True):
        check_accuracy(ours, same_dtype, true)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_inputs(wanted):
    inputs, grad = make()
    everything = results(linear, inputs, grad)[1:]
    for n in wanted:
        inputs[n].requires_grad_()
    linear(*inputs).backward(grad)
    for n, x in enumerate(inputs):
        assert (x.grad is not None) == (n in wanted)
        assert x.grad is None or torch.equal(x.grad, everything[n])


def test_any_strides_and_expanded_gradients():
    inputs, grad = make()
    expected = results(linear, inputs, grad)
    for change in (
        lambda x: x.mT.contiguous().mT if x.ndim == 2 else x,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.repeat_interleave(3, -1)[..., ::3],
    ):
        for ours, theirs in zip(results(linear, [change(x) for x in inputs], change(grad)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    for size in ((1, 1), (1, 40), (9, 1)):
        wide = torch.randn(size).expand(9, 40)
        for ours, theirs in zip(results(linear, inputs, wide), results(linear, inputs, wide.contiguous()), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_under_autocast():
    inputs, grad = make((2, 9, 24))
    with torch.autocast("cpu", BF16):
        found, plain = results(linear, inputs, grad.bfloat16()), results(F.linear, inputs, grad.bfloat16())
    assert [x.dtype for x in found] == [x.dtype for x in plain] == [BF16, FP32, FP32, FP32]
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_float64_is_plain_pytorch():
    inputs, grad = make(dtype=FP64)
    assert all(map(torch.equal, results(linear, inputs, grad), results(F.linear, inputs, grad)))


@pytest.mark.parametrize("bad", [torch.zeros(40, 23), torch.zeros(40, 24, dtype=FP16), torch.zeros(2, 40, 24)])
def test_the_errors_are_those_of_pytorch(bad):
    messages = []
    for function in (F.linear, linear):
        with pytest.raises(RuntimeError) as refused:
            function(torch.zeros(9, 24), bad)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@pytest.mark.filterwarnings("ignore:vjepa..linear_backward. an autograd kernel was not registered")
@pytest.mark.parametrize("shape", [(9, 24), (512, 384)], ids=str)
def test_gradients_of_gradients(shape):
    """Of sizes, too, that tiles serve."""
    inputs, _ = make(shape, 390)
    found = []
    for function in (linear, F.linear):
        x, weight = (given.clone().requires_grad_() for given in inputs[:2])
        of_x, of_weight = torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=True)
        found.append(torch.autograd.grad(of_x.sum() + of_weight.sum(), (x, weight)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("columns", "bias"), [(300, None), (384, torch.zeros(380)), (384, torch.zeros(390, dtype=FP16))], ids=str
)
def test_the_operator_refuses_what_its_product_would_read_beyond(columns, bias):
    """Of sizes that tiles serve."""
    with pytest.raises(RuntimeError):
        torch.ops.vjepa.linear(torch.zeros(300, 384), torch.zeros(390, columns), bias)


def test_opcheck():
    inputs, grad = make()
    opcheck(torch.ops.vjepa.linear.default, tuple(x.requires_grad_() for x in inputs))
    x, weight = (x.detach() for x in inputs[:2])
    for needs in ([True] * 3, [True, False, False], [False, True, True]):
        opcheck(torch.ops.vjepa.linear_backward.default, (grad, x, weight, needs))


def test_compiled_equals_eager_for_any_number_of_rows():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: linear(*given).sin(), fullgraph=True, backend="aot_eager")
    for number, rows in enumerate((4, 9, 2, 16)):
        inputs, grad = make((rows, 24))
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            ours = results(compiled, inputs, grad)
        for our, plain in zip(ours, results(lambda *given: linear(*given).sin(), inputs, grad), strict=True):
            torch.testing.assert_close(our, plain, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
