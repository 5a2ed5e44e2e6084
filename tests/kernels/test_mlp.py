"""mlp against linear, GELU and linear: in float64, and as PyTorch runs them in the same dtype; and its GELU for 16 bits."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa.kernels import backend, mlp

pytestmark = pytest.mark.usefixtures("used_memory")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [FP32, BF16, FP16]
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")
SHAPE = (7, 24, 72, 40)  # N, D, H, E
# Tiles of 128 and 32 rows, 128 hidden features and depths of 64 and 32 are full, begun, or cut to the next power of two.
SHAPES = [SHAPE, (1, 64, 160, 24), (130, 40, 160, 64), (33, 9, 5, 11), (2, 100, 1, 1), (3, 1, 64, 130), (0, 24, 72, 40)]


def eager(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


class Cut(torch.autograd.Function):
    """Cuts float32 off to bfloat16, and its gradient too, as Triton's interpreter does where a GPU rounds."""

    @staticmethod
    def cut(x):
        return (x.contiguous().view(torch.int32) & -65536).view(FP32)

    @staticmethod
    def forward(ctx, x):
        return Cut.cut(x)

    @staticmethod
    def backward(ctx, grad):
        return Cut.cut(grad)


def eager_cut(x, weight1, bias1, weight2, bias2):
    x, weight1, bias1, weight2, bias2 = (None if a is None else a.float() for a in (x, weight1, bias1, weight2, bias2))
    return F.linear(Cut.apply(F.gelu(Cut.apply(F.linear(x, weight1, bias1)))), weight2, bias2).bfloat16()


def make(shape=SHAPE, dtype=FP32, device="cpu", absent=()):
    tokens, width, hidden, features = shape
    shapes = ((tokens, width), (hidden, width), (hidden,), (features, hidden), (features,))
    scales = (1, width**-0.5, 1, hidden**-0.5, 1)
    inputs = [(torch.randn(size, device=device) * s).to(dtype) for size, s in zip(shapes, scales, strict=True)]
    inputs = [None if name in absent else x for name, x in zip(NAMES, inputs, strict=True)]
    return inputs, torch.randn(tokens, features, device=device).to(dtype)


def results(function, inputs, grad):
    """The output, then the gradients of those inputs that are there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)]


def check(check_accuracy, serving, inputs, grad):
    found = results(mlp, inputs, grad)
    cut = serving == "triton" and grad.dtype == BF16 and grad.device.type == "cpu"
    plain = results(eager_cut if cut else eager, inputs, grad)
    exact = results(eager, [None if x is None else x.double() for x in inputs], grad.double())
    assert [x.dtype for x in found] == [grad.dtype] * len(found)
    assert found[0].is_contiguous()
    for ours, same_dtype, true in zip(found, plain, exact, strict=True):
        if ours.numel():
            check_accuracy(ours, same_dtype, true)
    with torch.no_grad():
        assert torch.equal(mlp(*inputs), found[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(check_accuracy, serving, device, shape, dtype):
    check(check_accuracy, serving, *make(shape, dtype, device))


@pytest.mark.parametrize("shape", [(700, 384, 1536, 384), (1501, 260, 1600, 300)])
def test_large_products_of_float32(check_accuracy, shape):
    """Those that tiles of bfloat16 serve where a processor has them; the second in two chunks of rows."""
    check(check_accuracy, "auto", *make(shape))


@pytest.mark.parametrize("features", [300, 400])
def test_the_operator_refuses_tokens_whose_products_would_read_beyond(features):
    """Of sizes that tiles serve; weight1 has another number of columns."""
    inputs, grad = make((512, 384, 640, 384))
    hidden, x = torch.randn(512, 640), torch.randn(512, features)
    with backend("auto"), pytest.raises((RuntimeError, ValueError)):
        torch.ops.vjepa.mlp_backward(grad, x, hidden, inputs[1], inputs[3], [True] * 5)


@pytest.mark.parametrize("absent", [("bias1",), ("bias2",), ("bias1", "bias2")])
def test_without_biases(check_accuracy, serving, device, absent):
    check(check_accuracy, serving, *make(SHAPE, FP32, device, absent))


@pytest.mark.usefixtures("serving")
def test_without_rows_the_gradients_of_the_parameters_are_zero(device):
    inputs, grad = make((0, 24, 72, 40), FP32, device)
    for found, x in zip(results(mlp, inputs, grad)[2:], inputs[1:], strict=True):
        assert torch.equal(found, torch.zeros_like(x))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("wanted", [(n,) for n in range(5)] + [(0, 3), (2, 4), (3, 4), (0, 1, 2), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_frozen_inputs(device, wanted, dtype):
    inputs, grad = make(SHAPE, dtype, device)
    everything = results(mlp, inputs, grad)[1:]
    for n in wanted:
        inputs[n].requires_grad_()
    mlp(*inputs).backward(grad)
    for n, x in enumerate(inputs):
        assert (x.grad is not None) == (n in wanted)
        if x.grad is not None:  # where hidden needs no gradient, PyTorch computes the activation again
            slack = SHAPE[0] * torch.finfo(dtype).eps * float(everything[n].abs().max())  # a rounding of each row
            torch.testing.assert_close(x.grad, everything[n], rtol=0, atol=slack)


@pytest.mark.usefixtures("serving")
def test_deterministic_and_any_strides(device):
    inputs, grad = make((40, 24, 72, 40), FP32, device)
    expected = results(mlp, inputs, grad)
    assert all(map(torch.equal, results(mlp, inputs, grad), expected))
    for change in (
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
        lambda x: x.mT.contiguous().mT if x.ndim == 2 else x,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.repeat_interleave(3, -1)[..., ::3],
    ):
        found = results(mlp, [change(x) for x in inputs], change(grad))
        for ours, theirs in zip(
            found, expected, strict=True
        ):  # the other products depend on the strides in their last bits
            torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 1)])
def test_expanded_gradients(device, size):
    inputs, _ = make(SHAPE, FP32, device)
    grad = torch.randn(size, device=device).expand(7, 40)
    for ours, theirs in zip(results(mlp, inputs, grad), results(mlp, inputs, grad.contiguous()), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_understand_each_other(check_accuracy, device, dtype):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    inputs, grad = make(SHAPE, dtype, device)
    exact = results(eager, [x.double() for x in inputs], grad.double())
    plain = results(eager_cut if dtype == BF16 and device.type == "cpu" else eager, inputs, grad)
    for forward, backward in (("triton", "reference"), ("reference", "triton")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with backend(forward):
            out = mlp(*leaves)
        with backend(backward):
            found = torch.autograd.grad(out, leaves, grad)
        for ours, same_dtype, true in zip((out.detach(), *found), plain, exact, strict=True):
            check_accuracy(ours, same_dtype, true)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_native_library_keeps_serves_the_reference_and_back(check_accuracy, dtype):
    inputs, grad = make(SHAPE, dtype)
    exact = results(eager, [x.double() for x in inputs], grad.double())
    plain = results(eager, inputs, grad)
    for forward, backward in (("auto", "reference"), ("reference", "auto")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with backend(forward):
            out = mlp(*leaves)
        with backend(backward):
            found = torch.autograd.grad(out, leaves, grad)
        for ours, same_dtype, true in zip((out.detach(), *found), plain, exact, strict=True):
            check_accuracy(ours, same_dtype, true)


@pytest.mark.usefixtures("serving")
def test_keeps_x_and_hidden_but_not_the_activation(device):
    inputs, _ = make(SHAPE, FP16, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mlp(*(x.requires_grad_() for x in inputs))
    given = {x.data_ptr() for x in inputs}
    (hidden,) = (x for x in kept if x.data_ptr() not in given)
    torch.testing.assert_close(hidden, F.linear(*inputs[:3]))
    for frozen in (inputs, [x.detach() for x in inputs]):
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
        with hooks, torch.set_grad_enabled(frozen is not inputs):
            assert not mlp(*frozen).requires_grad
        assert not kept


def test_writes_nothing_for_a_backward_pass_that_cannot_come(device):
    inputs, _ = make(SHAPE, FP32, device)
    told = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.vjepa.mlp.default:
                told.append(args[-1])
            return operator(*args, **(kwargs or {}))

    with Spy():
        mlp(*inputs)
        leaves = [x.requires_grad_() for x in inputs]
        mlp(*leaves)
        with torch.no_grad():
            mlp(*leaves)
    assert told == [False, True, False]


def test_the_operator_without_what_is_kept(device):
    inputs, grad = make(SHAPE, FP32, device)
    leaves = [x.requires_grad_() for x in inputs]
    out, hidden = torch.ops.vjepa.mlp(*leaves, False)
    assert hidden.numel() == 0
    with pytest.raises(RuntimeError, match="call the operator with keep=True"):
        out.backward(grad)


@pytest.mark.usefixtures("serving")
def test_under_autocast_like_linear_layers(device):
    inputs, grad = make(SHAPE, FP32, device)
    inputs[0], inputs[3] = inputs[0].bfloat16(), inputs[3].half()
    with torch.autocast(device.type, BF16):
        found, plain = results(mlp, inputs, grad.bfloat16()), results(eager, inputs, grad.bfloat16())
    assert [x.dtype for x in found] == [x.dtype for x in plain] == [BF16, BF16, FP32, FP32, FP16, FP32]
    with torch.autocast(device.type, BF16):
        expected = results(mlp, [x.bfloat16() for x in inputs], grad.bfloat16())
    for ours, same, theirs in zip(found, expected, plain, strict=True):
        assert torch.equal(ours, same.to(ours.dtype))
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


def test_under_autocast_the_bits_of_linear_layers():
    inputs, grad = make(SHAPE, FP32)
    with torch.autocast("cpu", BF16):
        with backend("reference"):
            found = results(mlp, inputs, grad.bfloat16())
        assert all(map(torch.equal, found, results(eager, inputs, grad.bfloat16())))
        doubles = [x.double() for x in inputs]
        assert mlp(*doubles).dtype == FP64


@pytest.fixture
def far(tmp_path, device):
    """Three rows, the last beyond 2^31 elements, in memory of which few are touched: a file with a hole, or the GPU's."""

    def rows(near):
        if device.type == "cuda":
            if torch.cuda.mem_get_info(device)[0] < 2**32 * near.element_size():
                pytest.skip("needs 8 GB of the GPU's memory")
            memory = torch.zeros(2**31 + 64, dtype=near.dtype, device=device)
        else:
            memory = torch.from_file(str(tmp_path / "far"), shared=True, size=2**31 + 64, dtype=near.dtype)
        return memory.as_strided(near.shape, (2**30 + 16, 1)).copy_(near)  # a stride that is an int32

    return rows


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("place", ["x", "grad", "hidden"])
def test_offsets_beyond_32_bits(far, device, place):
    inputs, grad = make((3, 8, 16, 8), FP16, device)
    x, weight1, _, weight2, _ = inputs
    hidden = torch.ops.vjepa.mlp(*inputs, True)[1]
    near = {"grad": grad, "x": x, "hidden": hidden}
    there = {**near, place: far(near[place])}
    found, expected = (
        torch.ops.vjepa.mlp_backward(*rows.values(), weight1, weight2, [True] * 5) for rows in (there, near)
    )
    assert all(map(torch.equal, found, expected))
    assert torch.equal(mlp(there["x"], *inputs[1:]), mlp(*inputs))


@pytest.mark.parametrize("absent", [(), ("bias1", "bias2")])
def test_gradcheck(device, absent):
    inputs, _ = make((5, 7, 9, 4), FP64, device, absent)
    with backend("reference"):
        assert torch.autograd.gradcheck(
            mlp, [None if x is None else x.requires_grad_() for x in inputs], fast_mode=True
        )


def test_triton_has_no_float64(device):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    inputs, _ = make(SHAPE, FP64, device)
    with backend("triton"), pytest.raises(RuntimeError, match=r"cannot serve mlp .* float32, not in float64"):
        mlp(*inputs)
    assert torch.equal(mlp(*inputs), eager(*inputs))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("absent", [(), ("bias1", "bias2")])
def test_opcheck(device, absent):
    inputs, grad = make(SHAPE, FP32, device, absent)
    opcheck(torch.ops.vjepa.mlp.default, (*inputs, False))
    x, weight1, _, weight2, _ = inputs
    hidden = torch.ops.vjepa.mlp(*inputs, True)[1]
    for needs in ([True] * 5, [True, False, False, True, False], [False, False, False, True, True], [False] * 5):
        opcheck(torch.ops.vjepa.mlp_backward.default, (grad, x, hidden, weight1, weight2, needs))
    opcheck(torch.ops.vjepa.mlp.default, (*(None if x is None else x.requires_grad_() for x in inputs), True))


@pytest.mark.usefixtures("serving")
def test_compiled_equals_eager_for_any_number_of_rows(device):
    def block(*given):
        return mlp(given[0] * 2, *given[1:]).sin()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for number, rows in enumerate((4, 9, 2, 16, 3, 7)):  # torch.compile specialises on 1, whatever the operator
        inputs, grad = make((rows, 24, 72, 40), FP32, device)
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            ours = results(compiled, inputs, grad)
        for our, plain in zip(ours, results(block, inputs, grad), strict=True):
            torch.testing.assert_close(our, plain, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), block(*inputs))
    torch._dynamo.reset()


def test_compiled_under_autocast(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: mlp(*given), fullgraph=True, backend="aot_eager")
    inputs, grad = make(SHAPE, FP32, device)
    with torch.autocast(device.type, dtype=BF16):
        assert all(map(torch.equal, results(compiled, inputs, grad.bfloat16()), results(mlp, inputs, grad.bfloat16())))
        assert compiled(*inputs).dtype == BF16
    assert compiled(*inputs).dtype == FP32
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": torch.zeros(24)}, ValueError, r"x must have the shape \[N, D\]"),
        ({"x": torch.zeros(7, 24).long()}, TypeError, "x must be one of float32"),
        ({"x": None}, TypeError, r"x must be a tensor \[N, D\], got NoneType"),
        ({"weight1": None}, TypeError, r"weight1 must be a tensor \[H, D\], got NoneType"),
        (
            {"x": torch.zeros(7, 25)},
            ValueError,
            r"weight1 must have one column for each feature of x \(25\), got \(72, 24\)",
        ),
        (
            {"weight2": torch.zeros(40, 71)},
            ValueError,
            r"weight2 must have one column for each row of weight1 \(72\), got",
        ),
        ({"weight2": torch.zeros(0, 72), "bias2": None}, ValueError, "weight2 must have no empty dimension, got"),
        ({"x": torch.zeros(7, 0), "weight1": torch.zeros(72, 0)}, ValueError, "weight1 must have no empty dimension"),
        ({"bias1": torch.zeros(1, 72)}, ValueError, r"bias1 must have the shape \[H\]"),
        (
            {"bias1": torch.zeros(40)},
            ValueError,
            r"bias1 must have one entry for each row of weight1 \(72\), got \(40,\)",
        ),
        (
            {"bias2": torch.zeros(72)},
            ValueError,
            r"bias2 must have one entry for each row of weight2 \(40\), got \(72,\)",
        ),
        ({"weight2": torch.zeros(40, 72, device="meta")}, ValueError, r"weight2 must be on the device of x \(cpu\)"),
        ({"bias2": torch.zeros(40, device="meta")}, ValueError, r"bias2 must be on the device of x \(cpu\)"),
        ({"x": torch.zeros(7, 24).half()}, TypeError, r"weight1 must have the dtype of x \(float16\), got float32"),
        ({"bias2": torch.zeros(40).double()}, TypeError, r"bias2 must have the dtype of x \(float32\), got float64"),
    ],
)
def test_refuses(change, error, sentence):
    good = dict(zip(NAMES, make()[0], strict=True))
    with pytest.raises(error, match=sentence):
        mlp(**{**good, **change})


def test_shapes_and_dtypes_on_the_meta_device():
    out = mlp(*make(SHAPE, BF16, "meta")[0])
    assert (out.shape, out.dtype) == ((7, 40), BF16)
