"""add_layer_norm against the formula written out in float64, and against PyTorch's layer norm in the same dtypes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vjepa.kernels import add_layer_norm, backend

pytestmark = pytest.mark.usefixtures("used_memory")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, D = 5, 7
DTYPES = [  # residual, branch, weight and bias, normed
    (FP32, BF16, FP32, BF16),
    (FP32, FP32, FP32, FP32),
    (BF16, BF16, FP32, BF16),
    (BF16, FP32, BF16, FP32),
    (FP16, BF16, FP16, FP16),
    (FP64, FP32, FP32, FP64),
    (FP32, FP64, FP64, BF16),
]


def formula(residual, branch, weight, bias, eps=1e-6, rounded=None):
    """In the dtype of the arguments; rounded: the sum as rounded by others, through which gradients pass unchanged."""
    added = residual if branch is None else residual + branch
    if rounded is not None:
        added = added + (rounded - added).detach()
    apart = added - added.mean(-1, keepdim=True)
    normed = apart / torch.sqrt(apart.square().mean(-1, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return added, normed if bias is None else normed + bias


def eager(residual, branch, weight, bias, eps=1e-6, dtype=None):
    """What one writes without the operator."""
    added = residual if branch is None else (residual + branch).to(residual.dtype)
    wide = torch.promote_types(residual.dtype, FP32)
    affine = (None if x is None else x.to(wide) for x in (weight, bias))
    return added, F.layer_norm(added.to(wide), added.shape[1:], *affine, eps).to(dtype or residual.dtype)


def double(x):
    return None if x is None else x.detach().double()


def results(function, inputs, grads, **options):
    """Both outputs, then the gradients of those inputs that are there, for gradients of those outputs that have one."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
    return [out.detach() for out in outputs], list(found)


def make(shape, dtypes=DTYPES[0], device="cpu"):
    residual, branch, affine, normed = dtypes
    inputs = [torch.randn(shape, device=device) * 2 + 1, torch.randn(shape, device=device)]
    inputs += [torch.randn(shape[1], device=device) + 1, torch.randn(shape[1], device=device)]
    inputs = [x.to(dtype) for x, dtype in zip(inputs, (residual, branch, affine, affine), strict=True)]
    return inputs, [torch.randn(shape, device=device).to(dtype) for dtype in (residual, normed)]


def check_rounded(ours, expected):
    """The same bits, but that Triton's interpreter cuts bfloat16 off where a GPU rounds it."""
    cut = ours.dtype == BF16 and ours.device.type == "cpu"
    torch.testing.assert_close(ours, expected, rtol=torch.finfo(BF16).eps if cut else 0, atol=0)


def check(check_accuracy, inputs, grads, dtype, eps=1e-6):
    """Dtypes, shapes and accuracy of everything; returns it."""
    outputs, found = results(add_layer_norm, inputs, grads, eps=eps, dtype=dtype)
    plain_outputs, plain = results(eager, inputs, grads, eps=eps, dtype=dtype)
    exact_outputs, exact = results(
        formula, map(double, inputs), map(double, grads), eps=eps, rounded=double(outputs[0])
    )
    assert outputs[0].dtype == inputs[0].dtype
    assert outputs[1].dtype == dtype
    assert [g.dtype for g in found] == [x.dtype for x in inputs if x is not None]
    assert all(x.is_contiguous() for x in (outputs[1], *found))
    check_rounded(outputs[0], plain_outputs[0])
    triples = zip((outputs[1], *found), (plain_outputs[1], *plain), (exact_outputs[1], *exact), strict=True)
    for ours, same_dtype, true in triples:
        if ours.numel():
            check_accuracy(ours, same_dtype, true)
    return [*outputs, *found]


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda given: "-".join(str(d).removeprefix("torch.") for d in given))
@pytest.mark.parametrize("shape", [(N, D), (3, 100)])
def test_value_and_gradients(check_accuracy, device, dtypes, shape):
    check(check_accuracy, *make(shape, dtypes, device), dtypes[3])


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("shape", [(1, 1), (N, 1), (0, D), (1, D), (13, 3), (17, 100), (31, 64), (2, 384), (3, 1280)])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1]], ids=["mixed", "float32"])
def test_any_shape(check_accuracy, device, shape, dtypes):
    check(check_accuracy, *make(shape, dtypes, device), dtypes[3])


@pytest.mark.usefixtures("serving")
def test_without_rows_the_gradients_of_weight_and_bias_are_zero(device):
    inputs, grads = make((0, D), device=device)
    for found in results(add_layer_norm, inputs, grads)[1][2:]:
        assert torch.equal(found, torch.zeros(D, device=device))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("width", [2500, 9000, 16384])
def test_wide_rows(check_accuracy, device, width):
    check(check_accuracy, *make((2, width), DTYPES[0], device), BF16)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("absent", [(1,), (2,), (3,), (2, 3), (1, 2, 3)])
def test_without_branch_weight_or_bias(check_accuracy, device, absent):
    inputs, grads = make((N, D), DTYPES[0], device)
    check(check_accuracy, [None if n in absent else x for n, x in enumerate(inputs)], grads, BF16)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1]], ids=["mixed", "float32"])
def test_only_one_output_is_used(device, used, dtypes):
    inputs, grads = make((N, D), dtypes, device)
    alone = [grad if n == used else None for n, grad in enumerate(grads)]
    zeros = [grad if n == used else torch.zeros_like(grad) for n, grad in enumerate(grads)]
    found = results(add_layer_norm, inputs, alone, dtype=dtypes[3])[1]
    for ours, expected in zip(found, results(add_layer_norm, inputs, zeros, dtype=dtypes[3])[1], strict=True):
        torch.testing.assert_close(expected if ours is None else ours, expected)
    assert [x is None for x in found] == [False, False, used == 0, used == 0]


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (1, 3), (2, 3), (0, 2, 3)])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1]], ids=["mixed", "float32"])
def test_frozen_inputs(device, wanted, dtypes):
    inputs, grads = make((N, D), dtypes, device)
    everything = results(add_layer_norm, inputs, grads, dtype=dtypes[3])[1]
    for n in wanted:
        inputs[n].requires_grad_()
    outputs = add_layer_norm(*inputs, dtype=dtypes[3])
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    for n, x in enumerate(inputs):
        assert (x.grad is not None) == (n in wanted)
        assert x.grad is None or torch.equal(x.grad, everything[n])


def test_without_branch_the_sum_is_the_residual_itself(device):
    residual = torch.randn(N, D, device=device, requires_grad=True)
    added, normed = add_layer_norm(residual, None, None, None)
    assert added is residual
    (ours,) = torch.autograd.grad((added * 3).sum() + normed.square().sum(), residual)
    (plain,) = torch.autograd.grad(
        (residual * 3).sum() + F.layer_norm(residual, (D,), eps=1e-6).square().sum(), residual
    )
    torch.testing.assert_close(ours, plain)


@pytest.mark.usefixtures("serving")
def test_the_sum_is_rounded_once_and_before_the_norm(device):
    residual = torch.full((1, 4), 2048.0, dtype=FP16, device=device)
    branch = torch.tensor([[1.0, 1.001, 3.0, 0.0]], device=device)  # float16 has numbers 2 apart there
    added, normed = add_layer_norm(residual, branch, None, None, dtype=FP32)
    assert added.tolist() == [[2048.0, 2050.0, 2052.0, 2048.0]]
    torch.testing.assert_close(normed, F.layer_norm(added.float(), (4,), eps=1e-6))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_that_are_constant(check_accuracy, device, dtype):
    inputs, grads = make((N, D), (FP32, dtype, FP32, dtype), device)
    inputs[0], inputs[1] = torch.full_like(inputs[0], 3.0), torch.full_like(inputs[1], -1.5)
    outputs = check(check_accuracy, inputs, grads, dtype)
    torch.testing.assert_close(outputs[1], inputs[3].to(dtype).expand(N, D))
    check(check_accuracy, inputs, grads, dtype, eps=0.7)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("width", [D, 384])
def test_a_large_mean(check_accuracy, device, width):
    """Squares of 1e4 would swallow the variance of 1."""
    inputs, grads = make((3, width), DTYPES[1], device)
    check(check_accuracy, [inputs[0] + 1e4, *inputs[1:]], grads, FP32)


@pytest.mark.usefixtures("serving")
def test_deterministic_and_any_strides(device):
    inputs, grads = make((2 * N, D), DTYPES[1], device)
    other = [torch.cat((x, x), -1)[..., :D] for x in (*inputs[:2], *grads)]
    turned = [x.T.contiguous().T for x in (*inputs[:2], *grads)]
    apart = [x.repeat_interleave(3)[::3] for x in inputs[2:]]
    expected = results(add_layer_norm, inputs, grads)
    for changed in (
        [*inputs[:2], *grads],
        other,
        turned,
        [x.repeat_interleave(2, 0)[::2] for x in (*inputs[:2], *grads)],
    ):
        found = results(add_layer_norm, [*changed[:2], *apart], changed[2:])
        for ours, theirs in zip(found, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("size", [(1, 1), (1, D), (N, 1)])
def test_expanded_gradients(device, size):
    inputs, _ = make((N, D), DTYPES[1], device)
    expanded = [torch.randn(size, device=device).expand(N, D) for _ in range(2)]
    expected = results(add_layer_norm, inputs, [x.contiguous() for x in expanded])[1]
    assert all(map(torch.equal, results(add_layer_norm, inputs, expanded)[1], expected))


@pytest.mark.parametrize("resident", [1, 3])
def test_programs_that_take_several_tiles(check_accuracy, device, monkeypatch, resident):
    """Backward, more tiles of rows than programs, the last of them not full."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr("vjepa.kernels._triton_norm.RESIDENT", resident)
    with backend("triton"):
        check(check_accuracy, *make((37, D), DTYPES[0], device), BF16)


def test_backends_understand_each_other(device):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    inputs, grads = make((N, D), DTYPES[0], device)
    found = []
    for forward, backward in (("reference", "reference"), ("triton", "reference"), ("reference", "triton")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with backend(forward):
            outputs = add_layer_norm(*leaves, dtype=BF16)
        with backend(backward):
            found.append(torch.autograd.grad(outputs, leaves, grads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_what_the_native_library_keeps_serves_the_reference_and_back():
    inputs, grads = make((40, 33), DTYPES[0])
    found = []
    for forward, backward in (("reference", "reference"), ("auto", "reference"), ("reference", "auto")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with backend(forward):
            outputs = add_layer_norm(*leaves, dtype=BF16)
        with backend(backward):
            found.append(torch.autograd.grad(outputs, leaves, grads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_keeps_the_sum_and_two_numbers_a_row(device):
    inputs, _ = make((N, D), DTYPES[0], device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        added, _ = add_layer_norm(*(x.requires_grad_() for x in inputs), dtype=BF16)
    given = {x.data_ptr() for x in (added, inputs[2])}
    assert {x.data_ptr() for x in kept} > given
    assert [(tuple(x.shape), x.dtype) for x in kept if x.data_ptr() not in given] == [((N, 2), FP32)]


def test_dtype_of_the_normed_rows(device):
    x = torch.randn(N, D, device=device)
    with torch.autocast(device.type, dtype=BF16):
        for dtype in (FP32, FP16, BF16):
            assert [out.dtype for out in add_layer_norm(x.to(dtype), x, None, None)] == [dtype, BF16]
        assert add_layer_norm(x.double(), x, None, None)[1].dtype == FP64
        assert add_layer_norm(x, x, None, None, dtype=FP32)[1].dtype == FP32
        added, normed = add_layer_norm(x, x, None, None)
    expected = add_layer_norm(x, x, None, None, dtype=BF16)
    assert torch.equal(added, expected[0]) and torch.equal(normed, expected[1])
    assert add_layer_norm(x.bfloat16(), x, None, None)[1].dtype == BF16


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
@pytest.mark.parametrize("place", range(4))
def test_offsets_beyond_32_bits(far, device, place):
    """The rows of residual, branch or a gradient; 'added' of the backward pass is the residual where there is no branch."""
    inputs, grads = make((3, 8), (FP16, FP16, FP32, FP16), device)
    apart = [*inputs[:2], *grads]
    apart[place] = far(apart[place])
    for branch in (True, False) if place == 0 else (True,):
        near = results(add_layer_norm, [inputs[0], inputs[1] if branch else None, *inputs[2:]], grads)
        there = results(add_layer_norm, [apart[0], apart[1] if branch else None, *inputs[2:]], apart[2:])
        for ours, expected in zip(there, near, strict=True):
            assert all(map(torch.equal, ours, expected))


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("branch", [True, False])
def test_gradcheck(device, branch):
    inputs = [x.requires_grad_() for x in make((N, D), (FP64,) * 4, device)[0]]
    inputs[1] = inputs[1] if branch else None
    assert torch.autograd.gradcheck(add_layer_norm, inputs, fast_mode=True)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("absent", [(), (1,), (2, 3)])
def test_opcheck(device, absent):
    inputs, grads = make((N, D), DTYPES[0], device)
    inputs = [None if n in absent else x.requires_grad_() for n, x in enumerate(inputs)]
    opcheck(torch.ops.vjepa.add_layer_norm.default, (*inputs, 1e-6, BF16))
    added, _, statistics = torch.ops.vjepa.add_layer_norm(*inputs, 1e-6, BF16)
    added = (inputs[0] if 1 in absent else added).detach()
    weight = None if 2 in absent else inputs[2].detach()
    for needs in ([True, True, weight is not None, True], [False, True, False, True], [True, False, False, False]):
        for grad_sum in (grads[0], None):
            arguments = (grad_sum, grads[1], added, statistics, weight, BF16, FP32, needs)
            opcheck(torch.ops.vjepa.add_layer_norm_backward.default, arguments)


@pytest.mark.usefixtures("serving")
def test_compiled_equals_eager_for_any_number_of_rows(device):
    def block(residual, branch, weight, bias):
        residual, normed = add_layer_norm(residual, None, weight, bias)
        residual, normed = add_layer_norm(residual, branch * normed, weight, bias, dtype=BF16)
        return residual * 2, normed.float() + residual

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for number, rows in enumerate((4, 9, 2, 16, 3, 7)):  # torch.compile specialises on 1, whatever the operator
        inputs, _ = make((rows, D), DTYPES[1], device)
        grads = [torch.randn_like(inputs[0]) for _ in range(2)]
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            ours = results(compiled, inputs, grads)
        for our, plain in zip(ours, results(block, inputs, grads), strict=True):
            torch.testing.assert_close(our, plain, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_compiled_under_autocast(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: add_layer_norm(*given)[1], fullgraph=True, backend="aot_eager")
    inputs, _ = make((N, D), DTYPES[0], device)
    with torch.autocast(device.type, dtype=BF16):
        assert torch.equal(compiled(*inputs), add_layer_norm(*inputs)[1])
        assert compiled(*inputs).dtype == BF16
    assert compiled(*inputs).dtype == FP32
    torch._dynamo.reset()


def test_a_row_too_wide_for_a_program(device):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    x = torch.randn(1, 16385, device=device)
    with backend("triton"), pytest.raises(RuntimeError, match="at most 16384 features, got 16385"):
        add_layer_norm(x, x, None, None)
    assert add_layer_norm(x, x, None, None)[1].shape == x.shape


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"residual": torch.zeros(D)}, ValueError, r"residual must have the shape \[N, D\]"),
        ({"residual": torch.zeros(N, D).long()}, TypeError, "residual must be one of float32"),
        ({"residual": torch.zeros(N, 0)}, ValueError, r"residual must have at least one feature, got \(5, 0\)"),
        ({"residual": None}, TypeError, r"residual must be a tensor \[N, D\], got NoneType"),
        (
            {"branch": torch.zeros(N, D + 1)},
            ValueError,
            r"branch must have the shape of residual \(5, 7\), got \(5, 8\)",
        ),
        ({"branch": torch.zeros(N + 1, D)}, ValueError, "branch must have the shape of residual"),
        ({"branch": torch.zeros(N, D).long()}, TypeError, "branch must be one of float32"),
        ({"branch": torch.zeros(N, D, device="meta")}, ValueError, r"branch must be on the device of residual \(cpu\)"),
        ({"weight": torch.zeros(D + 1)}, ValueError, "weight must have one entry for each of the 7 features"),
        ({"weight": torch.zeros(1, D)}, ValueError, r"weight must have the shape \[D\]"),
        ({"bias": torch.zeros(D - 1)}, ValueError, "bias must have one entry for each of the 7 features"),
        ({"bias": torch.zeros(D).int()}, TypeError, "bias must be one of float32"),
        ({"bias": torch.zeros(D, device="meta")}, ValueError, "bias must be on the device of residual"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps must not be negative, got nan"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str 'small'"),
        ({"dtype": torch.int64}, TypeError, "dtype must be one of float32, .* or None, got torch.int64"),
        ({"dtype": "bf16"}, TypeError, "dtype must be one of .*, got str 'bf16'"),
    ],
)
def test_refuses(change, error, sentence):
    good = {"residual": torch.zeros(N, D), "branch": torch.zeros(N, D), "weight": torch.ones(D), "bias": torch.ones(D)}
    with pytest.raises(error, match=sentence):
        add_layer_norm(**{**good, **change})


def test_shapes_and_dtypes_on_the_meta_device():
    x = torch.zeros(4, 6, device="meta")
    added, normed = add_layer_norm(x, x.bfloat16(), None, None, dtype=torch.bfloat16)
    assert (added.shape, added.dtype, normed.dtype) == ((4, 6), torch.float32, torch.bfloat16)
    assert add_layer_norm(x, None, None, None)[1].dtype == torch.float32
